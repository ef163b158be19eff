"""States of random generators in a checkpoint. They are of a kind of device: another kind cannot take them."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm

SIZES = {5056: "cpu", 16: "cuda"}
"""Bytes of a generator's state -> the kind of device that it is of."""


def random_states(model: FlowAlgorithm) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Collect the states of all generators: tensors, and the part of them that JSON holds."""
    numpy_state: Any = np.random.get_state(legacy=False)
    tensors = {
        "training": model.generator.get_state(),
        "policy": model.policy.generator.get_state(),
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {
        "device": model.device.type,
        "numpy": [int(numpy_state["state"]["pos"]), int(numpy_state["has_gauss"]), float(numpy_state["gauss"])],
        "python": random.getstate(),
    }


def set_random_states(model: FlowAlgorithm, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Take stored states back; of another kind of device, go on from seeds derived from them, and warn of it."""
    there = [
        _take(generator, tensors[name], state.get("device"))
        for name, generator in (("training", model.generator), ("policy", model.policy.generator))
    ]
    if model.ranks.is_main:  # the others draw dropout of their own
        there.append(_take(torch.default_generator, tensors["torch"], "cpu"))
        if torch.cuda.is_available() and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"])
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *state["numpy"]))
    version, internal, normal = state["python"]
    random.setstate((version, tuple(internal), normal))
    kind = next(filter(None, there), None)
    if kind and model.ranks.is_main:
        warnings.warn(
            f"The continuation is not bit-exact: the checkpoint's random states are of a device of kind '{kind}', "
            f"this is '{model.device.type}', so that new ones are seeded from them.",
            stacklevel=2,
        )


def _take(generator: torch.Generator, stored: torch.Tensor, device: Any) -> str | None:
    """Set a generator to a state, or seed it from one of another kind of device, whose name comes back."""
    own, size = generator.device.type, stored.numel()
    kind = SIZES.get(size, device) if stored.dtype == torch.uint8 else own
    if kind == own or not isinstance(kind, str) or size == generator.get_state().numel():
        generator.set_state(stored)
        return None
    digest = hashlib.sha256(stored.numpy().tobytes()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return kind
