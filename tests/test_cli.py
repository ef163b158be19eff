"""The programs, run as a user runs them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import forgetting
from safetensors.torch import load_file

import flowrl
import flowrl.run
from flowrl.errors import ConfigError, RewardError
from flowrl.pages.run_files import RunFiles
from flowrl.registry import environment_spec
from flowrl.run import main
from flowrl.runs.commandline import RunConfig
from flowrl.runs.folder import alone_in, finite_or_none, write_evaluation
from flowrl.runs.program import guarded

TINY = [
    "--algo.n-samples", 64, "--algo.batch-size", 32, "--algo.rollout-steps", 2, "--algo.ema-decay", 0.9,
    "--algo.refresh-every", 2, "--eval-samples", 32, "--checkpoint-every", 2, "--picture-every", 3,
]  # fmt: skip
RUN = ["--algo", "orw_w2", "--env", "gaussians-linear", *TINY]
N = 64
FILES = ["policy.safetensors", "optimizer.safetensors", "random.safetensors"]
COLUMNS = {
    *(f"rollout/{key}" for key in ("reward_mean", "reward_std", "reward_min", "reward_max", "ess", "diversity")),
    *(f"train/{key}" for key in ("loss", "drift", "grad_norm", "learning_rate", "n_updates")),
    *(f"time/{key}" for key in ("iteration", "total_timesteps", "samples_per_second", "network_evaluations")),
}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights, optimizer and random states, bit for bit."""
    for file in FILES:
        mine, yours = load_file(one / file), load_file(other / file)
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[key], yours[key]) for key in mine), file


def assert_same_run(one: Path, other: Path) -> None:
    """The same final state and the same rows, apart from the speed."""
    assert_same_checkpoint(one / "final", other / "final")
    mine, yours = rows(one), rows(other)
    for row in (*mine, *yours):
        del row["time/samples_per_second"]
    assert mine == yours
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations, in this process; read only."""
    where = tmp_path_factory.mktemp("six")
    arguments = [*RUN, "--total-timesteps", 6 * N, "--out", where, "--name", "six"]
    assert main([str(argument) for argument in arguments]) == 0
    return where / "six"


@pytest.fixture(scope="module")
def again(run_in, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The same run in a process of its own, in `cwd`."""
    where = tmp_path_factory.mktemp("again")
    done = run_in(where, "flowrl.run", *RUN, "--total-timesteps", 6 * N, "--out", "elsewhere", "--name", "again")
    assert done.returncode == 0, done.stderr
    done.cwd = where
    return done


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations, to resume copies of."""
    where = tmp_path_factory.mktemp("three")
    arguments = [*RUN, "--total-timesteps", 3 * N, "--out", where, "--name", "three"]
    assert main([str(argument) for argument in arguments]) == 0
    return where / "three"


def test_no_arguments_prints_help_and_the_lists(run_here) -> None:
    done = run_here("flowrl.run")
    assert done.returncode == 0
    for expected in ("usage", "algorithms:", "orw_w2", "orw_kl", "environments:", "gaussians-ring", "sd3-aesthetic"):
        assert expected in done.stdout


def test_help_begins_each_list_on_a_line_of_its_own(run_here) -> None:
    lines = [line.strip() for line in run_here("flowrl.run", "--help").stdout.splitlines()]
    assert {"algorithms:", "environments:"} <= set(lines)


def test_warnings_of_a_program_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    def body(args: list[str]) -> int:
        warnings.warn_explicit("of two\n lines", UserWarning, "/there/flowrl/here.py", 1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert guarded(body, []) == 0
    assert capsys.readouterr().err == "warning: of two lines\n"


def test_help_shows_all_options_with_recommended_defaults(run_here) -> None:
    done = run_here("flowrl.run", "--algo", "orw_w2", "--env", "sd3-compress", "--env.flow", "mini-sd3", "--help")
    assert done.returncode == 0
    for option in ("--total-timesteps", "--resume", "--dry-run", "--env.flow", "--env.resolution", "--algo.alpha"):
        assert option in done.stdout
    spec = environment_spec("sd3-compress")
    recommended = spec.recommended(spec.config)
    for key in ("n_epochs", "group_size"):
        assert recommended[key] != getattr(flowrl.ORWCFMW2.Config(), key)
        described = done.stdout.split(f"--algo.{key.replace('_', '-')} ")[1].split("--algo.")[0]
        assert f"(default: {recommended[key]})" in described


MISTAKES = [
    (["--algo", "orw_w3", "--env", "gaussians-linear"], ["'orw_w3'", "'orw_w2'"]),
    (["--algo", "orw_w2", "--env", "gausians-linear"], ["'gausians-linear'", "'gaussians-linear'"]),
    ([*RUN, "--algo.alhpa", 0.3], ["--algo.alhpa", "--algo.alpha"]),
    ([*RUN, "--algo.solver", "eulr"], ["eulr", "euler"]),
    ([*RUN, "--totl-timesteps", 3], ["--totl-timesteps", "--total-timesteps"]),
    ([*RUN, "--env.flwo", "exact"], ["--env.flwo", "--env.flow"]),
    ([*RUN, "--env.flow", "gausians"], ["'gausians'", "'gaussians'"]),
    ([*RUN, "--algo.alpha", -1], ["alpha must not be negative"]),
    ([*RUN, "--algo.group-size", 7], ["group_size = 7 must divide n_samples = 64"]),
    ([*RUN, "--log-every", 0], ["--log-every must be positive"]),
    ([*RUN, "--total-timesteps", -64], ["--total-timesteps must not be negative"]),
    (["--algo", "orw_w2"], ["--env must be given", "gaussians-linear"]),
    (["--env", "gaussians-linear"], ["--algo must be given", "orw_kl"]),
    (["--algo", "no_such_module:Algo", "--env", "gaussians-linear"], ["no_such_module"]),
    (["--algo", "flowrl.orw_w2:ORWCFMW3", "--env", "gaussians-linear"], ["'ORWCFMW3'", "'ORWCFMW2'"]),
    (["--algo", "flowrl.training.buffer:RolloutBuffer", "--env", "gaussians-linear"], ["no FlowAlgorithm"]),
    ([*RUN, "--device", "warp"], ["warp", "cpu"]),
    (["--resume", "no-such-run"], ["no-such-run"]),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_mistakes(run_here, tmp_path: Path, arguments: list, expected: list[str]) -> None:
    done = run_here("flowrl.run", *arguments)
    assert done.returncode == 2
    for text in expected:
        assert text in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_as_a_program_ends(run_module, tmp_path: Path) -> None:
    done = run_module("flowrl.run", *MISTAKES[0][0])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(run_here, tmp_path: Path) -> None:
    done = run_here("flowrl.run", *RUN, "--device", "cuda")
    assert done.returncode == 2
    assert "error: Device 'cuda' is not available here" in done.stderr
    assert "Available: cpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(run_here, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = run_here("flowrl.run", *RUN, "--out", "taken")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot write to 'taken")
    assert "--out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--algo", "orw_w2", "--env", "gaussians-linear"],
        ["--algo", "orw_kl", "--env", "sd3-aesthetic", "--env.flow", "mini-sd3", "--algo.lora-rank", "4"],
    ],
    ids=["gaussians", "mini-sd3"],
)
def test_dry_run_writes_nothing(run_here, tmp_path: Path, arguments: list[str]) -> None:
    done = run_here("flowrl.run", *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    for expected in ("samples", "gradient steps", "trainable parameters", "MiB", "runs", "nothing was written"):
        assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_run_folder(six: Path) -> None:
    config = json.loads((six / "config.json").read_text())
    assert config["algorithm"] == "orw_w2"
    assert config["environment"]["name"] == "gaussians-linear"
    assert config["settings"]["n_samples"] == N
    assert config["run"]["total_timesteps"] == 6 * N
    assert {path.name for path in (six / "samples").iterdir()} == {
        f"{name}.png" for name in ("0000-reference", "0003", "0006")
    }
    kept = {path.name for path in (six / "checkpoints").iterdir()}
    assert kept - {f"{2 * N:010d}"} == {*(f"{n * N:010d}" for n in (4, 6)), "best"}
    assert_same_checkpoint(six / "final", six / "checkpoints" / f"{6 * N:010d}")
    assert (six / "before_after.png").stat().st_size > 1000


def test_metrics(six: Path) -> None:
    table = rows(six)
    assert table[0].keys() >= COLUMNS
    assert [int(row["time/iteration"]) for row in table] == [1, 2, 3, 4, 5, 6]
    assert [int(row["time/total_timesteps"]) for row in table] == [n * N for n in range(1, 7)]
    assert [int(row["train/n_updates"]) for row in table] == [2 * n for n in range(1, 7)]
    assert all(0 < float(row["rollout/ess"]) <= 1 for row in table)
    lines = [json.loads(line) for line in (six / "metrics.json").read_text().splitlines()]
    assert [line["time/iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_report_is_self_contained(six: Path) -> None:
    page = (six / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 1
    assert page.count("<polyline") >= 18  # six metrics against three axes
    for outside in ("http://", "https://", "<script", 'src="/'):
        assert outside not in page
    assert "drift" in page


def test_evaluation(six: Path) -> None:
    result = json.loads((six / "evaluation.json").read_text())
    assert result["n_samples"] == 32
    assert result["reward_ci"][0] < result["reward_mean"] < result["reward_ci"][1]
    for key in ("diversity", "drift", "ess", "w2_to_optimum", "w2_floor"):
        assert result[key] > 0
    assert result["reference"]["reward_mean"] != result["reward_mean"]


def test_printed_header(again) -> None:
    for expected in ("algorithm: orw_w2", "environment: gaussians-linear", "flow: gaussians", "seed: 0", "report:"):
        assert expected in again.stdout


def test_same_seed_same_weights(again, six: Path) -> None:
    assert_same_run(again.cwd / "elsewhere" / "again", six)


def test_the_same_name_and_another_seed(run_here, tmp_path: Path, three: Path) -> None:
    """A second run of the same name gets its own folder; another seed gives other weights."""
    shutil.copytree(three, tmp_path / "runs" / "three")
    done = run_here("flowrl.run", *RUN, "--total-timesteps", 3 * N, "--name", "three", "--seed", 1)
    assert done.returncode == 0
    second = tmp_path / "runs" / "three-2"
    assert len(rows(second)) == len(rows(tmp_path / "runs" / "three")) == 3
    mine, yours = (load_file(run / "final" / "policy.safetensors") for run in (second, three))
    assert any(not torch.equal(mine[key], yours[key]) for key in mine)


def test_three_and_three_iterations_are_six(run_here, three: Path, six: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    done = run_here("flowrl.run", "--resume", "run", "--total-timesteps", 6 * N, "--eval-samples", 32)
    assert done.returncode == 0, done.stderr
    assert f"going on at {3 * N} of {6 * N} samples" in done.stdout
    assert_same_run(run, six)
    assert json.loads((run / "config.json").read_text())["run"]["total_timesteps"] == 6 * N


def test_nothing_left_to_do(run_here, three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "run")
    done = run_here("flowrl.run", "--resume", "run")
    assert done.returncode == 0
    assert "nothing left to do" in done.stdout
    assert "--total-timesteps" in done.stdout


def test_a_run_stopped_after_its_last_iteration_is_finished(run_here, three: Path, tmp_path: Path) -> None:
    """Ctrl-C in the last iteration, or in the evaluation after it, leaves a checkpoint but no final/ and no report."""
    run = shutil.copytree(three, tmp_path / "run")
    (run / "final").rename(run / "checkpoints" / f"{3 * N:010d}")
    (run / "evaluation.json").unlink()
    done = run_here("flowrl.run", "--resume", "run", "--eval-samples", 32)
    assert done.returncode == 0
    assert_same_run(run, three)


def test_a_run_with_the_evaluation_of_an_older_state_is_not_finished(run_here, three: Path, tmp_path: Path) -> None:
    """It was evaluated while it trained, and killed before it evaluated its end."""
    run = shutil.copytree(three, tmp_path / "run")
    older = json.loads((run / "evaluation.json").read_text()) | {"trained_samples": 2 * N}
    (run / "evaluation.json").write_text(json.dumps(older))
    assert run_here("flowrl.run", "--resume", "run", "--eval-samples", 32).returncode == 0
    assert_same_run(run, three)


def test_a_config_without_what_it_may_be_without(run_here, three: Path, tmp_path: Path) -> None:
    """Of a seed it takes the usual one; without an environment there is no run. Both were tracebacks."""
    config = json.loads((three / "config.json").read_text())
    for name, code, told in (("seed", 0, "iterations of"), ("environment", 2, "does not come from a run")):
        (tmp_path / "one.json").write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        done = run_here("flowrl.run", "--config", "one.json", "--dry-run")
        assert (done.returncode, told in done.stdout + done.stderr) == (code, True)


def test_dry_run_of_a_resume_writes_nothing(run_here, three: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    done = run_here("flowrl.run", "--resume", "run", "--total-timesteps", 6 * N, "--dry-run")
    assert done.returncode == 0
    assert len(rows(run)) == 3
    assert "nothing was written" in done.stdout


def test_settings_beside_resume_are_told_where_to_give_them(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(three), "--algo.alpha", "0.5"]) == 2
    assert f"--config {three} --algo.alpha" in (error := capsys.readouterr().err)
    assert "goes on with the settings that it began with" in error


def test_an_edited_config_of_a_run_is_told_that_the_checkpoint_counts(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    more = ["--resume", str(run), "--total-timesteps", str(6 * N), "--dry-run"]
    assert main(more) == 0
    assert "other settings" not in capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())
    config["settings"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    assert main(more) == 0
    assert re.search(r"other settings than the checkpoint \(learning_rate 0\.5, not \S+\)", capsys.readouterr().err)


def test_two_runs_never_write_into_the_same_folder(run_here, three: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with alone_in(run):
        done = run_here("flowrl.run", "--resume", "run", "--total-timesteps", 6 * N)
    assert done.returncode == 2
    assert "Another process is training in 'run'" in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before
    with alone_in(run):  # free again
        pass


def test_a_process_that_is_killed_does_not_block_its_run_folder(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from flowrl.runs.folder import alone_in\n"
        f"with alone_in(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    with alone_in(tmp_path):
        pass


@pytest.fixture
def _determinism_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_determinism_put_back")
def test_deterministic_runs_are_the_same_twice(run_here, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = run_here("flowrl.run", *RUN, "--total-timesteps", 2 * N, "--name", name, "--deterministic")
        assert done.returncode == 0, done.stderr
    a, b = (tmp_path / "runs" / name for name in ("a", "b"))
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_run(a, b)
    assert json.loads((a / "config.json").read_text())["run"]["deterministic"] is True


def test_the_config_of_a_run_makes_the_same_run(run_here, six: Path, tmp_path: Path) -> None:
    """`--config` with nothing but a name; and with a setting that is to differ."""
    shutil.copy(six / "config.json", tmp_path / "given.json")
    done = run_here("flowrl.run", "--config", "given.json", "--name", "again")
    assert done.returncode == 0, done.stderr
    assert_same_run(six, tmp_path / "runs" / "again")
    mine, yours = (json.loads((run / "config.json").read_text()) for run in (six, tmp_path / "runs" / "again"))
    assert mine == yours
    shutil.copytree(tmp_path / "runs" / "again", tmp_path / "folder")
    other = ["--name", "other", "--algo.alpha", 0.7, "--seed", 5, "--total-timesteps", N, "--dry-run"]
    done = run_here("flowrl.run", "--config", "folder", *other)
    assert done.returncode == 0, done.stderr
    assert "alpha=0.7" in done.stdout
    assert "ema_decay=0.9" in done.stdout
    assert "1 iterations of 64 samples" in done.stdout


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ({}, ["--algo", "ddpo"], "a run with --algo orw_w2"),
        ({}, ["--resume", "."], "leave out one of the two"),
        ({"algorithm": "evil.module:Class"}, [], "Code named by a file is never imported"),
        ({"settings": {"n_samplse": 3}}, [], "'n_samples'"),
        ({"settings": {"n_samples": "many"}}, [], "n_samples must be"),
        ({"settings": []}, [], "is damaged"),
        ({"run": {"eval_samples": [1]}}, [], "eval_samples must be"),
        ({"run": None}, [], "does not come from a run"),
    ],
)
def test_mistakes_with_a_config(
    six: Path, tmp_path: Path, change: dict, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text(json.dumps({**json.loads((six / "config.json").read_text()), **change}))
    assert main(["--config", str(tmp_path / "given.json"), "--out", str(tmp_path), "--dry-run", *options]) == 2
    assert expected in capsys.readouterr().err


def test_a_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "nothing.json")]) == 2
    assert f"there is no '{tmp_path / 'nothing.json'}'. Name a run folder" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_own_settings(run_here, three: Path, tmp_path: Path) -> None:
    """--log-every, --checkpoint-every, --picture-every and --eval-samples are part of what was run."""
    run = shutil.copytree(three, tmp_path / "run")
    done = run_here("flowrl.run", "--resume", "run", "--total-timesteps", 4 * N)
    assert done.returncode == 0
    assert json.loads((run / "evaluation.json").read_text())["n_samples"] == 32
    assert (run / "checkpoints" / f"{4 * N:010d}").exists()


def test_a_damaged_checkpoint(run_here, three: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    file = run / "final" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    done = run_here("flowrl.run", "--resume", "run", "--total-timesteps", 6 * N)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "policy.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows(run)) == 3


LONG = [*RUN, "--checkpoint-every", 1000, "--picture-every", 1000, "--total-timesteps", 150 * N]


def interrupted(environment: dict[str, str], where: Path, name: str) -> tuple[int, str]:
    """Start a long run, press Ctrl-C once it has two rows of metrics; its exit code and output."""
    command = [sys.executable, "-m", "flowrl.run", *map(str, LONG), "--name", name]
    process = subprocess.Popen(
        command, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        metrics = where / "runs" / name / "metrics.csv"
        deadline = time.monotonic() + 100
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no metrics"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_and_resume_end_as_an_uninterrupted_run(
    run_here, program_environment: dict[str, str], tmp_path: Path
) -> None:
    code, output = interrupted(program_environment, tmp_path, "cut")
    assert code == 3, output
    assert "SIGINT" in output
    cut = tmp_path / "runs" / "cut"
    done_before = len(rows(cut))
    assert 2 <= done_before < 150, "the signal came too late to test anything"
    assert (cut / "checkpoints" / f"{done_before * N:010d}" / "state.json").exists()
    assert not (cut / "final").exists()
    command = next(line for line in output.splitlines() if "--resume" in line).partition("python -m flowrl.run ")[2]
    assert run_here("flowrl.run", *command.split(), "--eval-samples", 32).returncode == 0
    assert run_here("flowrl.run", *LONG, "--name", "whole").returncode == 0
    assert_same_run(cut, tmp_path / "runs" / "whole")
    assert len(rows(cut)) == 150


def test_evaluate_gives_the_run_its_own_figures_again(run_here, three: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    (run / "evaluation.json").unlink()
    done = run_here("flowrl.evaluate", "run", "--n-samples", 32)
    assert done.returncode == 0, done.stderr
    assert (run / "evaluation.json").read_text() == (three / "evaluation.json").read_text()
    assert "reference     trained" in done.stdout


def test_a_run_that_goes_on_shows_no_samples_of_before(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that is written before its end would show them as those of the present state."""
    run = shutil.copytree(three, tmp_path / "run")
    (run / "sounds").mkdir()
    (run / "sounds" / "contexts.json").write_text('{"contexts": []}')
    assert RunFiles.read(run).before_after

    def stopped(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flowrl.run, "evaluate", stopped)
    assert main(["--resume", str(run), "--total-timesteps", str(4 * N)]) == 130
    assert RunFiles.read(run).before_after == b""
    assert not (run / "sounds" / "contexts.json").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RewardError("out of order"), "out of order"),
        (MemoryError(), "There is no memory left (MemoryError: no reason). Draw fewer samples at once"),
    ],
    ids=["reward", "memory"],
)
def test_an_error_in_the_evaluation_loses_nothing(
    error: Exception, message: str, run_here, three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server is gone, say: what was trained is there, and evaluated by the command that is told."""
    run = shutil.copytree(three, tmp_path / "run")

    def failing(*given: object, **named: object) -> None:
        raise error

    (run / "evaluation.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(flowrl.run, "evaluate", failing)
        done = run_here("flowrl.run", "--resume", "run", "--eval-samples", 32)
    told = f"in {Path('run/final')}, not evaluated; go on with: python -m flowrl.run --resume run"
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.endswith(f"\nThe final weights are {told}\n")
    assert run_here("flowrl.run", "--resume", "run", "--eval-samples", 32).returncode == 0
    assert_same_run(run, three)


def test_a_checkpoint_of_a_run_is_trained_on_in_python(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(three / "final")]) == 2
    assert f"from a checkpoint, load it in Python: cls.load('{three / 'final'}').learn(N)" in capsys.readouterr().err


def test_an_evaluation_with_another_sampler_has_files_of_its_own(run_here, three: Path, tmp_path: Path) -> None:
    run = shutil.copytree(three, tmp_path / "run")
    own = {name: (run / name).read_bytes() for name in ("evaluation.json", "report.html", "before_after.png")}
    done = run_here("flowrl.evaluate", "run", "--n-samples", 32, "--steps", 3, "--solver", "heun")
    assert done.returncode == 0, done.stderr
    told = "with steps = 3, solver = heun, otherwise as in training"
    assert told in done.stdout
    assert {name: (run / name).read_bytes() for name in own} == own
    result = json.loads((run / "evaluation-steps-3-solver-heun.json").read_text())
    assert result["sampling"] == {"steps": 3, "solver": "heun"}
    assert result["evaluations_per_sample"] == 6
    assert told in (run / "report-steps-3-solver-heun.html").read_text()
    steps = json.loads((run / "config.json").read_text())["settings"]["rollout_steps"]
    done = run_here("flowrl.evaluate", "run", "--n-samples", 32, "--steps", steps)  # the run's own, given again
    assert (run / "evaluation.json").read_bytes() == own["evaluation.json"]


def test_a_run_stays_of_one_environment(run_here, three: Path, tmp_path: Path) -> None:
    """Its report says which one that is, and curves are of one reward."""
    own = shutil.copytree(three, tmp_path / "own")
    files = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    done = run_here("flowrl.evaluate", own, "--env", "gaussians-ring", "--n-samples", 8)
    assert "environment: gaussians-ring" in done.stdout
    assert "not written: the run is of 'gaussians-linear'" in done.stdout
    done = run_here("flowrl.run", "--resume", own, "--env", "gaussians-ring", "--total-timesteps", 64 * 4)
    assert done.returncode == 2
    assert "is a run on 'gaussians-linear': it goes on with that" in done.stderr
    assert {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()} == files


@pytest.mark.parametrize("option", [("--seed", 7), ("--name", "b"), ("--out=b",)])
def test_a_run_goes_on_in_its_own_folder_with_its_own_seed(run_here, three: Path, option: tuple[object, ...]) -> None:
    """Others went unheard."""
    done = run_here("flowrl.run", "--resume", three, "--total-timesteps", 64 * 4, *option)
    assert done.returncode == 2
    assert f"{str(option[0])[:6].rstrip('=')} does nothing beside --resume" in done.stderr


@pytest.mark.parametrize("name", ["..", "a/b", "../a", "/a", "a/", "."])
def test_a_name_is_no_path(name: str) -> None:
    """'..' made a folder '..-2', and others one outside --out, or an error that named neither."""
    with pytest.raises(ConfigError, match="--name is that of a folder in --out, not a path"):
        RunConfig(name=name)


def test_evaluate_steers_an_untrained_flow(run_here, tmp_path: Path) -> None:
    done = run_here("flowrl.evaluate", "--steer", "best_of_n", "--env", "sd3-count", "--n-samples", 8, "--steer-n", 2)
    assert done.returncode == 0, done.stderr
    assert "network evaluations per sample: 32" in done.stdout
    assert not list(tmp_path.iterdir())
    done = run_here("flowrl.evaluate", "--steer", "best_of_n", "--env", "gaussians-linear", "--algo", "orw")
    assert "--algo orw is the algorithm of a run" in done.stderr
    done = run_here("flowrl.evaluate", "--env", "sd3-count")
    assert done.returncode == 2
    assert "Nothing to evaluate" in done.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--n-samples", 0), ("--steps", 0), ("--seed", -1), ("--guidance-scale", "nan")]
)
def test_numbers_that_no_evaluation_has(run_here, tmp_path: Path, option: str, value: float | str) -> None:
    done = run_here("flowrl.evaluate", tmp_path, option, value)
    assert done.returncode == 2
    assert f"{option} must be" in done.stderr + done.stdout


def test_evaluate_nothing(run_here) -> None:
    done = run_here("flowrl.evaluate", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no folder 'nowhere'")


def test_evaluation_is_valid_json_even_of_one_sample(tmp_path: Path) -> None:
    """One sample has no spread: numbers that do not exist are null."""
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, rollout_steps=2)
    write_evaluation(tmp_path, flowrl.evaluate(model, n_samples=1))
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    assert finite_or_none({"drift": math.inf, "ci": (math.nan, 1.0)}) == {"drift": None, "ci": [None, 1.0]}


THIRD_PARTY = '''
from dataclasses import dataclass
import flowrl
from flowrl.envs.gaussians import GaussiansEnv, eight_gaussians
from flowrl.envs.registration import register
from flowrl.registry import EnvSpec


class MyAlgo(flowrl.ORWCFMW2):
    """ORW-CFM-W2 under another name."""


@dataclass(frozen=True)
class Settings:
    direction: float = 1.0
    """Which way is up."""


def make(settings):
    return GaussiansEnv(eight_gaussians(), lambda x: settings.direction * x[:, 1], "gaussians", name="up")


register(EnvSpec("up", make, Settings(), summary="up"))
'''


@pytest.fixture(scope="module")
def third_party(run_in, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run with somebody else's algorithm and environment, resumed without and with their names.

    The first two here, each of which forgets the module; the last in a process that has not seen it.
    """
    where = tmp_path_factory.mktemp("third-party")
    (where / "mine.py").write_text(THIRD_PARTY)
    names = ["--algo", "mine:MyAlgo", "--env", "mine:up"]
    first = [*names, "--env.direction", -1, *TINY, "--total-timesteps", 2 * N, "--out", where / "runs", "--name", "a"]
    with pytest.MonkeyPatch.context() as patch, forgetting("mine"):
        patch.syspath_prepend(where)
        assert main([str(argument) for argument in first]) == 0
    config = json.loads((where / "runs" / "a" / "config.json").read_text())
    resume = ["--resume", str(where / "runs" / "a"), "--total-timesteps", str(3 * N)]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, forgetting("mine"), contextlib.redirect_stderr(said):
        patch.syspath_prepend(where)
        code = main(resume)
        assert "mine" not in sys.modules
    named = run_in(where, "flowrl.run", *resume, *names)
    return {"run": where / "runs" / "a", "config": config, "without": (code, said.getvalue()), "named": named}


def test_third_party_names_resume(third_party: dict) -> None:
    assert third_party["config"]["environment"] == {"name": "up", "settings": {"direction": -1.0}}
    assert third_party["without"][0] == 2
    assert third_party["named"].returncode == 0, third_party["named"].stderr
    assert len(rows(third_party["run"])) == 3


def test_a_third_party_algorithm_is_recorded_as_itself(third_party: dict) -> None:
    assert third_party["config"]["algorithm"] == "mine:MyAlgo"
    assert "'mine:MyAlgo'" in third_party["without"][1]
    assert "--algo module:Class" in third_party["without"][1]


def test_settings_of_a_third_party_environment_are_kept(third_party: dict) -> None:
    config = json.loads((third_party["run"] / "config.json").read_text())
    assert config["environment"]["settings"] == {"direction": -1.0}
