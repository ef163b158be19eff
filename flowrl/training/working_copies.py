"""Working copies: a role's network as passes without gradients by its weights use it.

Weights are in the type that the network computes in, and the role's adapter is merged into the matrices that it adapts:
no casts and no further matrix products. A copy is made anew from the weights in float32 when they have changed, never
merged and unmerged in place, which loses bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flowrl.models.base import VelocityModel
from flowrl.models.long_prompts import silenced
from flowrl.types import Role


def sharing_copy(network: nn.Module) -> nn.Module:
    """Copy the structure of a network; its parameters and buffers are the same tensors."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())}).eval()


class WorkingCopy:
    """A copy of a role's network that is made anew when the role's weights have changed.

    Args:
        model: The flow around the copy.
        sources: Parameters that it is made of.

    Attributes:
        nbytes: Size of what it does not share.
    """

    nbytes = 0

    def __init__(self, model: VelocityModel, sources: Sequence[torch.Tensor]) -> None:
        self.model, self.sources = model, sources
        self._version: int | None = None

    def expire(self) -> None:
        """Make it anew before the next use, whatever its sources say."""
        self._version = None

    def fresh(self) -> VelocityModel:
        """Give the flow around the copy, made anew where a source was changed in place."""
        version = sum(source._version for source in self.sources)
        if version != self._version:
            with torch.no_grad():
                self._make()
            self._version = version
        return self.model

    def _make(self) -> None:
        """Write the weights of the copy."""


class MergedCopy(WorkingCopy):
    """A network with the adapter of a role merged into a copy of the adapted matrices; the rest is shared.

    Roles of a large network take turns in one copy, which can be as large as the network.

    Args:
        plain: The flow around the network without adapters.
        adapted: Its adapted layers by name, with the adapters of all roles.
        role: Whose adapter.
        sources: Parameters of that adapter.
        other: That of another role, to take turns with.
    """

    def __init__(
        self,
        plain: VelocityModel,
        adapted: Mapping[str, Any],
        role: Role,
        sources: Sequence[torch.Tensor],
        other: MergedCopy | None = None,
    ) -> None:
        self.role, self.pairs = role, list[tuple[nn.Parameter, Any]]()
        self.merged: list[Role] = []  # of one: whose adapter is in the matrices
        if other is not None:
            super().__init__(other.model, sources)
            self.pairs, self.merged = other.pairs, other.merged
            return
        super().__init__(plain.with_network(sharing_copy(plain.network)), sources)
        for name, layer in adapted.items():
            own = self.model.network.get_submodule(name)
            own.weight = nn.Parameter(torch.empty_like(layer.get_base_layer().weight), requires_grad=False)
            self.pairs.append((own.weight, layer))
            self.nbytes += own.weight.nbytes

    def fresh(self) -> VelocityModel:
        """Give the flow around the copy, made anew also where it was another role's."""
        if self.merged != [self.role]:
            self.expire()
        return super().fresh()

    def _make(self) -> None:
        self.merged[:] = [self.role]
        generator = torch.Generator(self.pairs[0][0].device).manual_seed(0)  # the same noise each time: no flicker
        for weight, layer in self.pairs:
            merged = layer.get_base_layer().weight.float() + layer.get_delta_weight(self.role).float()
            weight.copy_(merged if weight.dtype == torch.float32 else rounded_at_random(merged, generator))


def rounded_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 to bfloat16 up or down at random, right on average: (...), still float32.

    Frozen weights lie on bfloat16's grid; rounding to the nearest would lose every change of less than half a step.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)


class CastCopy(WorkingCopy):
    """A copy of a network in another type.

    Args:
        model: The flow around a role's own network.
        precision: Type of the copy.
    """

    def __init__(self, model: VelocityModel, precision: torch.dtype) -> None:
        self.own = [*model.network.parameters(), *model.network.buffers()]
        network = copy.deepcopy(model.network).requires_grad_(False).eval()
        with silenced():  # diffusers advises against casts of whole networks, also of those that have no part to keep
            network.to(precision)
        super().__init__(model.with_network(network), self.own)
        self.copies = [*network.parameters(), *network.buffers()]
        self.nbytes = sum(t.nbytes for t in self.copies)

    def _make(self) -> None:
        for copied, own in zip(self.copies, self.own):
            copied.copy_(own)
