"""Replay of minibatches: their losses and gradients from CUDA graphs, for algorithms that say that it can be done."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.training.hooks import LaterChecks
from flowrl.types import Batch

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm
    from flowrl.training.policy import FlowPolicy


class Minibatches:
    """Losses and gradients of minibatches, as `FlowAlgorithm.gradient` computes them, replayed where they can be.

    It does not keep the model, which keeps it: in a circle, what is deleted stays on the device for a while.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        self.parameters = list(policy.parameters_of("current").values())
        self.names: tuple[str, ...] = ()

    @staticmethod
    def are_replayed(model: FlowAlgorithm) -> bool:
        """Tell whether they are: what a class says of its loss need not hold for that of a subclass."""
        said = vars(type(model)).get("replayable", False)
        return said and model.policy.graphs.is_on and isinstance(model.checks, LaterChecks)

    def gradient(self, model: FlowAlgorithm, batch: Batch, n_pending: int) -> dict[str, torch.Tensor]:
        """Add the gradient of a minibatch to those of `n_pending` before it; its loss and figures."""
        rows = tuple(batch.extra)

        def work(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if not n_pending:
                for parameter in self.parameters:
                    parameter.grad = None
            x_1, context_ids, reward, coefficient, group, *extra = tensors
            figures = model.gradient(Batch(x_1, context_ids, reward, coefficient, group, dict(zip(rows, extra))))
            self.names = tuple(figures)
            return tuple(figures.values())

        place = self.parameters[0].grad
        key = rows, model.buffer.size, None if place is None else place.data_ptr()
        values = model.policy.graphs.run(
            "An update", key, work, *batch[:5], *batch.extra.values(), gradients=self.parameters
        )
        return dict(zip(self.names, values))
