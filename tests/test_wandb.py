"""Weights & Biases gets what TensorBoard gets; with a module in its place, and offline where the package is there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowrl.errors import ConfigError
from flowrl.run import main
from flowrl.runs.logs import logger, read_metrics
from flowrl.runs.wandb_writer import ID_FILE, WandbWriter

TINY = ["--algo", "orw", "--env", "gaussians-linear", "--algo.n-samples", "32", "--total-timesteps", "64"]
TINY += ["--eval-samples", "8", "--name", "r"]


class Fake:
    """In the place of the package: notes what it is given."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails: list[str] = []

    def init(self, **given: Any) -> SimpleNamespace:
        if "init" in self.fails:
            raise self.Error("no key.")
        self.started.append(given)
        return SimpleNamespace(id="abc123", log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], step: int) -> None:
        if "log" in self.fails:
            raise self.Error("gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        if "finish" in self.fails:
            raise self.Error("the service does not answer")
        self.finished += 1

    def Image(self, pixels: np.ndarray) -> np.ndarray:
        return pixels


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_log_that_does_not_end_costs_no_weights(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Sending the rest can fail when training is over; weights, evaluation and report come after that."""
    fake.fails = ["finish"]
    assert main([*TINY, "--wandb", "project"]) == 0
    assert {path.name for path in Path("runs/r").iterdir()} >= {"final", "evaluation.json", "report.html"}
    assert "Cannot end the log by WandbWriter: Error the service does not answer." in capsys.readouterr().out


def test_it_gets_what_tensorboard_gets(fake: Fake) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*TINY, "--picture-every", "2", "--wandb", "team/project"]) == 0
    (started,) = fake.started
    assert (started["entity"], started["project"], started["name"], started["id"]) == ("team", "project", "r", None)
    assert started["config"]["algorithm"] == "orw"
    assert fake.finished == 1
    board = events.EventAccumulator("runs/r/tensorboard").Reload()
    tags = board.Tags()
    rows = {step: values for step, values in fake.logged if "samples" not in values}
    assert set(tags["scalars"]) == set().union(*rows.values())
    for tag in tags["scalars"]:
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in board.Scalars(tag)] == [
            (step, values[tag]) for step, values in rows.items()
        ]
    assert [row["rollout/reward_mean"] for row in read_metrics(Path("runs/r/metrics.csv"))] == [
        values["rollout/reward_mean"] for values in rows.values()
    ]
    pictures = [(step, values["samples"].shape) for step, values in fake.logged if "samples" in values]
    assert [step for step, _ in pictures] == [e.step for e in board.Images("samples")] == [0, 64]
    assert [(e.height, e.width, 3) for e in board.Images("samples")] == [shape for _, shape in pictures]


def test_a_resumed_run_goes_on_with_the_same_one_when_asked(fake: Fake) -> None:
    assert main([*TINY, "--wandb", "project"]) == 0
    assert main(["--resume", "runs/r", "--total-timesteps", "96"]) == 0
    assert len(fake.started) == 1  # the folder's config.json does not say where metrics go
    assert main(["--resume", "runs/r", "--total-timesteps", "128", "--wandb", "project"]) == 0
    assert fake.started[1]["id"] == "abc123"
    assert fake.started[1]["entity"] is None


def test_an_id_that_is_none(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / ID_FILE).write_text("../../elsewhere")
    WandbWriter("project", tmp_path, {})
    assert fake.started[0]["id"] is None
    assert (tmp_path / ID_FILE).read_text() == "abc123\n"


def test_what_can_fail(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails = ["init"]
    with pytest.raises(ConfigError, match=r"no key\. Log in with `wandb login`"):
        WandbWriter("project", tmp_path, {})
    fake.fails = ["log"]
    log = logger(tmp_path, 0, WandbWriter("project", tmp_path, {}))
    for step in (1, 2):
        log.record("a", 0.5)
        log.dump(step)
    assert capsys.readouterr().out.count("Cannot write by WandbWriter: gone. Training goes on.") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*TINY, "--wandb", "project"]) == 2
    assert 'pip install "flowrl-torch[wandb]"' in capsys.readouterr().err


def test_the_package_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    assert main([*TINY, "--picture-every", "2", "--wandb", "project"]) == 0
    (folder,) = Path("runs/r/wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert b"rollout/reward_mean" in log.read_bytes()
    assert len(list((folder / "files" / "media" / "images").glob("samples_*.png"))) == 2


def test_a_run_without_the_package_makes_nothing(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*TINY, "--wandb", "p"]) == 2
    assert "Weights & Biases is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
