"""Compare algorithms at equal cost: `python -m flowrl.benchmark --suite toy`.

Cells (row x environment x swept value x seed) run in processes of one thread each. A finished cell is never run
again; a failed one is recorded with its error, and tried again by the next call.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowrl.callbacks import IterationCallback
from flowrl.checkpoint import write_json
from flowrl.comparison import write_comparison
from flowrl.errors import FlowRLError
from flowrl.evaluation import evaluate
from flowrl.registry import algorithm_class
from flowrl.report import image_grid, save_picture
from flowrl.runfolder import without_nan
from flowrl.steering import Steering
from flowrl.suite import Cell, load_suite, suites

PROGRAM = "python -m flowrl.benchmark"
UNBOUNDED = 10**12


@dataclass(frozen=True)
class BenchmarkConfig:
    """Algorithms x environments x seeds at equal cost; a table, curves and the reward-diversity frontier."""

    suite: str = ""
    """Suite that ships with flowrl, or a TOML file of your own (see flowrl/suite.py)."""
    algos: tuple[str, ...] = ()
    """Only these algorithms of the suite."""
    envs: tuple[str, ...] = ()
    """Only these environments of the suite."""
    seeds: tuple[int, ...] = ()
    """Seeds, instead of the suite's."""
    budget: int | None = None
    """Network evaluations per cell, instead of the suite's: a forward is 1 per sample, a backward 2."""
    out: Path = Path("benchmarks")
    """Folder that the suite's folder goes into."""
    workers: int = 0
    """Cells at a time; 0 takes one per core."""
    dry_run: bool = False
    """List the cells and exit."""
    cell: Path | None = None
    """Run the one cell of this folder; the program calls itself so."""


class StopAtBudget(IterationCallback):
    """Records cost and metrics of every iteration; ends the training when the budget is spent."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_iteration_end(self) -> bool:
        """One row per iteration."""
        model: Any = self.model
        logged = {key: value for key, value in model.last_logged.items() if isinstance(value, int | float)}
        self.rows.append(
            {**logged, "evaluations": model.policy.evaluations, "seconds": time.monotonic() - self.started}
        )
        return bool(model.policy.evaluations < self.budget)


def run_cell(folder: Path) -> None:
    """Train, evaluate, and write `curve.json`, `samples.png` and, last, `result.json`."""
    cell = Cell(**json.loads((folder / "cell.json").read_text()))
    algo = cell.algo or "orw"
    model = algorithm_class(algo)(
        "FlowPolicy", cell.env, seed=cell.seed, env_settings=cell.env_settings or None, **cell.settings
    )
    stop = StopAtBudget(cell.budget)
    if cell.algo:
        model.learn(UNBOUNDED, callback=stop)
    training_seconds = time.monotonic() - stop.started
    steering = Steering(**cell.steer) if cell.steer else None
    result = evaluate(model, cell.eval_samples, seed=10_000 + cell.seed, steering=steering)
    write_json(folder / "curve.json", stop.rows)
    core = model.env.core
    if core.flow.is_image:
        image_grid(result.samples[:16], columns=4).save(folder / "samples.png")
    else:
        save_picture(result.samples, result.sample_contexts, core, folder / "samples.png")
    cost = {
        "network_evaluations": model.policy.evaluations,
        "samples": model.num_timesteps,
        "gradient_steps": model._n_updates,
        "training_seconds": round(training_seconds, 1),
        "buffer_bytes": model.buffer.nbytes,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    write_json(folder / "result.json", without_nan({"cell": cell.to_dict(), "cost": cost, **result.to_dict()}))


def run_cells(cells: list[Cell], root: Path, workers: int) -> list[Path]:
    """Run what is not finished yet; returns the folders of failed cells. Ctrl-C keeps every finished cell."""
    waiting = [cell for cell in cells if not (root / cell.folder / "result.json").exists()]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before, {workers} at a time: {root}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    running: dict[subprocess.Popen[bytes], tuple[Cell, float]] = {}
    failed: list[Path] = []
    n_done, total = 0, len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                folder = root / cell.folder
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "cell.json", cell.to_dict())
                (folder / "error.txt").unlink(missing_ok=True)
                command = [sys.executable, "-m", "flowrl.benchmark", "--cell", str(folder)]
                with (folder / "log.txt").open("wb") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running[process] = (cell, time.monotonic())
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                cell, started = running.pop(process)
                n_done += 1
                folder = root / cell.folder
                good = process.returncode == 0 and (folder / "result.json").exists()
                if not good:
                    failed.append(folder)
                    (folder / "error.txt").write_text((folder / "log.txt").read_text(errors="replace"))
                state = "done" if good else f"FAILED, see {folder / 'error.txt'}"
                seconds = time.monotonic() - started
                print(
                    f"[{n_done}/{total}] {cell.env}, {cell.label}, seed {cell.seed}: {state} ({seconds:.0f} s)",
                    flush=True,
                )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    arguments = sys.argv[1:] if args is None else args
    if not arguments:
        tyro.extras.get_parser(BenchmarkConfig, prog=PROGRAM, description=__doc__).print_help()
        print(f"\nsuites: {', '.join(suites())}")
        return 0
    config = tyro.cli(BenchmarkConfig, args=arguments, prog=PROGRAM, description=__doc__)
    try:
        if config.cell is not None:
            run_cell(config.cell)
            return 0
        cells = load_suite(config.suite, config.algos, config.envs, config.seeds, config.budget)
        root = config.out / Path(config.suite).stem
        if config.dry_run:
            print("\n".join(f"{c.env}, {c.label}, seed {c.seed}: {c.budget:,} network evaluations" for c in cells))
            print(f"{len(cells)} cells; results would go to {root}")
            return 0
        failed = run_cells(cells, root, config.workers or os.cpu_count() or 1)
        written = write_comparison(cells, root)
    except FlowRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; finished cells are kept. The same command goes on: {PROGRAM} {' '.join(arguments)}")
        return 130
    print("written: " + ", ".join(map(str, written)))
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
