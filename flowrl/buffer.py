"""RolloutBuffer: what an iteration generated, preallocated on the training device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flowrl.types import Batch, Transitions


class RolloutBuffer:
    """Sample, context, reward and weight; and for algorithms that record paths, the sampler's noisy steps.

    Endpoint storage does not grow with the number of sampler steps, path storage does.

    Args:
        capacity: Samples it holds.
        latent_shape: Shape of one sample in the space of the flow.
        device: Training device.
        path_steps: Noisy sampler steps to keep of each sample; 0 keeps endpoints only.
        half: Keep samples in float16; paths stay in float32, their log-probabilities are of those very states.
    """

    def __init__(
        self,
        capacity: int,
        latent_shape: tuple[int, ...],
        device: torch.device | str,
        path_steps: int = 0,
        half: bool = False,
    ) -> None:
        self.capacity = capacity
        self.device = torch.device(device)
        self.x_1 = torch.zeros(
            capacity, *latent_shape, device=self.device, dtype=torch.float16 if half else torch.float32
        )
        self.contexts = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.reward = torch.zeros(capacity, device=self.device)
        self.weight = torch.ones(capacity, device=self.device)
        self.path_steps = path_steps
        if path_steps:
            self.states = torch.zeros(capacity, path_steps + 1, *latent_shape, device=self.device)
            self.log_prob = torch.zeros(capacity, path_steps, device=self.device)
            self.first_step = torch.zeros((), dtype=torch.long, device=self.device)
        self.size = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the storage takes."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, torch.Tensor))

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

    def add_path(self, states: torch.Tensor, log_prob: torch.Tensor, first_step: int) -> None:
        """Append the noisy steps of the batch that `add` appends next.

        Args:
            states: (B, path_steps + 1, *latent_shape).
            log_prob: (B, path_steps), mean over dimensions.
            first_step: Index of the first of them in the sampler; the same for the whole buffer.
        """
        here = slice(self.size, self.size + len(states))
        self.states[here].copy_(states)
        self.log_prob[here].copy_(log_prob)
        self.first_step.fill_(first_step)

    def all(self) -> Batch:
        """Everything in the buffer, in order; views, no copies (but of samples kept in float16)."""
        n = self.size
        return Batch(self.x_1[:n].float(), self.contexts[:n], self.reward[:n], self.weight[:n])

    def minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass in random order, in minibatches of `batch_size` (the last may be smaller).

        Indices are drawn and used on the device: no host synchronisation.
        """
        order = torch.randperm(self.size, generator=generator, device=self.device)
        for index in order.split(batch_size):
            yield self.rows(index)

    def rows(self, index: torch.Tensor) -> Batch:
        """The samples of these indices (B,), without their paths."""
        return Batch(self.x_1[index].float(), self.contexts[index], self.reward[index], self.weight[index])

    def transition_minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One pass over all recorded steps of all samples in random order, in minibatches of `batch_size` steps."""
        order = torch.randperm(self.size * self.path_steps, generator=generator, device=self.device)
        for chosen in order.split(batch_size):
            index, step = chosen // self.path_steps, chosen % self.path_steps
            steps = Transitions(
                self.states[index, step],
                self.states[index, step + 1],
                self.first_step + step,
                self.log_prob[index, step],
            )
            yield self.rows(index)._replace(transitions=steps)
