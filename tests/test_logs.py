"""The metrics files of a run: every row whole or not there, whatever happens."""

from __future__ import annotations

import csv
import errno
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import KVWriter

from flowrl.runs.logs import MetricsFile, PatientWriter, logger
from flowrl.storage.files import read_rows

ROWS = [{"time/total_timesteps": 64 * i, "a": i / 3} for i in range(1, 4)]


def write(file: MetricsFile, *rows: dict[str, Any]) -> None:
    for row in rows:
        file.write(row, {})


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    write(MetricsFile(tmp_path / "m.csv", "csv"), *ROWS)
    assert read_rows(tmp_path / "m.csv") == ROWS
    write(MetricsFile(tmp_path / "m.json", "json"), *ROWS)
    assert [json.loads(line) for line in (tmp_path / "m.json").read_text().splitlines()] == ROWS


def test_a_new_metric_is_a_new_column(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv", "csv")
    write(file, ROWS[0], {**ROWS[1], "b": 7, "0": 5}, ROWS[2])
    table = csv_rows(tmp_path / "m.csv")
    assert list(table[0]) == ["a", "time/total_timesteps", "0", "b"]
    assert [row["b"] for row in table] == ["", "7", ""]
    assert read_rows(tmp_path / "m.csv")[0] == ROWS[0]


def test_kinds_of_values(tmp_path: Path) -> None:
    row = {"n": np.float32(0.5), "nan": math.nan, "text": 'a "b", c', "i": np.int64(3), "hidden": 1, "far": -math.inf}
    for kind in ("csv", "json"):
        MetricsFile(tmp_path / f"m.{kind}", kind).write(row, {"hidden": (kind,)})
    assert read_rows(tmp_path / "m.csv") == [{"n": 0.5, "text": 'a "b", c', "i": 3, "far": -math.inf}]
    expected = {"n": 0.5, "nan": None, "text": 'a "b", c', "i": 3, "far": None}
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == expected


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.csv"
    write(MetricsFile(path, "csv"), *ROWS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_rows(path) == ROWS[:2]


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    write(MetricsFile(tmp_path / "metrics.csv", "csv"), *ROWS)
    resumed = logger(tmp_path, 128)
    for key, value in {**ROWS[2], "new": 1}.items():
        resumed.record(key, value)
    resumed.dump(step=192)
    resumed.close()
    assert read_rows(tmp_path / "metrics.csv") == [*ROWS[:2], {**ROWS[2], "new": 1}]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines == [*ROWS[:2], {**ROWS[2], "new": 1}]


def test_a_new_run_does_not_go_on_with_an_old_file(tmp_path: Path) -> None:
    write(MetricsFile(tmp_path / "metrics.csv", "csv"), *ROWS)
    logger(tmp_path, 0).close()
    assert not (tmp_path / "metrics.csv").exists()


def test_a_row_is_appended_or_the_file_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a row."""

    class HalfFull:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> HalfFull:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            return self.file.write(data[: len(data) // 2])

    for kind in ("csv", "json"):
        path = tmp_path / f"m.{kind}"
        file = MetricsFile(path, kind)
        write(file, ROWS[0])
        before = path.read_bytes()
        plain = Path.open
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda self, *args, plain=plain, **kw: HalfFull(plain(self, *args, **kw)))
            with pytest.raises(OSError, match="no space"):
                write(file, ROWS[1])
        assert path.read_bytes() == before
        write(file, ROWS[2])  # the row that waited comes first
        read = read_rows(path) if kind == "csv" else [json.loads(line) for line in path.read_text().splitlines()]
        assert read == ROWS


def test_a_file_that_vanished_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "m.csv", "csv")
    write(file, ROWS[0])
    (folder / "m.csv").unlink()
    folder.rmdir()
    write(file, ROWS[1])
    assert read_rows(folder / "m.csv") == [ROWS[1]]


def test_a_writer_that_fails_says_so_once_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(KVWriter):
        error: OSError | None = OSError(errno.EROFS, "Read-only file system")

        def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
            if self.error:
                raise self.error

        def close(self) -> None:
            raise OSError

    failing = Failing()
    patient = PatientWriter(failing, "metrics")
    for _ in range(3):
        patient.write({}, {})
    assert capsys.readouterr().out.count("Read-only file system") == 1
    failing.error = None
    patient.write({}, {})
    failing.error = OSError("again")
    patient.write({}, {})
    assert "again" in capsys.readouterr().out
    patient.close()


def test_a_reader_of_the_output_that_goes_away_ends_no_run(tmp_path: Path, program_environment: dict[str, str]) -> None:
    """`python -m flowrl.run ... | head -1`"""
    command = ["--algo", "orw", "--env", "gaussians-linear", "--total-timesteps", "192", "--name", "a"]
    sizes = ["--algo.n-samples", "32", "--algo.batch-size", "32", "--eval-samples", "32", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "flowrl.run", *command, *sizes],
        cwd=tmp_path,
        env=program_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(120)
    assert "Traceback" not in errors
    assert len(csv_rows(tmp_path / "runs" / "a" / "metrics.csv")) == 6
    assert (tmp_path / "runs" / "a" / "report.html").exists()
