"""Further networks that an algorithm trains beside its flow, such as a critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flowrl.checks import of_one_kind
from flowrl.distributed.ranks import Ranks
from flowrl.errors import CheckpointError
from flowrl.training.optimizers import AdamW, adam_shapes, laid_out_like, step_unless


class TrainedNetwork:
    """A network with an optimizer of its own; `FlowAlgorithm.add_network` makes it.

    Args:
        module: The network, on the training device; the same on every rank.
        learning_rate: Learning rate of Adam.
        ranks: The ranks that train together; gradients are averaged over them.
    """

    def __init__(self, module: nn.Module, learning_rate: float, ranks: Ranks) -> None:
        self.module, self.ranks = module, ranks
        self.optimizer = AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def improve(self, loss: torch.Tensor) -> None:
        """Take a gradient step on a scalar loss; one whose gradient is not finite changes nothing."""
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.module.parameters())
        self.ranks.average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        step_unless((~norm.isfinite()).float(), self.optimizer)

    def regress(
        self, target: torch.Tensor, weight: torch.Tensor | float, *state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate numbers (B,) by their states, and take a step on the mean of `weight (estimate - target)^2`.

        Returns:
            The estimates (B,) from before the step, detached, and that mean.
        """
        value = self.module(*state)
        error = (weight * (value - target).square()).mean()
        self.improve(error)
        return value.detach(), error.detach()

    def state(self) -> dict[str, torch.Tensor]:
        """Collect the weights by their names, and the optimizer's moments as `moments.INDEX.NAME`."""
        moments = self.optimizer.state_dict()["state"]
        state = {f"moments.{i}.{key}": value for i, entry in moments.items() for key, value in entry.items()}
        return {**self.module.state_dict(), **state}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load what `state` gave.

        Raises:
            CheckpointError: It is of another network.
        """
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("moments."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        weights = {name: t for name, t in tensors.items() if not name.startswith("moments.")}
        try:
            odd = [name for name, own in self.module.state_dict().items() if not of_one_kind(weights[name], own)]
            self.module.load_state_dict(weights)
        except (LookupError, RuntimeError) as error:
            raise CheckpointError(f"A stored network does not fit this one: {error}.") from error
        parameters = list(self.module.parameters())
        for i, entry in moments.items():  # a fused step would read beyond one that is too small
            shapes = {key: tuple(value.shape) for key, value in entry.items()}
            fits = i < len(parameters) and shapes == adam_shapes(parameters[i])
            if not (fits and all(value.is_floating_point() for value in entry.values())):
                odd.append(f"moments.{i}")
        if odd:
            raise CheckpointError(f"A stored network does not fit this one: '{odd[0]}' is of another type or shape.")
        moments = {i: {k: laid_out_like(v, parameters[i]) for k, v in e.items()} for i, e in moments.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class ExtraState:
    """State of an algorithm beside its policy, registered once by name: tensors, and trained networks.

    A checkpoint stores it and gives it back: tensors in place, which must keep their shapes.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.networks: dict[str, TrainedNetwork] = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Collect all of it, by name."""
        own = {f"{name}.{key}": t for name, net in self.networks.items() for key, t in net.state().items()}
        return {**self.tensors, **own}

    def load(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Load what `state` gave.

        Raises:
            CheckpointError: Something is missing or of another shape; names it.
        """
        for name, tensor in self.tensors.items():
            if name not in stored or stored[name].shape != tensor.shape or not of_one_kind(stored[name], tensor):
                raise CheckpointError(f"The checkpoint holds no '{name}' of shape {tuple(tensor.shape)}.")
            tensor.copy_(stored[name])
        for name, network in self.networks.items():
            own = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
            if len(self.networks) == 1:  # checkpoints of version 0.1.0
                own |= {key: t for key, t in stored.items() if key.startswith("moments.")}
            network.load(own)
