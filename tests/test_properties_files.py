"""Properties of files and checkpoints: what is written is read back."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import (
    few,
    seeded,
    seeds,
)

import flowrl
from flowrl.errors import CheckpointError
from flowrl.storage.files import host_copies, read_json, read_tensors, save_tensors, write_json

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
DTYPES += (torch.int8, torch.int16, torch.bool)


@st.composite
def any_tensor(draw: Any) -> torch.Tensor:
    """Of any shape and type: empty, 0-d, not contiguous, with NaN and infinities."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(seeds)
    tensor = (50 * torch.rand(shape, generator=seeded(seed))).to(dtype)
    if dtype.is_floating_point and tensor.numel():
        tensor.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1.0]))
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    is_same_kind = one.dtype == other.dtype and one.shape == other.shape
    return is_same_kind and torch.equal(one.isnan(), other.isnan()) and torch.equal(_no_nan(one), _no_nan(other))


def _no_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(3.0, 4.0, 5.0) if tensor.is_floating_point() else tensor


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())


@given(st.dictionaries(names, any_tensor(), max_size=5), st.booleans())
def test_tensors_come_back_as_they_were_written(tensors, shared) -> None:
    if shared and tensors:  # two names for the same storage
        tensors["twice"] = next(iter(tensors.values()))
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "a", host_copies(tensors))
        loaded = read_tensors(Path(folder) / "a")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4), json_values)
def test_json_comes_back_as_it_was_written(content, other) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.json"
        write_json(file, content)
        assert read_json(file) == content
        assert file.read_bytes().isascii()  # readable whatever the machine's encoding
        if not isinstance(other, dict):
            write_json(file, other)
            with pytest.raises(CheckpointError, match="no JSON object"):
                read_json(file)


class Keeps(flowrl.ORWCFMW2):
    """Keeps tensors of its own in checkpoints."""

    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012  (set by the test)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.own = {name: self.keep(name, torch.zeros_like(tensor)) for name, tensor in self.kept.items()}


@few
@given(st.dictionaries(names, any_tensor(), max_size=4), seeds, st.integers(0, 2))
def test_a_checkpoint_gives_everything_back(kept, seed, iterations) -> None:
    Keeps.kept = kept
    options = {"n_samples": 8, "batch_size": 4, "rollout_steps": 2, "ema_decay": 0.5, "refresh_every": 2}
    model = Keeps("FlowPolicy", "gaussians-linear", seed=seed % 2**31, device="cpu", **options)
    model.learn(8 * iterations)
    for name, tensor in kept.items():
        model.own[name].copy_(tensor)
    model.policy.evaluations = seed
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        loaded = Keeps.load(folder, device="cpu")
    assert loaded.own.keys() == kept.keys()
    assert all(same(loaded.own[name], tensor) for name, tensor in kept.items())
    assert (loaded.config, loaded.seed, loaded.iteration) == (model.config, model.seed, iterations)
    assert (loaded.num_timesteps, loaded._n_updates) == (8 * iterations, 2 * iterations)
    assert loaded.policy.evaluations == seed
    for role in model.policy.roles:
        ours, theirs = model.policy.parameters_of(role), loaded.policy.parameters_of(role)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for one, other in ((model.generator, loaded.generator), (model.policy.generator, loaded.policy.generator)):
        assert torch.equal(one.get_state(), other.get_state())
