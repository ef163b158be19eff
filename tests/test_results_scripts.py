"""Scripts that make published results: what they count, on small grids."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import small_pipelines
import torch
from conftest import REPOSITORY

import flowrl
from flowrl.envs.plans import smooth_plans
from flowrl.suites.cell import run_cell


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which may import those beside it."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))
    return module


GRID = [
    *("--env", "gaussians-linear", "--alphas", "0.01", "1", "--taus", "2", "--seeds", "0", "1", "--budget", "600"),
    *(
        "--eval-samples",
        "64",
        "--set",
        "n_samples=32",
        "batch_size=32",
        "learning_rate=0.01",
        "solver=heun",
        "rollout_steps=4",
    ),
]


def test_an_ablation_from_cells_to_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails is counted, and is in no mean; the rest are means of what the cells wrote."""
    ablation = script("ablation")
    ran = []

    def run_here(cells: list[Any], root: Path, workers: int) -> None:
        assert workers == 1
        for cell in cells:
            ran.append((cell.settings["alpha"], cell.settings["tau"], cell.seed))
            folder = root / cell.folder
            folder.mkdir(parents=True)
            (folder / "cell.json").write_text(json.dumps(cell.to_dict()))
            if ran[-1] == (1.0, 2.0, 1):
                (folder / "error.txt").write_text("it broke")
            else:
                run_cell(folder)

    monkeypatch.setattr(ablation, "run_cells", run_here)
    ablation.main([*GRID, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    assert ran == [(0.01, 2.0, 0), (1.0, 2.0, 0), (0.01, 2.0, 1), (1.0, 2.0, 1)]  # seed by seed
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "work").rglob("result.json"))]
    assert len(results) == 3
    for result in results:
        config = result["cell"]["config"]
        assert (config["standardise"], config["solver"], config["n_samples"]) == ("batch", "heun", 32)
    with (tmp_path / "out" / "gaussians-linear.csv").open() as file:
        weak, strong = csv.DictReader(file)
    assert (weak["seeds"], weak["failed"], strong["seeds"], strong["failed"]) == ("2", "0", "1", "1")
    of_weak = [result for result in results if result["cell"]["settings"]["alpha"] == 0.01]
    shares = [result["diversity"] / result["reference"]["diversity"] for result in of_weak]
    assert float(weak["diversity"]) == pytest.approx(sum(shares) / 2, rel=1e-3)
    assert float(weak["diversity_std"]) == pytest.approx(abs(shares[0] - shares[1]) / math.sqrt(2), rel=1e-2, abs=1e-4)
    gains = [(r["reward_mean"] - r["reference"]["reward_mean"]) / r["reference"]["reward_std"] for r in of_weak]
    assert float(weak["gain"]) == pytest.approx(sum(gains) / 2, rel=1e-3)
    assert strong["diversity_std"] == "nan"
    assert strong["works"] == "0"
    assert (tmp_path / "out" / "gaussians-linear.png").stat().st_size > 2000


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"gain": 0.4, "diversity": 0.9}, False),
        ({"gain": 3.0, "diversity": 0.4}, False),
        ({"gain": 3.0, "velocity": 1.6}, False),  # it ran off
        ({"failed": 1}, False),
        ({"seeds": 0}, False),
    ],
)
def test_what_works(changed: dict[str, float], expected: bool) -> None:
    row = {"gain": 0.6, "diversity": 0.6, "velocity": 1.1, "failed": 0, "seeds": 2} | changed
    assert script("ablation").works(row) is expected


def test_random_search_and_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rollouts as asked for, the best of them all, and the sides of those over the threshold."""
    plans = script("plans")
    monkeypatch.setattr(plans, "CHUNK", 40)
    found = plans.search("pendulum", "random, smooth plans", 3, 100)
    generator = torch.Generator().manual_seed(1003)
    env = flowrl.make("plan-pendulum")
    drawn = [smooth_plans(n, generator) for n in (40, 40, 20)]
    parts = env.evaluate(torch.cat(drawn), torch.zeros(100, dtype=torch.long)).components
    assert found["best"] == pytest.approx(parts["return"].max().item())
    assert found["rollouts"] == 100
    last = {key: value[80:] for key, value in parts.items()}
    threshold = last["return"].sort().values[14].item()
    counted = plans.described(drawn[2], env, threshold)
    over = last["return"] > threshold
    assert counted["better"] == pytest.approx(5 / 20)
    assert counted["better_right"] == pytest.approx(last["first_right"][over].mean().item())
    assert counted["mean"] == pytest.approx(last["return"].mean().item())
    assert counted["right"] == pytest.approx(last["first_right"].mean().item())


def test_sides_of_plans_that_solve() -> None:
    class Env:
        def evaluate(self, plans: torch.Tensor, contexts: torch.Tensor) -> flowrl.RewardOutput:
            parts = {"return": [1, 2, 3, 4], "solved": [1, 0, 1, 1], "first_right": [1, 1, 0, 0]}
            return flowrl.RewardOutput(plans[:, 0], {key: torch.tensor(v).float() for key, v in parts.items()})

    counted = script("plans").described(torch.randn(4, 50), Env())
    assert counted["solved_right"] == pytest.approx(1 / 3)
    assert counted["right"] == pytest.approx(1 / 2)


def test_table_of_plans() -> None:
    """Means and 95 % intervals over seeds, nothing where there is nothing."""
    plans = script("plans")
    results = [
        {"task": "pendulum", "method": "RAFT", "seed": seed, "best": best, "rollouts": 10, "better_right": None}
        for seed, best in enumerate((-900.0, -800.0, -700.0))
    ]
    text = plans.table(results, "pendulum")
    assert "`plan-pendulum`, 10 rollouts, seeds [0, 1, 2]" in text
    assert "| RAFT | -800.0 ± 248.4 |  |" in text  # 4.303 * 100 / sqrt(3)


def test_table_and_distance_of_emoji() -> None:
    """Means and standard deviations over seeds; the Fréchet distance of Gaussians that are shifted and scaled."""
    emoji = script("emoji")
    figures = {"reward": -1.4, "drift": 0.0, "w2": 0.0, "frechet": 7.0, "diversity": 14.0}
    rows = [
        {"alpha": 0.1, "seed": seed, "reference": figures, **figures, "reward": reward}
        for seed, reward in enumerate((-1.2, -1.1))
    ]
    reference, line = emoji.table(rows).splitlines()[2:]
    assert reference == "| reference |  | -1.400 | 0.0000 | 0.00 | 7.0 | 14.00 |"
    assert line.startswith("| 0.1 | 2 | -1.150 ± 0.071 | 0.0000 ± 0.0000 |")
    a = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    trace = a.T.cov().trace().item()
    assert emoji.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert emoji.frechet(a, 3 * a + 2) == pytest.approx(4 * trace + (2 * a.mean(0) + 2).square().sum().item(), rel=1e-5)


def test_guidance_of_darcy() -> None:
    """Without strength it is the sampler; with some the reward rises; a step costs a forward and a backward."""
    darcy, env = script("darcy"), flowrl.make("darcy")
    policy = flowrl.FlowPolicy.of(env, device="cpu", seed=0)
    ids, x_0 = torch.tensor([0, 1]), policy.noise(2, torch.Generator().manual_seed(0))
    plain = policy.sample_latents(ids, x_0=x_0, steps=4, role="reference")
    before = policy.evaluations
    torch.testing.assert_close(darcy.guided(policy, env, ids, x_0, 4, 0.0), plain, atol=1e-4, rtol=1e-4)
    assert policy.evaluations - before == darcy.GUIDED_COST * 2 * 4
    pushed = darcy.guided(policy, env, ids, x_0, 4, 0.3)
    rewards = [env.evaluate(policy.decode(x), ids).reward.mean() for x in (plain, pushed)]
    assert rewards[1] > rewards[0]


def test_table_of_darcy() -> None:
    """Ratios are to the reference of the same seed."""
    darcy = script("darcy")
    row = dict.fromkeys(darcy.COLUMNS, 1.0) | {"evaluations": 2000, "trained_for": 0}
    results = [row | {"method": "reference", "seed": seed, "residual": 2.0 + seed} for seed in (0, 1)]
    results += [row | {"method": "DRaFT", "seed": seed, "residual": 1.0 + seed / 2} for seed in (0, 1)]
    lines = darcy.table(results).splitlines()
    assert lines[2].startswith("| reference | 2 | 2,000, 0 | 2.5000 ± 0.7071 | 1.0000 ± 0.0000 |")
    assert lines[3].startswith("| DRaFT | 2 | 2,000, 0 | 1.2500 ± 0.3536 (x 0.500 ± 0.000) | 1.0000 ± 0.0000 (x 1.000")


def test_table_of_speech() -> None:
    """Gains are over the reference of the same seed, which has none."""
    speech = script("speech")
    row = dict.fromkeys(speech.COLUMNS, 1.0) | {"judged": 512}
    results = [row | {"method": "reference", "seed": seed, "opinion": 3.0 + seed, "judged": 0} for seed in (0, 1)]
    results += [row | {"method": "tilt", "seed": seed, "opinion": 3.25 + 1.5 * seed} for seed in (0, 1)]
    lines = speech.table(results).splitlines()
    assert lines[2].startswith("| reference | 0, 1 | 0 | 3.50 ± 0.71 |  | 1.000 ± 0.000 |")
    assert lines[3].startswith("| tilt | 0, 1 | 512 | 4.00 ± 1.06 | 0.50 ± 0.35 | 1.000 ± 0.000 |")


def test_distances_over_many_sets() -> None:
    """Of sets of one point W2 is the distance of two points of the optimum."""
    toy_sets = script("toy_sets")
    figures = toy_sets.measure("gaussians-quadratic", [], [], sets=50, n=1, budget=0)["exact"]
    core = flowrl.make("gaussians-quadratic")
    x, y = core.oracle.sample(20_000).chunk(2)
    assert figures["mean"] == pytest.approx((x - y).norm(dim=1).mean().item(), abs=3 * figures["ci"])
    assert figures["ci"] == pytest.approx(1.96 * figures["std"] / 200**0.5)


def test_settings_of_digits() -> None:
    digits = script("digits")
    assert [digits.setting(text) for text in ("target=plain", "tau=2.5")] == [("target", "plain"), ("tau", 2.5)]


def test_cost_by_arithmetic() -> None:
    ratio = script("weighting_cost").arithmetic(n_epochs=1, rollout_steps=16)["ratio"]
    assert list(ratio.values()) == pytest.approx([1, 1, 4 / 3, 5 / 3, 21 / 3])


def test_the_gpu_benchmark_on_small_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table on the standard output, all figures in the JSON; what takes large imports, in this process."""
    command = [str(REPOSITORY / "benchmarks" / "gpu.py"), "--tiny", "--eager-only"]
    rows, out = ("mlp", "ceiling"), tmp_path / "gpu.json"
    command += ["--out", str(out), "--rows"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command, *rows], capture_output=True, text=True, env=environment, check=True
    )
    figures = json.loads(out.read_text())
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(rows)
    assert not [row for row in figures["rows"].values() if "error" in row or "failed" in row]
    assert figures["rows"]["mlp"]["flowrl / bare"] > 0
    assert figures["rows"]["ceiling"]["flops"] > 0
    assert figures["device"] == "CPU"

    gpu = script("gpu")
    for imported in ("gpu_lab", "gpu_rows"):
        script(imported)
    monkeypatch.setattr(sys, "argv", [*command, "sd35-rollout", "sd35-update", "sd35-iteration"])
    gpu.main()
    figures = json.loads(out.read_text())["rows"]
    assert not [row for row in figures.values() if "error" in row or "failed" in row]
    assert figures["sd35-rollout"]["variants"]["pipeline, eager"]["per_second"] > 0
    assert figures["sd35-update"]["variants"]["bare, eager"]["per_second"] > 0
    assert figures["sd35-iteration"].keys() > {"seconds"}


def test_gpu_rows_are_compared_like_with_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkouts alone, both; graphs once they are captured; settings of rows that there are."""
    gpu, rows, said = script("gpu"), script("gpu_rows"), []
    seconds = {
        "rows": {"flowrl": 9.0},
        "alone": {"flowrl": 1.0, "flowrl, CUDA graphs": 0.5},
        "baseline": {"flowrl": 2.0},
    }
    parts = {name: {"mlp": {"seconds": {**value, "bare": 0.1}}} for name, value in seconds.items()}
    figures = {"rows": parts.pop("rows"), **{name: {"rows": part} for name, part in parts.items()}}
    assert gpu.against("mlp", figures) == {"flowrl": 2.0, "flowrl, CUDA graphs": 4.0}
    rollout = {"flowrl": {"seconds": 0.5}, "pipeline, eager": {"seconds": 0.25}}
    assert gpu.speeds({"variants": rollout}) == {"flowrl": 2.0}

    class Graphed(script("gpu_lab").Lab):
        def in_turn(self, works, n):
            said.append(f"measured {', '.join(works)}")
            return {name: {"median": 1.0, "first": 1.0} for name in works}

    def build(lab: Any) -> Any:
        return SimpleNamespace(
            config=SimpleNamespace(n_samples=4, cuda_graphs=lab.settings.get("cuda_graphs", False)),
            learn=lambda *args, **kwargs: said.append("an iteration"),
        )

    monkeypatch.setattr(rows, "_parts", lambda variant, model: {})
    lab = Graphed(torch.device("cuda"), only_flowrl=True, row="mlp", say=lambda *args: None)
    figures, _ = rows._small(lab, build, None, 2)
    assert said == ["measured flowrl", *["an iteration"] * 3, "measured flowrl, CUDA graphs"]
    assert figures["seconds"] == {"flowrl": 1.0, "flowrl, CUDA graphs": 1.0}

    def fails(*given: Any, **named: Any) -> Any:
        if not lab.extra:
            raise RuntimeError("no memory")
        return build(lab)

    figures, _ = rows._small(lab, fails, None, 2)
    assert figures["seconds"] == {"flowrl, CUDA graphs": 1.0}
    assert figures["failed"] == {"flowrl": "RuntimeError: no memory"}
    monkeypatch.setattr(lab, "large", fails)
    monkeypatch.setattr(rows, "_draws", lambda model: model.learn)
    monkeypatch.setattr(lab, "env", lambda name: None)
    lab.row, lab.only_flowrl, lab.eager_only = "sd35-rollout", False, False
    pipeline = lambda *given: (1.0, said.clear, said.clear)  # noqa: E731
    figures = rows._rollout(lab, "sd35-rollout", "any", 4, 2, pipeline)
    assert figures["variants"].keys() == {"pipeline, eager", "flowrl, blocks compiled", "pipeline, blocks compiled"}
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--set", "mpl.cuda_graphs=true"])
    with pytest.raises(SystemExit, match="--set names no row mpl; there are ceiling"):
        gpu.main()


SCRIPTS = [path for folder in ("benchmarks", "pretrain", "docs/tools") for path in (REPOSITORY / folder).rglob("*.py")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_scripts_import_of_flowrl_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowrl":
            module = importlib.import_module(str(node.module))
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), missing


@pytest.mark.parametrize(
    ("row", "device", "told", "variants"),
    [
        ("sd35-update", "cpu", {}, ["flowrl", "flowrl, blocks compiled"]),
        ("sd35-update", "cpu", {"quick": True}, ["flowrl"]),
        ("sd35-rollout", "cpu", {"quick": True}, ["flowrl", "flowrl, blocks compiled"]),
        ("sd35-rollout", "cpu", {"eager_only": True}, ["flowrl"]),
        ("sd35-rollout", "cpu", {"given": {"sd35-rollout.compile": "whole"}}, ["flowrl"]),
        ("mlp", "cuda", {"eager_only": True}, ["flowrl", "flowrl, CUDA graphs"]),
        ("mlp", "cuda", {"as_given": True}, ["flowrl"]),
        ("mlp", "cpu", {}, ["flowrl"]),
        ("flux-rollout", "cuda", {}, ["flowrl"]),
    ],
)
def test_gpu_rows_take_flowrl_as_it_is_told_and_as_fast_as_it_goes(
    row: str, device: str, told: dict[str, Any], variants: list[str]
) -> None:
    module = script("gpu_lab")
    lab = module.Lab(torch.device(device), row=row, **told)
    assert [(name, lab.settings) for name in lab.variants()] == [
        (name, lab.settings if name == "flowrl" else module.FASTEST[row][1]) for name in variants
    ]
    assert lab.extra == {}


def test_bare_loops_are_compared_with_settings_that_they_know_only() -> None:
    overhead = script("overhead")
    makers = lambda net, x, t, c: net(x, t), lambda x: x[:, 0], lambda x: x
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **overhead.MLP)
    overhead.BareLoop(model, *makers)
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, **overhead.MLP | {"baseline": "local"})
    with pytest.raises(ValueError, match="flowrl's baseline is 'local', and this loop's 'clipped'"):
        overhead.BareLoop(model, *makers)


def test_random_conditions_of_gpu_rows_are_of_the_shapes_and_types_that_texts_have(tmp_path: Path) -> None:
    env = flowrl.make("sd3-compress", flow=str(small_pipelines.sd3(tmp_path / "sd3")), prompts=("a star",))
    load = script("gpu_lab")._loader(env.flow.load, torch.device("cpu"))
    drawn, own = (flow.encode(["a star", "a ring"]) for flow in (load(), env.flow.load()))
    assert [(part.shape, part.dtype) for part in drawn] == [(part.shape, part.dtype) for part in own]


def test_results_made_with_other_options_are_no_part_of_a_table(tmp_path: Path) -> None:
    """What a script has made is not made again: with other settings it would pass for theirs."""
    parser = argparse.ArgumentParser()
    for option in ("--seeds", "--budget"):
        parser.add_argument(option, type=int, default=1)
    parser.add_argument("--out", type=Path, default=tmp_path / "results")
    kept = script("kept").kept_results

    def asked(*options: str) -> list[dict[str, Any]]:
        return kept(parser, parser.parse_args(options))

    assert asked("--budget", "2") == []
    assert asked() == []  # nothing is there yet
    (tmp_path / "results" / "results.json").write_text('[{"seed": 1}]')
    assert asked("--seeds", "2") == [{"seed": 1}]
    with pytest.raises(SystemExit, match=r"with other options \(--budget 1, not 2\): take another --out"):
        asked("--budget", "2")


@pytest.mark.parametrize("folder", ["benchmarks", "pretrain", "docs/tools"])
def test_scripts_look_at_their_command_line(folder: str) -> None:
    """Those without options too: what was asked for `--help` would run, for minutes or over files that are there."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / folder).glob("*.py")}
    programs = {name: text for name, text in texts.items() if "__main__" in text}
    assert programs
    assert not [name for name, text in programs.items() if ".parse_args(" not in text]
