"""Sounds of ACE-Step: their length and level, what is refused, and the files that are written."""

from __future__ import annotations

import re
import runpy
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, ace_step
from families.case import PROMPTS
from gymnasium import spaces
from scipy.io import wavfile

import flowrl
from flowrl.envs.rewards.groups import WinRateReward
from flowrl.envs.rewards.mixture import MixtureReward, Part
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import ConfigError
from flowrl.export import export
from flowrl.models.families.ace_step import AceStepFlow
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions
from flowrl.sample import SampleConfig, write_samples
from flowrl.training.policy import FlowPolicy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ace_step.build(tmp_path_factory.mktemp("ace"))


def loaded(folder: Path, frames: int, **options: int) -> AceStepFlow:
    flow = source_of(
        str(folder), pipeline=PipelineOptions(**{"sequence_length": 80, "frames": frames, **options})
    ).load()
    assert isinstance(flow, AceStepFlow)
    return flow


def policy_of(flow: AceStepFlow, scale: float) -> FlowPolicy:
    config = flowrl.FlowConfig(guidance_scale=scale)
    box = spaces.Box(-1, 1, flow.sample_shape)
    return FlowPolicy(spaces.Discrete(3), box, model=flow, contexts=PROMPTS, config=config, seed=0)


def test_sounds_have_a_rate_and_the_peak_of_the_pipeline(folder: Path) -> None:
    source = source_of(str(folder), pipeline=CASES["ace-step"].options)
    assert (source.sample_rate, source.is_image, source.frame_rate) == (256, False, 0)
    assert source.sample_shape == (2, 1500 * 32)
    flow = loaded(folder, 16)
    assert flow.sample_rate == 256
    sounds = flow.decode(torch.randn(2, *flow.latent_shape))
    assert torch.allclose(sounds.abs().amax((1, 2)), torch.full((2,), 10 ** (-1 / 20)))


def test_seconds_never_round_to_a_frame_more(folder: Path) -> None:
    flow = loaded(folder, 16)
    flow.pipeline.vae.register_to_config(sampling_rate=48000, downsampling_ratios=[2, 4, 4, 6, 10])
    for frames in range(1, 200):
        flow.latent_shape = (4, frames)
        assert -int(-flow.seconds * 25 // 1) == frames
    assert flow.seconds == 199 / 25
    flow.latent_shape = (4, 1500)
    assert flow.seconds == 60.0


def test_guidance_is_refused_and_says_why(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale must be 1 for AceStepPipeline, not 3: .* momentum"):
        policy_of(loaded(folder, 8), 3.0).sample_latents(torch.arange(3), steps=2)


def test_a_resolution_and_prompts_without_room_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"draws sounds, which have no resolution: .* frames, of 32 values each, 256"):
        loaded(folder, 8, resolution=32)
    with pytest.raises(ConfigError, match="frames must be at least 1"):
        loaded(folder, 0)
    with pytest.raises(ConfigError, match=r"in its template has [0-9]+ tokens, more than 20: set sequence_length"):
        loaded(folder, 8, sequence_length=20).encode(["white circles"])


def loudness(sounds: torch.Tensor, prompts: Any) -> torch.Tensor:
    return sounds.square().mean((1, 2))


def test_samples_are_written_as_sounds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(str(folder), pipeline=PipelineOptions(sequence_length=80, frames=16))
    with pytest.raises(ConfigError, match=r"draws sounds \(2, 512\), and the reward is of images: .* takes_sounds"):
        TextToImageEnv(source, PROMPTS, loudness)
    loudness.takes_sounds = True  # type: ignore[attr-defined]
    env = TextToImageEnv(source, PROMPTS, loudness)
    assert (env.action_space.low.min(), env.action_space.high.max()) == (-1, 1)
    for mixed in (MixtureReward([Part("loud", loudness)]), WinRateReward(loudness, "loud")):
        assert TextToImageEnv(source, PROMPTS, mixed).reward_function is mixed
    with pytest.raises(ConfigError, match="the reward is of images"):
        TextToImageEnv(
            source, PROMPTS, MixtureReward([Part("loud", loudness), Part("red", lambda x, prompts: x[:, 0])])
        )
    model = flowrl.ORWCFMW2("FlowPolicy", env, n_samples=4, group_size=2, batch_size=2, lora_rank=2, device="cpu")
    write_samples(model, PROMPTS[:2], SampleConfig(run=tmp_path, n=2, out=tmp_path / "drawn"))
    files = sorted((tmp_path / "drawn").rglob("*.wav"))
    assert len(files) == 4
    assert (tmp_path / "drawn" / "grid.png").exists()  # of spectrograms
    with wave.open(str(files[0])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (256, 2, 512)
    export(model, tmp_path, tmp_path / "out")  # whose card's script writes a sound as well
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'pipeline_tag: "text-to-audio"' in card
    assert "draws noise in another order" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "script.py").write_text(code.replace(f'"{folder.name}"', repr(str(folder))))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("script.py")
    rate, values = wavfile.read("sound.wav")
    assert (rate, values.shape) == (256, (512, 2))
