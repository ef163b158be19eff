"""Damaged and hostile files give clear errors; the scripts `fuzz_*.py` try thousands."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory it has in /proc")
@pytest.mark.parametrize(("name", "what"), [("fuzz_checkpoints", "folders"), ("fuzz_files", "files")])
def test_damaged_files(program_environment: dict[str, str], name: str, what: str) -> None:
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), "--n", "50"]
    done = subprocess.run(command, env=program_environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"50 {what}" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is installed")
def test_coverage_needs_atheris(program_environment: dict[str, str]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_coverage.py"))]
    done = subprocess.run(command, env=program_environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install atheris. Nothing was fuzzed." in done.stderr
