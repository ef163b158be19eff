"""Compare algorithms at equal cost: `python -m flowrl.benchmark --suite toy`.

Cells (row x environment x swept value x seed) run in processes of one thread each. A finished cell is never run
again; a failed one is recorded with its error, and tried again by the next call.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tyro

from flowrl.errors import ConfigError, RankError
from flowrl.pages.benchmark_page import benchmark_page
from flowrl.pages.benchmark_plots import frontier, learning_curves, save_drawing
from flowrl.pages.benchmark_results import collect, to_six_digits
from flowrl.pages.benchmark_tables import markdown
from flowrl.runs.callbacks import StopOnSignal
from flowrl.runs.folder import alone_in, finite_or_none, writing_to
from flowrl.runs.program import EXIT_STOPPED, OwnModules, guarded
from flowrl.storage.files import write_json, written_whole
from flowrl.suites.cell import run_logged
from flowrl.suites.finished import finished_before, with_others
from flowrl.suites.suite import Cell, load_suite, suites
from flowrl.types import Compile

PROGRAM = "python -m flowrl.benchmark"
MOST_LOST = 3
LOST = (
    f"The process that starts the cells ended {MOST_LOST} times: something ends it, perhaps the system for want of "
    "memory. Finished cells are kept, and the same command goes on; fewer --workers need less."
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Algorithms x environments x seeds at equal cost; a table, curves and the reward-diversity frontier."""

    suite: str = ""
    """Suite that ships with flowrl, or a TOML file of your own (see flowrl/suites/suite.py)."""
    algos: tuple[str, ...] = ()
    """Run only these algorithms of the suite. Tables keep the cells of others that were run before."""
    envs: tuple[str, ...] = ()
    """Run only these environments of the suite."""
    seeds: tuple[int, ...] = ()
    """Seeds, instead of the suite's."""
    budget: int | None = None
    """Network evaluations per cell, instead of the suite's: a forward is 1 per sample, a backward 2."""
    out: Path = Path("benchmarks")
    """Folder that the suite's folder goes into."""
    workers: int = 0
    """Cells at a time; 0 takes one per core."""
    compile: Compile | None = None
    """Compile the network of every cell, as `--algo.compile` of a run does; figures differ by rounding alone."""
    modules: OwnModules = ()
    dry_run: bool = False
    """List the cells and exit."""

    def __post_init__(self) -> None:
        if not self.suite:
            raise ConfigError(f"Name a suite, --suite NAME or a TOML file of your own. Shipped: {', '.join(suites())}.")
        if self.workers < 0:
            raise ConfigError(f"--workers must be the cells at a time, or 0 for one per core, not {self.workers}.")


def run_cells(
    cells: list[Cell], root: Path, workers: int, modules: tuple[str, ...] = (), compile: Compile | None = None
) -> list[Path]:
    """Run what is not finished yet; give the folders of failed cells.

    Raises:
        ConfigError: A finished cell there was made with other settings.
        RankError: What starts the cells ends again and again.
        KeyboardInterrupt: On Ctrl-C, SIGTERM or a closed terminal; every finished cell is kept.
    """
    waiting = [cell for cell in cells if not finished_before(cell, root)]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before, {workers} at a time: {root}", flush=True)
    processes = _processes()
    running: dict[BaseProcess, tuple[Cell, float]] = {}
    failed: list[Path] = []
    n_done, total, lost = 0, len(waiting), 0
    with _stop_signals() as received:
        try:
            while (waiting or running) and not received:
                while waiting and len(running) < workers and not received:
                    cell = waiting[0]
                    try:
                        process = _start(processes, cell, root / cell.folder, (modules, compile))
                        running[process] = (cell, time.monotonic())
                        del waiting[0]
                    except (EOFError, ConnectionError) as error:  # the server that forks was ended; it starts anew
                        if (lost := lost + 1) == MOST_LOST and not received:
                            raise RankError(LOST) from error
                wait([process.sentinel for process in running], timeout=0.5)
                for process in [process for process in running if not process.is_alive() and not received]:
                    cell, started = running.pop(process)
                    n_done += 1
                    folder = root / cell.folder
                    if not (good := _finished(process, folder)):
                        failed.append(folder)
                    state = "done" if good else f"FAILED, see {folder / 'error.txt'}"
                    told = f"{cell.env}, {cell.label}, seed {cell.seed}: {state}"
                    print(f"[{n_done}/{total}] {told} ({time.monotonic() - started:.0f} s)", flush=True)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()
    if received:
        raise KeyboardInterrupt
    return failed


def _start(processes: Any, cell: Cell, folder: Path, how: tuple[tuple[str, ...], Compile | None]) -> BaseProcess:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", cell.to_dict())
    (folder / "error.txt").unlink(missing_ok=True)
    process: BaseProcess = processes.Process(target=run_logged, args=(folder, *how))
    process.start()
    return process


def _finished(process: BaseProcess, folder: Path) -> bool:
    """Tell whether a cell that ended has its result, which comes last; write `error.txt` otherwise."""
    if (folder / "result.json").exists():
        return True
    log = (folder / "log.txt").read_text("utf-8", errors="replace") if (folder / "log.txt").exists() else ""
    killed = " (killed; where nobody did that, the system has, for want of memory)" if process.exitcode == -9 else ""
    (folder / "error.txt").write_text(f"{log}\nexit code {process.exitcode}{killed}\n", encoding="utf-8")
    return False


def _processes() -> Any:
    """Choose how cells are started: on Linux, forked off a server that has imported everything once."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowrl.suites.cell", "scipy.optimize", "matplotlib.figure", "torchdiffeq"])
    return context


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect stop signals; none interrupts, since a cell that is just being started could not be ended any more."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in StopOnSignal.heard()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_results(cells: Sequence[Cell], root: Path) -> list[Path]:
    """Write results.json, table.md, curves.png, frontier.png and frontier.html into `root`; give their paths.

    Raises:
        CheckpointError: The result of a cell is damaged.
    """
    entries = collect(cells, root)
    paths = [root / name for name in ("results.json", "table.md", "curves.png", "frontier.png", "frontier.html")]
    write_json(paths[0], to_six_digits(finite_or_none(entries)))
    with written_whole(paths[1]) as new:
        new.write_text(markdown(entries), encoding="utf-8")
    save_drawing(learning_curves(entries), paths[2], dpi=80)
    save_drawing(frontier(entries), paths[3], dpi=110)
    page = benchmark_page(entries, root)
    with written_whole(paths[4]) as new:
        new.write_text(page, encoding="utf-8")
    return paths


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code (0 done, 1 cells failed, 2 an error the message explains, 3 stopped)."""
    return guarded(_main, args)


def _main(args: list[str]) -> int:
    if not args:
        with suppress(SystemExit):
            tyro.cli(BenchmarkConfig, args=["--help"], prog=PROGRAM, description=__doc__)
        print(f"\nsuites: {', '.join(suites())}")
        return 0
    config = tyro.cli(BenchmarkConfig, args=args, prog=PROGRAM, description=__doc__)
    cells = load_suite(config.suite, config.algos, config.envs, config.seeds, config.budget)
    root = config.out / Path(config.suite).stem
    if config.dry_run:
        for cell in cells:
            plan = f"{cell.budget:,} network evaluations" if cell.budget else "nothing to train"
            print(f"{cell.env}, {cell.label}, seed {cell.seed}: {plan}")
        print(f"{len(cells)} cells; results would go to {root}")
        return 0
    try:
        with writing_to(root, lambda: "Finished cells are kept; choose another place with --out."):
            workers = config.workers or os.cpu_count() or 1
            failed = run_cells(cells, root, workers, config.modules, config.compile)
            with alone_in(root, wait=True):
                shown, left_out = with_others(cells, root, config.suite, config.budget)
                written = write_results(shown, root)
    except KeyboardInterrupt:
        print(f"\nstopped; finished cells are kept. The same command goes on: {PROGRAM} {shlex.join(args)}")
        return EXIT_STOPPED
    if left_out:
        print(f"not in the tables: {left_out}")
    print("written: " + ", ".join(map(str, written)))
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
