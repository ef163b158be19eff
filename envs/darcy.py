"""Darcy flow: generate a permeability field together with the pressure that it causes, so that the equation holds.

The reward is minus the logarithm of the mean squared residual of `-div(K grad p) = 1`. A flow can raise it by fields
that are easier to get right; evaluations measure beside it what that would spoil (`errors`, `errors_of_all`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flowrl.envs.base import GenerationEnv
from flowrl.envs.darcy_data import KINDS, random_log_k
from flowrl.errors import ConfigError
from flowrl.functional.darcy import energy, residual, solve
from flowrl.functional.exact import in_float64
from flowrl.functional.metrics import quantile_distance, spectrum_distance, wasserstein2
from flowrl.models.loading import FlowSource, source_of
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput

Gradient = Literal["exact", "mixed"]
FLOOR = 1e-12
"""Least mean squared residual: a pair as exact as float32 has about 1e-9."""
SHOWN_LOG_K, SHOWN_P = 2.0, 0.15
"""Ranges of pictures: log K from -2 to 2, p from 0 to 0.15."""
ZOOM = 3
"""Pixels of a picture along the side of a node."""


class DarcyEnv(GenerationEnv):
    """One-step environment whose sample is a pair (2, n, n), log K and p at the nodes of the unit square.

    The component `residual` is the mean squared residual at the inner nodes, in units of f = 1.

    Args:
        flow: Source of the flow.
        gradient: Gradient of the reward; see `DarcyConfig`.
    """

    def __init__(self, flow: FlowSource, gradient: Gradient = "exact", render_mode: str | None = None) -> None:
        super().__init__(flow, contexts=KINDS, low=-10.0, high=10.0, name="darcy", render_mode=render_mode)
        self.renderer, self.gradient = side_by_side, gradient

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Compute minus the logarithm of the mean squared residual (natural, B)."""
        residuals = residual(samples[:, 0], samples[:, 1])
        squared = residuals.square().mean((1, 2))
        reward = -squared.clamp_min(FLOOR).log()
        if self.gradient == "mixed" and reward.requires_grad:
            mixed = (reward - energy(residuals).clamp_min(FLOOR).log()) / 2
            reward = reward.detach() + mixed - mixed.detach()
        return RewardOutput(reward.float(), {"residual": squared.float()})

    def errors(self, samples: torch.Tensor, contexts: Contexts) -> dict[str, torch.Tensor]:
        """Compute errors of p (B,), in units of the solver's p for the same K (root mean squares).

        `pressure error`: of p against the solver's; `wall error`: of p on the walls, where the solver's is 0.
        """
        log_k, p = in_float64(samples).unbind(1)
        solved = solve(log_k)
        size = solved.square().mean((1, 2)).sqrt()
        walls = torch.cat([p[:, 0], p[:, -1], p[:, 1:-1, 0], p[:, 1:-1, -1]], dim=1)
        return {
            "pressure error": (p - solved).square().mean((1, 2)).sqrt() / size,
            "wall error": walls.square().mean(1).sqrt() / size,
        }

    def errors_of_all(self, samples: torch.Tensor, contexts: Contexts, seed: int) -> dict[str, float]:
        """Measure how far log K as a whole is from as many fresh fields of the data, a mean over the kinds.

        `W2 of log K`: exact W2 of whole fields; `spectrum of log K`: see `spectrum_distance`; `values of log K`: W1 of
        the values at the nodes.
        """
        log_k = samples[:, 0].detach().float().cpu()
        kinds = torch.tensor([KINDS.index(context) for context in contexts])
        data = random_log_k(kinds, log_k.shape[-1], torch.Generator().manual_seed(seed))
        found: dict[str, list[float]] = {"W2 of log K": [], "spectrum of log K": [], "values of log K": []}
        for kind in kinds.unique():
            mine, theirs = log_k[kinds == kind], data[kinds == kind]
            found["W2 of log K"].append(wasserstein2(mine, theirs))
            found["spectrum of log K"].append(spectrum_distance(mine, theirs))
            found["values of log K"].append(quantile_distance(mine, theirs))
        return {name: sum(values) / len(values) for name, values in found.items()}


def side_by_side(samples: torch.Tensor) -> torch.Tensor:
    """Draw pairs (B, 2, n, n) as pictures (B, 3, H, W) in [0, 1]: log K on the left, p on the right."""
    log_k, p = samples.detach().float().cpu().unbind(1)
    parts = [coloured(log_k / (2 * SHOWN_LOG_K) + 0.5, "viridis"), coloured(p / SHOWN_P, "magma")]
    gap = torch.ones(len(samples), 3, parts[0].shape[2], 2)
    return torch.cat([parts[0], gap, parts[1]], dim=3)


def coloured(fields: torch.Tensor, colours: str) -> torch.Tensor:
    """Draw fields (B, n, n) with values in [0, 1] in a colour map of matplotlib: pictures (B, 3, ZOOM n, ZOOM n)."""
    from matplotlib import colormaps

    rgb = torch.from_numpy(colormaps[colours](fields.clamp(0, 1).numpy())[..., :3]).float().permute(0, 3, 1, 2)
    return nn.functional.interpolate(rgb, scale_factor=ZOOM)


@dataclass(frozen=True)
class DarcyConfig:
    """Settings of `darcy`."""

    flow: str = "darcy"
    """Flow to fine-tune: "darcy" (shipped, 32x32), or a folder that `pretrain/darcy.py` wrote."""
    gradient: Gradient = "mixed"
    """Gradient that methods follow: of the reward ("exact"), or half of it and half that of minus the logarithm of the
    residual's energy ("mixed"), which shrinks p less where K is not met. Values of rewards are the same."""


def _make(config: DarcyConfig) -> DarcyEnv:
    source = source_of(config.flow)
    shape = source.sample_shape
    if len(shape) != 3 or shape[0] != 2 or shape[1] != shape[2] or source.is_image:
        raise ConfigError(f"'darcy' needs a flow of pairs of shape (2, n, n), not {shape}.")
    return DarcyEnv(source, config.gradient)


RECOMMENDED: Mapping[str, Any] = {
    "n_samples": 64,
    "batch_size": 32,
    "rollout_steps": 10,
    "learning_rate": 3e-4,
    "ema_decay": 0.98,
    # small minibatches: the gradient of one sample says much, and steps are what is short
    "gradient.batch_size": 8,
    "gradient.alpha": 5.0,
    "gradient.learning_rate": 4e-4,
    # kinds differ in residual more than samples of a kind do
    "endpoint.standardise": "group",
    "endpoint.n_samples": 128,
    "endpoint.n_epochs": 2,
    "endpoint.alpha": 0.5,
    "endpoint-free.standardise": "group",
    "endpoint-kl.standardise": "group",
    "steps.group_size": 8,
}

SPECS = [
    EnvSpec(
        name="darcy",
        differentiable=True,
        factory=_make,
        config=DarcyConfig(),
        recommended=lambda config: RECOMMENDED,
        total_timesteps=1_280,
        summary="permeability and pressure of Darcy flow: make the equation hold, minus the log of its residual",
    )
]
