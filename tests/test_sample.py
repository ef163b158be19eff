"""Samples of a run as files, and against diffusers' own pipeline."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

import flowrl
from flowrl.errors import UnknownNameError
from flowrl.evaluate import main as evaluate_program
from flowrl.evaluation import measure
from flowrl.models.loading import ASSETS
from flowrl.runs.folder import load_model
from flowrl.sample import SampleConfig, as_json, chosen_contexts, draw, main, seeded_noise, slug, write_samples
from flowrl.training.algorithm import FlowAlgorithm

MINI = ASSETS / "mini-sd3"
PROMPTS = ["three red stars on blue", "four white circles"]  # the first is none of the run's own
STEPS = 3


@pytest.fixture(scope="module")
def models(tiny_runs: dict[str, Path]) -> dict[str, FlowAlgorithm]:
    return {name: load_model(run, device="cpu") for name, run in tiny_runs.items()}


def sample(run: Path, out: Path, *arguments: object) -> dict[str, np.ndarray]:
    """Run the program; the images that it wrote, by name, in the order of samples.json."""
    told = [str(run), "--out", str(out), *(text for prompt in PROMPTS for text in ("--prompt", prompt))]
    assert main([*told, *map(str, arguments)]) == 0
    entries = json.loads((out / "samples.json").read_text())["samples"]
    return {entry["file"]: np.asarray(Image.open(out / entry["file"])).astype(int) for entry in entries}


def call(pipeline: StableDiffusion3Pipeline, prompts: list[str], **options: object) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.0, **options}
    return pipeline(prompts, num_inference_steps=STEPS, max_sequence_length=1, output_type="pt", **options).images


def their_pipeline(kind: str, final: Path) -> StableDiffusion3Pipeline:
    """What anybody would do with a run's final/ folder."""
    if kind == "full":
        transformer = SD3Transformer2DModel.from_pretrained(final, subfolder="transformer")
        return StableDiffusion3Pipeline.from_pretrained(MINI, transformer=transformer)
    pipeline = StableDiffusion3Pipeline.from_pretrained(MINI)
    pipeline.load_lora_weights(final)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_diffusers_draws_the_same_from_the_final_folder(
    tiny_runs: dict[str, Path], models: dict[str, FlowAlgorithm], kind: str, scale: float
) -> None:
    policy, seeds = models[kind].policy, [7, 8]

    def ours(**options: object) -> torch.Tensor:
        return torch.cat(list(draw(policy, PROMPTS, seeds, guidance_scale=scale, **options)))

    pipeline = their_pipeline(kind, tiny_runs[kind] / "final")
    latents = seeded_noise(seeds, policy.model.latent_shape)
    theirs = call(pipeline, PROMPTS, latents=latents, guidance_scale=scale)
    assert theirs.dtype == torch.float32
    assert (ours() - theirs).abs().max() <= 1e-3
    for other in ("current", "reference"):  # the moving average is what is compared
        assert (ours(role=other) - theirs).abs().max() > 0.02


def test_a_pipelines_generator_gives_the_same_noise(
    tiny_runs: dict[str, Path], models: dict[str, FlowAlgorithm]
) -> None:
    pipeline = their_pipeline("lora", tiny_runs["lora"] / "final")
    theirs = call(pipeline, PROMPTS[:1], generator=torch.Generator().manual_seed(5))
    (ours,) = draw(models["lora"].policy, PROMPTS[:1], [5])
    assert (ours - theirs).abs().max() <= 1e-3


def test_files(tiny_runs: dict[str, Path], models: dict[str, FlowAlgorithm], tmp_path: Path) -> None:
    images = sample(tiny_runs["lora"], tmp_path / "a", "-n", 2, "--seed", 5)
    assert list(images) == [
        f"{k:04d}-{name}-seed{seed}.png"
        for k, (name, seed) in enumerate(
            (name, seed) for name in ("three-red-stars-on-blue", "four-white-circles") for seed in (5, 6)
        )
    ]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*images, "grid.png", "samples.json"}
    expected = torch.cat(list(draw(models["lora"].policy, [p for p in PROMPTS for _ in range(2)], [5, 6, 5, 6])))
    pixels = (255 * expected).round().permute(0, 2, 3, 1).numpy().astype(int)
    assert all(np.array_equal(image, wanted) for image, wanted in zip(images.values(), pixels))
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png")).astype(int)
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    assert np.array_equal(grid[68:132, 2:66], pixels[2])  # second row, the second prompt
    about = json.loads((tmp_path / "a" / "samples.json").read_text())
    told = {"role": "ema", "steps": STEPS, "solver": "euler", "guidance_scale": 1.0, "guidance": "cfg"}
    assert (told | {"trained_on_samples": 16}).items() <= about.items()
    assert about["samples"][3] == {"file": list(images)[3], "prompt": PROMPTS[1], "seed": 6}


def test_an_image_depends_on_prompt_and_seed_alone(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    """Not on how many are drawn, on which others, or how many at once; only the arithmetic may round otherwise."""
    four = list(sample(tiny_runs["full"], tmp_path / "a", "-n", 2).values())
    again = list(sample(tiny_runs["full"], tmp_path / "b", "-n", 2).values())
    assert all(np.array_equal(one, other) for one, other in zip(four, again))
    singly = list(sample(tiny_runs["full"], tmp_path / "c", "-n", 3, "--batch-size", 1).values())
    for one, other in zip(four, [singly[0], singly[1], singly[3], singly[4]]):
        assert abs(one - other).max() <= 1
    shifted = list(sample(tiny_runs["full"], tmp_path / "d", "-n", 1, "--seed", 1).values())
    assert abs(shifted[0] - four[1]).max() <= 1
    assert abs(shifted[0] - four[0]).max() > 50


def test_options_of_the_sampler_are_heeded(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    plain = next(iter(sample(tiny_runs["lora"], tmp_path / "plain", "-n", 1).values()))
    for i, options in enumerate(
        [["--steps", 5], ["--solver", "ab2"], ["--guidance-scale", 3], ["--role", "reference"]]
    ):
        other = next(iter(sample(tiny_runs["lora"], tmp_path / str(i), "-n", 1, *options).values()))
        assert abs(other - plain).max() > 5, options
    (base,) = call(
        StableDiffusion3Pipeline.from_pretrained(MINI), PROMPTS[:1], generator=torch.Generator().manual_seed(0)
    )
    assert abs((255 * base.permute(1, 2, 0)).numpy() - other).max() <= 1  # the reference is the base model


def test_nothing_is_overwritten(tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    run = [str(tiny_runs["points"]), "-n", "20", "--out", str(tmp_path / "out")]
    assert main(run) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main([*run, "--seed", "9"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-2"}
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_points(tiny_runs: dict[str, Path], models: dict[str, FlowAlgorithm], tmp_path: Path) -> None:
    run = [str(tiny_runs["points"]), "--seed", "2"]
    assert main([*run, "-n", "40", "--out", str(tmp_path / "a")]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"samples.safetensors", "scatter.png", "samples.json"}
    tensors = load_file(tmp_path / "a" / "samples.safetensors")
    seeds = list(range(2, 42))
    assert tensors["seeds"].tolist() == seeds
    policy = models["points"].policy
    torch.testing.assert_close(tensors["samples"], policy.sample(n=40, x_0=seeded_noise(seeds, (2,))))
    (entry,) = json.loads((tmp_path / "a" / "samples.json").read_text())["samples"]
    assert entry == {"file": "samples.safetensors", "rows": [0, 40], "prompt": None, "seeds": [2, 42]}
    assert main([*run, "-n", "7", "--batch-size", "3", "--out", str(tmp_path / "b")]) == 0
    fewer = load_file(tmp_path / "b" / "samples.safetensors")["samples"]
    torch.testing.assert_close(fewer, tensors["samples"][:7])
    assert Image.open(tmp_path / "a" / "scatter.png").size == (400, 400)


class Labels(flowrl.VelocityModel):
    """A flow whose contexts are numbers or pairs of them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(2, 2)
        self.network.forward = lambda x, t, c: x + c[:, None]
        self.latent_shape = self.sample_shape = (2,)

    def encode(self, contexts: Any) -> Any:
        return (torch.stack([torch.as_tensor(context).float().sum() for context in contexts]),)


@pytest.mark.parametrize(
    ("contexts", "written"),
    [
        (list(np.arange(2)), [0, 1]),
        ([torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.5])], [[0.5, 1.0], [1.0, 0.5]]),
        ([np.float32(0.5), (1, torch.tensor(2))], [0.5, [1, 2]]),
        ([{("a", 1): 2}, Path("a")], ["{('a', 1): 2}", "a"]),
    ],
    ids=str,
)
def test_contexts_that_json_does_not_know(contexts: list[Any], written: list[Any]) -> None:
    assert [as_json(context) for context in contexts] == written


@pytest.mark.parametrize(
    "prompts", [[torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])], [np.array([0.0, 1.0])]], ids=["tensors", "array"]
)
def test_samples_of_contexts_that_json_does_not_know(prompts: list[Any], tmp_path: Path) -> None:
    """They ended in a traceback, after all had been drawn; a single array could not be compared with None."""

    @flowrl.register_env("pairs-of-numbers", flow=Labels, prompts=prompts)
    def side(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        return samples[:, 0]

    settings: dict[str, Any] = {"n_samples": 4, "batch_size": 4, "rollout_batch_size": 2, "seed": 0, "device": "cpu"}
    model = flowrl.ORWCFMW2("FlowPolicy", "pairs-of-numbers", **settings)
    config = SampleConfig(run=tmp_path, n=2, out=tmp_path / "a")
    write_samples(model, chosen_contexts(model.env.core, ()), config)
    about = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [entry["prompt"] for entry in about["samples"]] == [prompt.tolist() for prompt in prompts]
    assert about["batch_size"] == 2  # as the run drew: more may not fit
    assert flowrl.evaluate(model, n_samples=8).n_prompts == len(prompts)


def test_bars_are_asked_for_by_programs_and_shown_on_terminals(
    tiny_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What draws for minutes said nothing meanwhile. tqdm's `disable=None` looks whether it writes to a terminal."""
    bars = []

    def bar(rows: Any, what: str, *total: int, leave: bool, disable: bool | None) -> Any:
        bars.append((what, total, disable))
        return rows

    for module in (measure, sys.modules["flowrl.sample"]):
        monkeypatch.setattr(module, "tqdm", bar)
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", n_samples=4, batch_size=4, seed=0, device="cpu")
    flowrl.evaluate(model, n_samples=8)
    assert bars == [("batches of reference", (), True), ("batches of current", (), True)]
    bars.clear()
    assert evaluate_program([str(tiny_runs["lora"]), "--n-samples", "4", "--batch-size", "2"]) == 0
    sample(tiny_runs["lora"], tmp_path / "a", "-n", 2, "--batch-size", 3)
    assert bars == [("batches of reference", (), None), ("batches of ema", (), None), ("batches", (2,), None)]


def test_a_bar_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", n_samples=4, batch_size=4, seed=0, device="cpu")
    monkeypatch.setattr(sys, "stderr", None)  # pythonw has none
    assert flowrl.evaluate(model, n_samples=8, progress=True).n_samples == 8


def test_noise_is_standard_normal() -> None:
    """Neighbouring seeds give independent noise."""
    x = seeded_noise(range(4000), (2,)).numpy()
    assert abs(x.mean()) < 4 / math.sqrt(8000)
    assert abs(x.std() - 1) < 0.04
    assert abs(np.corrcoef(x[:-1, 0], x[1:, 0])[0, 1]) < 0.07


def test_prompts_of_the_run_itself(models: dict[str, FlowAlgorithm]) -> None:
    env = models["lora"].env.core
    own = chosen_contexts(env, [])
    assert 4 <= len(own) <= 8
    assert own == env.contexts[:: len(env.contexts) // len(own) + 1][: len(own)]
    assert chosen_contexts(env, ["b", "a", "b"]) == ["b", "a"]


def test_contexts_that_are_no_text() -> None:
    env = SimpleNamespace(contexts=[0, 1, 2], name="digits")
    assert chosen_contexts(env, ["2", "0"]) == [2, 0]
    with pytest.raises(UnknownNameError, match="context of 'digits' '3'"):
        chosen_contexts(env, ["3"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Cats & dogs?", "cats-dogs"), ("Über/..\\x", "uber-x"), ("日本", "sample"), (7, "7"), ("a" * 90, "a" * 40)],
)
def test_slug(text: object, expected: str) -> None:
    assert slug(text) == expected


MISTAKES = [
    ("nowhere", [], "There is no folder"),
    ("lora", ["-n", "0"], "--n must be positive, not 0"),
    ("lora", ["--steps", "0"], "--steps must be positive"),
    ("lora", ["--batch-size", "0"], "--batch-size must be positive"),
    ("lora", ["--seed", "-1"], "--seed must be in"),
    ("lora", ["--guidance-scale", "nan"], "--guidance-scale must be finite"),
    ("lora", ["--prompt", " "], "--prompt takes text"),
    ("lora", ["--prompt", "a\udcffb"], "--prompt takes text"),
    ("points", ["--prompt", "a star"], "unconditional and takes no prompt"),
    ("points", ["--guidance-scale", "2"], "no empty context"),
    ("points", ["--role", "ema"], "keeps no 'ema' network"),
    ("points", ["--device", "warp"], "Device 'warp' is not available"),
    ("points", ["--algo", "no_such_module:A"], "Cannot import 'no_such_module'"),
]


@pytest.mark.parametrize(("run", "arguments", "expected"), MISTAKES)
def test_mistakes(
    tiny_runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run: str,
    arguments: list[str],
    expected: str,
) -> None:
    """Some of them tyro reports, which ends the program itself."""
    monkeypatch.setenv("COLUMNS", "300")
    try:
        code = main([str(tiny_runs.get(run, tmp_path / run)), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_files(
    tiny_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    run = [str(tiny_runs["points"]), "-n", "2"]
    assert main([*run, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file/out': File exists. Choose another place with --out." in capsys.readouterr().err

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowrl.sample.write_json", full)
    assert main([*run, "--out", str(tmp_path / "out")]) == 2
    assert "out': No space left on device. Choose another place" in capsys.readouterr().err


def test_as_a_program(run_module, tiny_runs: dict[str, Path], tmp_path: Path) -> None:
    done = run_module("flowrl.sample", tiny_runs["points"], "-n", 5)
    assert done.returncode == 0, done.stderr
    assert f"written: {tmp_path / 'sampled'}" in done.stdout
    assert load_file(tmp_path / "sampled" / "samples.safetensors")["samples"].shape == (5, 2)
