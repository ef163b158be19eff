"""Kill runs at random moments, resume them, and compare them with runs that nobody killed.

    python tests/kill_runs.py --kills 10

For every algorithm, on the toy flow and with LoRA on the embedded text-to-image flow: a run is killed by SIGKILL, half
of the times at a random moment and half of the times while a checkpoint is being written, and resumed each time. In the
end weights, optimizer, random states, counters, metrics and evaluation are those of the uninterrupted run, bit for bit.

Runs are forked from this process, which has imported everything: little of a life is spent on starting.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a pool of threads does not survive a fork

import torch

from flowrl.errors import CheckpointError
from flowrl.registry import ALGORITHMS
from flowrl.run import main as run_main
from flowrl.storage.files import LEFT_BEHIND
from flowrl.training.loading import checkpoint_folder

OPTIONS = {
    "mlp": [
        *("--env", "gaussians-linear", "--total-timesteps", "640", "--algo.n-samples", "32", "--algo.group-size", "8"),
        *("--algo.batch-size", "16", "--algo.rollout-steps", "4", "--eval-samples", "64", "--algo.refresh-every", "3"),
        *("--algo.ema-decay", "0.9", "--checkpoint-every", "1", "--picture-every", "7"),
    ],
    "lora": [
        *("--env", "sd3-count", "--total-timesteps", "64", "--algo.n-samples", "8", "--algo.group-size", "4"),
        *("--algo.batch-size", "8", "--algo.rollout-steps", "3", "--algo.n-epochs", "1", "--algo.lora-rank", "4"),
        *("--eval-samples", "8", "--checkpoint-every", "1", "--picture-every", "100"),
    ],
}
OWN = {("kl", "lora"): ["--algo.tolerance", "0.3", "--algo.n-samples", "4", "--algo.group-size", "2"]}
TIMED = "time/samples_per_second"
LONGEST = 600.0


@dataclass
class Tally:
    """What was done to the runs of a case."""

    kills: int = 0
    in_writing: int = 0
    before_any: int = 0
    resumed: int = 0
    victims: int = 0


def start(arguments: list[str], where: Path) -> int:
    """A run in a process of its own; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(where)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run_main(arguments)
        Path("modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def import_all(where: Path) -> None:
    """Import here what a run there has imported, so that others need not."""
    for name in (where / "modules").read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def wait(pid: int, seconds: float = LONGEST) -> int | None:
    """Exit status of a process; None when it is still running after so long."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.0005)


def ended(status: int | None, where: Path) -> None:
    """Stop here, with what a run said, unless it ended well."""
    if status is None:
        sys.exit(f"a run took longer than {LONGEST:.0f} s: this machine is too slow, or too busy")
    assert status == 0, (where / "log").read_text()[-2000:]


def half_written(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process ended."""
    return any(LEFT_BEHIND.fullmatch(path.name) for parent in (run, run / "checkpoints") for path in _names(parent))


def _names(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def kill(pid: int, run: Path, rng: random.Random, longest: float) -> bool:
    """Kill a process at a random moment; False when it had ended well before."""
    if rng.random() < 0.5:
        status = wait(pid, rng.uniform(0, longest))
    else:
        status, end = None, time.monotonic() + rng.uniform(0, longest)
        while status is None and not (time.monotonic() > end and half_written(run)):
            status = wait(pid, 0)
        status = wait(pid, rng.uniform(0, 0.004)) if status is None else status
    if status is None:
        os.kill(pid, signal.SIGKILL)
        _, left = os.waitpid(pid, 0)
        status = os.waitstatus_to_exitcode(left)
    assert status in (0, -signal.SIGKILL), f"exit code {status}: {(run.parent.parent / 'log').read_text()[-2000:]}"
    return status != 0


def metrics(run: Path) -> list[list[dict[str, object]]]:
    """The rows of metrics.csv and of metrics.json, without what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [[{key: value for key, value in row.items() if key != TIMED} for row in part] for part in (table, lines)]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished run folders."""
    files = [path.relative_to(one) for path in (one / "final").rglob("*") if path.is_file()]
    found = [str(file) for file in (*files, Path("evaluation.json")) if not _same(one / file, other / file)]
    if metrics(one) != metrics(other):
        found.append("metrics")
    if {path.name for path in _names(one)} != {path.name for path in _names(other)} or half_written(other):
        found.append("names of files")
    return found


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def try_case(algo: str, part: str, kills: int, rng: random.Random, where: Path) -> tuple[Tally, list[str]]:
    """Kill runs of an algorithm and resume them so many times; what was done and what differed in the end."""
    options = [*OPTIONS[part], *OWN.get((algo, part), [])]
    if ALGORITHMS[algo].needs_gradient:  # these need a reward with a gradient
        options = ["sd3-aesthetic" if option == "sd3-count" else option for option in options]
    arguments = ["--algo", algo, "--device", "cpu", "--no-progress", *options]
    untouched = where / "runs" / "untouched"
    for _ in range(2):  # the second time without the imports
        shutil.rmtree(untouched, ignore_errors=True)
        began = time.monotonic()
        ended(wait(start([*arguments, "--name", "untouched"], where)), where)
        longest = 0.6 * (time.monotonic() - began)
        import_all(where)
    tally, run = Tally(), where / "runs" / "victim"
    while tally.resumed < kills:
        tally.victims += 1
        shutil.rmtree(run, ignore_errors=True)
        fresh = True
        while True:
            pid = start([*arguments, "--name", "victim"] if fresh else ["--resume", str(run)], where)
            spare = tally.resumed >= kills
            if spare:
                ended(wait(pid), where)
                break
            if not kill(pid, run, rng, longest):
                longest /= 1.2
                break
            tally.kills += 1
            tally.in_writing += half_written(run)
            try:
                checkpoint_folder(run)
                tally.resumed += 1
                fresh = False
            except CheckpointError:
                tally.before_any += 1
                longest *= 1.2  # the machine has become slower since it was measured, or it was bad luck
                shutil.rmtree(run, ignore_errors=True)
                fresh = True
        if found := differences(untouched, run):
            return tally, found
    return tally, []


def said(tally: Tally) -> str:
    """A tally in words."""
    return (
        f"{tally.kills} kills, {tally.in_writing} while a checkpoint was written, {tally.before_any} before there was "
        f"one, {tally.victims} runs"
    )


def main() -> int:
    """The program; 1 when a run differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of every case, each followed by a resume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algos", nargs="*", default=sorted(ALGORITHMS))
    parser.add_argument("--parts", nargs="*", default=list(OPTIONS), choices=list(OPTIONS))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    failed, sums = 0, Tally()
    for part in parsed.parts:
        for algo in parsed.algos:
            rng = random.Random(f"{parsed.seed} {algo} {part}")
            with tempfile.TemporaryDirectory() as where:
                began = time.monotonic()
                tally, found = try_case(algo, part, parsed.kills, rng, Path(where))
                failed += bool(found)
                print(
                    f"{algo:12s} {part}: {said(tally)}: {'differs: ' + ', '.join(found) if found else 'identical'} "
                    f"({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
                for name in vars(sums):
                    setattr(sums, name, getattr(sums, name) + getattr(tally, name))
    print(f"{said(sums)}: {failed} cases differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
