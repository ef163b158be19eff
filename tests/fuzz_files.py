"""Reads thousands of damaged and hostile suites, prompt files and configurations: python tests/fuzz_files.py --n 5000

Each is read by what reads it for a user: suites by the benchmark, prompt files by the environments, the JSON and CSV of
run folders, flows, exported folders and finished cells by their programs. What must hold is in `fuzzing.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from fuzzing import CANARY, JSON, NAMING_CODE, TEXT, Damage, Target, json_code, main, pick

from flowrl import run
from flowrl.envs.prompts import fingerprint, prompts_from, shares_of
from flowrl.errors import FlowRLError
from flowrl.models.loading import ASSETS, source_of
from flowrl.pages import model_card as card
from flowrl.pages.benchmark_results import collect
from flowrl.pages.run_files import RunFiles
from flowrl.pages.run_page import run_page
from flowrl.registry import algorithm_class
from flowrl.runs.folder import write_config
from flowrl.runs.logs import read_metrics
from flowrl.storage import hub
from flowrl.storage.files import read_json, write_json
from flowrl.suites.finished import finished_before
from flowrl.suites.suite import Cell, load_suite

SUITE = """
description = "everything that a suite can say"
seeds = [0, 1]
budget = 2_000
eval_samples = 64

[envs.gaussians-linear]
budget = 1_000

[envs.sd3-compress]
settings = { flow = "mini-sd3", reward = "compress:1+colourfulness:0.5", resolution = 64, prompts = ["stars"] }

[rows."ORW-CFM-W2"]
algo = "orw_w2"
settings = { n_samples = 64, lora_rank = 2, lora_targets = ["attn.to_q"], compile = false, solver = "heun" }
sweep = { alpha = [0.1, 3.0] }
on.sd3-compress = { n_epochs = 2 }

[rows.Flow-GRPO]
algo = "flow_grpo"
settings = { n_samples = 64, group_size = 8, beta = 0.04 }
envs = ["gaussians-linear"]

[rows."best of n"]
steer = { method = "best_of_n", n = 3 }

[rows.SMC]
steer = { method = "smc", n = 8, temperature = 0.1, noise_level = 0.7, ess_threshold = 0.5, sde = "flow" }
"""
CELLS: list[Cell] = []
"""Those whose results are damaged."""
ODD_TOML = ["true", "-1", "0", "1.5", "1e308", "nan", "inf", "-inf", str(2**63), str(-(2**70)), "9" * 5000, '""']
ODD_TOML += ["1e999", "0x" + "f" * 5000, "[]", "{}", "[[1]]", "{a = 1}", '["x", 1]', "1979-05-27", "07:32:00"]
ODD_TOML += ['"' + "x" * 10_000 + '"', '"../../x"', '"\\u0000"', '"""\n"""', "[" + "1," * 20_000 + "]", '"/dev/zero"']
ODD_TOML += ['"OWNER/NAME"', "'flowrl/gaussians-linear-v/../../../x'", *(f'"{name}"' for name in NAMING_CODE)]
ODD_KEYS = ['"../../x"', '""', '".."', '"/etc/x"', "__class__", "a.b.c", '"x\\ny"', '"' + "k" * 10_000 + '"', '"---"']
ODD_KEYS += [f'"{CANARY}:gaussians-linear"', '"flowrl/gaussians-linear-v/../../../x"', "self", "seed"]
ODD_PROMPTS = [
    '"weight": 1e999',
    '"weight": -1',
    '"weight": 1' + "0" * 400,
    '"weight": null',
    '"split": "x"',
    '"a": []',
]
ODD_PROMPTS += [
    '"prompt": ""',
    '"prompt": "\\ud800"',
    '"prompt": "\\u0000"',
    '"prompt": {}',
    '"\\ud800": 1',
    '"a": NaN',
]
ODD_PROMPTS += ['"a": ' + "9" * 5000, '"a": ' + "[" * 4000, '"prompt": "' + "x" * 9_000 + '"', '"": 0', '"a": 1e308']


def value(file: Path, rng: np.random.Generator) -> None:
    """Another value somewhere in a TOML file."""
    replace(file, rng, r'"[^"\n]*"|\[[^\[\]\n]*\]|\{[^{}\n]*\}|\b[0-9][0-9._e-]*\b|true|false', ODD_TOML)


def key(file: Path, rng: np.random.Generator) -> None:
    """Another key or table name somewhere in a TOML file."""
    replace(
        file,
        rng,
        r'[A-Za-z_][A-Za-z0-9_-]*(?= = )|"[^"\n]*"(?=\])|(?<=\[)[a-z]+(?=\.)|(?<=\.)[a-z0-9-]+(?=\])',
        ODD_KEYS,
    )


def replace(file: Path, rng: np.random.Generator, pattern: str, odd: list[str]) -> None:
    text = file.read_text()
    found = pick(rng, list(re.finditer(pattern, text)))
    file.write_text(text[: found.start()] + pick(rng, odd) + text[found.end() :])


def toml_bomb(file: Path, rng: np.random.Generator) -> None:
    """Deep, long, or few lines that stand for endless work."""
    depth = int(rng.integers(500, 100_000))
    many = "[" + ", ".join(map(str, range(depth))) + "]"
    bombs = ["a = " + "[" * depth + "]" * depth, "a = " + "{a = " * depth + "1" + "}" * depth, "a = " + "9" * depth]
    bombs += ["a." * depth + "a = 1", "[" + "a." * depth + "a]", 'a = "' + "x" * depth, "[[a]]\n" * depth, "'" * depth]
    bombs += [f"{'a.' * 300}b{i} = 1\n" * 1 for i in range(3)]
    bombs += [
        SUITE.replace("seeds = [0, 1]", f"seeds = {many}"),
        SUITE.replace("alpha = [0.1, 3.0]", f"alpha = {many}"),
    ]
    both = SUITE.replace("seeds = [0, 1]", f"seeds = {many}").replace("alpha = [0.1, 3.0]", f"alpha = {many}")
    bombs += [
        both,
        "".join(f"k{i} = 1\n" for i in range(depth)),
        SUITE + "".join(f"[rows.r{i}]\nalgo='ddpo'\n" for i in range(depth)),
    ]
    file.write_text(pick(rng, bombs))


def prompt(file: Path, rng: np.random.Generator) -> None:
    """Odd fields in a line of prompts."""
    content = file.read_text().splitlines()
    place = int(rng.integers(len(content)))
    line = pick(rng, ODD_PROMPTS)
    content[place] = "{" + line + ("" if '"prompt"' in line else ', "prompt": "a red car"') + "}"
    file.write_text("\n".join(content))


def many_prompts(file: Path, rng: np.random.Generator) -> None:
    n = int(rng.integers(1000, 100_000))
    texts = (f"{i:x}" if file.suffix == ".txt" else f'{{"prompt":"{i:x}"}}' for i in range(n))
    file.write_text("\n".join(texts))


def cell_value(file: Path, rng: np.random.Generator) -> None:
    """A row of metrics that was cut, or holds what is no number."""
    content = file.read_text().splitlines()
    place = int(rng.integers(len(content)))
    odd = ["", "nan", "1e", "-", "\0", "x" * 200_000, '"', "1,2,3,4,5,6,7,8,9" * 20, "9" * 5000, "١", "--1", "1_0"]
    cells = content[place].split(",")
    cells[int(rng.integers(len(cells)))] = pick(rng, odd)
    content[place] = ",".join(cells)
    file.write_text("\n".join(content))


TOML: list[Damage] = [*TEXT, *4 * [value], *3 * [key], toml_bomb, toml_bomb]
PROMPTS: list[Damage] = [*TEXT, *4 * [prompt], many_prompts]
CSV: list[Damage] = [*TEXT, *6 * [cell_value]]
HOSTILE_JSON: list[Damage] = [*TEXT, *JSON, json_code, json_code]


def sound(folder: Path) -> list[Target]:
    """What is damaged: a folder for each kind of file."""
    targets = []

    def add(name: str, damages: dict[str, list[Damage]], read, times: int) -> Path:
        (folder / name).mkdir(parents=True, exist_ok=True)
        targets.extend(times * [Target(name, folder / name, damages, read)])
        return folder / name

    (add("suite", {".toml": TOML}, read_suite, 8) / "suite.toml").write_text(SUITE)
    prompts = add("prompts", {".txt": PROMPTS, ".jsonl": PROMPTS}, read_prompts, 8)
    (prompts / "one.txt").write_text(
        "# a comment\na red car\n\nthree apples\n" + "\n".join(f"a dog {i}" for i in range(20))
    )
    lines = [{"prompt": f"a cat {i}", "count": i, "weight": 1 + i, "tail": True, "x": 0.5} for i in range(20)]
    lines += [{"prompt": f"a bird {i}", "split": "held_out"} for i in range(4)]
    (prompts / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, algo in (("gaussians-linear", "ddpo"), ("sd3-compress", "orw_w2")):
        finished_run(
            add(f"run of {name}", {".json": HOSTILE_JSON, ".csv": CSV}, read_run, 2 if algo == "ddpo" else 1),
            algo,
            name,
        )
    mlp = add("flow", {".json": HOSTILE_JSON}, read_flow, 1)
    shutil.copytree(ASSETS / "gaussians", mlp, dirs_exist_ok=True)
    pipeline = add("pipeline", {".json": HOSTILE_JSON}, read_flow, 3)
    for file in ("model_index.json", "transformer/config.json", "vae/config.json", "sampling.json"):
        (pipeline / file).parent.mkdir(exist_ok=True)
        shutil.copy(ASSETS / "mini-sd3" / file, pipeline / file)
    exported = add("export", {".json": HOSTILE_JSON}, read_export, 2)
    (exported / hub.MANIFEST).write_text(
        json.dumps({"flowrl": "0", "name": "o/n", "kind": "lora", "files": ["README.md"]})
    )
    (exported / "README.md").write_text("x")
    cells = add("cells", {".json": HOSTILE_JSON}, read_cells, 2)
    finished_cells(cells)
    return targets


METRICS = "time/total_timesteps,rollout/reward_mean,train/drift\n4,-1.25,\n8,-1.5,0.001\n"
RESULT = {"reward_mean": 0.5, "diversity": 1.9, "drift": 0.01, "w2_to_optimum": 1.6, "w2_floor": 0.7}
RESULT |= {"components": {"a": 1.0}, "reward_ci": [0.4, 0.6], "n_samples": 8, "evaluations_per_sample": 16}
RESULT |= {"reference": {"reward_mean": 0.2, "diversity": 2.0, "reward_ci": [0.1, 0.3], "components": {"a": 0.5}}}


def finished_run(folder: Path, algo: str, env: str) -> None:
    """What `flowrl.run` leaves, as far as it is read again; written here, to save the training."""
    small = {"n_samples": 8, "batch_size": 4, "group_size": 4, "rollout_steps": 2, "seed": 0, "device": "cpu"}
    settings = {"flow": "mini-sd3", "prompts": ("stars",)} if env.startswith("sd3") else {}
    model = algorithm_class(algo)("FlowPolicy", env, env_settings=settings, **small)
    model.save(folder / "final")
    kept = {"total_timesteps": 8, "log_every": 1, "eval_rewards": ["colourfulness"], "progress": False}
    write_config(folder, model, {"run": kept})
    (folder / "metrics.csv").write_text(METRICS)
    write_json(folder / "evaluation.json", RESULT)


def finished_cells(folder: Path) -> None:
    """What `flowrl.benchmark` leaves of two cells."""
    text = SUITE.replace("settings = { flow", "#").replace("[envs.sd3-compress]", "").replace("on.sd3-compress", "#")
    suite = folder.with_suffix(".toml")
    suite.write_text(text)
    CELLS.extend(load_suite(str(suite), ["flow_grpo", "best_of_n"], seeds=[0], budget=100))
    row = {"evaluations": 64, "seconds": 0.5, "rollout/reward_mean": 0.4, "rollout/diversity": 1.9, "train/drift": 0.0}
    cost = {"network_evaluations": 128, "samples": 64, "gradient_steps": 8, "training_seconds": 1.5}
    for cell in CELLS:
        (folder / cell.folder).mkdir(parents=True)
        write_json(folder / cell.folder / "curve.json", [row, {**row, "evaluations": 128}])
        write_json(folder / cell.folder / "result.json", {"cell": cell.to_dict(), "cost": cost, **RESULT})


def read_suite(folder: Path) -> None:
    cells = load_suite(str(folder / "suite.toml"))
    for cell in cells:
        json.dumps(cell.to_dict())
        inside = (folder / cell.folder).resolve()
        assert inside.relative_to(folder.resolve()).parts[0] == "cells", cell.folder
        assert len(inside.parent.name) < 200, "no file system takes a name of that length"
    assert len({cell.folder for cell in cells}) == len(cells), "two cells in one folder"


def read_prompts(folder: Path) -> None:
    errors = []
    for file in ("one.txt", "two.jsonl"):
        try:
            prompts = prompts_from(folder / file, held_out_share=0.5 if file == "one.txt" else 0.0)
        except FlowRLError as error:
            errors.append(error)
            continue
        fingerprint(prompts.train)
        shares = shares_of(prompts.train)
        assert shares is None or np.isfinite(shares).all()
    if errors:
        raise errors[0]


def read_run(folder: Path) -> None:
    read_metrics(folder / "metrics.csv")
    if (folder / "config.json").exists():
        run_page(RunFiles.read(folder))
    if (folder / "evaluation.json").exists():
        card._results(read_json(folder / "evaluation.json"))
    code = run.main(["--resume", str(folder), "--dry-run"])
    if code:
        raise FlowRLError("the program ended with an error")


def read_flow(folder: Path) -> None:
    source_of(str(folder)).skeleton()


def read_export(folder: Path) -> None:
    hub.push(folder, "owner/name", dry_run=True)


def read_cells(folder: Path) -> None:
    for cell in CELLS:
        finished_before(cell, folder)
    collect(CELLS, folder)


if __name__ == "__main__":
    sys.exit(main(__doc__, "files", sound))
