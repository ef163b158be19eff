"""Damaged and hostile checkpoint folders give clear errors; `fuzz_checkpoints.py` tries thousands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory it has in /proc")
def test_damaged_checkpoints(program_environment: dict[str, str]) -> None:
    script = Path(__file__).with_name("fuzz_checkpoints.py")
    command = [sys.executable, str(script), "--n", "250"]
    done = subprocess.run(command, env=program_environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "250 folders" in done.stdout
