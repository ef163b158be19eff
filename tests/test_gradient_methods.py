"""Methods that follow the gradient of the reward, against derivatives that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.models.loading import source_of
from flowrl.types import Batch, RewardOutput

pytestmark = pytest.mark.on_device
W, A = -0.7, torch.tensor([2.0, -1.0])


class Linear(torch.nn.Module):
    """v = W x + shift."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return W * x + self.shift


class LinearEnv(GenerationEnv):
    """r = a . x."""

    def __init__(self) -> None:
        super().__init__(source_of(Linear, (2,)), [None], low=-99, high=99, name="linear")

    def reward(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        return RewardOutput(samples @ A.to(samples.device))


def made(cls: type[Any], **settings: Any) -> Any:
    return cls(
        "FlowPolicy", LinearEnv(), seed=0, device=DEVICE, n_samples=16, batch_size=16, rollout_steps=8, **settings
    )


def gradient(model: Any) -> torch.Tensor:
    ids = torch.zeros(16, dtype=torch.long, device=DEVICE)
    loss, _ = model.loss(Batch.of(torch.zeros(16, 0, device=DEVICE), ids))
    loss.backward()
    return model.policy.model.network.shift.grad.cpu()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_draft_is_the_derivative_of_the_last_steps(k: int) -> None:
    h = 1 / 8
    expected = sum((1 + h * W) ** j * h for j in range(k)) * A
    torch.testing.assert_close(gradient(made(flowrl.DRaFT, grad_steps=k)), -expected)


def test_refl_is_the_derivative_of_the_estimate() -> None:
    seen = {round(float(-gradient(made_with(seed))[0] / A[0]) * 8) for seed in range(12)}
    assert seen == {1, 2}  # 1 - t of the last quarter of eight steps: (1 - t) a


def made_with(seed: int) -> Any:
    model = made(flowrl.ReFL)
    model.generator.manual_seed(seed)
    return model


@pytest.mark.parametrize("cls", [flowrl.DRaFT, flowrl.ReFL])
def test_the_penalty_pulls_to_the_reference(cls: type[Any]) -> None:
    free, held = made(cls), made(cls, alpha=3.0)
    for model in (free, held):
        with torch.no_grad():
            model.policy.model.network.shift.copy_(torch.tensor([0.5, 0.25]))
        model.generator.manual_seed(7)
    # |v - v_ref|^2, mean over two dimensions, is |shift|^2 / 2
    torch.testing.assert_close(gradient(held) - gradient(free), 3.0 * torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("name", ["draft", "refl"])
def test_rewards_without_a_gradient_are_refused(name: str) -> None:
    model = flowrl.algorithm_class(name)(
        "FlowPolicy", "sd3-count", env_settings={"flow": "mini-sd3"}, seed=0, device=DEVICE,
        n_samples=4, group_size=2, batch_size=4, rollout_steps=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"'{name}' needs the gradient of the reward by the samples"):
        model.learn(4)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="grad_steps must be from 1 to rollout_steps = 8, not 9"):
        made(flowrl.DRaFT, grad_steps=9)
    with pytest.raises(ConfigError, match="late_share must be in"):
        made(flowrl.ReFL, late_share=0.0)
    with pytest.raises(ConfigError, match="alpha must not be negative"):
        made(flowrl.ReFL, alpha=-1.0)
