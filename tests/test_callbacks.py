"""Checkpoints by iterations, by minutes, the best one, in the background; folders that vanish; signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from stable_baselines3.common.logger import Logger

import flowrl
from flowrl.errors import CheckpointError
from flowrl.functional import metrics
from flowrl.runs import callbacks
from flowrl.runs.callbacks import KeepCheckpoints, PictureCallback, StopOnSignal
from flowrl.storage.files import clear_away, replace_folder
from flowrl.training import saving as snapshot
from flowrl.training.loading import checkpoint_folder
from flowrl.training.records import RolloutRecord
from flowrl.training.saving import Snapshot
from flowrl.types import RewardOutput

N = 32


def model(**settings: object) -> flowrl.ORWCFMW2:
    return flowrl.ORWCFMW2(
        "FlowPolicy", "gaussians-linear", seed=0, device="cpu", n_samples=N, batch_size=N, **settings
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def names_of(*iterations: int) -> set[str]:
    return {f"{N * i:010d}" for i in iterations}


def set_rewards(monkeypatch: pytest.MonkeyPatch, rewards: dict[int, float]) -> None:
    """Let the mean reward of an iteration be what the test says."""
    monkeypatch.setattr(
        flowrl.FlowAlgorithm,
        "rollout_reward",
        property(lambda self: rewards.get(self.iteration, 0.0), lambda s, v: None),
    )


def test_the_newest_and_the_best_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rewards(monkeypatch, {3: 5.0, 6: 1.0})
    keep = KeepCheckpoints(tmp_path, every=1, keep=2)
    model().learn(7 * N, callback=keep)
    keep.wait()
    assert names(tmp_path) == {*names_of(3, 6, 7), "best"}
    assert (tmp_path / "best").resolve().name == f"{N * 3:010d}"
    assert flowrl.ORWCFMW2.load(tmp_path / "best").num_timesteps == 3 * N
    assert checkpoint_folder(tmp_path / "best").name == f"{N * 3:010d}"  # the link leads elsewhere once another is best
    for later in names_of(6, 7):
        shutil.rmtree(tmp_path / later)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path, target_is_directory=True)
    assert checkpoint_folder(run).name == f"{N * 3:010d}"


def test_pictures_and_evaluations_draw_no_more_at_once_than_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rollouts draw at once fits into the memory of a GPU; 36 or 256 samples of a large model need not."""
    trained, drawn, paired, sample = (
        model(rollout_batch_size=8, rollout_steps=1),
        [],
        [],
        flowrl.FlowPolicy.sample_latents,
    )

    def sample_latents(policy: flowrl.FlowPolicy, ids: torch.Tensor, **settings: object) -> torch.Tensor:
        drawn.append(len(ids))
        return sample(policy, ids, **settings)

    def diversity(samples: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        paired.append(len(samples))
        return torch.zeros(())

    monkeypatch.setattr(flowrl.FlowPolicy, "sample_latents", sample_latents)
    trained.learn(N, callback=PictureCallback(tmp_path))
    monkeypatch.setattr(metrics, "n_compared", lambda samples, most, values: values // 2**29 * 10, raising=False)
    monkeypatch.setattr(metrics, "diversity", diversity)
    flowrl.evaluate(trained, n_samples=20)
    assert max(drawn) == 8
    assert sum(drawn) > 2 * 512
    assert paired == [10, 10]


def test_samples_of_an_iteration_do_not_stay_while_the_network_trains() -> None:
    record, images = RolloutRecord(), torch.zeros(1).expand(16, 3, 1024, 1024)
    for _ in range(8):
        record.add(images, torch.zeros(16, dtype=torch.long), RewardOutput(torch.zeros(16)))
    assert len(record.shown) == 2  # 21 of them are looked at
    assert model().learn(N).record.shown == []


def test_a_reward_that_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = model()
    trained.rollout_figures = {"rollout/reward_mean": torch.tensor(float("nan"))}
    assert trained.rollout_reward is None
    set_rewards(monkeypatch, {1: -3.0, 2: None, 3: None})  # type: ignore[dict-item]
    keep = KeepCheckpoints(tmp_path, every=1, keep=1)
    trained.learn(3 * N, callback=keep)
    keep.wait()
    assert names(tmp_path) == {*names_of(1, 3), "best"}


def test_of_a_run_without_rewards_none_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rewards(monkeypatch, {1: None, 2: None, 3: None})  # type: ignore[dict-item]
    keep = KeepCheckpoints(tmp_path, every=1, keep=2)
    model().learn(3 * N, callback=keep)
    keep.wait()
    assert names(tmp_path) == names_of(2, 3)


def test_without_the_best(tmp_path: Path) -> None:
    keep = KeepCheckpoints(tmp_path, every=1, keep=1, keep_best=False)
    model().learn(3 * N, callback=keep)
    keep.wait()
    assert names(tmp_path) == names_of(3)


def test_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 25))  # seconds: one look an iteration, one more with every checkpoint
    monkeypatch.setattr("flowrl.runs.callbacks.time.monotonic", lambda: float(next(clock)))
    keep = KeepCheckpoints(tmp_path, every=0, minutes=1, keep=100, keep_best=False)
    model().learn(8 * N, callback=keep)
    keep.wait()
    assert names(tmp_path) == names_of(3, 6)  # 75 s after the start, and again


def test_the_reward_of_a_checkpoint_is_that_of_its_iteration(tmp_path: Path) -> None:
    trained = model().learn(2 * N)
    trained.save(tmp_path / "saved")
    reward = json.loads((tmp_path / "saved" / "state.json").read_text())["reward"]
    assert reward == pytest.approx(trained.last_logged["rollout/reward_mean"])
    assert flowrl.ORWCFMW2.load(tmp_path / "saved").rollout_reward == pytest.approx(reward)


def test_what_is_written_in_the_background_is_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing waits until training is two iterations on."""
    go = threading.Event()
    write = Snapshot.write

    def late(self: Snapshot, path: Path) -> Path:
        assert go.wait(60)
        return write(self, path)

    trained, plain = model(ema_decay=0.9), model(ema_decay=0.9)
    plain.learn(N)
    plain.save(tmp_path / "plain")
    monkeypatch.setattr(Snapshot, "write", late)
    keep = KeepCheckpoints(tmp_path / "kept", every=1000)
    trained.learn(N, callback=keep)
    keep._begin()
    trained.learn(2 * N, reset_num_timesteps=False)
    assert not (tmp_path / "kept").exists()
    go.set()
    keep.wait()
    for file in ("policy.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert (tmp_path / "kept" / f"{N:010d}" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    a, b = (json.loads((tmp_path / f / "state.json").read_text()) for f in (f"kept/{N:010d}", "plain"))
    assert a == b


def test_a_failure_in_the_background_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Snapshot, path: Path) -> Path:
        raise CheckpointError("no space.")

    keep = KeepCheckpoints(tmp_path, every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "write", fail)
        trained = model().learn(2 * N, callback=keep)
        assert keep.write() is None
    assert capsys.readouterr().out.count("no space. It will be tried again") == 3  # two iterations and the last try
    assert trained.num_timesteps == 2 * N
    assert keep.write() == tmp_path / f"{2 * N:010d}"


def test_a_folder_that_vanishes_while_old_checkpoints_are_deleted_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vanish(self: Snapshot, path: Path) -> Path:
        write(self, path)
        shutil.rmtree(tmp_path / "checkpoints")
        return path

    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", vanish)
    keep = KeepCheckpoints(tmp_path / "checkpoints", every=1)
    assert model().learn(2 * N, callback=keep).num_timesteps == 2 * N
    keep.wait()
    assert "while training goes on" in capsys.readouterr().out


def test_the_last_checkpoint_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = KeepCheckpoints(tmp_path, every=1)
    model().learn(N, callback=keep)
    keep.wait()
    monkeypatch.setattr(snapshot, "write_json", None)
    assert keep.write() == tmp_path / f"{N:010d}"


def test_a_checkpoint_folder_that_vanishes_is_made_again(tmp_path: Path) -> None:
    keep = KeepCheckpoints(tmp_path / "run" / "checkpoints", every=1)
    trained = model().learn(N, callback=keep)
    keep.wait()
    shutil.rmtree(tmp_path / "run")
    trained.learn(N, callback=keep, reset_num_timesteps=False)
    keep.wait()
    assert names(tmp_path / "run" / "checkpoints") == {*names_of(2), "best"}


def test_what_killed_processes_left_is_cleared_away(tmp_path: Path) -> None:
    left = {".0000000032-ab_12345", ".0000000064-old-17", ".0000000096-old-17"}
    others = {"0000000064", ".git-ab_12345", ".x"}
    for name in left | others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(name)
    clear_away(tmp_path)
    assert names(tmp_path) == {"0000000096", *others}
    assert (tmp_path / "0000000096" / "state.json").read_text() == ".0000000096-old-17"
    clear_away(tmp_path / "nothing")


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    for name in ("far", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(name)
    (tmp_path / "final").symlink_to("far")
    (tmp_path / ".final-old-17").symlink_to("far")
    replace_folder(tmp_path / "new", tmp_path / "final")
    clear_away(tmp_path)
    assert names(tmp_path) == {"far", "final"}
    assert [(tmp_path / name / "state.json").read_text() for name in ("far", "final")] == ["far", "new"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = model().learn(N)
    trained.save(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "new")

    class Killed(BaseException):
        pass

    def killed(self: Path, target: Path) -> None:
        if self.name == "new":
            raise Killed
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        replace_folder(tmp_path / "new", tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert flowrl.ORWCFMW2.load(tmp_path / "saved").num_timesteps == N


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_closed_terminal_stops_the_run_but_not_under_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for setting, expected in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, None)):
            signal.signal(signal.SIGHUP, setting)
            with StopOnSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.received is expected
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_any_checkpoints_is_an_error(run_here) -> None:
    arguments = ["--algo", "orw", "--env", "gaussians-linear", "--checkpoint-every", 0]
    done = run_here("flowrl.run", *arguments)
    assert done.returncode == 2
    assert "a run without checkpoints can be lost" in done.stderr


def test_killed_runs_end_as_others(program_environment: dict[str, str]) -> None:
    """Some of what `python tests/kill_runs.py` does for all algorithms."""
    script = Path(__file__).with_name("kill_runs.py")
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    command = [sys.executable, str(script), "--kills", "3", "--algos", "flow_grpo", "--parts", "mlp"]
    done = subprocess.run(command, env=program_environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 cases differ" in done.stdout


class Clock:
    """A clock by which an iteration takes a second, and a picture as long as the test says."""

    def __init__(self, picture: float) -> None:
        self.now, self.picture = 100.0, picture

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def save_picture(self, samples: torch.Tensor, contexts: object, env: object, path: Path) -> None:
        self.now += self.picture
        path.parent.mkdir(exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("every", "cost", "drawn"),
    [
        (None, 0.01, [0, 10, 20, 30, 40, 50, 57]),  # 10 iterations between two
        (None, 0.5, [0, 20, 30, 40, 50, 57]),  # a second by iteration 20
        (None, 10.0, [0, 57]),  # the first and the last
        (20, 10.0, [0, 20, 40]),  # as asked for
    ],
)
def test_pictures_take_a_twentieth_of_the_time(
    every: int | None, cost: float, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(cost)
    monkeypatch.setattr(callbacks, "time", clock)
    monkeypatch.setattr(callbacks, "save_picture", clock.save_picture)
    pictures = PictureCallback(tmp_path / "samples", every)
    trained = model(n_epochs=1, rollout_steps=1)
    pictures.init_callback(trained)
    trained._total_timesteps = 57 * N
    trained.set_logger(Logger(None, []))
    pictures.on_training_start({}, {})
    for iteration in range(1, 58):
        clock.now += 1
        trained.iteration, trained.num_timesteps = iteration, iteration * N
        assert pictures.on_iteration_end()
    pictures.on_training_end()
    found = sorted(int(name[:4]) for name in names(tmp_path / "samples"))
    assert found == drawn


def test_a_run_that_is_stopped_draws_no_last_picture(tmp_path: Path) -> None:
    pictures = PictureCallback(tmp_path / "samples")
    stop = StopOnSignal()
    stop.received = signal.SIGTERM
    model().learn(4 * N, callback=[pictures, stop])
    assert names(tmp_path / "samples") == {"0000-reference.png"}


def test_pictures_draw_no_random_numbers_of_training(tmp_path: Path) -> None:
    with_pictures, without = (
        model().learn(4 * N, callback=callback) for callback in (PictureCallback(tmp_path / "samples", 1), None)
    )
    for one, other in zip(with_pictures.policy.parameters(), without.policy.parameters()):
        assert torch.equal(one, other)
    assert len(names(tmp_path / "samples")) == 5
