"""Given samples: tensors of a file that an algorithm learns from in place of drawing its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flowrl.errors import ConfigError
from flowrl.types import has_values

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


_are_read = ContextVar("_are_read", default=True)


@contextmanager
def only_to_train(to_train: bool) -> Iterator[None]:
    """Leave files of samples unread where algorithms are made that are not to train: they may be gone."""
    token = _are_read.set(to_train)
    try:
        yield
    finally:
        _are_read.reset(token)


def read_samples(
    path: Path, model: FlowAlgorithm, names: tuple[str, ...]
) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Read tensors (N, *latent_shape) by their names, in the flow's own (latent) space, and `contexts` (N,).

    Their hash becomes the model's `given_hash`. None where they are left unread.

    Raises:
        ConfigError: The file is missing or damaged, or its tensors do not fit the flow and the environment.
    """
    if not _are_read.get():
        return None
    with unset_fake_temporarily():  # in a prediction of memory, too
        samples, contexts = _checked(path, model, names)
    if has_values(torch.empty(0)):
        return samples, contexts
    return [rows.clone() for rows in samples], contexts.clone()  # without storage, and counted


def _checked(path: Path, model: FlowAlgorithm, names: tuple[str, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=str(model.device))
        samples, contexts = [tensors[name].float() for name in names], tensors["contexts"].long()
    except Exception as error:
        listed = ", ".join(f"'{name}'" for name in names)
        raise ConfigError(
            f"Cannot read samples from '{path}': {type(error).__name__} {error}. It must be a safetensors file with "
            f"{listed} and 'contexts'."
        ) from error
    shape, n_contexts = model.policy.model.latent_shape, len(model.env.core.contexts)
    for name, x_1 in zip(names, samples):
        if x_1.shape[1:] != shape or contexts.shape != x_1.shape[:1] or len(x_1) == 0:
            raise ConfigError(
                f"The samples in '{path}' do not fit: {name} must be (N, {', '.join(map(str, shape))}) and contexts "
                f"(N,), not {tuple(x_1.shape)} and {tuple(contexts.shape)}."
            )
        if not tensors[name].is_floating_point():
            raise ConfigError(
                f"The samples in '{path}' do not fit: {name} must be floating-point numbers, not {tensors[name].dtype}."
            )
        if not bool(x_1.isfinite().all()):
            raise ConfigError(f"The samples in '{path}' do not fit: {name} holds numbers that are not finite.")
    kind = tensors["contexts"].dtype
    is_whole = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
    if not is_whole or not 0 <= int(contexts.min()) <= int(contexts.max()) < n_contexts:
        raise ConfigError(f"The contexts in '{path}' must be indices from 0 to {n_contexts - 1}, whole numbers.")
    digest = hashlib.sha256()
    for rows in (*samples, contexts):
        digest.update(f"{tuple(rows.shape)}".encode() + rows.cpu().numpy().tobytes())
    model.given_hash = digest.hexdigest()
    return samples, contexts
