"""Qwen-Image 2.1 whose configuration has noise levels, and whose autoencoder has no channel of what is transparent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import CASES
from families.case import PROMPTS
from gymnasium import spaces

import flowrl
from flowrl.errors import ConfigError
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineOptions
from flowrl.training.policy import FlowPolicy

LEVELS = [1.0, 0.7]


def test_noise_levels_of_the_configuration(tmp_path: Path) -> None:
    """They are those of a run of as many steps; others are spaced equally, which its own call has to be told."""
    case = CASES["qwen-image-2.1"]
    case.build(tmp_path, colours=3, causal=False, levels=LEVELS)
    source = source_of(str(tmp_path), pipeline=PipelineOptions(resolution=32, sequence_length=32))
    flow, theirs = source.load(), source.load()
    theirs.pipeline.set_progress_bar_config(disable=True)
    assert "takes the 2 noise levels" in flow.OWN_CALL
    config = flowrl.FlowConfig()
    box = spaces.Box(0, 1, flow.sample_shape)
    policy = FlowPolicy(spaces.Discrete(3), box, model=flow, contexts=PROMPTS, config=config, seed=0)
    x_0, ids = policy.noise(3), torch.arange(3)
    for steps, told in ((2, {}), (3, {"sigmas": np.linspace(1, 1 / 3, 3)})):
        ours = policy.sample_latents(ids, x_0=x_0, steps=steps, solver="euler", guidance_scale=3.0)
        with torch.no_grad():
            expected = case.call(theirs, x_0, 3.0, steps, **told)
        assert (ours - expected).abs().max() <= 1e-4
    with torch.no_grad():
        assert (expected - case.call(theirs, x_0, 3.0, 3)).abs().max() > 0.01  # of two steps
        images = case.call(theirs, x_0, 3.0, 3, **told, output="pt")
    assert (flow.decode(ours) - images).abs().max() <= 1e-4
    with pytest.raises(ConfigError, match=r"in its template has .* tokens, more than 32"):
        flow.encode(["white " * 40])
