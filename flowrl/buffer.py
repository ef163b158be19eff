"""RolloutBuffer: what an iteration generated, preallocated on the training device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flowrl.types import Batch


class RolloutBuffer:
    """Endpoint storage: sample, context, reward and weight; nothing of the path that led to the sample.

    Its size does not depend on the number of sampler steps.

    Args:
        capacity: Samples it holds.
        latent_shape: Shape of one sample in the space of the flow.
        device: Training device.
    """

    def __init__(self, capacity: int, latent_shape: tuple[int, ...], device: torch.device | str) -> None:
        self.capacity = capacity
        self.device = torch.device(device)
        self.x_1 = torch.zeros(capacity, *latent_shape, device=self.device)
        self.contexts = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.reward = torch.zeros(capacity, device=self.device)
        self.weight = torch.ones(capacity, device=self.device)
        self.size = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""
        return sum(t.nbytes for t in (self.x_1, self.contexts, self.reward, self.weight))

    @property
    def full(self) -> bool:
        """Whether another sample would not fit."""
        return self.size >= self.capacity

    def reset(self) -> None:
        """Forget the contents; the storage stays."""
        self.size = 0

    def add(self, x_1: torch.Tensor, contexts: torch.Tensor, reward: torch.Tensor) -> None:
        """Append a batch: (B, *latent_shape), (B,), (B,).

        Raises:
            IndexError: The batch does not fit.
        """
        end = self.size + len(x_1)
        if end > self.capacity:
            raise IndexError(f"The buffer holds {self.capacity} samples, {self.size} are in it; {len(x_1)} do not fit.")
        self.x_1[self.size : end].copy_(x_1)
        self.contexts[self.size : end].copy_(contexts)
        self.reward[self.size : end].copy_(reward)
        self.size = end

    def all(self) -> Batch:
        """Everything in the buffer, in order; views, no copies."""
        n = self.size
        return Batch(self.x_1[:n], self.contexts[:n], self.reward[:n], self.weight[:n])

    def minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in random order, in minibatches of `batch_size` (the last may be smaller).

        Indices are drawn and used on the device: no host synchronisation.
        """
        order = torch.randperm(self.size, generator=generator, device=self.device)
        for index in order.split(batch_size):
            yield Batch(self.x_1[index], self.contexts[index], self.reward[index], self.weight[index])
