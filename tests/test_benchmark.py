"""The benchmark program: suites, cells, failures, tables."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, forgetting
from html_checker import checked
from PIL import Image

import flowrl
from flowrl import benchmark
from flowrl.benchmark import BenchmarkConfig, run_cells
from flowrl.envs.rewards.catalogue import register_reward
from flowrl.errors import CheckpointError, ConfigError, RankError, UnknownNameError
from flowrl.models.mlp import MLP
from flowrl.pages.benchmark_page import _thumbnail, benchmark_page
from flowrl.pages.benchmark_plots import frontier, learning_curves
from flowrl.pages.benchmark_results import CURVE_POINTS, Entry, _add_speed, collect, summary
from flowrl.pages.benchmark_tables import drift, interval, markdown, target
from flowrl.pages.text import markdown_table
from flowrl.registry import ALGORITHMS, ENVIRONMENTS
from flowrl.runs.folder import alone_in, finite_or_none
from flowrl.storage.files import write_json
from flowrl.suites import cell as cell_module
from flowrl.suites.cell import UNBOUNDED, StopAtBudget, run_cell
from flowrl.suites.finished import finished_before, with_others
from flowrl.suites.suite import Cell, load_suite, suites
from flowrl.training import role_networks

SUITE = """
description = "small"
seeds = [0, 1]
budget = 2_000
eval_samples = 64

[envs.gaussians-linear]

[rows."ORW-CFM-W2"]
algo = "orw_w2"
settings = { n_samples = 64, rollout_steps = 4 }
sweep = { alpha = [0.1, 3.0] }

[rows."DDPO"]
algo = "ddpo"
settings = { n_samples = 64, rollout_steps = 4 }

[rows."best of n"]
steer = { method = "best_of_n", n = 3 }
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SUITE)
    return path


@pytest.mark.parametrize("name", suites())
def test_shipped_suites_have_meaning_and_leave_no_algorithm_out(name: str) -> None:
    cells = load_suite(name)
    own = {n for n, c in ALGORITHMS.items() if c.__module__.startswith("flowrl.")}
    tuned_on_count = {"adrpo", "awm", "crd", "dgpo", "flow_dpo", "fpo", "nft", "ram", "rvm", "tilt"}
    untuned = {"adjoint", "draft", "refl"} | tuned_on_count
    left_out = {
        "toy": set(),
        "laptop": {"adjoint", "rvm"},
        "alignment": {"orw_kl", "kl", "dpok"} | untuned,
        "domains": own - {"orw_w2", "tilt", "flow_grpo", "draft"},
    }.get(name, untuned)
    assert {cell.algo for cell in cells} - {""} == own - left_out
    assert len({cell.folder for cell in cells}) == len(cells)


def test_rows_that_state_a_tilt_aim_at_that_of_the_suite(tmp_path: Path) -> None:
    """Unless they set their coefficient, or another target; who states none is left alone."""
    path = tmp_path / "aimed.toml"
    path.write_text(
        """
seeds = [0]
budget = 2_000
target_lambda = 0.5
[envs.gaussians-linear]
[rows."DDPO"]
algo = "ddpo"
[rows."exact KL"]
algo = "kl"
[rows."RWR"]
algo = "rwr"
settings = { tau = 3.0 }
[rows."DPOK"]
algo = "dpok"
sweep = { beta = [0.1] }
[rows."Flow-GRPO"]
algo = "flow_grpo"
sweep = { target_lambda = [0.3] }
[rows."CRD"]
algo = "crd"
on.gaussians-linear = { target_lambda = 4.0 }
[rows."best of n"]
steer = { method = "best_of_n", n = 3 }
"""
    )
    cells = {cell.row: cell for cell in load_suite(str(path))}
    aims = {row: cell.config["target_lambda"] for row, cell in cells.items()}
    assert aims == {"DDPO": 0, "exact KL": 0.5, "RWR": 0, "DPOK": 0, "Flow-GRPO": 0.3, "CRD": 4, "best of n": 0}
    assert cells["exact KL"].settings == {"target_lambda": 0.5}
    assert not cells["best of n"].settings
    path.write_text(path.read_text().replace("target_lambda = 0.5", "target_lambda = -1"))
    with pytest.raises(ConfigError, match=r"'target_lambda' .*must be a number above 0, not -1"):
        load_suite(str(path))


def test_a_table_says_which_tilt_is_aimed_at() -> None:
    entry = {"cost": {"gradient_steps": 8.0}, "target_lambda": 0.5}
    assert target(entry) == "0.5"
    assert target({**entry, "target_lambda": math.nan}) == "states no target"
    assert target({**entry, "cost": {"gradient_steps": 0.0}}) == ""


def test_choices_narrow_a_suite(suite: Path) -> None:
    assert len(load_suite(str(suite))) == 8
    cells = load_suite(str(suite), algos=["orw_w2"], seeds=[5], budget=7)
    assert [(c.swept, c.seed, c.budget) for c in cells] == [({"alpha": 0.1}, 5, 7), ({"alpha": 3.0}, 5, 7)]
    assert [c.steer for c in load_suite(str(suite), algos=["best_of_n"], seeds=[0])] == [
        {"method": "best_of_n", "n": 3}
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget = 2_000", "budgte = 2_000", "Did you mean 'budget'"),
        ('algo = "ddpo"', 'algo = "ddp0"', "Did you mean 'ddpo'"),
        ("[envs.gaussians-linear]", "[envs.gaussian-linear]", "Did you mean 'gaussians-linear'"),
        ("alpha = [0.1, 3.0]", "alhpa = [0.1, 3.0]", "Did you mean 'alpha'"),
        ("alpha = [0.1, 3.0]", "alpha = [-1.0]", "Row 'ORW-CFM-W2' on 'gaussians-linear': alpha must not be negative"),
        ("alpha = [0.1, 3.0]", "alpha = [0.1], tau = [1.0]", "sweeps alpha, tau"),
        ("n = 3", "m = 3", "setting of steering 'm'"),
        ('algo = "ddpo"', "", "either an algo or how to steer"),
        ("-linear]", '-linear]\neval_rewards = ["compres"]', "Did you mean 'compress'"),
        ("-linear]", '-linear]\neval_rewards = "compress"', "'eval_rewards' of .* must be a list of texts"),
        ("seeds = [0, 1]", "", "lacks 'seeds'"),
        ("seeds = [0, 1]", "seeds = [0, 1", "damaged"),
    ],
)
def test_mistakes_in_a_suite_stop_it(suite: Path, old: str, new: str, message: str) -> None:
    suite.write_text(SUITE.replace(old, new, 1))
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        load_suite(str(suite))


def test_mistakes_in_a_choice() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'toy'"):
        load_suite("toys")
    with pytest.raises(UnknownNameError, match="Did you mean 'raft'"):
        load_suite("toy", algos=["rafts"])
    with pytest.raises(ConfigError, match="no suite file"):
        load_suite("nowhere/mine.toml")
    for budget in (0, -5):
        with pytest.raises(ConfigError, match=f"a whole number above 0, not {budget}"):
            load_suite("toy", budget=budget)
    with pytest.raises(ConfigError, match="a list of whole numbers from 0"):
        load_suite("toy", seeds=[-1])
    with pytest.raises(ConfigError, match=r"Name a suite, .* Shipped: alignment"):
        BenchmarkConfig()
    with pytest.raises(ConfigError, match=r"--workers must be .* not -1"):  # which no cell would ever be started with
        BenchmarkConfig("toy", workers=-1)


def test_runs_resumes_and_compares(run_module, run_here, suite: Path, tmp_path: Path) -> None:
    arguments = ("--suite", suite, "--workers", 2)
    done = run_module("flowrl.benchmark", *arguments, "--seeds", 0, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "benchmarks" / "small"
    first = root / "cells" / "gaussians-linear" / "ddpo" / "seed-0" / "result.json"
    written = first.stat().st_mtime_ns
    result = json.loads(first.read_text())
    assert result["cost"]["network_evaluations"] >= 2_000
    assert result["cost"]["buffer_bytes"] > 64 * 2 * 4 * 4  # the path
    done = run_here("flowrl.benchmark", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 cells, 4 finished before" in done.stdout
    assert first.stat().st_mtime_ns == written
    entries = json.loads((root / "results.json").read_text())
    assert [(e["label"], e["seeds_finished"]) for e in entries] == [
        ("ORW-CFM-W2, alpha = 0.1", 2), ("ORW-CFM-W2, alpha = 3", 2), ("DDPO", 2), ("best of n", 2),
    ]  # fmt: skip
    table = (root / "table.md").read_text()
    assert "| DDPO |" in table
    assert "W2 to optimum" in table
    frontier = (root / "frontier.html").read_text()
    assert frontier.count("<circle") == 4
    assert "http" not in frontier  # self-contained
    for name in ("curves.png", "frontier.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")
    done = run_here("flowrl.benchmark", *arguments, "--budget", 3_000)
    assert done.returncode == 2
    assert "finished with other settings (budget 2000, not 3000). Choose another folder with --out" in done.stderr


def test_cells_are_compiled_and_count_as_the_same(
    suite: Path, tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(role_networks, "compile_network", lambda network, kind: asked.append(kind))
    monkeypatch.setattr(benchmark, "_processes", lambda: SimpleNamespace(Process=InThisProcess))
    arguments = ("--suite", suite, "--workers", 1, "--seeds", 0, "--algos", "ddpo", "best_of_n", "--budget", 500)
    done = run_here("flowrl.benchmark", *arguments, "--compile", "blocks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(asked) == {"blocks"}
    results = list((tmp_path / "benchmarks" / "small").rglob("result.json"))
    assert [json.loads(file.read_text())["compiled"] for file in results] == ["blocks"] * 2
    assert "2 finished before" in run_here("flowrl.benchmark", *arguments).stdout


class InThisProcess:
    """Process of a cell that is over when it has been started."""

    exitcode = 0

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self.args, self.is_alive = args, lambda: False
        self.sentinel, other = multiprocessing.Pipe()
        other.close()  # from which on it is ready

    def start(self) -> None:
        run_cell(*self.args)


def test_a_cell_finished_with_another_default_is_not_taken_for_this_one(suite: Path, tmp_path: Path) -> None:
    cell = load_suite(str(suite), algos=["ddpo"], seeds=[0])[0]
    made = replace(cell, config={**cell.config, "learning_rate": 0.5}).to_dict()
    (tmp_path / cell.folder).mkdir(parents=True)
    (tmp_path / cell.folder / "result.json").write_text(json.dumps({"cell": made}))
    with pytest.raises(ConfigError, match=r"settings \(learning_rate 0.5, not 3e-05\)"):
        run_cells([cell], tmp_path, workers=1)


def test_a_setting_that_came_later_counts_as_the_same_at_its_default(suite: Path, tmp_path: Path) -> None:
    cell = load_suite(str(suite), algos=["ddpo"], seeds=[0])[0]
    older = {key: value for key, value in cell.config.items() if key not in ("mask", "solver")} | {"compile": False}
    (tmp_path / cell.folder).mkdir(parents=True)
    made = replace(cell, config=older).to_dict()
    del made["eval_rewards"]
    write_json(tmp_path / cell.folder / "result.json", {"cell": made})
    assert finished_before(cell, tmp_path)
    with pytest.raises(ConfigError, match=r"settings \(eval_rewards \[\], not \['count'\]\)"):
        finished_before(replace(cell, eval_rewards=["count"]), tmp_path)
    with pytest.raises(ConfigError, match=r"settings \(mask 'none', not 'dppo'\)"):
        finished_before(replace(cell, config={**cell.config, "mask": "dppo"}), tmp_path)
    with pytest.raises(ConfigError, match=r"settings \(compile 'off', not 'blocks'\)"):
        finished_before(replace(cell, config={**cell.config, "compile": "blocks"}), tmp_path)


def test_tables_keep_the_cells_of_others(suite: Path, tmp_path: Path) -> None:
    whole = load_suite(str(suite), seeds=[0, 7])
    for cell in whole:
        if cell.algo != "orw_w2":
            (tmp_path / cell.folder).mkdir(parents=True)
            write_json(tmp_path / cell.folder / "result.json", {"cell": cell.to_dict()})
    chosen = load_suite(str(suite), algos=["orw_w2"], seeds=[0])
    kept, left_out = with_others(chosen, tmp_path, str(suite))
    assert kept == [c for c in whole if c.seed == 0 or c.algo != "orw_w2"]  # seed 7 is the folder's
    assert left_out == ""
    short = load_suite(str(suite), algos=["orw_w2"], seeds=[0], budget=9)
    kept, left_out = with_others(short, tmp_path, str(suite), budget=9)
    assert {c.algo for c in kept} == {"orw_w2", ""}  # steering has no budget
    assert "(budget 2000, not 9)" in left_out
    suite.write_text(SUITE.replace('[rows."DDPO"]', '[rows."of another name"]'))
    kept, left_out = with_others(chosen, tmp_path, str(suite))
    assert {c.algo for c in kept} == {"orw_w2", ""}
    assert (
        "ddpo/seed-0' is of a row, an environment or a value that the suite no longer has (1 more like it)" in left_out
    )
    suite.write_text(SUITE.replace('algo = "ddpo"', 'algo = "my_algos:Own"'))
    kept, left_out = with_others(chosen, tmp_path, str(suite))
    assert kept == chosen
    assert left_out.startswith("4 other cells that were run before: ")


def test_a_finished_cell_with_an_infinite_setting_is_not_run_again(suite: Path, tmp_path: Path) -> None:
    cell = replace(load_suite(str(suite), algos=["ddpo"], seeds=[0])[0], algo="raft", config={"threshold": -math.inf})
    (tmp_path / cell.folder).mkdir(parents=True)
    write_json(tmp_path / cell.folder / "result.json", finite_or_none({"cell": cell.to_dict()}))  # as cells do
    assert run_cells([cell], tmp_path, workers=1) == []
    assert not (tmp_path / cell.folder / "cell.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_keeps_finished_cells_and_says_how_to_go_on(
    run_here, program_environment: dict[str, str], suite: Path, tmp_path: Path
) -> None:
    choice = ["--suite", str(suite), "--algos", "best_of_n", "ddpo", "--seeds", "0", "--workers", "1"]
    head, rows = SUITE.partition("[rows.")[0], SUITE.split("[rows.")[1:]
    endless = "[rows.".join([head.replace("budget = 2_000", "budget = 20_000_000"), *reversed(rows)])
    suite.write_text(endless)
    program = [sys.executable, "-m", "flowrl.benchmark", *choice]
    stream = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(program, cwd=tmp_path, env=program_environment, **stream) as process:
        while "done" not in (line := process.stdout.readline()):
            assert line, "ended without a finished cell"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[0]
    assert process.returncode == 3, said
    assert "Traceback" not in said
    (command,) = (line.partition("python -m flowrl.benchmark ")[2].split() for line in said.splitlines() if line)
    assert command == choice
    suite.write_text(SUITE)
    done = run_here("flowrl.benchmark", *command)
    assert done.returncode == 0, done.stderr
    assert "2 cells, 1 finished before" in done.stdout
    assert done.stdout.count("done (") == 1


@pytest.mark.parametrize("lost", [2, 3])
def test_a_cell_that_could_not_be_started_is_started_again(suite: Path, tmp_path: Path, monkeypatch, lost: int) -> None:
    """As where what forks the cells was killed: it ended in a traceback."""
    tries = start_that_fails(monkeypatch, lost)
    cells = load_suite(str(suite), algos=["ddpo"], seeds=[0])
    if lost < benchmark.MOST_LOST:
        assert run_cells(cells, tmp_path, workers=2) == []
        assert len(tries) == lost + 1
    else:
        with pytest.raises(RankError, match=r"ended 3 times.*the same command goes on"):
            run_cells(cells, tmp_path, workers=2)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_all_processes_stops_a_benchmark_while_it_starts_cells(
    suite: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    """What forks the cells is ended by it too."""
    number = getattr(signal, name)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # also under nohup
    tries = start_that_fails(monkeypatch, 100, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        run_cells(load_suite(str(suite), algos=["ddpo"], seeds=[0]), tmp_path, workers=2)
    assert len(tries) == 1


def start_that_fails(monkeypatch, times: int, meanwhile: Callable[[], None] = lambda: None) -> list[Cell]:
    """Let so many starts of cells fail; others end at once with a result. Gives the cells that were to be started."""
    tries: list[Cell] = []

    class Ended:
        sentinel, exitcode, is_alive = 0, 0, staticmethod(lambda: False)

    def start(processes: object, cell: Cell, folder: Path, modules: tuple[str, ...]) -> Ended:
        tries.append(cell)
        meanwhile()
        if len(tries) <= times:
            raise EOFError
        folder.mkdir(parents=True)
        write_json(folder / "result.json", {"cell": cell.to_dict()})
        return Ended()

    monkeypatch.setattr(benchmark, "_start", start)
    monkeypatch.setattr(benchmark, "wait", lambda *_, **__: [])
    return tries


def test_a_cell_killed_after_its_result_has_finished(suite: Path, tmp_path: Path) -> None:
    cells = load_suite(str(suite), algos=["ddpo"], seeds=[0, 1])
    for cell, name in zip(cells, ("result.json", "log.txt")):
        (tmp_path / cell.folder).mkdir(parents=True)
        (tmp_path / cell.folder / name).write_text("{}")
    killed = SimpleNamespace(exitcode=-9)
    assert [benchmark._finished(killed, tmp_path / cell.folder) for cell in cells] == [True, False]
    assert "for want of memory" in (tmp_path / cells[1].folder / "error.txt").read_text()


def test_a_cell_that_another_process_runs_is_waited_for(suite: Path, tmp_path: Path, monkeypatch) -> None:
    """As of a second benchmark in that place, or of one that was killed; once finished it is not run again."""
    (first,) = load_suite(str(suite), algos=["ddpo"], seeds=[0])
    folder = tmp_path / first.folder
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(first.to_dict()))
    monkeypatch.setattr(cell_module.os, "dup2", lambda *_: None)
    monkeypatch.setattr(cell_module.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(cell_module, "algorithm_class", pytest.fail)
    waiting = threading.Thread(target=cell_module.run_logged, args=(folder,), daemon=True)
    with alone_in(folder):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        assert not (folder / "log.txt").exists()
        write_json(folder / "result.json", {"cell": first.to_dict()})
    waiting.join(20)
    assert not waiting.is_alive()
    assert (folder / "log.txt").read_text() == ""
    (folder / "cell.json").write_text(json.dumps(replace(first, eval_samples=7).to_dict()))
    with pytest.raises(ConfigError, match="finished with other settings"):
        run_cell(folder)


def test_damaged_files_of_a_finished_cell_say_what_to_do(suite: Path, tmp_path: Path) -> None:
    (first,) = load_suite(str(suite), algos=["ddpo"], seeds=[0])
    (tmp_path / first.folder).mkdir(parents=True)
    (tmp_path / first.folder / "result.json").write_text("{")
    (tmp_path / first.folder / "samples.png").write_text("no picture")
    with pytest.raises(CheckpointError, match=r"result.json' is damaged.*Remove its folder"):
        finished_before(first, tmp_path)
    with pytest.raises(CheckpointError, match=r"samples.png' is damaged.*Remove its folder"):
        _thumbnail(tmp_path / first.folder / "samples.png")


def test_a_failing_cell_is_recorded_and_the_others_go_on(run_here, suite: Path, tmp_path: Path) -> None:
    broken = SUITE.replace('algo = "ddpo"', 'algo = "rwr"').replace(
        "settings = { n_samples = 64, rollout_steps = 4 }\n\n", 'settings = { data = "nowhere.safetensors" }\n\n'
    )
    suite.write_text(broken)
    done = run_here("flowrl.benchmark", "--suite", suite, "--seeds", 0, "--algos", "rwr", "best_of_n")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    root = tmp_path / "benchmarks" / "small"
    error = root / "cells" / "gaussians-linear" / "ddpo" / "seed-0" / "error.txt"
    assert "nowhere.safetensors" in error.read_text()
    assert "| DDPO | failed (1 seeds) |" in (root / "table.md").read_text()
    assert "| best of n |" in (root / "table.md").read_text()


def test_no_arguments_and_dry_run(run_here, suite: Path, tmp_path: Path) -> None:
    done = run_here("flowrl.benchmark")
    assert done.returncode == 0
    assert "suites: " in done.stdout
    done = run_here("flowrl.benchmark", "--suite", suite, "--dry-run")
    assert done.returncode == 0
    assert "8 cells" in done.stdout
    assert not (tmp_path / "benchmarks").exists()
    done = run_here("flowrl.benchmark", "--suite", "tyo")
    assert done.returncode == 2
    assert "Did you mean 'toy'" in done.stderr


def test_a_place_that_takes_no_files(run_here, suite: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = run_here("flowrl.benchmark", "--suite", suite, "--out", tmp_path / "taken", "--workers", 1)
    assert done.returncode == 2
    assert f"error: Cannot write to '{tmp_path / 'taken' / 'small'}': Not a directory. Finished cells" in done.stderr


def test_names_in_tables_stand_for_themselves() -> None:
    """Rows and components are named by others: a bar would move all figures that follow by a column."""
    table = markdown_table(["a|b", "two\nlines"], [["<i>x</i>", "c\\|d"]])
    assert table.splitlines() == [r"| a\|b | two lines |", "|---|---|", r"| \<i>x\</i> | c\\\|d |"]


def test_summary_by_hand() -> None:
    values = summary([1.0, 2.0, 3.0, 10.0])
    assert values["mean"] == 4.0
    assert values["iqm"] == 2.5
    assert values["half_width"] == pytest.approx(3.1824 * math.sqrt(16.6667) / 2, rel=1e-3)
    assert math.isnan(summary([1.0])["half_width"])
    assert summary([None, 2.0])["n"] == 1


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    cells = [Cell("DDPO", "gaussians-linear", "ddpo", 0, 1, 1)]
    entries = collect(cells, tmp_path)
    assert "No cell has finished" in markdown(entries)
    assert "<svg" not in benchmark_page(entries, tmp_path)


def entry(row: str, diversity: float, reward: float) -> Entry:
    point = {"evaluations": 100, "rollout/reward_mean": reward, "rollout/diversity": 1.0}
    about = {"env": "e", "label": row, "row": row, "settings": {}, "seeds_finished": 1, "folders": ["f"]}
    numbers = {"diversity": diversity, "reward_mean": reward, "drift": 0.1, "reference_diversity": 2.0}
    summaries = {key: summary([value]) for key, value in {**numbers, "reference_reward_mean": 0.0}.items()}
    return {**about, **summaries, "curve": [point]}


def test_a_diverged_run_hides_nothing_in_the_plots(tmp_path: Path) -> None:
    entries = [entry(f"a{i}", 1.0 + 0.1 * i, 0.1 * i) for i in range(9)] + [entry("far", 1e15, -1e30)]
    (axes,) = frontier(entries).axes
    assert axes.get_xlim()[1] < 3
    assert -1 < axes.get_ylim()[0] < axes.get_ylim()[1] < 2
    assert learning_curves(entries).axes[0].get_ylim()[0] > -1
    (tmp_path / "f").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "f" / "samples.png")
    places = [float(x) for x in re.findall(r'<circle cx="([-0-9.e+]+)"', benchmark_page(entries, tmp_path))]
    assert len(places) == 10
    assert len({round(x) for x in places[:9]}) == 9, "the others are still told apart"
    assert max(places) == places[9] <= 760


def test_the_page_of_a_benchmark(tmp_path: Path) -> None:
    """A mark for each setting that shows its samples, dotted the way of one that is alone; no name breaks the page."""
    (tmp_path / "f").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "f" / "samples.png")
    hostile = '"><script>alert(1)</script>'
    entries = [entry("swept", 1.0, 0.1), entry("swept", 1.2, 0.2), entry(hostile, 1.5, 0.3)]
    entries[-1]["curve"] = [{**entries[-1]["curve"][0], "rollout/diversity": diversity} for diversity in (1.0, 1.4)]
    text = benchmark_page(entries, tmp_path)
    found = checked(text, scripts=1)
    assert found.tags.count("circle") == text.count("data-told=") == text.count("data:image/jpeg;base64,") == 3
    assert text.count('class="curve s1 dotted"') == 1
    assert found.tags.count("polyline") == 3
    for expected in (f"Benchmark {tmp_path.name}", "swept", hostile, "before training", "diversity"):
        assert expected in found.text


def test_held_out_prompts_are_measured_apart(tmp_path: Path) -> None:
    """Each prompt's reward is its own number, whatever is drawn: the means tell which prompts were scored."""
    prompts = [str(i) for i in range(8)]
    env = flowrl.register_env("numbers", flow=lambda: MLP(2, 8, 2), sample_shape=(2,), prompts=prompts)
    env(lambda samples, contexts: samples[:, 0] * 0 + torch.tensor([float(c) for c in contexts]))
    cell = Cell("RWR", "numbers", "rwr", 0, 1, 64, {"n_samples": 16}, {"held_out_share": 0.3})
    folder = tmp_path / cell.folder
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(cell.to_dict()))
    try:
        made = flowrl.make("numbers", held_out_share=0.3)
        run_cell(folder)
    finally:
        del ENVIRONMENTS["numbers"]
    result = json.loads((folder / "result.json").read_text())
    for told, asked in ((result, made.contexts), (result["held_out"], made.held_out)):
        assert told["n_prompts"] == len(asked)
        assert {row["prompt"] for row in told["per_prompt"]} == set(asked)
        assert told["reward_mean"] == pytest.approx(sum(r["n"] * float(r["prompt"]) for r in told["per_prompt"]) / 64)
    result["held_out"]["reference"]["reward_mean"] -= 2
    (folder / "result.json").write_text(json.dumps(result))
    table = markdown(collect([cell], tmp_path)).splitlines()
    place = [cell.strip() for cell in table[4].split("|")].index("gain, held-out prompts")
    assert table[-1].split("|")[place].strip() == "2"


def test_rewards_that_training_does_not_see_are_columns_of_their_own(tmp_path: Path) -> None:
    """Those that cannot be asked are found before training."""
    rewards = ["first", "half"]
    with forgetting():
        register_reward(rewards[0])(lambda samples, contexts: samples[:, 0])
        register_reward(rewards[1])(lambda samples, contexts: samples[:, 0] / 2)
        settings = {"n_samples": 16, "n_epochs": 1, "group_size": 8}
        cell = Cell("RWR", "gaussians-linear", "rwr", 0, 1, 64, settings, eval_rewards=rewards)
        folder = tmp_path / cell.folder
        folder.mkdir(parents=True)
        (folder / "cell.json").write_text(json.dumps(cell.to_dict()))
        run_cell(folder)
        compared = replace(cell, row="compared", eval_samples=65, eval_rewards=["winrate(first)"])
        other = tmp_path / compared.folder
        other.mkdir(parents=True)
        (other / "cell.json").write_text(json.dumps(compared.to_dict()))
        with pytest.raises(ConfigError, match="Take 64 or 66"):
            run_cell(other)
        assert not (other / "curve.json").exists()
    result = json.loads((folder / "result.json").read_text())
    change = result["side"]["held-out first"] - result["reference"]["side"]["held-out first"]
    assert change != 0
    write_json(other / "result.json", {**result, "cell": replace(compared, eval_rewards=[]).to_dict()})
    lines = markdown(collect([cell, replace(compared, eval_rewards=[])], tmp_path)).splitlines()
    table = [[part.strip() for part in line.split("|")] for line in lines]
    for name, expected in zip(rewards, (change, change / 2)):
        place = table[4].index(f"change in {name}, held out")
        assert float(table[6][place]) == pytest.approx(expected, rel=1e-2)
        assert table[7][place] == ""


def test_a_renderer_that_fails_loses_no_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(samples: torch.Tensor, contexts: object) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    env = flowrl.register_env("drawn", flow=lambda: MLP(2, 8), sample_shape=(2,), render=broken)
    env(lambda samples, contexts: samples[:, 0])
    cell = Cell("RWR", "drawn", "rwr", 0, 1, 16, {"n_samples": 16})
    folder = tmp_path / cell.folder
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(cell.to_dict()))
    try:
        run_cell(folder)
    finally:
        del ENVIRONMENTS["drawn"]
    assert "No picture of the samples was drawn; the figures are kept." in capsys.readouterr().err
    (folder / "error.txt").write_text("of a call that did not wait for it")
    entries = collect([cell], tmp_path)
    assert (entries[0]["seeds_finished"], entries[0]["seeds_failed"]) == (1, 0)
    page = benchmark_page(entries, tmp_path)
    assert "data-told=" in page
    assert "data-picture=" not in page


def test_long_curves_are_thinned_and_keep_both_ends(tmp_path: Path) -> None:
    cell = Cell("DDPO", "gaussians-linear", "ddpo", 0, 1, 1)
    folder = tmp_path / cell.folder
    folder.mkdir(parents=True)
    numbers = dict.fromkeys(("reward_mean", "diversity", "drift", "w2_to_optimum", "w2_floor"), 1.0)
    reference = {"reward_mean": 0.0, "diversity": 1.0}
    result = {**numbers, "components": {}, "reference": reference, "evaluations_per_sample": 16, "cost": {}}
    (folder / "result.json").write_text(json.dumps(result))
    curve = [{"evaluations": i, "rollout/reward_mean": i / 200} for i in range(200)]
    (folder / "curve.json").write_text(json.dumps(curve))
    (told,) = collect([cell], tmp_path)
    assert len(told["curve"]) == CURVE_POINTS
    assert [told["curve"][i]["evaluations"] for i in (0, -1)] == [0, 199]
    assert told["evaluations_to_90_percent"] == 180, "measured on the whole curve"


def test_a_method_without_rewards_in_training_leaves_the_goal_to_others() -> None:
    entries = [entry("asks", 1.0, 0.1), entry("given pairs", 1.0, 0.1)]
    entries[0]["curve"] = [{"evaluations": i, "rollout/reward_mean": float(i)} for i in range(11)]
    entries[1]["curve"] = [{"evaluations": i, "rollout/reward_mean": math.nan} for i in range(11)]
    _add_speed(entries)
    assert entries[0]["evaluations_to_90_percent"] == 10
    assert "evaluations_to_90_percent" not in entries[1]


def test_seeds_whose_drift_is_not_finite_are_told() -> None:
    """A flow that ran off must not look better for it: its drift is null in result.json."""
    entry = {"seeds_finished": 3, "cost": {"gradient_steps": 8.0}}
    assert drift({**entry, "drift": summary([0.1, None, 0.3])}) == "0.2 (finite in 2 of 3)"
    assert drift({**entry, "drift": summary([None] * 3)}) == "(finite in 0 of 3)"
    assert drift({**entry, "drift": summary([0.1] * 3)}) == "0.1"
    assert drift({**entry, "cost": {"gradient_steps": 0.0}, "drift": summary([None] * 3)}) == ""


def test_other_figures_that_are_not_finite_in_all_seeds_are_told() -> None:
    assert interval(summary([2.0, None, 2.0]), 3) == "2 ± 0 (finite in 2 of 3)"
    assert interval(summary([None] * 2), 2) == "(finite in 0 of 2)"
    assert interval(summary([2.0, 2.0]), 2) == interval(summary([2.0, 2.0])) == "2 ± 0"


def test_curves_without_a_diversity_are_drawn() -> None:
    """Of prompts that are drawn once each there is none in training."""
    entries = [entry("a", 1.0, 0.1)]
    entries[0]["curve"][0]["rollout/diversity"] = math.nan
    assert len(learning_curves(entries).axes) == 2


def test_the_learning_rate_falls_with_the_budget_of_a_cell():
    settings = {"n_samples": 16, "rollout_steps": 4, "batch_size": 16, "lr_schedule": "linear", "learning_rate": 1e-3}
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device="cpu", **settings)
    stop = StopAtBudget(budget=4 * 16 * (4 + 5))  # four iterations: 4 to draw; v, v_old and v_ref, and a backward pass
    model.learn(UNBOUNDED, callback=stop)
    assert [row["train/learning_rate"] for row in stop.rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_rows_that_gained_nothing_have_not_come_to_90_percent() -> None:
    """Neither where none gained, by the chance of their first iterations, nor where a gain was lost again."""
    falls, rises, lost = (entry(name, 1.0, 0.1) for name in ("falls", "rises", "lost"))
    for row, rewards in ((falls, (0.2, -1, -1)), (rises, (0.0, 1, 1)), (lost, (0.0, 1, -1))):
        row["curve"] = [{"evaluations": i, "rollout/reward_mean": float(r)} for i, r in enumerate(rewards)]
        row["reward_mean"] = summary([1.0 if row is rises else -0.5])
    _add_speed([falls])
    assert falls["evaluations_to_90_percent"] is None
    _add_speed([falls, lost])
    assert [row["evaluations_to_90_percent"] for row in (falls, lost)] == [None, None]
    _add_speed([falls, rises, lost])
    assert [row["evaluations_to_90_percent"] for row in (falls, rises, lost)] == [None, 2, None]
    flat = {**entry("flat", 1.0, 0.1), "curve": [{"evaluations": i, "rollout/reward_mean": 0.5} for i in range(3)]}
    _add_speed([flat])
    assert flat["evaluations_to_90_percent"] is None
