"""Methods on samples as one kernel: they differ in their base, their anchors and their coefficient.

At a point (x_t, t), with samples of the behaviour policy noised again, the gradient in v is

    sum over anchors of  anchor_gain (v - anchor)  -  gain A (u - base)

times a weight of t. `ROWS` has the published methods; what each of them does with rewards is in `flowrl.baselines`.
Everywhere: velocities are (B, ...), coefficients (B,) or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch

from flowrl.functional.advantages import group_advantage
from flowrl.functional.flow import TimeSampling, drawn, expand, time_quantile
from flowrl.functional.losses import group_mean, weighed
from flowrl.types import Role

Spread = Literal["group", "global", "none"]
Gain = torch.Tensor | float
"""A coefficient: (B,), or the same for all samples."""


class Row(NamedTuple):
    """A method's row of the table.

    Attributes:
        base: Whose velocity a sample's is compared with.
        anchors: What v is pulled to, and how strongly.
        gain: Factor of the advantage.
    """

    base: Role
    anchors: Mapping[Role, Gain]
    gain: float = 1.0

    def gradient(
        self,
        u: torch.Tensor,
        advantage: torch.Tensor,
        velocities: Mapping[Role, torch.Tensor],
        time_weight: Gain = 1.0,
    ) -> torch.Tensor:
        """Compute the gradient in v (B, ...), detached.

        Args:
            u: Velocity `x_1 - x_0` of the pair.
            advantage: A (B,), of both signs.
            velocities: By role: "current" (v itself), the base and the anchors.
            time_weight: (B,), or the same for all.
        """
        v = velocities["current"].detach()
        total = _times(weighed(advantage, self.gain), velocities[self.base].detach() - u)
        for role, gain in self.anchors.items():
            total = total + _times(gain, v - velocities[role].detach())
        return _times(time_weight, total)

    def minimiser(
        self, advantage: torch.Tensor, target: torch.Tensor, velocities: Mapping[Role, torch.Tensor]
    ) -> torch.Tensor:
        """Compute where the expected gradient is zero, from expectations given x_t: v* (B, ...).

        It is a minimum only where `curvature` is positive for that expectation of A.

        Args:
            advantage: `E[A | x_t]` (B,).
            target: `E[A u | x_t]` (B, ...).
            velocities: By role, the base and the anchors; "current" is what is asked for.
        """
        pulled = self.gain * target
        for role, gain in self.anchors.items():
            pulled = pulled + _times(gain, velocities[role])
        if self.base != "current":
            pulled = pulled - _times(self.gain * advantage, velocities[self.base])
        curvature = torch.as_tensor(self.curvature(advantage), dtype=target.dtype, device=target.device)
        return pulled / expand(curvature.expand(len(target)), target)

    def curvature(self, advantage: Gain) -> Gain:
        """Compute the factor of v in the gradient, for an expected advantage given x_t; below zero nothing holds v."""
        own = self.gain * advantage if self.base == "current" else 0.0
        return sum(self.anchors.values()) + own


def _times(coefficient: Gain, velocity: torch.Tensor) -> torch.Tensor:
    return weighed(velocity, expand(coefficient, velocity) if isinstance(coefficient, torch.Tensor) else coefficient)


ROWS: Mapping[str, Callable[..., Row]] = {
    "adrpo": lambda beta: Row("reference", {"reference": beta}),
    "awm": lambda beta_ref, beta_old, gain: Row("current", {"reference": beta_ref, "behaviour": beta_old}, gain),
    "nft": lambda beta, beta_ref: Row("behaviour", {"behaviour": beta, "reference": beta_ref}),
    "orw_w2 plain": lambda alpha: Row("current", {"reference": alpha}),
    "orw_w2 residual": lambda weight, alpha: Row("behaviour", {"behaviour": weight, "reference": alpha}),
    "ram": lambda strength, base: Row(base, {"reference": 1.0}, strength),
    "rvm": lambda beta_ref, beta_old, gain: Row("current", {"reference": beta_ref, "behaviour": beta_old}, gain),
}
"""Rows by method, as functions of its settings. A is the advantage, but the weight in `orw_w2 plain`, and the weight
less the baseline in `orw_w2 residual`, where v is pulled to v_old by the weight itself."""


def endpoint_loss(v: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute `|v - sg(v - gradient)|^2` (B,), mean over dimensions: the regression on the detached target.

    It is not negative, whatever the signs of the coefficients. Its gradient in v is `2 gradient / D`, without rounding,
    as that of `w |v - u|^2` is for the gradient `w (v - u)`.
    """
    return (gradient.detach() + (v - v.detach())).square().flatten(1).mean(1)


def advantages(
    reward: torch.Tensor, group: torch.Tensor, spread: Spread, maximum: float, centred: bool = True
) -> torch.Tensor:
    """Compute advantages (B,): rewards less the mean of their group, in units of a spread, clipped at `maximum`.

    Args:
        reward: (B,).
        group: (B,) int64 in [0, B).
        spread: Standard deviation of the group ("group"), of all rewards ("global"), or rewards' own units ("none").
        maximum: Largest size.
        centred: Whether means are taken off.

    Returns:
        (B,); exactly zero in a group whose rewards agree, where they are centred.
    """
    if spread == "group" and centred:
        return group_advantage(reward, group, maximum)
    own = reward - group_mean(reward, group, len(reward))
    std: torch.Tensor | float = 1.0
    if spread == "group":
        std = group_mean(own.square(), group, len(reward)).sqrt() + 1e-4
    elif spread == "global":
        std = reward.std(correction=0) + 1e-4
    return ((own if centred else reward) / std).clamp(-maximum, maximum)


def advantage_slope(reward_std: torch.Tensor, spread: Spread, group_size: int) -> torch.Tensor:
    """Compute how much the expected advantage of a sample rises per unit of its reward, where nothing is clipped.

    Its own share of its group's mean takes `1 / n` off. With "global" all contexts are taken to have the same rewards.
    With "group" rewards are taken to be normal: the regression of A on r is then `E[std_g] / std^2`, where
    `E[std_g] / std = sqrt(2 / n) Gamma(n / 2) / Gamma((n - 1) / 2)`.

    Args:
        reward_std: Standard deviation of the rewards within their groups, pooled; a scalar tensor, or (B,).
        spread: Unit of the advantages.
        group_size: n.
    """
    n = group_size
    std = reward_std / math.sqrt(1 - 1 / n)  # of all rewards of a context
    if spread == "none":
        return torch.full_like(reward_std, 1 - 1 / n)
    if spread == "global":
        return (1 - 1 / n) / (std + 1e-4)
    return math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / (std + 1e-4)


def stratified_times(
    n: int, strata: int, kind: TimeSampling | Literal["early"], generator: torch.Generator
) -> torch.Tensor:
    """Draw `strata` flow times for each of `n` samples, one in each part of equal probability: (n * strata,).

    "early" has density `2 (1 - t)`; the others are those of `sample_time`. Times of a sample follow one another.
    """

    def draw(rows: int) -> torch.Tensor:
        u = torch.rand(rows, strata, generator=generator, device=generator.device)
        u = ((u + torch.arange(strata, device=u.device)) / strata).clamp_max(1 - 2**-24)
        return 1 - (1 - u).sqrt() if kind == "early" else time_quantile(u, kind)

    return drawn(draw, n, generator).flatten()


def lagging_decay(step: int, flat: float, rate: float, hold: float) -> float:
    """Compute the share of the old policy that a refresh keeps, `min(max(0, (step - flat) rate), hold)`."""
    return min(max(0.0, (step - flat) * rate), hold)
