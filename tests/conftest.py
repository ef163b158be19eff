"""Shared by all tests: seeded generators, and programs run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: one thread for each, and for the programs they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def program_environment() -> dict[str, str]:
    """Variables for a subprocess: wide plain output, so that messages are not broken over lines."""
    return {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def run_in(program_environment: dict[str, str]) -> Run:
    """`run_in(folder, "flowrl.run", *args)`: `python -m flowrl.run ARGS` in that folder."""

    def run(folder: Path, module: str, *args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=folder,
            env=program_environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def run_module(run_in: Run, tmp_path: Path) -> Run:
    """`run_module("flowrl.run", *args)`, in `tmp_path`."""
    return lambda module, *args, **kwargs: run_in(tmp_path, module, *args, **kwargs)
