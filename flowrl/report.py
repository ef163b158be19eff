"""Make the page of a run again, or one that compares runs: `python -m flowrl.report RUN RUN ...`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from flowrl.errors import ConfigError
from flowrl.pages.run_files import RunFiles
from flowrl.pages.run_page import run_page
from flowrl.pages.runs_page import runs_page
from flowrl.runs.program import OwnModules, run_program
from flowrl.storage.files import written_whole

PROGRAM = "python -m flowrl.report"


@dataclass(frozen=True)
class ReportConfig:
    """Make the page of a run again, or one that compares several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path | None = None
    """The file to write; report.html in the run folder, or comparison.html here for several runs."""
    modules: OwnModules = ()


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code."""
    return run_program(PROGRAM, ReportConfig, _report, args)


def _report(config: ReportConfig) -> int:
    if not config.runs:
        raise ConfigError(f"Name a run folder or several: {PROGRAM} runs/NAME runs/OTHER")
    runs = [RunFiles.read(folder) for folder in config.runs]
    names = [run.name for run in runs]
    runs = [
        replace(run, name=str(folder)) if names.count(run.name) > 1 else run for run, folder in zip(runs, config.runs)
    ]
    single = len(runs) == 1
    out = config.out or (config.runs[0] / "report.html" if single else Path("comparison.html"))
    text = run_page(runs[0]) if single else runs_page(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(out) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write '{out}': {error}. Choose another place with --out.") from error
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
