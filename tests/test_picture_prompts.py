"""Prompts with pictures: the field of prompt files, reading and its faults, what FLUX.1 Kontext makes of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import flux_kontext, longcat_image_edit, ltx_image, qwen_image_edit, wan, wan_image
from families.case import PROMPTS
from families.flux_kontext import PICTURES
from PIL import Image
from transformers import Qwen2VLProcessor

import flowrl
from flowrl.envs.prompts import Prompt, fingerprint, positions_of, prompts_from
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.evaluation.steering import Steering, steer
from flowrl.models import pictures
from flowrl.models.base import VelocityModel
from flowrl.models.first_frame import FirstFrameFlow
from flowrl.models.latent_scale import from_autoencoder, to_autoencoder
from flowrl.models.loading import source_of
from flowrl.models.pictures import PicturesFlow, read_picture
from flowrl.models.pipeline import PipelineOptions
from flowrl.run import main
from flowrl.sample import main as sample
from flowrl.training.memory_plan import predict_memory
from flowrl.training.policy import FlowPolicy

SETTINGS: dict[str, Any] = {
    "n_samples": 4,
    "group_size": 2,
    "batch_size": 2,
    "rollout_steps": 2,
    "n_epochs": 1,
    "rollout_batch_size": 4,
}
STARS = PICTURES / "stars.png"


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_kontext.build(tmp_path_factory.mktemp("kontext") / "flow")


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    """A prompt file beside a folder of pictures: one instruction for two of them."""
    shutil.copytree(PICTURES, tmp_path / "data" / "shown")
    lines = [{"prompt": "white circles", "image": f"shown/{name}"} for name in ("stars.png", "circles.jpg")]
    lines.append({"prompt": "three red stars on blue", "image": "shown/squares.webp", "weight": 2})
    return write(tmp_path / "data" / "edits.jsonl", *lines)


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.flatten(1).mean(1)


def policy_of(kontext: Path, contexts: list[str], scale: float = 1.0, **options: Any) -> FlowPolicy:
    source = source_of(str(kontext), pipeline=PipelineOptions(resolution=16, **options))
    env = TextToImageEnv(source, contexts, brightness)
    return FlowPolicy.of(env, flowrl.FlowConfig(guidance_scale=scale, rollout_steps=2), device="cpu", seed=0)


def test_relative_paths_count_from_the_prompt_file(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_afar = prompts_from(edits).train
    assert from_afar[0].fields["image"] == str(edits.parent / "shown" / "stars.png")
    assert [prompt.weight for prompt in from_afar] == [1, 1, 2]
    monkeypatch.chdir(edits.parent)
    beside = prompts_from("edits.jsonl").train
    assert fingerprint(beside) == fingerprint(from_afar)


def test_what_is_no_relative_path_stays(tmp_path: Path) -> None:
    given = ["https://example.org/a.png", str(tmp_path / "a.png"), 3, True, ""]
    lines = [{"prompt": f"a {i}", "image": value} for i, value in enumerate(given)]
    read = prompts_from(write(tmp_path / "a.jsonl", *lines)).train
    assert [prompt.fields["image"] for prompt in read] == given


def test_one_text_may_come_with_several_pictures(edits: Path) -> None:
    first, second, third = prompts_from(edits).train
    assert first == second
    assert positions_of([second, "white circles", third, first], [first, second, third]) == ([1, 0, 2, 0], [])
    new = Prompt("white circles", {"image": "other.png"})
    assert positions_of([new, third, new, "stars"], [first, second]) == ([2, 3, 2, 4], [new, third, "stars"])
    path = write(edits.parent / "twice.jsonl", *({"prompt": "a", "image": place} for place in ("b.png", "./b.png")))
    with pytest.raises(ConfigError, match=r"line 2: the prompt 'a' is in line 1 already"):
        prompts_from(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK"])
def test_pictures_are_brought_to_rgb_and_to_the_size(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    with Image.open(STARS) as stars:
        stars.convert(mode).save(file)
    picture = read_picture(Prompt("a", {"image": str(file)}), 12, 8)
    with Image.open(file) as image:
        expected = np.asarray(image.convert("RGB").resize((8, 12), Image.Resampling.LANCZOS))
    assert picture.shape == (3, 12, 8)
    assert torch.equal(picture, torch.tensor(expected).permute(2, 0, 1).float() / 255)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    with Image.open(STARS) as stars:
        stars.save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(Prompt("a", {"image": str(STARS)}), 20, 28)
    turned = read_picture(Prompt("a", {"image": str(tmp_path / "turned.png")}), 28, 20)
    assert torch.equal(turned, upright.rot90(-1, (1, 2)))


def _damaged(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: None, "there is no such file"),
    "a folder": (lambda path: path.mkdir(), "there is no such file"),
    "a pipe": (os.mkfifo, "there is no such file"),
    "text": (lambda path: path.write_text("no picture"), "cannot identify image file"),
    "damaged": (_damaged, "truncated"),
    "another format": (lambda path: Image.new("RGB", (4, 4)).save(path, "GIF"), "cannot identify image file"),
    "large": (lambda path: Image.new("RGB", (200, 100)).save(path), "200 x 100 pixels, and may have 10,000"),
    "sixteen bits": (lambda path: Image.new("I;16", (4, 4)).save(path), "more than 8 bits a channel"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_picture_is_named_with_its_prompt(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = FAULTS[fault]
    monkeypatch.setattr(pictures, "MOST_PIXELS", 10_000)
    path = tmp_path / "bad.png"
    make(path)
    with pytest.raises(ConfigError) as told:
        read_picture(Prompt("make it night", {"image": str(path)}), 8, 8)
    assert f"Cannot read the picture '{path}' of the prompt 'make it night': " in str(told.value)
    assert reason in str(told.value)
    assert "whole PNG, JPEG or WebP file" in str(told.value)


@pytest.mark.parametrize("place", ["a\0b.png", "\ud800.png", "\x1b[31m.png"])
def test_paths_that_cannot_be_are_written_so_that_they_can_be_printed(place: str, tmp_path: Path) -> None:
    (prompt,) = prompts_from(write(tmp_path / "a.jsonl", {"prompt": "a", "image": place})).train
    with pytest.raises(ConfigError, match="there is no such file") as told:
        read_picture(prompt, 8, 8)
    assert str(told.value).isprintable()


@pytest.mark.parametrize("prompt", ["white circles", Prompt("white circles", {"image": 3})])
def test_a_prompt_without_a_picture_is_refused(prompt: str, kontext: Path) -> None:
    with pytest.raises(ConfigError, match=r"a picture with each prompt, and 'white circles' has none: .*\"image\""):
        policy_of(kontext, [flux_kontext.context(PROMPTS[0]), prompt])
    policy = policy_of(kontext, [flux_kontext.context(PROMPTS[0])])
    with pytest.raises(ConfigError, match="has none"):
        policy.sample(["white circles"])
    assert policy.contexts == [PROMPTS[0]]


@pytest.mark.parametrize("line", [{}, {"image": "none.png"}])
def test_a_dry_run_looks_at_the_pictures(
    line: dict[str, str], kontext: Path, edits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(edits, {"prompt": "a", "image": "shown/stars.png"}, {"prompt": "b", **line})
    given = ["--env", "sd3-compress", "--env.flow", str(kontext), "--env.prompt-file", str(edits)]
    assert main(["--algo", "orw_w2", *given, "--env.resolution", "16", "--dry-run"]) != 0
    assert "'b'" in capsys.readouterr().err
    write(edits, {"prompt": "a", "image": "shown/stars.png"})
    assert main(["--algo", "orw_w2", *given, "--env.resolution", "16", "--dry-run"]) == 0


def test_pictures_change_what_is_drawn(kontext: Path, edits: Path) -> None:
    """For one text; a string is the first prompt of that text."""
    first, second, _ = prompts_from(edits).train
    policy = policy_of(kontext, [first, second])
    x_0 = policy.noise(1)
    one, other, string = (policy.sample([context], x_0=x_0) for context in (first, second, "white circles"))
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(string, one)
    new = Prompt("white circles", {"image": str(PICTURES / "squares.webp")})
    assert (policy.sample([new], x_0=x_0) - one).abs().max() > 1e-3
    assert len(policy.contexts) == 3


def test_guidance_keeps_the_picture(kontext: Path, edits: Path) -> None:
    policy = policy_of(kontext, list(prompts_from(edits).train), 3.0, embedded_guidance=2.0)
    cond = policy.condition(torch.tensor([2, 0]))
    null = policy.model.null_condition()
    assert null[2].count_nonzero() == 0
    embeds, pooled, picture, guidance = policy.model.null_like(null, cond)
    assert torch.equal(picture, cond[2])
    assert torch.equal(embeds, null[0].expand_as(cond[0]))
    assert torch.equal(pooled, null[1].expand_as(cond[1]))
    assert guidance.tolist() == [2.0, 2.0]


def test_the_empty_context_is_repeated_where_nothing_is_kept() -> None:
    null = torch.randn(1, 4), torch.tensor([3])
    cond = torch.randn(5, 4), torch.arange(5)
    empty = VelocityModel().null_like(null, cond)
    assert torch.equal(empty[0], null[0].repeat(5, 1))
    assert empty[1].tolist() == [3] * 5
    assert VelocityModel().null_like((), ()) == ()


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"scaling_factor": 0.3, "shift_factor": None},
        {"scaling_factor": 1.5, "latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.3]},
        {},
    ],
)
def test_latents_come_from_the_autoencoder_as_they_go_to_it(config: dict[str, Any]) -> None:
    z = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(to_autoencoder(from_autoencoder(z, config), config), z)


def test_a_run_goes_on_from_another_folder(kontext: Path, edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(edits.parent)
    settings = {"flow": str(kontext), "prompt_file": "edits.jsonl", "resolution": 16}
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", env_settings=settings, seed=0, device="cpu", **SETTINGS)
    model.learn(4)
    model.save(edits.parent / "saved")
    (edits.parent / "elsewhere").mkdir()
    monkeypatch.chdir(edits.parent / "elsewhere")
    again = flowrl.ORWCFMW2.load(edits.parent / "saved", device="cpu")
    for ours, theirs in zip(again.policy._condition, model.policy._condition):
        assert torch.equal(ours, theirs)
    again.learn(4, reset_num_timesteps=False)


def test_the_encoder_of_pictures_is_in_the_predicted_memory(kontext: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted() -> int:
        source = source_of(str(kontext), pipeline=PipelineOptions(resolution=256))
        env = TextToImageEnv(source, [flux_kontext.context(prompt) for prompt in PROMPTS], brightness)
        plan = predict_memory(flowrl.ORWCFMW2, flowrl.ORWCFMW2.configure(settings=SETTINGS), env)
        assert not plan.missing
        return plan.phases["loading, encoding prompts"]

    whole = predicted()
    monkeypatch.setattr(pictures.PicturesFlow, "latents_of", lambda self, given: given)
    assert whole - predicted() > 3 * 8 * 256 * 256 * 4  # the first layer's output for three pictures


def test_other_pipelines_leave_the_field_to_rewards(edits: Path) -> None:
    write(
        edits, {"prompt": "two red stars on blue", "image": "shown/stars.png"}, {"prompt": "stars", "image": "no.png"}
    )
    seen: list[str] = []

    def closeness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.extend(prompt.fields["image"] for prompt in prompts)
        return brightness(images, prompts)

    env = TextToImageEnv("mini-sd3", prompts_from(edits).train, closeness)
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", **{**SETTINGS, "rollout_steps": 2})
    model.learn(4)
    assert set(seen) == {str(edits.parent / "shown" / "stars.png"), str(edits.parent / "no.png")}


def test_rewards_compare_with_the_picture(kontext: Path, edits: Path) -> None:
    def closeness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        given = torch.stack([read_picture(prompt, *images.shape[-2:]) for prompt in prompts])
        return -(images - given.to(images)).square().flatten(1).mean(1)

    source = source_of(str(kontext), pipeline=PipelineOptions(resolution=16))
    env = TextToImageEnv(source, prompts_from(edits).train, closeness)
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", **SETTINGS)
    model.learn(4)


def test_the_model_card_shows_a_picture_in_the_call(kontext: Path, edits: Path, tmp_path: Path) -> None:
    from flowrl.export import sampling_settings
    from flowrl.pages.model_card import _use

    settings = {"flow": str(kontext), "prompt_file": str(edits), "height": 16, "width": 24}
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", env_settings=settings, seed=0, device="cpu", **SETTINGS)
    text = _use(model, "pipeline", "me/mine", sampling_settings(model))
    assert '    image=load_image("stars.png").resize((24, 16), Image.Resampling.LANCZOS),' in text
    assert "    max_area=384,\n    _auto_resize=False,\n" in text
    assert "from PIL import Image" in text


def test_files_of_a_run_say_which_picture_a_text_had(kontext: Path, edits: Path) -> None:
    """`samples.json`, `evaluation.json` and the report: one text has two pictures here."""
    given = ["--env", "sd3-compress", "--env.flow", kontext, "--env.prompt-file", edits, "--out", edits.parent]
    small = [part for name, value in SETTINGS.items() for part in (f"--algo.{name.replace('_', '-')}", value)]
    told = ["--algo", "flow_dpo", *given, "--env.resolution", 16, *small, "--total-timesteps", 4, "--eval-samples", 16]
    assert main([*map(str, told), "--name", "run", "--device", "cpu"]) == 0
    run, out = edits.parent / "run", edits.parent / "sampled"
    assert sample([str(run), "-n", "1", "--out", str(out), "--device", "cpu"]) == 0
    shown = [str(edits.parent / "shown" / name) for name in ("stars.png", "circles.jpg", "squares.webp")]
    entries = json.loads((out / "samples.json").read_text())["samples"]
    assert [entry["image"] for entry in entries] == shown
    assert sample([str(run), "-n", "1", "--out", str(out), "--device", "cpu", "--prompt", "white circles"]) == 0
    (entry,) = json.loads((edits.parent / "sampled-2" / "samples.json").read_text())["samples"]
    assert (entry["prompt"], entry["image"]) == ("white circles", shown[0]), "the first of that text"
    rows = json.loads((run / "evaluation.json").read_text())["per_prompt"]
    assert {(row["prompt"], row["image"]) for row in rows} <= {(e["prompt"], e["image"]) for e in entries}
    assert all(f"{row['prompt']} with {row['image']}" in (run / "report.html").read_text() for row in rows)


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_image_edit.build(tmp_path_factory.mktemp("edit") / "flow")


def test_text_encoders_that_see_pictures_lose_nothing_of_a_prompt(edit: Path) -> None:
    """All words that there is room for beside the picture and the template, and one more is an error."""
    flow = source_of(str(edit), pipeline=PipelineOptions(resolution=56, sequence_length=32)).load()
    template = flow._embeds("", pictures.open_picture(qwen_image_edit.context("stars"), 56, 56)).shape[1] - 4
    words = "white " * (32 - template)
    _, there, *_ = flow.encode([qwen_image_edit.context(words)])
    assert int(there.sum()) == 4 + 32
    with pytest.raises(ConfigError, match=r"'white white .* has 33 tokens, more than 32: set sequence_length to at"):
        flow.encode([qwen_image_edit.context(words + "white")])


def test_guidance_leads_away_from_the_empty_prompt_with_the_same_picture(edit: Path, edits: Path) -> None:
    flow = source_of(str(edit), pipeline=PipelineOptions(resolution=8, sequence_length=32)).load()
    prompts = prompts_from(edits).train
    empty = flow.encode([Prompt("", prompt.fields) for prompt in prompts])
    null = flow.null_like(flow.null_condition(), flow.encode(prompts))
    assert all(torch.equal(ours, right) for ours, right in zip(null, empty))
    assert not torch.equal(empty[0][0], empty[0][1])


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_pipeline_that_needs_torchvision_says_so(edit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Qwen2VLProcessor, "get_attributes")
    source = source_of(str(edit), pipeline=PipelineOptions(resolution=8))
    with pytest.raises(ModelLoadError, match=r"The part 'processor' .* is made with torchvision, which is not"):
        source.load()


def test_prompts_of_longcat_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quotation has a token for each sign; and pictures that its processor makes smaller are refused."""
    (case,) = longcat_image_edit.CASES
    flow = source_of(str(case.build(tmp_path)), pipeline=replace(case.options, resolution=16)).load()
    white = flow.encode([case.context("white " * 12)])[0]
    assert white.shape[1] == 12 + 6
    for prompt in ("white " * 13, "'white circles'"):
        with pytest.raises(
            ConfigError, match=r"The prompt .* has 1[34] tokens, more than 12: set sequence_length to at"
        ):
            flow.encode([case.context(prompt)])
    monkeypatch.setattr(type(flow), "seen_tokens", 5)
    with pytest.raises(ConfigError, match="pictures of 16x16 smaller than they are"):
        flow.encode([case.context("white")])


def test_first_latents_that_are_a_pictures_go_to_it_from_everywhere(tmp_path: Path) -> None:
    """By a line that ends there; what the network gives for them, and what they are on the way, changes nothing."""
    (case,) = ltx_image.CASES
    folder = case.build(tmp_path)
    with pytest.raises(ConfigError, match="goes on from a picture: frames must be more than 1"):
        source_of(str(folder), pipeline=replace(case.options, resolution=32, frames=1))
    flow = source_of(str(folder), pipeline=replace(case.options, resolution=32)).load()
    cond, t = flow.encode(case.contexts[:2]), torch.tensor([0.2, 0.9])
    x, left = torch.randn(2, *flow.latent_shape), (1 - t).view(2, 1, 1, 1, 1)
    other = torch.cat([torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2)
    with torch.no_grad():
        v, v_other = flow(x, t, cond), flow(other, t, cond)
        last = flow(x, torch.ones(2), cond)
    for start, velocity in ((x, v), (other, v_other)):
        assert torch.allclose((start + left * velocity)[:, :, :1], cond[-1], atol=1e-6)
    assert torch.equal(v[:, :, 1:], v_other[:, :, 1:])
    assert last.isfinite().all()
    assert not torch.equal(cond[-1][0], cond[-1][1])


def test_first_latents_that_are_a_pictures_come_to_it_by_every_solver(tmp_path: Path) -> None:
    """Some ask for a velocity at the end, where the line is 0 / 0."""
    (case,) = ltx_image.CASES
    source = source_of(str(case.build(tmp_path)), pipeline=replace(case.options, resolution=32))
    env = TextToImageEnv(source, case.contexts[:2], brightness)
    policy = FlowPolicy.of(env, flowrl.FlowConfig(rollout_steps=2), device="cpu", seed=0)
    ids = torch.arange(2)
    picture = policy.condition(ids)[-1]
    drawn = [policy.sample_latents(ids, solver=s, grad_steps=k) for s in ("heun", "rk4") for k in (0, 1)]
    drawn.append(steer(policy, env, Steering("d_flow", n=1), ids, torch.Generator(), solver="heun"))
    for x_1 in drawn:
        assert torch.equal(x_1[:, :, :1], picture)


def test_wan_of_a_time_for_each_token_begins_with_a_picture_in_its_place_if_it_is_to(tmp_path: Path) -> None:
    """As a `WanPipeline`, as which it is published, it takes none."""
    text = source_of(str(wan.wan(tmp_path / "text", expand_timesteps=True)), pipeline=wan.OPTIONS)
    assert not isinstance(text.skeleton(), PicturesFlow)
    folder = str(wan_image.build_first_frame(tmp_path / "picture"))
    assert isinstance(source_of(folder, pipeline=wan.OPTIONS).skeleton(), FirstFrameFlow)
    with pytest.raises(ConfigError, match="A WanImageToVideoPipeline goes on from a picture: frames must be more than"):
        source_of(folder, pipeline=replace(wan.OPTIONS, frames=1))


def test_pictures_that_the_flow_is_not_given_are_told(tmp_path: Path) -> None:
    flow = source_of(str(wan.wan(tmp_path)), pipeline=replace(wan.OPTIONS, resolution=16)).load()
    with pytest.warns(
        UserWarning, match='name pictures .field "image"., of which this flow is given none: only rewards'
    ):
        flow.encode([wan_image.context(PROMPTS[0])])


def test_wan_of_a_first_and_a_last_picture_is_refused(tmp_path: Path) -> None:
    network = wan_image.build(tmp_path) / "transformer" / "config.json"
    network.write_text(json.dumps({**json.loads(network.read_text()), "pos_embed_seq_len": 10}))
    with pytest.raises(ConfigError, match="from a first picture to a last one"):
        source_of(str(tmp_path), pipeline=wan.OPTIONS)


@pytest.mark.skipif(find_spec("ftfy") is not None, reason="ftfy is there")
def test_a_pipeline_that_cleans_prompts_by_ftfy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = source_of(str(wan_image.build(tmp_path / "flow")), pipeline=replace(wan.OPTIONS, resolution=16)).load()
    monkeypatch.delattr(wan_image.pipeline_wan_i2v, "ftfy")
    with pytest.raises(ConfigError, match=r"A WanImageToVideoPipeline cleans prompts by .*: pip install ftfy"):
        flow.encode([wan_image.context("stars")])
