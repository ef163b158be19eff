"""Checks of what an algorithm's own methods give, with messages that name the method.

Types and shapes, which cost nothing to look at, in every iteration; values, and what minibatches give, in the first.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flowrl.checks import described, is_finite
from flowrl.errors import ConfigError
from flowrl.types import Batch, version_of

HOOKS = (
    *("contexts", "draw", "reward", "weigh", "advantage", "order", "loss", "refresh", "refresh_decay"),
    *("pair", "velocity", "error", "reward_of", "cautions", "copies_for", "couple", "read", "rows_of"),
    *("tilt_of", "may_refresh"),
)
"""Methods that a subclass of `FlowAlgorithm` replaces or calls."""
RESERVED = ("loss", "grad_norm", "learning_rate", "n_updates", "bad_updates")
"""Figures of updates that flowrl measures itself: a loss cannot put its own in their place."""
FORMER = {
    "score": "weigh (for weights) or advantage",
    "draw_contexts": "contexts",
    "draw_latents": "draw",
    "objective": "draw, whose rows weigh gets",
    "observe": "weigh or advantage, which are called once an iteration",
    "minibatches": "order",
    "sync": "refresh",
    "extra_state": "keep or add_network, called in _setup_model",
    "load_extra_state": "keep or add_network, called in _setup_model",
}
"""Hooks of earlier versions, and what took their place."""


def check_names(cls: type, base: type) -> None:
    """Check that no public method of a subclass is nearly a hook's name: it would never be called.

    Raises:
        ConfigError: One is; names the hook.
    """
    for parent in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(parent).items():
            if name.startswith("_") or not callable(value) or isinstance(value, type):
                continue
            if hasattr(base, name) and name not in FORMER:
                continue
            meant = FORMER.get(name) or next(iter(difflib.get_close_matches(name, HOOKS, 1, 0.8)), None)
            if meant is not None and meant != name:
                raise ConfigError(
                    f"{parent.__name__}.{name} is never called; the method for it is {meant}. Rename it, or give it a "
                    "leading underscore if it is a helper of your own."
                )
    own = [name for name in ("weigh", "advantage") if getattr(cls, name) is not getattr(base, name)]
    if len(own) > 1:
        raise ConfigError(f"{cls.__name__} has both weigh and advantage: rewards become weights or advantages.")


class HookChecks:
    """Checks of an algorithm's first iteration.

    Each raises a ConfigError that names the method, what it gave and what it must give.

    Args:
        name: The algorithm's class.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _fail(self, method: str, gave: str, must: str) -> None:
        raise ConfigError(f"{self.name}.{method} gave {gave}; it must give {must}.")

    def contexts(self, ids: Any, n: int, n_contexts: int) -> None:
        """Check context indices."""
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.long or ids.shape != (n,):
            self._fail("contexts", described(ids), f"int64 indices of shape ({n},), one per sample (n_samples)")
        elif not bool(((ids >= 0) & (ids < n_contexts)).all()):
            self._fail("contexts", f"indices from {ids.min()} to {ids.max()}", f"indices below {n_contexts}")

    def draw(self, drawn: Any, n: int, shape: tuple[int, ...]) -> None:
        """Check samples and their rows."""
        must = f"(x_1 ({', '.join(map(str, (n, *shape)))}), {{name: tensor ({n}, ...)}})"
        if not isinstance(drawn, tuple) or len(drawn) != 2:
            self._fail("draw", described(drawn), must)
        x_1, extra = drawn
        if not isinstance(x_1, torch.Tensor) or x_1.shape != (n, *shape):
            self._fail("draw", f"x_1 {described(x_1)}", must)
        self._check_rows("draw", extra, n, must, ())

    def rows_of(self, rows: Any, n: int, drawn: Iterable[str]) -> None:
        """Check rows that a reward's output is made into, beside those that were `drawn`."""
        self._check_rows("rows_of", rows, n, f"{{name: tensor ({n},)}}", drawn)

    def cautions(self, texts: Any) -> None:
        """Check texts by kind."""
        if not isinstance(texts, Mapping) or not all(isinstance(text, str) for text in texts.values()):
            self._fail("cautions", described(texts), "texts by kind, {'ess': \"Lower tau.\"}")

    def tilt_of(self, tilt: Any) -> None:
        """Check a lambda."""
        is_one = isinstance(tilt, torch.Tensor) and tilt.dim() == 0
        if not (tilt is None or is_one or is_finite(tilt)):
            self._fail("tilt_of", described(tilt), "a number or scalar tensor, or None where it aims at no tilt")

    def _check_rows(self, method: str, extra: Any, n: int, must: str, taken: Iterable[str]) -> None:
        if not isinstance(extra, Mapping):
            self._fail(method, described(extra), must)
        for name, rows in extra.items():
            if not isinstance(rows, torch.Tensor) or rows.dim() == 0 or len(rows) != n:
                self._fail(method, f"{described(rows)} as '{name}'", f"a tensor of first dimension {n} for each name")
            if name in ("x_1", "part", *taken):
                self._fail(method, f"rows named '{name}'", f"other names than {' and '.join(('x_1', 'part', *taken))}")

    def _check_shape(self, method: str, values: Any, n: int) -> None:
        if not isinstance(values, torch.Tensor) or values.shape != (n,):
            self._fail(method, described(values), f"one number per sample, shape ({n},)")

    @contextmanager
    def untouched(self, method: str, rollout: Batch) -> Iterator[None]:
        """Check that a method leaves the samples and their rewards as they are: logs and losses show the same ones."""
        versions = [version_of(rows) for rows in rollout[:5]]
        yield
        for name, rows, before in zip(Batch._fields, rollout[:5], versions):
            if version_of(rows) != before:
                raise ConfigError(
                    f"{self.name}.{method} changes rollout.{name} in place, which is in logs and minibatches, too: "
                    f"work on a copy, rollout.{name}.clone(), or without x -= ... and x.sub_(...)."
                )

    def coefficient(self, method: str, values: Any, reward: torch.Tensor) -> None:
        """Check weights or advantages of these rewards (B,)."""
        self._check_shape(method, values, len(reward))
        if not bool(values.isfinite().all()):
            wide = ". Their squares are beyond float32: scale the reward down" if reward.abs().max() > 1e18 else ""
            of = f"of rewards from {reward.min():.3g} to {reward.max():.3g}"
            self._fail(method, f"numbers that are not finite, {of}", f"finite numbers{wide}")
        if method == "weigh" and bool((values < 0).any()):
            warnings.warn(
                f"{self.name}.weigh gave weights down to {values.min():.3g}: the effective sample share of negative "
                "weights has no meaning. Numbers of both signs are advantages: give them by `advantage`.",
                stacklevel=2,
            )

    def order(self, order: Any, n: int) -> None:
        """Check the entries of a pass."""
        if not isinstance(order, torch.Tensor) or order.dtype != torch.long or order.dim() != 1 or len(order) == 0:
            self._fail("order", described(order), "int64 indices of shape (N,), at least one")
        if not bool(((order >= 0) & (order < n)).all()):
            self._fail("order", f"indices from {order.min()} to {order.max()}", f"indices below {n}")

    def loss(self, result: Any) -> None:
        """Check a loss and its metrics."""
        must = "(a scalar loss that has a gradient, {name: scalar tensor})"
        if not isinstance(result, tuple) or len(result) != 2:
            self._fail("loss", described(result), must)
        loss, parts = result
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            self._fail("loss", described(loss), must + "; take the mean over the minibatch")
        if not loss.requires_grad:
            must = "one made from self.velocity(pair), say, of a network that cuts no gradient (no_grad, detach)"
            self._fail("loss", "a loss without gradient", must)
        if not isinstance(parts, Mapping):
            self._fail("loss", f"metrics {described(parts)}", must)
        for name, value in parts.items():
            if name in RESERVED:
                self._fail("loss", f"a metric named '{name}', which flowrl measures itself", "another name")
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                self._fail("loss", f"{described(value)} as metric '{name}'", "a scalar tensor (never a number)")


class LaterChecks(HookChecks):
    """Checks of all iterations but the first: those that wait for no device and cost nothing."""

    def contexts(self, ids: Any, n: int, n_contexts: int) -> None:
        """Check context indices: their number."""
        if not isinstance(ids, torch.Tensor) or ids.shape != (n,):
            super().contexts(ids, n, n_contexts)

    def coefficient(self, method: str, values: Any, reward: torch.Tensor) -> None:
        """Check the number of weights or advantages; any that are not finite are told with the gradients they make."""
        self._check_shape(method, values, len(reward))

    def order(self, order: Any, n: int) -> None:
        """Check nothing."""

    def loss(self, result: Any) -> None:
        """Check nothing."""
