"""CRD: centred reward distillation (Zhu et al. 2026, arXiv 2603.14128) on the flow-matching error.

The policy that maximises the reward with a KL divergence to the old one has `log p / p_old = r / beta - log Z`. Repeat:
draw groups of samples of the same context by the ODE, and fit the log-ratio, as flow-matching errors have it, to the
reward; both centred in the group, where the unknown `log Z` cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import advantage_slope
from flowrl.functional.losses import squared_error
from flowrl.registry import register_algorithm
from flowrl.training.groups import WholeGroups, WholeGroupsConfig
from flowrl.types import Batch, Role


@dataclass(frozen=True)
class CRDConfig(WholeGroupsConfig):
    """Settings of CRD."""

    beta: float = 1.0
    """Strength of the KL divergence from the old policy; rewards are in units of their spread in the group."""
    anchor: float = 0.0
    """Strength of a penalty |v - v_ref|^2."""
    decay: float = 1.0
    """Share of the old policy that a refresh keeps. 1 leaves it the reference, with one optimum; below, it follows the
    policy in training, which draws the samples in either case, and the flow goes on from refresh to refresh."""
    error_scale: Literal["none", "size"] = "none"
    """Errors |v - u|^2 summed over dimensions, as log-likelihoods are ("none"), or their means over dimensions divided
    by their own mean size |v - u| ("size", as published), which grows so slowly away from the reference that it needs
    the anchor."""
    max_advantage: float = 5.0
    """Rewards are clipped at so many of their standard deviations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "max_advantage"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        self.require(self.anchor >= 0, f"anchor must not be negative, not {self.anchor}.")
        self.require(0 <= self.decay <= 1, f"decay must be in [0, 1], not {self.decay}.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({"refresh_every": "unless decay is below 1"} if self.decay == 1 else {})


@register_algorithm("crd")
class CRD(WholeGroups):
    """Centred reward distillation: log-ratios fitted to rewards, both relative to the group."""

    kind = "endpoint.preference.regression"
    replayable = True
    tilt_setting = ("beta", -1)
    Config: ClassVar[type[FlowConfig]] = CRDConfig
    config: CRDConfig

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep `v_old`, with which errors are compared, where it is not the reference."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.decay < 1 else copies

    @property
    def behaviour_role(self) -> Role:
        """The copy that draws the samples: not the old one, which may lag behind."""
        return "current"

    @property
    def old_role(self) -> Role:
        """The copy that errors are compared with."""
        return "behaviour" if self.config.decay < 1 else "reference"

    def refresh_decay(self) -> float:
        """Keep a share of the old policy."""
        return self.config.decay

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute `lambda = dA/dr / (2 beta (1 - 1 / n))` where the old policy stays the reference, unanchored.

        dA/dr is that of `advantage_slope`, and n the group size: the log-ratio is centred in the group as well. It is
        the tilt at t = 0 of samples of variance 1: where v moves by d there, R of a sample is `2 d·x_1` but for what
        the group has in common, and the tilt of a reward a·x_1 is `d = lambda a`.
        Otherwise each refresh tilts anew, and none is stated; nor of rewards compared each by itself, nor of errors
        in units of their size.
        """
        config = self.config
        stays = config.decay == 1 and config.anchor == 0 and config.reward_aggregation == "sum"
        if not stays or config.error_scale != "none":
            return None
        n = config.group_size
        return advantage_slope(reward_std, "group", n) / (2 * config.beta * (1 - 1 / n))

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Compute rewards (B,) in units of their standard deviation in the group."""
        return self.relative(rollout, self.config.max_advantage)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `(beta (R - mean_g R) - (a - mean_g a))^2 / beta`, R the log-ratio, and `anchor |v - v_ref|^2`."""
        config = self.config
        pair = self.group_pair(batch)
        v, v_old = self.velocity(pair), self.velocity(pair, self.old_role)
        log_ratio = self.likelihood(v, pair.u) - self.likelihood(v_old, pair.u)
        miss = self.centred(config.beta * log_ratio) - self.centred(batch.advantage)
        if "stray" in batch.extra:  # groups that compare nothing: equal rewards would still be a target
            miss = miss.masked_fill(self.in_groups(batch.extra["stray"]), 0)
        loss = miss.square().mean() / config.beta
        figures = {"miss": miss.square().mean(), "log_ratio": log_ratio.mean()}
        if config.anchor == 0:
            return loss, figures
        drift = squared_error(v, self.velocity(pair, "reference")).mean()
        return loss + config.anchor * drift, {**figures, "drift": drift}

    def centred(self, values: torch.Tensor) -> torch.Tensor:
        """Subtract from values (B,) of a minibatch the mean of their group: (G, group_size)."""
        groups = self.in_groups(values)
        return groups - groups.mean(1, keepdim=True)

    def likelihood(self, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Compute what stands for the log-likelihood (B,): `-|v - u|^2`, a sum over dimensions.

        With error_scale "size" their mean, over the mean size of the error, detached.
        """
        if self.config.error_scale == "none":
            return -(v - u).square().flatten(1).sum(1)
        return -squared_error(v, u) / (v - u).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
