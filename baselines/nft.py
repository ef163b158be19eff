"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): contrast of a positive and a negative policy.

Repeat: draw groups of samples of the old policy, turn each reward into an optimality `r = 1/2 + A / (2 clip)` in
[0, 1], and with `v+ = (1 - beta) v_old + beta v`, `v- = (1 + beta) v_old - beta v` minimise

    (r |v+ - u|^2 + (1 - r) |v- - u|^2) / beta

on fresh noise and times; then let the old policy follow slowly. The gradient in v is that of
`beta (v - v_old) - (2 r - 1) (u - v_old)`: a row of `flowrl.functional.endpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.functional.endpoint import ROWS, Row, Spread
from flowrl.registry import register_algorithm
from flowrl.training.endpoints import EndpointAlgorithm, EndpointConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class NFTConfig(EndpointConfig):
    """Settings of DiffusionNFT."""

    beta: float = 1.0
    """How far the positive and the negative policy lie from the old one; published 1, 0.1 for text and mixed
    rewards."""
    beta_ref: float = 1e-4
    """Strength of |v - v_ref|^2; published code 1e-4, the paper 0."""
    spread: Spread = "global"
    """Unit of advantages: the standard deviation of the rewards of their group ("group"), of all rewards of the
    iteration ("global", as published), or none: the rewards' own ("none")."""
    scale_by_clip: bool = True
    """Multiply all but |v - v_ref|^2 by max_advantage, as published code does, whose adv_clip that is."""
    error: Literal["velocity", "x1_hat"] = "velocity"
    """Error of the branches: of the velocity, as in the paper, or of the sample estimated in one step, x1_hat, as in
    published code: (1 - t)^2 times the other."""
    adaptive: bool = False
    """Divide each branch by its own mean absolute error, at least 1e-5, as published code does; the minimiser is then
    no longer that of the paper."""
    decay_rate: float = 0.001
    """By how much the share that a refresh keeps of the old policy grows per iteration; published 0.001 (decay_hold
    0.5), or 0.0075 (decay_flat 75, decay_hold 0.999); 0 copies the trained one."""
    decay_hold: float = 0.5
    """Largest share of the old policy that a refresh keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta > 0, f"beta must be positive, not {self.beta}.")
        self.require(self.beta_ref >= 0, f"beta_ref must not be negative, not {self.beta_ref}.")

    def row(self) -> Row:
        """Give `beta (v - v_old) + beta_ref (v - v_ref) - rho (u - v_old)`, the first and the last scaled."""
        scale = self.max_advantage if self.scale_by_clip else 1.0
        return ROWS["nft"](scale * self.beta, self.beta_ref)._replace(gain=scale / self.max_advantage)


@register_algorithm("nft")
class NFT(EndpointAlgorithm):
    """Contrast of a positive and a negative policy around the old one (DiffusionNFT)."""

    kind = "advantages.contrast"
    replayable = True
    tilt_setting = ("beta_ref", -1)
    Config: ClassVar[type[FlowConfig]] = NFTConfig
    config: NFTConfig

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the contrast, as a regression with the same gradient."""
        config, row = self.config, self.config.row()
        batch, pair = self.noised(batch)
        v, v_old = self.velocity(pair), self.velocity(pair, "behaviour")
        good = 0.5 + batch.advantage / (2 * config.max_advantage)
        bad = 1 - good
        near = 1 - pair.t if config.error == "x1_hat" else torch.ones_like(pair.t)
        good, bad = near.square() * good, near.square() * bad
        if config.adaptive:
            step = config.beta * (v.detach() - v_old)
            misses = ((v_old + side - pair.u).abs().flatten(1).mean(1) for side in (step, -step))
            good, bad = (share / (near * miss).clamp_min(1e-5) for share, miss in zip((good, bad), misses))
        rho = (good - bad) * config.max_advantage  # in the row's unit, that of the advantage
        anchors = {**row.anchors, "behaviour": (good + bad) * row.anchors["behaviour"]}
        return self.follow(row._replace(anchors=anchors), batch, pair, rho, {"current": v, "behaviour": v_old})

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Give lambda of the tilt at which it stops: `dA/dr / beta_ref`, over max_advantage unless scaled by it.

        None without beta_ref, and for an adaptive loss or that of x1_hat, which weigh samples and times otherwise.
        """
        return None if self.config.adaptive or self.config.error == "x1_hat" else super().tilt_of(reward_std)
