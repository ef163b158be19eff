"""Types shared by all modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

Condition = tuple[torch.Tensor, ...]
"""Encoded contexts: tensors whose first dimension is the batch; empty for an unconditional flow."""

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A velocity field with its condition bound: `(x_t (B, ...), t (B,)) -> v (B, ...)`."""

Role = Literal["current", "reference", "behaviour", "ema"]
"""Which copy of the velocity network: trained, frozen, lagged sampler, moving average."""

Contexts = Sequence[Any]
"""What a sample is conditioned on, one entry per sample: prompts, labels, or None."""


@dataclass(frozen=True)
class RewardOutput:
    """What an environment says of a batch of samples."""

    reward: torch.Tensor  # (B,) float32, finite
    components: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (B,)
    info: dict[str, Any] = field(default_factory=dict)

    def at(self, kept: torch.Tensor, index: torch.Tensor) -> RewardOutput:
        """The output of samples `index` (B,), where this is that of samples `kept` (M,), among which they are."""
        row = torch.zeros(int(kept.max()) + 1, dtype=torch.long, device=kept.device)
        row[kept] = torch.arange(len(kept), device=kept.device)
        rows = row[index]
        return RewardOutput(self.reward[rows], {key: value[rows] for key, value in self.components.items()}, self.info)


class Transitions(NamedTuple):
    """Steps of an SDE sampler, one per row: from `x_k` at its k-th time to `x_next` at the next."""

    x_k: torch.Tensor  # (B, *latent_shape)
    x_next: torch.Tensor  # (B, *latent_shape)
    k: torch.Tensor  # (B,) int64, index into the sampler's times
    log_prob: torch.Tensor  # (B,) of the step as it was drawn, mean over dimensions


class Batch(NamedTuple):
    """A minibatch of the rollout buffer, on the training device."""

    x_1: torch.Tensor  # (B, *latent_shape)
    contexts: torch.Tensor  # (B,) int64, indices into the environment's contexts
    reward: torch.Tensor  # (B,)
    weight: torch.Tensor  # (B,) what the algorithm's `score` made of the reward
    transitions: Transitions | None = None  # only where an algorithm records paths
