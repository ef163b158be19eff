"""Gradients that are not finite: looked at once an iteration, and explained when they do not end."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from flowrl.distributed.sharding import unsharded
from flowrl.errors import NonFiniteError
from flowrl.functional.losses import effective_sample_size

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


class BadUpdates:
    """Counter of gradient steps that are left out.

    Attributes:
        total: So far.
        in_a_row: Until now, as far as looked at.
        zeros: Gradient steps so far whose gradient was zero.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = self.zeros = 0
        self._noted: list[torch.Tensor] = []  # since the last look, of each step whether it is bad, and its norm

    def note(self, bad: torch.Tensor, norm: torch.Tensor) -> None:
        """Take in a step and its gradient's norm; `bad` is a scalar, 0 or 1. No host synchronisation."""
        self._noted += (bad, norm)

    def look(self) -> int:
        """Count the bad ones since the last look."""
        noted = torch.stack(self._noted).tolist() if self._noted else []
        self._noted.clear()
        marks, norms = noted[::2], noted[1::2]
        for mark in marks:
            self.in_a_row = self.in_a_row + 1 if mark else 0
        bad = int(sum(marks))
        self.total, self.zeros = self.total + bad, self.zeros + norms.count(0)
        return bad


def check_updates(model: FlowAlgorithm) -> None:
    """Warn of gradient steps of this iteration that were left out.

    Raises:
        NonFiniteError: There were too many in a row; says what to look at.
    """
    bad = model.bad_updates.look()
    if bad and model.ranks.is_main:
        warnings.warn(f"{bad} gradient steps were left out: their gradients are not finite.", stacklevel=3)
    if model.bad_updates.in_a_row >= model.config.max_bad_updates:
        raise NonFiniteError(
            f"The gradients of the last {model.bad_updates.in_a_row} gradient steps are not finite, and nothing was "
            f"learnt from them: {'; '.join(_facts(model))}. Lower the learning rate or tau, or take precision float32; "
            "the weights are those of before."
        )


def _facts(model: FlowAlgorithm) -> list[str]:
    """List loss of a minibatch, weights, samples, settings, and the first parameters that are not finite."""
    loss, _ = model.loss(next(model.minibatches()))
    loss.backward()
    parameters, rollout = model.policy.parameters_of("current"), model.buffer.all()
    grads = {name: unsharded(p.grad) for name, p in parameters.items() if p.grad is not None}
    bad_grads = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    bad_weights = [name for name, p in parameters.items() if not bool(unsharded(p.detach()).isfinite().all())]
    model.policy.optimizer.zero_grad(set_to_none=True)
    given, word = rollout.coefficient, "weights" if model.has_weights else "advantages"
    facts = [
        f"loss of a minibatch {loss.item():.3g}",
        f"{word} {given.min().item():.3g} to {given.max().item():.3g}",
        *([f"effective sample share {(effective_sample_size(given) / len(given)).item():.3g}"] * model.has_weights),
        f"samples up to {rollout.x_1.abs().amax().item() if rollout.x_1.numel() else 0:.3g}",
        f"learning rate {model.config.learning_rate:g}",
    ]
    if hasattr(model.config, "tau"):
        facts.append(f"tau {model.config.tau:g}")
    if bad_grads:
        facts.append(f"{len(bad_grads)} of {len(parameters)} parameters have such gradients, first '{bad_grads[0]}'")
    if bad_weights:
        facts.append(f"the weights of '{bad_weights[0]}' are not finite")
    return facts
