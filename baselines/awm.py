"""AWM, advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050): the flow-matching error as a log-likelihood.

Repeat: draw groups of samples, compare their rewards, and with `l = |v - u|^2` on fresh noise and times minimise

    max(-A rho, -A clip(rho)),  rho = e^(l_old - l)     + beta_ref |v - v_ref|^2 + beta_old |v - v_old|^2

On policy (rho = 1, as published code has it) the gradient is that of `A l`: A (v - u), of both signs. Where advantages
are negative only the anchors hold the velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import ROWS, Row
from flowrl.functional.losses import clip_fraction, squared_error
from flowrl.registry import register_algorithm
from flowrl.training.endpoints import EndpointAlgorithm, EndpointConfig
from flowrl.types import Batch, Role


@dataclass(frozen=True)
class AWMConfig(EndpointConfig):
    """Settings of AWM."""

    beta_ref: float = 1e-3
    """Strength of |v - v_ref|^2; published 1e-4 to 3e-3."""
    beta_old: float = 1.0
    """Strength of |v - v_old|^2 with the old policy, an average that follows the trained one (b_ema); published 1.
    Advantages are divided by max_advantage, so that 1 holds all of them."""
    clip_range: float = 0.0
    """Ratios e^(l_old - l) beyond 1 +- this get no gradient, as in the paper; 0 leaves the ratio at one, as in
    published code."""
    error_weighting: Literal["square", "ghuber"] = "square"
    """"square"; or "ghuber", as published code: the error m counts as ((m + 1e-10)^p - 1e-10^p) (1 - t) / p, whose
    minimiser is another."""
    ghuber_power: float = 0.25
    """p of "ghuber"; published 0.25."""
    noisings: int = 6
    """How often each sample of a minibatch is noised, at times of as many equal parts of [0, 1]; published 6."""
    decay_rate: float = 0.001
    """By how much the share that a refresh keeps of the old policy grows per iteration; published 0.001."""
    decay_hold: float = 0.3
    """Largest share of the old policy that a refresh keeps; published 0.3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta_ref", "beta_old", "clip_range"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}.")
        self.require(0 < self.ghuber_power <= 1, f"ghuber_power must be in (0, 1], not {self.ghuber_power}.")

    def row(self) -> Row:
        """Give `A (v - u) + beta_ref (v - v_ref) + beta_old (v - v_old)`, with A in units of its clip."""
        return ROWS["awm"](self.beta_ref, self.beta_old, 1 / self.max_advantage)

    def caution(self) -> str:
        """Say that the anchors are too weak, where they are."""
        text = super().caution()
        return text and f"{text} Set beta_old to 1 (as published), or both so that they are 1 in sum."

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | (
            {} if self.error_weighting == "ghuber" else {"ghuber_power": "unless error_weighting is 'ghuber'"}
        )


@register_algorithm("awm")
class AWM(EndpointAlgorithm):
    """Advantage-weighted matching: policy gradients with the flow-matching error as a log-likelihood."""

    replayable = True
    tilt_setting = ("beta_ref", -1)
    Config: ClassVar[type[FlowConfig]] = AWMConfig
    config: AWMConfig

    @classmethod
    def copies_for(cls, config: AWMConfig) -> set[Role]:
        """Keep the old policy for the ratio, too."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.clip_range else copies

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the clipped objective and its anchors, as a regression with the same gradient."""
        config = self.config
        batch, pair = self.noised(batch)
        v, a = self.velocity(pair), batch.advantage
        velocities: dict[Role, torch.Tensor] = {"current": v}
        miss = squared_error(v.detach(), pair.u)
        figures = {}
        if config.clip_range:
            velocities["behaviour"] = self.velocity(pair, "behaviour")
            ratio = (squared_error(velocities["behaviour"], pair.u) - miss).exp()
            clipped = torch.where(a > 0, ratio > 1 + config.clip_range, ratio < 1 - config.clip_range)
            a = (a * ratio).masked_fill(clipped, 0)
            figures["clip_fraction"] = clip_fraction(ratio, config.clip_range, self.importance(batch))
        if config.error_weighting == "ghuber":
            a = a * (1 - pair.t) * (miss + 1e-10).pow(config.ghuber_power - 1)
        loss, others = self.follow(config.row(), batch, pair, a, velocities)
        return loss, {**figures, **others}

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give lambda of the tilt at which it stops: `dA/dr / (max_advantage beta_ref)`.

        None without beta_ref, and for "ghuber", which weighs samples by their errors.
        """
        return None if self.config.error_weighting == "ghuber" else super().tilt_of(reward_std)
