"""Strategies that the tests of properties share.

Examples are derived from the tests' names: every run tries the same ones.
"""

from __future__ import annotations

from typing import Any

import torch
from conftest import DEVICE
from hypothesis import settings
from hypothesis import strategies as st

from flowrl.functional.sde import SDE
from flowrl.functional.solver_steps import SOLVERS
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.transitions import TransitionAlgorithm
from flowrl.types import Rows

settings.register_profile("flowrl", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("flowrl")

few, fewer = settings(max_examples=12), settings(max_examples=25)  # for what takes a model, a file, a program

seeds = st.integers(0, 2**31)
solvers = st.sampled_from(sorted(SOLVERS))
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
sdes = st.sampled_from([SDE("flow", 0.7), SDE("flow", 1.4), SDE("constant", 0.7), SDE("cps", 0.6), SDE("cps", 1.0)])


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


def tensors(low: float, high: float, min_size: int = 1, max_size: int = 30) -> st.SearchStrategy[torch.Tensor]:
    """Vectors (B,) float32."""
    return st.lists(numbers(low, high), min_size=min_size, max_size=max_size).map(lambda values: torch.tensor(values))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@st.composite
def grouped(draw: Any, low: float = -1e3, high: float = 1e3) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rewards (B,), the group of each (B,), and how many groups there are; some may be empty."""
    reward = draw(tensors(low, high))
    n_groups = draw(st.integers(1, 5))
    groups = draw(st.lists(st.integers(0, n_groups - 1), min_size=len(reward), max_size=len(reward)))
    return reward, torch.tensor(groups), n_groups


@st.composite
def splits(draw: Any, n: int) -> list[int]:
    """Sizes that add up to `n`."""
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=5)) if n > 1 else set())
    return [end - start for start, end in zip([0, *cuts], [*cuts, n])]


@st.composite
def time_grids(draw: Any) -> torch.Tensor:
    """Increasing times from 0 to 1, no two nearer than 0.01."""
    inner = draw(st.sets(st.integers(1, 99), max_size=6))
    return torch.tensor([0.0, *(k / 100 for k in sorted(inner)), 1.0])


def read_steps(rows: Rows, sample: torch.Tensor, part: torch.Tensor) -> Rows:
    """What a step has of its path, as methods on steps read it."""
    return TransitionAlgorithm.read(rows, sample, part)


def add_paths(buffer: RolloutBuffer, part: torch.Tensor, first_step: int, steps: int | None = None) -> None:
    """Samples by number, whose k-th state is 100 number + k and whose k-th log-probability is minus that."""
    states = (100 * part[:, None] + torch.arange((steps or buffer.parts) + 1)).float()
    first = torch.full((len(part),), first_step)
    rows = {"states": states[..., None], "log_prob": -states[:, :-1], "first_step": first, "half": part + 0.5}
    buffer.add(part[:, None].float(), part % 7, 3.0 * part, rows)
