"""The device of the tests: the CPU, also where there is a GPU, unless FLOWRL_TEST_DEVICE is "cuda" or "far"."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import far_device
import pytest
import torch
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("FLOWRL_TEST_DEVICE") or "cpu"
TESTS = str(Path(__file__).resolve().parent)
FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.normal, torch.ones, torch.rand,
    torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip
if DEVICE != "cuda":  # before torch looks for GPUs, and for the programs that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if DEVICE == "far":  # before flowrl is imported
    far_device.install()


class TensorsOfTests(TorchFunctionMode):
    """Makes the tensors that files in tests/ make, where these name no device, on that of the tests, or of a generator.

    Those of the library, and the layers of networks, stay where it puts them: one that it forgets to move is found.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_a_test = func in FACTORIES and os.path.dirname(sys._getframe(1).f_code.co_filename) == TESTS
        if by_a_test and kwargs.get("device") is None:
            generator = kwargs.get("generator")
            kwargs = {**kwargs, "device": DEVICE if generator is None else generator.device}
        return func(*args, **kwargs)


def set_device() -> None:
    """Check the device that was asked for, and make tests use it."""
    if DEVICE not in ("cpu", "cuda", "far"):
        raise pytest.UsageError(f"FLOWRL_TEST_DEVICE must be 'cpu', 'cuda' or 'far', not '{DEVICE}'.")
    if DEVICE == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("FLOWRL_TEST_DEVICE=cuda, but torch finds no CUDA device here.")
        torch.backends.cudnn.allow_tf32 = False  # tolerances are those of float32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as `--deterministic`: sums in any order differ
        torch.use_deterministic_algorithms(True, warn_only=True)
    if DEVICE != "cpu":
        TensorsOfTests().__enter__()  # for the whole process: modules of tests make tensors when they are imported


def runs_here(item: pytest.Item) -> bool:
    """Tell whether a test runs on this device: on a GPU those marked `on_device`, but not `on_device(False)`."""
    mark = item.get_closest_marker("on_device")
    return DEVICE == "cpu" or (mark is not None and mark.args != (False,))
