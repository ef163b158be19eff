"""Two networks of one flow, of which each is given the times of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from flowrl.types import has_values


class ByTime(nn.Module):
    """Pair of networks, one for the noisy times and one for the others, as one network.

    A batch of mixed times is split between them. At times of one side only its network runs, and the other gets a
    gradient of 0; over several ranks both run while gradients are made, and else what any rank needs, as ranks exchange
    weights and gradients network by network.

    Args:
        transformer: Network for times from `boundary` on, counted by the noise.
        transformer_2: Network for the rest.
        boundary: Time at which they meet.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    def parts(self) -> dict[str, nn.Module]:
        """Give both networks by name."""
        return {"transformer": self.transformer, "transformer_2": self.transformer_2}

    @property
    def config(self) -> Any:
        """Configuration of the first network; that of the second is of the same sizes."""
        return self.transformer.config

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        for network in self.parts().values():
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    def forward(self, timestep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        """Run each row (B, ...) of the inputs through the network of its time (B,)."""
        noisy = timestep >= self.boundary
        used = self._used(noisy)
        if used != (True, True):
            network, other = self.parts().values() if used[0] else reversed(self.parts().values())
            if torch.is_grad_enabled():
                _leave_no_gradient(other)
            return network(timestep=timestep, **inputs)
        whole: torch.Tensor | None = None
        for network, index in zip(self.parts().values(), _rows(noisy)):
            weight = float(len(index) > 0)
            index = index if weight else index.new_zeros(1)  # another rank needs this network: run it for nothing
            own = {name: part[index] if isinstance(part, torch.Tensor) else part for name, part in inputs.items()}
            predicted = weight * network(timestep=timestep[index], **own)[0]
            whole = predicted.new_zeros(len(timestep), *predicted.shape[1:]) if whole is None else whole
            whole = whole.index_add(0, index, predicted)
        assert whole is not None
        return (whole,)

    def _used(self, noisy: torch.Tensor) -> tuple[bool, bool]:
        """Tell which of the networks are to run, the same on every rank."""
        if not has_values(noisy):
            return True, torch.is_grad_enabled()
        sides = torch.stack([noisy.any(), ~noisy.all()]).float()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            if torch.is_grad_enabled():
                return True, True
            distributed.all_reduce(sides, distributed.ReduceOp.MAX)
        first, second = sides.bool().tolist()
        return first, second


def _leave_no_gradient(network: nn.Module) -> None:
    """Give trained weights that have no gradient one of 0, for which an optimizer takes a step, as on several ranks."""
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _rows(noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the indices of noisy rows and of the others; without values to tell, of both halves."""
    if has_values(noisy):
        return noisy.nonzero().flatten(), (~noisy).nonzero().flatten()
    n = len(noisy)
    first, second = torch.arange(n, device=noisy.device).split([(n + 1) // 2, n // 2])
    return first, second
