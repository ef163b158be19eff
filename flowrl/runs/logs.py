"""The metrics of a run: metrics.csv, metrics.json, TensorBoard and a table on stdout, Weights & Biases where asked.

What is in the files stays there whatever ends the process, and a file that takes nothing for a while ends no run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import (
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)

from flowrl.storage.files import read_rows
from flowrl.training.writers import Table, printable

Row = dict[str, Any]


def say(text: str) -> None:
    """Print, flushed; a terminal or pipe that is gone ends no run."""
    try:
        print(printable(text), flush=True)
    except OSError:
        discard_output()


def discard_output() -> None:
    """Let what is printed from now on, and what has not been sent yet, go nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def logger(folder: Path, num_timesteps: int, *others: KVWriter) -> Logger:
    """Make the stable-baselines3 logger that writes into a run folder.

    Rows that a resumed run wrote after its checkpoint are dropped; they will be computed again.

    Args:
        folder: The run folder.
        num_timesteps: Samples that the run has trained on.
        *others: Where rows go besides.
    """
    kept = [row for row in read_rows(folder / "metrics.csv") if _timesteps(row) <= num_timesteps]
    formats: list[KVWriter] = [
        PatientWriter(Table(sys.stdout), "to stdout"),
        PatientWriter(MetricsFile(folder / "metrics.csv", "csv", kept), str(folder / "metrics.csv")),
        PatientWriter(MetricsFile(folder / "metrics.json", "json", kept), str(folder / "metrics.json")),
    ]
    try:
        tensorboard = TensorBoardWriter(str(folder / "tensorboard"))
        formats.append(PatientWriter(tensorboard, str(folder / "tensorboard")))
    except (ImportError, AssertionError):
        say("tensorboard is not installed (pip install tensorboard): no TensorBoard log is written")
    formats += [PatientWriter(writer, f"by {type(writer).__name__}") for writer in others]
    return Logger(str(folder), formats)


def show_picture(log: Logger, name: str, path: Path, step: int) -> None:
    """Give a picture (PNG) to the writers that show pictures.

    Args:
        log: Of the run.
        name: What the picture is of; the same for a whole run.
        path: The file.
        step: Samples that the run has trained on.
    """
    for writer in log.output_formats:
        if isinstance(writer, PatientWriter):
            writer.picture(name, path, step)


WARNINGS = "warnings.txt"
"""File of a run folder: what training warned of, a line each."""


@contextlib.contextmanager
def telling_warnings(folder: Path | None, tell: Callable[[str], None] = say) -> Iterator[None]:
    """Tell flowrl's own warnings in one line each, and keep them in the run folder."""
    plain: Any = warnings.showwarning
    kept: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning) or "flowrl" not in Path(filename).parts:
            plain(message, category, filename, *rest, **more)
            return
        text = " ".join(str(message).split())
        tell(f"warning: {text}")
        if folder is not None and text not in kept:
            kept.add(text)
            with contextlib.suppress(OSError), (folder / WARNINGS).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = plain


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the numbers in the rows of a run's `metrics.csv`."""
    return [{k: float(v) for k, v in row.items() if not isinstance(v, str)} for row in read_rows(path)]


def _timesteps(row: Row) -> float:
    steps = row.get("time/total_timesteps", math.inf)
    return math.inf if isinstance(steps, str) else steps


def _plain(value: Any) -> Any:
    """Give a number or text; None for NaN: JSON has none."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _csv_lines(keys: Sequence[str], rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    csv.DictWriter(stream, keys, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def _json_lines(rows: Sequence[Row]) -> str:
    """Write a line of JSON for each row, in which infinite numbers are null too; the CSV file has them."""
    infinite = (math.inf, -math.inf)
    finite = ({key: None if value in infinite else value for key, value in row.items()} for row in rows)
    return "".join(json.dumps(row) + "\n" for row in finite)


class MetricsFile(KVWriter):
    """A file that every row is in whole or not at all, also after SIGKILL or a full disk.

    Rows are appended; where a new metric makes the lines longer, the file is written anew and renamed. What the file
    does not take is kept and written with a later row.

    Args:
        path: The file; what it holds is replaced.
        kind: "csv" or "json" (a line of JSON per row).
        rows: What it holds first.
    """

    def __init__(self, path: Path, kind: str, rows: Sequence[Row] = ()) -> None:
        self.path, self.kind = path, kind
        self.keys: list[str] = []
        self._waiting: list[Row] = []
        if rows:
            self._replace(rows)
        else:
            path.unlink(missing_ok=True)

    def write(self, key_values: Mapping[str, Any], key_excluded: Mapping[str, Any], step: int = 0) -> None:
        """Append a row, and those before it that could not be written.

        Raises:
            OSError: It cannot be written now.
        """
        row = filter_excluded_keys(dict(key_values), dict(key_excluded), self.kind)
        self._waiting.append({key: _plain(value) for key, value in row.items()})
        known = self.kind == "json" or all(key in self.keys for row in self._waiting for key in row)
        if known and self.path.exists():
            self._append(self._waiting)
        else:
            self._replace([*self._read(), *self._waiting])
        self._waiting = []

    def _append(self, rows: Sequence[Row]) -> None:
        data = (_json_lines(rows) if self.kind == "json" else _csv_lines(self.keys, rows)).encode(errors="replace")
        size = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError("there is no space for a whole row")
        except OSError:
            os.truncate(self.path, size)
            raise

    def _replace(self, rows: Sequence[Row]) -> None:
        keys = [*self.keys, *sorted({key for row in rows for key in row} - set(self.keys))]
        header = "" if self.kind == "json" else _csv_lines(keys, [dict(zip(keys, keys))])
        body = _json_lines(rows) if self.kind == "json" else _csv_lines(keys, rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            temporary.write_bytes((header + body).encode(errors="replace"))
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.keys = keys

    def _read(self) -> list[Row]:
        if self.kind == "csv":
            return read_rows(self.path)
        return (
            [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
            if self.path.exists()
            else []
        )

    def close(self) -> None:
        """Do nothing: no file is open between rows."""


class TensorBoardWriter(TensorBoardOutputFormat):
    """Writer of stable-baselines3 that also takes pictures."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture."""
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


class PatientWriter(KVWriter):
    """Writer that passes rows on to another; where that one cannot write, says so once and goes on."""

    def __init__(self, writer: KVWriter, name: str) -> None:
        self.writer, self.name = writer, name
        self.failed = False

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write a row."""
        self._patiently(self.writer.write, key_values, key_excluded, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture, where the writer shows any."""
        show = getattr(self.writer, "picture", None)
        if show is not None:
            self._patiently(show, name, path, step)

    def _patiently(self, write: Callable[..., None], *what: Any) -> None:
        try:
            write(*what)
        except Exception as error:
            if not self.failed:
                why = str(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}"
                say(f"warning: Cannot write {self.name}: {why}. Training goes on.")
            self.failed = True
        else:
            self.failed = False

    def close(self) -> None:
        """Close the writer; what comes after training does not wait for one that fails."""
        try:
            self.writer.close()
        except Exception as error:
            if not isinstance(error, OSError):
                say(f"warning: Cannot end the log {self.name}: {type(error).__name__} {error}.")
