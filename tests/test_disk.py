"""Disks that are full for a while, or for good."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run

import flowrl
from flowrl.errors import ConfigError
from flowrl.runs import callbacks
from flowrl.runs.callbacks import KeepCheckpoints, PictureCallback
from flowrl.runs.folder import alone_in
from flowrl.runs.logs import logger
from flowrl.storage import files

SIZES = {"n_samples": 64, "batch_size": 64}


def model() -> flowrl.ORWCFMW2:
    return flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", **SIZES)


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, keep = model(), KeepCheckpoints(tmp_path / "checkpoints", every=1, keep_best=False, background=False)
    trained.learn(64, callback=keep)
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        trained.learn(64, callback=keep, reset_num_timesteps=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000000064"]  # the last good one
    assert "No space left on device" in capsys.readouterr().out
    trained.learn(64, callback=keep, reset_num_timesteps=False)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000000064", "0000000192"]
    assert flowrl.ORWCFMW2.load(tmp_path / "checkpoints" / "0000000192").num_timesteps == 192


def test_a_picture_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "save_picture", full)
    trained = model().learn(128, callback=PictureCallback(tmp_path / "samples", every=1))
    assert trained.num_timesteps == 128
    assert "Cannot write a picture" in capsys.readouterr().out


def mounted(*options: str) -> bool:
    """Whether `mount` exists, may be used here, and did what it was asked."""
    mount = shutil.which("mount")
    return mount is not None and subprocess.run([mount, *options], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    if not mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        pytest.skip("cannot mount a disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 190 kB, where one can be had."""
    with disk(tmp_path / "tiny", "190k") as folder:
        yield folder


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, which can be made read-only."""
    with disk(tmp_path / "roomy", "20m") as folder:
        yield folder


def test_metrics_are_written_once_there_is_space_again(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = model()
    trained.set_logger(logger(tiny, 0))
    trained.learn(64)
    fill(tiny / "ballast")
    for _ in range(30):
        trained.learn(64, reset_num_timesteps=False)
    assert "Cannot write" in capsys.readouterr().out
    (tiny / "ballast").unlink()
    trained.learn(64, reset_num_timesteps=False)
    trained.logger.close()
    with (tiny / "metrics.csv").open(newline="") as file:
        steps = [int(row["time/total_timesteps"]) for row in csv.DictReader(file)]
    assert steps == [64 * (i + 1) for i in range(32)]


def fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return


def test_a_run_on_a_full_disk_trains_on_and_ends_with_an_error(tiny: Path, run_in: Run) -> None:
    command = ["--algo", "orw_w2", "--env", "gaussians-linear", "--device", "cpu", "--name", "a"]
    settings = ["--total-timesteps", "1280", "--algo.n-samples", "64", "--algo.batch-size", "64"]
    every = ["--checkpoint-every", "5", "--picture-every", "2"]
    done = run_in(tiny, "flowrl.run", *command, *settings, *every)
    assert done.returncode == 2
    assert "Training goes on" in done.stdout
    assert "1.28e+03" in done.stdout or "1280" in done.stdout  # it went on to the end
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("error:", "What", "The final weights are not kept; "))


def test_a_folder_that_becomes_read_only_loses_nothing(roomy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, keep = model(), KeepCheckpoints(roomy / "checkpoints", every=1, keep_best=False, background=False)
    trained.set_logger(logger(roomy, 0))
    trained.learn(64, callback=keep)
    assert mounted("-o", "remount,ro", str(roomy))
    trained.learn(64, callback=keep, reset_num_timesteps=False)
    said = capsys.readouterr().out
    assert "Read-only file system" in said
    assert "Training goes on" in said
    assert [path.name for path in (roomy / "checkpoints").iterdir()] == ["0000000064"]
    assert mounted("-o", "remount,rw", str(roomy))
    trained.learn(64, callback=keep, reset_num_timesteps=False)
    trained.logger.close()
    assert flowrl.ORWCFMW2.load(roomy / "checkpoints" / "0000000192").num_timesteps == 192
    with (roomy / "metrics.csv").open(newline="") as file:
        assert [int(row["time/total_timesteps"]) for row in csv.DictReader(file)] == [64, 128, 192]


def test_a_run_in_a_read_only_folder_ends_before_it_trains(
    roomy: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(roomy)
    assert mounted("-o", "remount,ro", str(roomy))
    done = run_here("flowrl.run", "--algo", "orw_w2", "--env", "gaussians-linear", "--device", "cpu")
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert "rollout/" not in done.stdout
    with pytest.raises(ConfigError, match="Make it writable, or go on in a copy of it"), alone_in(roomy):
        pass  # as a run that goes on does: it cannot be told to another place


def test_what_is_there_stays_whole_on_a_full_disk(roomy: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end with one line; report and pictures of before were left cut, and three ended in tracebacks."""
    monkeypatch.chdir(roomy)
    command = ["--algo", "orw", "--env", "gaussians-linear", "--device", "cpu", "--name", "a", "--out", "."]
    size = ["--algo.n-samples", "32", "--eval-samples", "16"]
    assert run_here("flowrl.run", *command, *size, "--total-timesteps", "32").returncode == 0
    before = contents(roomy / "a")
    fill(roomy / "ballast")
    for program, *arguments in (
        ("flowrl.evaluate", "a", "--n-samples", "16"),
        ("flowrl.report", "a"),
        ("flowrl.run", "--resume", "a", "--total-timesteps", "64"),
        ("flowrl.run", *command),
    ):
        done = run_here(program, *arguments)
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert contents(roomy / "a") == before
        if program == "flowrl.evaluate":
            assert "W2 to optimum" in done.stdout
            assert "The figures are those above." in done.stderr
        if "--resume" in arguments:
            assert "Go on with: python -m flowrl.run --resume a" in done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Give the files of a run folder but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_signal_on_a_full_disk_says_that_nothing_was_kept(
    tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks.Snapshot, "write", full)
    monkeypatch.setattr(callbacks.StopOnSignal, "on_iteration_end", stopped)
    done = run_here("flowrl.run", "--algo", "orw", "--env", "gaussians-linear", "--algo.n-samples", "32")
    assert done.returncode == 3
    assert "; this state is not kept; there is no checkpoint yet" in done.stdout


def stopped(callback: callbacks.StopOnSignal) -> bool:
    """Act as where a signal has come."""
    callback.received = signal.SIGTERM
    return False


def written_half(path: Path) -> None:
    with files.written_whole(path) as new:
        new.write_text("half")
        full()


def test_a_file_takes_the_place_of_another_once_it_is_whole(tmp_path: Path) -> None:
    path, link = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("old")
    link.symlink_to(path)
    with pytest.raises(OSError, match="No space"):
        written_half(path)
    assert path.read_text() == "old"
    for place, text in ((path, "new"), (link, "through a link")):
        with files.written_whole(place) as new:
            new.write_text(text)
        assert path.read_text() == text
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [path, link]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_the_umask_says_who_reads_a_checkpoint(tmp_path: Path, mask: int) -> None:
    """Weights as all else: safetensors writes files that only their owner reads."""
    before = os.umask(mask)
    try:
        model().save(tmp_path / "saved")
        files.save_tensors(tmp_path / "samples.safetensors", {"samples": torch.ones(2)})
    finally:
        os.umask(before)
    written = [tmp_path / "samples.safetensors", *(tmp_path / "saved").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~mask}
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o777 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.safetensors", "saved"]
