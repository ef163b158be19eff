"""Memory and open files of long runs, seen from outside: `python benchmarks/endurance.py mlp`, or `mini-sd3`.

Starts `python -m flowrl.run` with everything that a run does beside training (metrics, TensorBoard, pictures,
checkpoints), and reads the resident size and the number of open files from the /proc of Linux after each iteration.
After the first tenth of the iterations neither may grow: the median resident size of the last tenth is compared with
that of the second tenth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "mlp": (2000, 64, ["--env", "gaussians-linear", "--algo.batch-size", "64", "--algo.rollout-steps", "8"]),
    "mini-sd3": (
        *(200, 16),
        ["--env", "sd3-count", "--algo.group-size", "4", "--algo.batch-size", "16", "--algo.rollout-steps", "4"],
    ),
}


def watch(command: list[str], metrics: Path) -> list[tuple[int, int, int]]:
    """Iterations done, resident KiB and open files of a process, once for each row of its metrics."""
    seen: list[tuple[int, int, int]] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        folder = Path("/proc") / str(process.pid)
        while process.poll() is None:
            time.sleep(0.05)
            done = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0
            if done > (seen[-1][0] if seen else 0):
                try:
                    status = (folder / "status").read_text()
                    n_files = len(os.listdir(folder / "fd"))
                    resident = int(status.split("VmRSS:")[1].split()[0])
                except (OSError, IndexError):
                    break  # it has just ended
                seen.append((done, resident, n_files))
    if process.returncode:
        sys.exit(f"the run ended with exit code {process.returncode}")
    return seen


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", choices=list(RUNS))
    parser.add_argument("--algo", default="orw_w2")
    parser.add_argument("--iterations", type=int)
    parsed = parser.parse_args()
    iterations, n, options = RUNS[parsed.flow]
    iterations = parsed.iterations or iterations
    with tempfile.TemporaryDirectory() as where:
        command = [sys.executable, "-m", "flowrl.run", "--algo", parsed.algo, "--device", "cpu", "--out", where]
        command += ["--name", "run", "--total-timesteps", str(n * iterations), "--algo.n-samples", str(n), *options]
        began = time.monotonic()
        seen = watch(command, Path(where) / "run" / "metrics.csv")
    training = [(i, resident, files) for i, resident, files in seen if i < iterations]  # what follows is evaluation
    early, late = (
        [entry for entry in training if low * iterations <= entry[0] < high * iterations]
        for low, high in ((0.1, 0.2), (0.9, 1.0))
    )
    if not (early and late):
        sys.exit(f"of {iterations} iterations none of the second or of the last tenth was seen: take more --iterations")
    for name, column, unit in (("resident size", 1, "KiB"), ("open files", 2, "")):
        before, after = (statistics.median(entry[column] for entry in part) for part in (early, late))
        most = max(entry[column] for entry in training)
        print(f"{name}: {before:.0f} {unit} -> {after:.0f} {unit} ({after / before - 1:+.2%}), at most {most}")
    print(f"{parsed.algo}, {parsed.flow}, {iterations} iterations: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
