"""Videos: networks by time, frames and sizes, frames of rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.wan import OPTIONS, wan
from torch import nn

from flowrl.errors import ConfigError
from flowrl.models.by_time import ByTime
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.models.schedules import times_of


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
