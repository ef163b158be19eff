"""Shared by all tests: seeded generators, and programs run as a user runs them."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from devices import DEVICE, runs_here, set_device
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: one thread for each, and for the programs they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

os.environ["HF_HUB_OFFLINE"] = "1"  # or tests of names that nobody has wait for the hub, or for the lack of it

# with what all tests have imported, a look at every object takes 0.1 s and finds little
gc.set_threshold(20_000, 10, 10)

REPOSITORY = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    set_device()


def pytest_report_header(config: pytest.Config) -> str:
    only = "" if DEVICE == "cpu" else "; only tests marked on_device run, the others are of the CPU (CONTRIBUTING.md)"
    return f"FLOWRL_TEST_DEVICE: {DEVICE}{only}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not runs_here(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs_here(item)]


@contextmanager
def forgetting(*modules: str) -> Iterator[None]:
    """Context in which modules may register what they like: it is forgotten afterwards, and so are they."""
    from flowrl.envs.rewards.catalogue import REWARDS
    from flowrl.models.families import DECLARED
    from flowrl.registry import ALGORITHMS, ENVIRONMENTS

    registries: list[MutableMapping[str, Any]] = [ALGORITHMS, ENVIRONMENTS, REWARDS, DECLARED, gymnasium.registry]
    before = [dict(registry) for registry in registries]
    for name in modules:  # of the same name, from another test
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for registry, content in zip(registries, before):
            registry.clear()
            registry.update(content)
        for name in modules:
            sys.modules.pop(name, None)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, which the first process of the test run that asks for it fills; read only."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(0)


@pytest.fixture(scope="session")
def program_environment() -> dict[str, str]:
    """Variables for a subprocess: on the CPU, with wide plain output, so that messages are not broken over lines."""
    plain = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    return {**os.environ, **plain, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "FLOWRL_TEST_DEVICE": "cpu"}


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


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """As `run_module`, but in this process: a program takes longer to start than a small run takes.

    For tests of what a program does; those of processes, signals and imports start one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(module: str, *args: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        try:
            code = importlib.import_module(module).main([str(argument) for argument in args])
        except SystemExit as stopped:  # tyro ends the program itself
            code = stopped.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess([module, *args], code, said.out, said.err)

    return run


TINY_SD3 = [
    "--algo", "orw_w2", "--env", "sd3-compress", "--env.flow", "mini-sd3", "--algo.n-samples", "8",
    "--algo.group-size", "2", "--algo.batch-size", "4", "--algo.n-epochs", "2", "--algo.rollout-steps", "3",
    "--algo.warmup-updates", "0", "--algo.ema-decay", "0.9", "--total-timesteps", "16", "--eval-samples", "8",
    "--picture-every", "100", "--checkpoint-every", "100", "--seed", "3",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs "lora", "full" (both of mini-sd3) and "points", with learning rates that show; read only."""
    from flowrl.run import main

    kinds = {
        "lora": [*TINY_SD3, "--algo.learning-rate", "2e-2", "--algo.lora-rank", "4"],
        "full": [*TINY_SD3, "--algo.learning-rate", "2e-3"],
        "points": ["--algo", "orw", "--env", "gaussians-linear", "--algo.n-samples", "32", "--total-timesteps", "32"],
    }

    def make(folder: Path) -> None:
        for name, arguments in kinds.items():
            assert main([*arguments, "--out", str(folder), "--name", name]) == 0

    out = made_once(tmp_path_factory, "tiny-runs", make)
    return {name: out / name for name in kinds}
