"""What all programs share: the user's own modules, errors in one line, exit codes."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import forgetting

import flowrl
from flowrl.errors import ConfigError, UnknownNameError
from flowrl.evaluate import main as evaluate_program
from flowrl.export import main as export
from flowrl.models.imports import looked_up, without_garbage_collection
from flowrl.registry import own_module
from flowrl.run import _resume_hint, main
from flowrl.runs.commandline import RunConfig
from flowrl.runs.folder import imported_algorithm
from flowrl.runs.program import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, guarded

OWN = '''
import flowrl


@flowrl.register_algorithm("own_algo")
class OwnAlgo(flowrl.ORWCFM):
    """ORW-CFM under another name."""


class Unregistered(flowrl.ORWCFM):
    """Likewise, which only `own:Unregistered` names."""


@flowrl.register_env("own-env", flow="gaussians")
def right(samples, contexts):
    """To the right."""
    return samples[:, 0]


@flowrl.register_reward("own_reward")
def bright(images, prompts):
    """Bright."""
    return images.mean((1, 2, 3))
'''
SUITE = """
seeds = [0]
budget = 100
[envs.own-env]
[rows."own"]
algo = "own_algo"
"""
SMALL = ["--algo.n-samples", "16", "--algo.rollout-steps", "2", "--total-timesteps", "16", "--eval-samples", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module of one's own, which can be imported from there, a suite, and a run of that module's."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    (folder / "own.toml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch, forgetting("own"):
        patch.syspath_prepend(folder)
        for algo, name in (("own_algo", "run"), ("own:Unregistered", "other")):
            own = ["--modules", "own", "--algo", algo, "--env", "own-env"]
            assert main([*own, *SMALL, "--out", str(folder), "--name", name]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module has not been imported, and what it registers is forgotten afterwards."""
    monkeypatch.setenv("FLOWRL_REWARD_TOKEN", "token")
    with forgetting("own"):
        yield


PROGRAMS = {
    "run": ["--algo", "own_algo", "--env", "own-env", "--dry-run"],
    "run --resume": ["--resume", "{run}", "--total-timesteps", "32", "--dry-run"],
    "run --config": ["--config", "{run}", "--dry-run"],
    "run --resume, unregistered": ["--resume", "{other}", "--total-timesteps", "32", "--dry-run"],
    "run --config, unregistered": ["--config", "{other}", "--dry-run"],
    "evaluate": ["{run}", "--n-samples", "8"],
    "sample": ["{run}", "--n", "4"],
    "sample, unregistered": ["{other}", "--n", "4"],
    "export": ["{run}", "exported"],
    "serve": ["--reward", "own_reward", "--host", "192.0.2.1"],
    "benchmark": ["--suite", "{place}/own.toml", "--dry-run"],
}
WITHOUT = {"run": "Unknown algorithm 'own_algo'", "serve": "Unknown reward 'own_reward'"}
WITHOUT |= {"benchmark": "Unknown environment 'own-env'"}
WITH = {"export": "no diffusers pipeline", "serve": "Cannot listen on 192.0.2.1"}
"""The errors that come after the module's names have been found."""


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_imports_the_modules_that_are_named(run_here, place: Path, program: str) -> None:
    """Without them the names in a file or on the command line are unknown: what a file names is never imported."""
    module = f"flowrl.{re.split('[ ,]', program)[0]}"
    arguments = [word.format(run=place / "run", other=place / "other", place=place) for word in PROGRAMS[program]]
    done = run_here(module, *arguments)
    assert done.returncode == EXIT_ERROR
    assert WITHOUT.get(program, "registered") in done.stderr
    assert "own" not in sys.modules
    done = run_here(module, *arguments, "--modules", "own")
    assert done.returncode == (EXIT_ERROR if program in WITH else 0), done.stderr
    assert WITH.get(program, "") in done.stderr


@pytest.mark.usefixtures("unknown")
def test_a_report_knows_the_defaults_of_an_own_algorithm(run_here, place: Path) -> None:
    for modules, knows in ((), False), (("--modules", "own"), True):
        done = run_here("flowrl.report", place / "run", "--out", "page.html", *modules)
        assert done.returncode == 0, done.stderr
        assert ("algo.refresh_every" in Path("page.html").read_text().split("config.json")[0]) != knows


@pytest.mark.parametrize(
    "name", ["os:PathLike", "flowrl:FlowAlgo", "flowrl", "", ":", "no_such_module:Algo", None, ["flowrl:ORWCFM"]]
)
def test_a_name_in_a_file_imports_nothing(name: object) -> None:
    before = set(sys.modules)
    assert imported_algorithm(name) is None
    assert set(sys.modules) == before
    assert imported_algorithm("flowrl:ORWCFM") is flowrl.ORWCFM


def test_modules_are_the_users_word_and_not_kept(place: Path) -> None:
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["algorithm"] == "own_algo"
    assert "modules" not in config["run"]


def test_the_hint_to_resume_names_own_code_again(place: Path) -> None:
    hint = _resume_hint(place / "run", RunConfig(algo="mine:Algo", env="gaussians-linear", modules=("own", "other")))
    assert hint.endswith(f"--resume {place / 'run'} --algo mine:Algo --modules own other")


def test_the_hint_to_resume_names_the_modules_of_rewards(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-4" / "state.json").write_text('{"num_timesteps": 4}')
    settings = {"reward": "clip:0.5+winrate(my_rewards:dark):1"}
    (tmp_path / "config.json").write_text(json.dumps({"environment": {"name": "sd3-count", "settings": settings}}))
    run = RunConfig(algo="orw_w2", env="sd3-count", modules=("own",), eval_rewards=("a.judges:b", "compress"))
    assert _resume_hint(tmp_path, run).endswith(f"--resume {tmp_path} --modules own a.judges my_rewards")


def test_hints_can_be_pasted_into_a_shell(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my runs"
    folder.symlink_to(place / "run")
    assert shlex.split(_resume_hint(folder, RunConfig(algo="orw_w2", env="gaussians-linear")))[-1] == str(folder)
    assert export([str(folder)]) == 2
    assert shlex.split(capsys.readouterr().err)[-2:] == [str(folder), "FOLDER."]


def test_a_reward_that_leaves_the_current_folder_scatters_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()

    def wandering(samples: torch.Tensor, contexts: list[None]) -> torch.Tensor:
        os.chdir(elsewhere)
        return samples[:, 0]

    with forgetting():
        flowrl.register_env("wandering", flow="gaussians")(wandering)
        assert main(["--algo", "orw", "--env", "wandering", *SMALL, "--out", "runs", "--name", "a"]) == 0
        os.chdir(tmp_path)
        assert evaluate_program(["runs/a", "--n-samples", "8"]) == 0
    assert not list(elsewhere.iterdir())
    assert {"config.json", "metrics.csv", "final", "report.html", "samples"} <= set(os.listdir("../runs/a"))


def test_a_run_whose_name_begins_with_a_hyphen_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (step := Path("-n/checkpoints/step-4")).mkdir(parents=True)
    (step / "state.json").write_text('{"num_timesteps": 4}')
    Path("-n/config.json").write_text("{}")
    assert _resume_hint(Path("-n"), RunConfig(algo="orw_w2")).endswith("flowrl.run --resume ./-n")


@pytest.mark.parametrize("program", ["run", "evaluate", "sample", "export", "report", "serve", "benchmark"])
def test_a_module_that_is_not_there(run_here, program: str) -> None:
    done = run_here(f"flowrl.{program}", "--modules", "no_such_module")
    assert done.returncode == EXIT_ERROR
    assert done.stderr.startswith("error: Cannot import 'no_such_module'")


def test_installed_programs_find_modules_of_the_current_folder(
    run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flowrl-run` has not got it on its path, as `python -m flowrl.run` has. The library leaves the path alone."""
    (tmp_path / "beside.py").write_text("print('beside is there')\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with forgetting("beside"), pytest.raises(UnknownNameError, match="Cannot import 'beside'"):
        own_module("beside")
    with forgetting("beside"):
        done = run_here("flowrl.run", "--modules", "beside")
    assert "beside is there" in done.stdout, done.stderr


def test_a_module_that_fails(run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = run_here("flowrl.run", "--modules", "broken", "--help")
    assert done.returncode == EXIT_ERROR
    assert "Importing 'broken' failed: ZeroDivisionError" in done.stderr


def ended(error: BaseException) -> int:
    def body(args: list[str]) -> int:
        raise error

    return guarded(body, [])


def test_errors_and_ctrl_c_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(ConfigError("no meaning")) == EXIT_ERROR
    assert ended(KeyboardInterrupt()) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "error: no meaning\nstopped\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), BrokenPipeError("of a reward's server")])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        ended(error)


@pytest.mark.parametrize(("message", "told"), [("no g++ here\nand much more", "no g++ here"), ("", "no reason")])
def test_a_network_that_cannot_be_compiled_is_a_line(
    message: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiler(graph: object, inputs: object) -> None:
        raise OSError(message)

    def body(args: list[str]) -> int:
        torch.compile(torch.sin, backend=compiler)(torch.ones(2))
        return 0

    assert guarded(body, []) == EXIT_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"error: The network cannot be compiled here (OSError: {told}). Install")
    assert said.endswith("--algo.compile off for a new run, the environment variable TORCHDYNAMO_DISABLE=1 for any.\n")
    assert said.count("\n") == 1


def test_programs_work_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pythonw starts them, or a shell with `>&- 2>&-`."""

    def body(args: list[str]) -> int:
        print(sys.stdout.isatty(), sys.stderr.isatty())
        raise ConfigError("no meaning")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert guarded(body, []) == EXIT_ERROR


def test_a_program_ends_without_a_last_look_at_all_that_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[object] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    assert guarded(lambda given: 0, []) == 0
    assert gc.freeze in at_exit


def young() -> set[int]:
    return {id(thing) for generation in (0, 1) for thing in gc.get_objects(generation)}


def test_what_an_import_makes_is_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    with without_garbage_collection():
        assert not gc.isenabled()
        made = [[] for _ in range(10_000)]
        monkeypatch.setitem(sys.modules, "imported_meanwhile", ModuleType("imported_meanwhile"))
    assert gc.isenabled()
    assert id(made[0]) not in young()
    with without_garbage_collection():  # nothing is imported
        more = [[] for _ in range(10_000)]
    assert id(more[0]) in young()
    gc.freeze()  # by somebody who wants it to stay so
    try:
        with without_garbage_collection():
            monkeypatch.setitem(sys.modules, "imported_later", ModuleType("imported_later"))
        assert gc.get_freeze_count() > len(made)
    finally:
        gc.unfreeze()


def test_where_all_is_imported_frozen_objects_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prediction of memory, whose imports are done, a count took longer than the prediction."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("counted"))
    looked_up("torch", "Tensor")


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_reader_that_is_gone(program_environment: dict[str, str], tmp_path: Path) -> None:
    """`python -m flowrl.run | head -0`."""
    program = [sys.executable, "-m", "flowrl.run"]
    with subprocess.Popen(
        program, cwd=tmp_path, env=program_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == EXIT_BROKEN_PIPE == 141
    assert "BrokenPipe" not in said


@pytest.mark.parametrize("name", ["sample", "export", "report", "benchmark", "serve"])
def test_programs_whose_work_is_not_divided_refuse_several_processes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("flowrl.runs.program.os._exit", lambda code: None)
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module(f"flowrl.{name}")
    assert program.main(["runs/none"]) == EXIT_ERROR
    told = "error (process 1 of 2): This program works in one process, and 2 were started: start it without torchrun"
    assert capsys.readouterr().err.startswith(told)
