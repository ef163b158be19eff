"""Videos and sounds: networks by time, frames and sizes, frames of rewards, files and pictures."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import scipy.io.wavfile
import torch
import tyro
from families import sana_image_to_video, sana_video, skyreels_v2, skyreels_v2_image
from families.wan import OPTIONS, wan
from PIL import Image
from torch import nn

import flowrl.export
import flowrl.run
import flowrl.sample
from flowrl.envs.registration import CustomEnv, make
from flowrl.envs.rewards.frames import is_of_frames, over_frames
from flowrl.envs.rewards.groups import WinRateReward
from flowrl.envs.rewards.mixture import MixtureReward, Part
from flowrl.envs.text_to_image import TextToImageConfig
from flowrl.errors import ConfigError
from flowrl.evaluation.side_effects import held_out, looks
from flowrl.models.by_time import ByTime
from flowrl.models.families import DECLARED
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.schedules import times_of
from flowrl.runs import media
from flowrl.runs.pictures import SPECTROGRAM, save_picture, spectrograms
from flowrl.types import RewardOutput

OPTIONS_16 = replace(OPTIONS, resolution=16)


class Counting(nn.Module):
    """A network that counts its calls and rows."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.tensor(factor)), []

    def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        assert not return_dict
        self.rows.append(len(timestep))
        return (self.weight * hidden_states + timestep[:, None],)


def test_a_batch_of_mixed_times_is_split_between_two_networks() -> None:
    both = ByTime(Counting(2.0), Counting(3.0), boundary=500.0)
    x, times = torch.randn(4, 3), torch.tensor([900.0, 499.9, 500.0, 0.0])
    (whole,) = both(timestep=times, hidden_states=x, return_dict=False)
    alone = [both(timestep=times[i : i + 1], hidden_states=x[i : i + 1], return_dict=False)[0] for i in range(4)]
    assert torch.equal(whole, torch.cat(alone))
    assert torch.allclose(whole, torch.tensor([2.0, 3.0, 2.0, 3.0])[:, None] * x + times[:, None])
    assert both.transformer.rows == both.transformer_2.rows == [2, 1, 1]
    whole.sum().backward()
    for network, rows in ((both.transformer, [0, 2]), (both.transformer_2, [1, 3])):
        assert torch.allclose(network.weight.grad, x[rows].sum())


@pytest.mark.parametrize(("time", "used"), [(800.0, "transformer"), (100.0, "transformer_2")])
def test_at_one_time_one_network_runs(time: float, used: str) -> None:
    both = ByTime(Counting(2.0), Counting(3.0), boundary=500.0)
    both(timestep=torch.full((3,), time), hidden_states=torch.randn(3, 2), return_dict=False)
    assert {name: part.rows for name, part in both.parts().items()} == {
        name: [3] if name == used else [] for name in both.parts()
    }


@pytest.mark.parametrize(("time", "idle"), [(100.0, "transformer"), (800.0, "transformer_2")])
def test_a_network_that_does_not_run_gets_a_gradient_of_zero_as_on_several_ranks(time: float, idle: str) -> None:
    """So the optimizer takes its step of the moments there are."""
    both = ByTime(Counting(2.0), Counting(3.0), boundary=500.0)
    times = torch.full((3,), time)
    with torch.no_grad():
        both(timestep=times, hidden_states=torch.randn(3, 2), return_dict=False)
    assert both.parts()[idle].weight.grad is None
    both.parts()[idle].weight.grad = torch.tensor(7.0)  # of another minibatch of the same step
    both(timestep=times, hidden_states=torch.randn(3, 2), return_dict=False)
    assert both.parts()[idle].weight.grad == 7
    both.parts()[idle].weight.grad = None
    both(timestep=times, hidden_states=torch.randn(3, 2), return_dict=False)
    assert both.parts()[idle].weight.grad == 0


@pytest.mark.parametrize("with_grad", [False, True])
def test_all_ranks_run_the_same_networks(with_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients both; without, those that any rank needs. An idle one gives nothing, but a gradient of zero."""

    def all_reduce(sides: torch.Tensor, operation: Any) -> None:
        sides.copy_(torch.tensor([1.0, 0.0]))  # what the others need

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    both = ByTime(Counting(2.0), Counting(3.0), boundary=500.0)
    x, times = torch.randn(3, 2), torch.full((3,), 800.0)
    with torch.set_grad_enabled(with_grad):
        (whole,) = both(timestep=times, hidden_states=x, return_dict=False)
    assert torch.allclose(whole, 2 * x + 800)
    assert both.transformer_2.rows == ([1] if with_grad else [])
    if with_grad:
        whole.sum().backward()
        assert both.transformer_2.weight.grad == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan(tmp_path_factory.mktemp("video") / "wan")


@pytest.mark.parametrize(("frames", "example"), [(6, 5), (7, 9), (0, 1), (-3, 1)])
def test_a_number_of_frames_that_cannot_be_is_refused(folder: Path, frames: int, example: int) -> None:
    with pytest.raises(ConfigError, match=rf"multiple of 4 and one more .* not {frames}; e\.g\. {example}\."):
        source_of(str(folder), pipeline=PipelineOptions(frames=frames))


def test_frames_and_sides_are_the_pipelines_own_unless_given(folder: Path) -> None:
    assert source_of(str(folder)).sample_shape == (81, 3, 480, 832)
    options = PipelineOptions(resolution=(32, 48), frames=9)
    assert source_of(str(folder), pipeline=options).sample_shape == (9, 3, 32, 48)


def test_sana_draws_in_the_size_that_its_network_was_made_for() -> None:
    vae = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    network = {"in_channels": 128, "patch_size": [1, 1, 1]}
    for size, sides in ((22, (704, 1280)), (30, (480, 832))):
        shapes = DECLARED["SanaVideoPipeline"].shapes({**network, "sample_size": size}, vae, PipelineOptions())
        assert shapes.sample == (81, 3, *sides)
        assert shapes.latent == (128, 11, sides[0] // 32, sides[1] // 32)


@pytest.mark.parametrize(
    "kind", ["HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanImagePipeline"]
)
def test_networks_of_two_times_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"distilled to jumps between two times \(use_meanflow\): no flow"):
        DECLARED[kind].shapes({"use_meanflow": True}, {}, PipelineOptions())


@pytest.mark.parametrize("family", [skyreels_v2, skyreels_v2_image])
def test_networks_of_diffusion_forcing_are_refused(family: ModuleType, tmp_path: Path) -> None:
    family.build(tmp_path, inject_sample_info=True)
    kind = json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
    with pytest.raises(ConfigError, match=rf"made for diffusion forcing \(inject_sample_info\).* a {kind} does not"):
        source_of(str(tmp_path), pipeline=OPTIONS)


def test_latents_come_to_an_autoencoder_that_holds_their_mean(tmp_path: Path) -> None:
    """Sana of videos with that of LTX-2: as its own call does, without a scale."""
    (case,) = sana_video.CASES
    folder = sana_video.build(tmp_path, of_ltx2=True)
    with pytest.raises(ConfigError, match="multiple of 32 pixels for this pipeline, not 16x48"):
        source_of(str(folder), pipeline=replace(case.options, resolution=(16, 48)))
    flow = source_of(str(folder), pipeline=replace(case.options, resolution=32)).load()
    flow.pipeline.set_progress_bar_config(disable=True)
    x_0 = torch.randn(3, *flow.latent_shape)
    with torch.no_grad():
        expected = case.call(flow, x_0, 1.0, 2, "pt")
        ours = flow.decode(case.call(flow, x_0, 1.0, 2))
    assert expected.std() > 0.01
    assert (ours - expected).abs().max() <= 1e-4


def test_pictures_come_from_an_autoencoder_that_holds_the_mean_of_its_latents(tmp_path: Path) -> None:
    """Sana that begins with them: its own call keeps them in the first frame of latents."""
    (case,) = sana_image_to_video.CASES
    folder = sana_image_to_video.build(tmp_path, of_ltx2=True)
    flow = source_of(str(folder), pipeline=replace(case.options, resolution=32)).load()
    flow.pipeline.set_progress_bar_config(disable=True)
    pictures = flow.encode(case.contexts)[-1]
    with torch.no_grad():
        expected = case.call(flow, torch.randn(3, *flow.latent_shape), 1.0, 1)[:, :, :1]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert (pictures - expected).abs().max() <= 1e-5


def test_the_noise_levels_of_a_published_scheduler_are_taken(folder: Path, tmp_path: Path) -> None:
    """UniPC's levels, with its shift; the steps between them are Euler's."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    given: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = UniPCMultistepScheduler(**given)
    WanPipeline.from_pretrained(folder, scheduler=scheduler).save_pretrained(tmp_path / "wan")
    flow = source_of(str(tmp_path / "wan"), pipeline=OPTIONS).load()
    assert isinstance(flow, PipelineFlow)
    assert torch.equal(flow.times(4), times_of(scheduler, 4))
    scheduler.set_timesteps(4)
    assert torch.allclose(flow.times(4)[1:], 1 - scheduler.sigmas[1:], atol=1e-6)


# settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"resolution": 512}, 512),
        ({"resolution": "512"}, 512),
        ({"resolution": "768x1344"}, (768, 1344)),
        ({"height": 768, "width": 1344}, (768, 1344)),
    ],
)
def test_sizes_as_they_are_written(settings: dict[str, Any], expected: Any) -> None:
    assert TextToImageConfig(**settings).pipeline().resolution == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "large"}, "HEIGHTxWIDTH, e.g. 768x1344, not 'large'"),
        ({"resolution": "768x"}, "HEIGHTxWIDTH"),
        ({"resolution": "768X1344"}, "HEIGHTxWIDTH"),
        ({"resolution": "-8"}, "HEIGHTxWIDTH"),
        ({"resolution": 0}, "must be positive, not 0"),
        ({"height": 768}, "go together"),
        ({"width": 768}, "go together"),
        ({"height": 768, "width": 0}, "must be positive"),
        ({"resolution": 512, "height": 768, "width": 512}, "give one or the others"),
        ({"sequence_length": 0}, "sequence_length must be positive"),
        ({"embedded_guidance": float("inf")}, "embedded_guidance must be finite"),
    ],
)
def test_sizes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextToImageConfig(**settings)


@pytest.mark.parametrize("given", [["--env.resolution", "768x1344"], ["--env.height", "768", "--env.width", "1344"]])
def test_sizes_on_the_command_line(given: list[str]) -> None:
    config = tyro.cli(Program, args=[*given, "--env.frames", "9", "--env.sequence-length", "12"])
    options = config.env.pipeline()
    assert (options.resolution, options.frames, options.sequence_length) == ((768, 1344), 9, 12)
    assert tyro.cli(Program, args=["--env.resolution", "512"]).env.resolution == 512


@dataclass
class Program:
    """Options as a program has them."""

    env: TextToImageConfig = field(default_factory=TextToImageConfig)


@pytest.mark.parametrize("flow", ["mini-sd3", "emoji"])
def test_images_have_no_frames(flow: str) -> None:
    with pytest.raises(ConfigError, match="frames"):
        source_of(flow, pipeline=PipelineOptions(frames=5))


# frames of rewards, statistics and pictures


@pytest.mark.parametrize("whole", [False, True])
def test_a_reward_of_images_is_averaged_over_the_frames(whole: bool) -> None:
    seen = []

    def reward(images: torch.Tensor, prompts: Any) -> RewardOutput:
        seen.append(tuple(images.shape))
        values = images.flatten(1).mean(1)
        return RewardOutput(values, {"twice": 2 * values})

    reward.takes_videos = whole  # type: ignore[attr-defined]
    videos = torch.rand(2, 3, 3, 4, 4, requires_grad=True)
    output = over_frames(reward)(videos, ["a", "b"])
    assert torch.allclose(output.reward, videos.flatten(1).mean(1))
    assert torch.allclose(output.components["twice"], 2 * output.reward)
    assert output.reward.requires_grad
    assert seen == ([(2, 3, 3, 4, 4)] if whole else [(2, 3, 4, 4)] * 3)


def smoothness(videos: torch.Tensor, prompts: Any) -> torch.Tensor:
    assert videos.ndim == 5
    return -(videos[:, 1:] - videos[:, :-1]).abs().flatten(1).mean(1)


smoothness.takes_videos = True  # type: ignore[attr-defined]


def test_mixtures_and_win_rates_have_one_value_of_a_video() -> None:
    """Parts of images are means over the frames first, then normalised or compared; others are given the whole."""
    videos, prompts = torch.rand(6, 3, 3, 4, 4), ["a", "a", "a", "b", "b", "b"]
    smooth, bright = smoothness(videos, prompts), videos.flatten(1).mean(1)

    def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert images.ndim == 4
        return images.flatten(1).mean(1)

    mixture = MixtureReward([Part("bright", brightness, 2.0, "running"), Part("smooth", smoothness, 0.5, "group")])
    output = over_frames(mixture.observe)(videos, prompts)
    by_group = smooth.view(2, 3)
    scores = (by_group - by_group.mean(1, keepdim=True)) / by_group.std(1, correction=0, keepdim=True)
    expected = 2 * (bright - bright.mean()) / bright.std(correction=0) + 0.5 * scores.flatten()
    assert torch.allclose(output.reward, expected, atol=1e-5)
    assert torch.allclose(output.components["bright"], bright)
    assert mixture.running["bright"].state[0] == 6
    shares = over_frames(WinRateReward(brightness, "bright"))(videos, prompts).reward
    assert torch.equal(shares.view(2, 3), (bright.view(2, 3, 1) > bright.view(2, 1, 3)).sum(2) / 2)
    assert [is_of_frames(reward) for reward in (mixture, WinRateReward(smoothness, "smooth"), brightness)] == [1, 0, 1]


def test_held_out_rewards_and_looks_take_videos() -> None:
    videos = torch.rand(2, 3, 3, 8, 8)
    values = held_out({"bright": lambda images, prompts: images.flatten(1).mean(1)}, videos, ["a", "b"])
    assert torch.allclose(values["held-out bright"], videos.flatten(1).mean(1))
    of_frames = [looks(videos[:, t]) for t in range(3)]
    for name, value in looks(videos).items():
        assert torch.allclose(value, torch.stack([frame[name] for frame in of_frames]).mean(0))


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations on videos, with its evaluation and pictures."""
    place = tmp_path_factory.mktemp("runs")
    given = f"""
        --algo orw_w2 --env sd3-aesthetic --env.flow {folder} --env.reward colourfulness --env.resolution 16x32
        --env.frames 5 --env.sequence-length 12 --env.prompts stars circles
        --algo.n-samples 4 --algo.group-size 2 --algo.batch-size 2 --algo.n-epochs 1 --algo.rollout-steps 2
        --algo.rollout-batch-size 4 --algo.lora-rank 2 --total-timesteps 4 --eval-samples 4 --device cpu
        --out {place} --name wan
    """
    head = io.StringIO()
    with contextlib.redirect_stdout(head):
        assert flowrl.run.main(given.split()) == 0
    (place / "wan" / "head.txt").write_text(head.getvalue())
    return place / "wan"


def test_a_run_on_videos_shows_frames_and_says_what_is_rewarded(run: Path) -> None:
    assert "the mean over the frames" in (run / "head.txt").read_text()
    with Image.open(run / "before_after.png") as picture:
        assert picture.width == 2 * (5 * (32 + 2) + 2) + 12  # a row of five frames, before and after


def test_samples_of_videos_are_written_as_videos(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "writes_mp4", lambda: False)
    monkeypatch.setattr(flowrl.sample, "writes_mp4", lambda: False)
    args = [str(run), "--prompt", "stars", "-n", "2", "--steps", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert flowrl.sample.main(args) == 0
    about = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert about["frames_per_second"] == 16
    for entry in about["samples"]:
        with Image.open(tmp_path / "out" / entry["file"]) as video:
            assert (video.n_frames, video.size) == (5, (32, 16))
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width == 5 * (32 + 2) + 2


def test_mp4_is_written_by_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Writer(contextlib.AbstractContextManager):  # type: ignore[type-arg]
        append_data = written.append

        def __exit__(self, *exc: object) -> None:
            written.append("closed")

    def get_writer(path: Path, **options: Any) -> Writer:
        written.extend([path, options["fps"]])
        return Writer()

    monkeypatch.setattr(media, "writes_mp4", lambda: True)
    monkeypatch.setitem(sys.modules, "imageio", ModuleType("imageio"))
    monkeypatch.setitem(sys.modules, "imageio.v2", SimpleNamespace(get_writer=get_writer))
    assert media.save_video(torch.rand(4, 3, 8, 6), tmp_path / "a.png", 16) == tmp_path / "a.mp4"
    assert written[:2] == [tmp_path / "a.mp4", 16]
    assert [frame.shape for frame in written[2:-1]] == [(8, 6, 3)] * 4
    assert written[-1] == "closed"


def test_the_export_says_how_many_frames_and_draws_a_video(run: Path, tmp_path: Path) -> None:
    assert flowrl.export.main([str(run), str(tmp_path / "shared"), "--device", "cpu"]) == 0
    sampling = json.loads((tmp_path / "shared" / "sampling.json").read_text())
    assert (sampling["height"], sampling["width"], sampling["num_frames"]) == (16, 32, 5)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert ").frames[0]\nexport_to_video(video" in card


def test_a_pipeline_of_two_networks_is_exported_whole(tmp_path: Path) -> None:
    """Both networks, after full fine-tuning, with the boundary between them."""
    folder = wan(tmp_path / "wan", two=True, boundary_ratio=0.65)
    options: dict[str, Any] = {"frames": 5, "sequence_length": 12, "prompts": ("stars",)}
    env = make("sd3-aesthetic", flow=str(folder), reward="colourfulness", resolution=16, **options)
    settings: dict[str, Any] = {"precision": "float32", "n_samples": 4, "group_size": 2, "rollout_batch_size": 4}
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", lora_rank=0, batch_size=2, n_epochs=1, **settings)
    model.learn(4)
    flowrl.export.export(model, tmp_path, tmp_path / "shared")
    again = source_of(str(tmp_path / "shared"), pipeline=OPTIONS_16).load()
    assert isinstance(again.network, ByTime)
    assert again.network.boundary == 650
    kept = model.policy.networks.model_of(model.policy.sampling_role).network
    for ours, theirs in zip(kept.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_plan_of_two_networks_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = wan(tmp_path / "wan", two=True, boundary_ratio=0.65)
    given = f"""
        --algo orw_w2 --env sd3-aesthetic --env.flow {folder} --env.reward colourfulness --env.frames 9
        --env.resolution 32x48 --env.sequence-length 12 --env.prompts stars --algo.n-samples 4 --algo.group-size 2
        --algo.rollout-batch-size 4 --algo.batch-size 2 --algo.rollout-steps 2 --dry-run --device cpu
    """
    assert flowrl.run.main(given.split()) == 0
    told = capsys.readouterr().out
    assert "not tried" not in told
    assert "the mean over the frames" in told


# sounds

RATE = 8000


class Sound(nn.Module):
    """A flow of sounds of two channels."""

    sample_shape = (2, 800)
    sample_rate = RATE

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.scale * x - x  # the noise fades


def test_a_sound_is_a_wav_file(tmp_path: Path) -> None:
    tone = torch.stack([torch.sin(torch.arange(800) * 0.3), torch.full((800,), 2.0)])
    path = media.save_sound(tone, tmp_path / "tone.png", RATE)
    assert path.name == "tone.wav"
    rate, values = scipy.io.wavfile.read(path)
    assert (rate, values.shape, str(values.dtype)) == (RATE, (800, 2), "int16")
    assert abs(values[:, 0] / 32767 - tone[0].numpy()).max() < 1e-4
    assert (values[:, 1] == 32767).all()  # clipped


def test_a_spectrogram_shows_the_frequency() -> None:
    """A tone is a line, higher up where it is higher; silence is nothing."""
    time = torch.arange(8000) / RATE
    low, high = (torch.sin(2 * torch.pi * hertz * time)[None] for hertz in (500, 3000))
    images = spectrograms(torch.stack([low, high]))
    assert images.shape == (2, 1, *SPECTROGRAM)
    assert images.min() >= 0
    assert images.max() == 1
    rows = images[:, 0, :, 50:-50].mean(2).argmax(1)
    expected = SPECTROGRAM[0] * (1 - torch.tensor([500, 3000]) / (RATE / 2))
    assert (rows - expected).abs().max() <= 2


def test_a_flow_of_sounds_is_heard_and_seen(tmp_path: Path) -> None:
    """From training to files: spectrograms for pictures, wav for samples."""
    core = CustomEnv(source_of(Sound), [None], lambda sounds, _: -sounds.square().mean((1, 2)), "quiet", -9.0, 9.0)
    assert core.flow.sample_rate == RATE
    settings: dict[str, Any] = {"n_samples": 8, "group_size": 2, "rollout_batch_size": 8, "rollout_steps": 2}
    model = flowrl.ORWCFMW2("FlowPolicy", core, seed=0, device="cpu", batch_size=8, n_epochs=1, **settings)
    model.learn(8)
    config = flowrl.sample.SampleConfig(run=tmp_path, n=3, out=tmp_path / "out")
    _, picture, listed = flowrl.sample.write_samples(model, [None], config)
    about = json.loads(listed.read_text())
    assert about["sample_rate"] == RATE
    assert [Path(entry["file"]).suffix for entry in about["samples"]] == [".wav"] * 3
    with Image.open(picture) as grid:
        assert grid.size == (2 * (SPECTROGRAM[1] + 2) + 2, 2 * (SPECTROGRAM[0] + 2) + 2)
    save_picture(torch.randn(4, *Sound.sample_shape), [None] * 4, core, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.height == 2 * (SPECTROGRAM[0] + 2) + 2
