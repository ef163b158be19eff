"""Types shared by all modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor  # torch itself has imported it

Condition = tuple[torch.Tensor, ...]
"""Encoded contexts: tensors whose first dimension is the batch; empty for an unconditional flow."""

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A velocity field with its condition bound: `(x_t (B, ...), t (B,)) -> v (B, ...)`."""

Role = Literal["current", "reference", "behaviour", "ema"]
"""Role of a copy of the velocity network: trained, frozen, lagged sampler, moving average."""

Compile = Literal["auto", "off", "blocks", "whole"]
"""What of a network is compiled."""

Switch = Literal["auto", "on", "off"]
"""Whether something is done: "auto" decides by the device and what is known of the run."""

Contexts = Sequence[Any]
"""Contexts of samples, one entry per sample: prompts, labels, or None."""


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch of samples, and their components."""

    reward: torch.Tensor  # (B,) float32, finite
    components: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (B,)
    info: dict[str, Any] = field(default_factory=dict)

    def detached(self) -> RewardOutput:
        """Cut the graph that led to it."""
        return RewardOutput(self.reward.detach(), {k: v.detach() for k, v in self.components.items()}, self.info)

    def at(self, kept: torch.Tensor, index: torch.Tensor) -> RewardOutput:
        """Pick the rows of samples `index` (B,), all of them in `kept` (M,), whose output this is."""
        row = torch.zeros(int(kept.max()) + 1, dtype=torch.long, device=kept.device)
        row[kept] = torch.arange(len(kept), device=kept.device)
        rows = row[index]
        return RewardOutput(self.reward[rows], {key: value[rows] for key, value in self.components.items()}, self.info)


Rows = dict[str, torch.Tensor]
"""Rows that belong to each sample, by name: tensors whose first dimension is the batch."""


class Pair(NamedTuple):
    """Samples paired with noise, and points between them: where a flow-matching error is taken."""

    x_0: torch.Tensor  # (B, *latent_shape), noise
    t: torch.Tensor  # (B,)
    x_t: torch.Tensor  # (B, *latent_shape), (1 - t) x_0 + t x_1
    u: torch.Tensor  # (B, *latent_shape), x_1 - x_0
    cond: Condition


class Transitions(NamedTuple):
    """Steps of an SDE sampler, one per row: from `x_k` at its k-th time to `x_next` at the next."""

    x_k: torch.Tensor  # (B, *latent_shape)
    x_next: torch.Tensor  # (B, *latent_shape)
    k: torch.Tensor  # (B,) int64, index into the sampler's times
    log_prob: torch.Tensor  # (B,) of the step as it was drawn, mean over dimensions


class Batch(NamedTuple):
    """A minibatch of the rollout buffer, on the training device; or all of the buffer."""

    x_1: torch.Tensor  # (B, *latent_shape)
    context_ids: torch.Tensor  # (B,) int64, indices into the environment's contexts
    reward: torch.Tensor  # (B,)
    coefficient: torch.Tensor  # (B,) weights or advantages, from `weigh` or `advantage`
    group: torch.Tensor  # (B,) int64, equal for samples that were drawn together for one context
    extra: Mapping[str, torch.Tensor] = MappingProxyType({})  # name -> (B, ...), rows that `draw` gave with the samples

    @classmethod
    def of(cls, x_1: torch.Tensor, context_ids: torch.Tensor) -> Batch:
        """Make a batch of samples (B, *latent_shape) and contexts (B,) alone: without rewards, each its own group."""
        nothing = torch.zeros(len(x_1), device=x_1.device)
        return cls(x_1, context_ids, nothing, nothing, torch.arange(len(x_1), device=x_1.device))

    @property
    def weight(self) -> torch.Tensor:
        """Weights (B,) that `weigh` gave, not negative."""
        return self.coefficient

    @property
    def advantage(self) -> torch.Tensor:
        """Advantages (B,) that `advantage` gave, of both signs."""
        return self.coefficient


def has_values(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has values, or shape and type alone, as in a prediction of memory."""
    return not isinstance(tensor, FakeTensor)


def version_of(tensor: torch.Tensor) -> int:
    """Count the changes in place that torch has seen of a tensor; 0 under `inference_mode`, where it counts none."""
    return 0 if tensor.is_inference() else tensor._version
