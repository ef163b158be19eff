"""RWR: reward-weighted regression (Peters and Schaal 2007; Lee et al. 2023, arXiv 2302.12192) for flows.

Offline: draw samples of the reference once (or take given ones), then fit them with weights `exp(tau r)`: the result
is `q_ref e^{tau r} / Z`. Online: draw anew from the fitted flow in every iteration, which is ORW-CFM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.orw_w2 import ORWCFMW2, ORWConfig
from flowrl.registry import register_algorithm
from flowrl.training.given import read_samples
from flowrl.types import Role, Rows


@dataclass(frozen=True)
class RWRConfig(ORWConfig):
    """Settings of RWR."""

    mode: Literal["offline", "online"] = "offline"
    """"offline" fits samples of the reference (or of `data`), "online" those of the flow as it is fitted."""
    data: str = ""
    """File (safetensors) with given samples to fit offline: "x_1" (N, *latent_shape) and "contexts" (N,) int64."""
    target: Literal["residual", "plain"] = "plain"
    """"plain", as published; "residual" for what differs between rewards only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.mode in ("offline", "online"), f"mode must be 'offline' or 'online', not '{self.mode}'.")
        self.require(not self.data or self.mode == "offline", "data is what mode 'offline' fits; it needs that mode.")
        self.require(
            not self.data or self.coupling != "rectified",
            "There is no noise that given samples come from: data needs another coupling than 'rectified'.",
        )
        self.require(
            not self.data or self.target == "plain",
            "The residual target takes the samples to be the reference's own: data needs target 'plain'.",
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        found = super().idle() | ({"draw_steps": "for given samples"} if self.data else {})
        return found | ({"refresh_every": "unless mode is 'online'"} if self.mode == "offline" else {})


@register_algorithm("rwr")
class RWR(ORWCFMW2):
    """Reward-weighted regression."""

    replayable = True
    draws_ahead = True
    Config: ClassVar[type[FlowConfig]] = RWRConfig
    kind = "offline"
    tilt_setting = ("tau", 1)
    config: RWRConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        self.data = read_samples(Path(self.config.data), self, ("x_1",)) if self.config.data else None
        self.learns_from = "data" if self.config.data else "samples"

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep no further copy offline: samples and `v_old` are the reference's."""
        copies = super().copies_for(config)
        return copies - {"behaviour"} if config.mode == "offline" else copies

    @property
    def behaviour_role(self) -> Role:
        """The copy that draws the samples; offline, the reference."""
        return "reference" if self.config.mode == "offline" else super().behaviour_role

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute lambda of the tilt that is aimed at, offline: tau, over the spread where rewards are standardised."""
        if self.config.mode == "online":
            return None
        return self.config.tau / (torch.ones_like(reward_std) if self.config.standardise == "none" else reward_std)

    def contexts(self) -> torch.Tensor:
        """Take the contexts of given samples, where there are any; draw others."""
        if self.data is None:
            return super().contexts()
        _, contexts = self.data
        self.rows = torch.randint(len(contexts), (self.config.n_samples,), generator=self.generator, device=self.device)
        return contexts[self.rows]

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents of the reference or of the flow in training (online), or take given ones."""
        if self.data is None:
            return super().draw(context_ids)
        n = len(context_ids) * self.ranks.world_size
        rows, self.rows = self.rows[:n], self.rows[n:]
        return self.data[0][0][self.ranks.shard(rows)], {}
