"""What a Stable Audio 3 is refused for, and what its own call does otherwise."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from families import stable_audio3

from flowrl.errors import ConfigError, ModelLoadError
from flowrl.models.families.stable_audio3 import StableAudio3Flow
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions


def test_distilled_weights_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = stable_audio3.build(tmp_path, stochastic_sampling=True)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"stochastic_sampling: it is distilled .* train its base model"):
        source_of(str(folder))


def test_prompts_of_other_lengths_are_told(tmp_path: Path) -> None:
    folder = stable_audio3.build(tmp_path)

    def loaded(length: int) -> str:
        return source_of(str(folder), pipeline=PipelineOptions(frames=16, sequence_length=length)).load().OWN_CALL

    assert loaded(stable_audio3.TOKENS) == ""
    assert "pads prompts to 12 tokens" in loaded(20)
    with pytest.raises(ConfigError, match="at most 256"):
        loaded(300)


def test_what_torch_says_of_the_autoencoders_layers_is_not_shown(tmp_path: Path) -> None:
    """By loading and by a dry run: it is advice for who writes such layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        (case,) = stable_audio3.CASES
        source = source_of(str(case.build(tmp_path)), pipeline=case.options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        source.load()
        source.imitation(torch.float32, torch.float32)


def test_its_own_call_makes_as_many_frames_of_every_duration() -> None:
    """Of sounds of 44100 values a second, 4096 a frame: a rounding above would be one more."""
    flow = StableAudio3Flow.__new__(StableAudio3Flow)
    object.__setattr__(flow, "sample_rate", 44100)
    for frames in range(1, 3000):
        object.__setattr__(flow, "sample_shape", (2, 4096 * frames))
        assert math.ceil((flow.seconds + 0.0) * 44100 / 4096) == frames
