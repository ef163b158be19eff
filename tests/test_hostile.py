"""Files of others: what was found by fuzzing, and by reading the code with an enemy's eyes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import flowrl
from flowrl import benchmark
from flowrl.checks import check_types
from flowrl.envs.prompts import prompts_from
from flowrl.errors import CheckpointError, ConfigError, FlowRLError, ModelLoadError, UnknownNameError
from flowrl.models.loading import ASSETS, source_of
from flowrl.pages import model_card as card
from flowrl.pages.benchmark_results import collect
from flowrl.run import main
from flowrl.runs.logs import logger, read_metrics
from flowrl.runs.pictures import curves
from flowrl.storage import hub
from flowrl.storage.files import LARGEST_JSON, read_json, read_rows
from flowrl.suites.suite import MOST_CELLS, Cell, load_suite
from flowrl.training.algorithm import FlowAlgorithm

SUITE = """
seeds = [0]
budget = 100
[envs.gaussians-linear]
[rows.DDPO]
algo = "ddpo"
settings = { n_samples = 64 }
sweep = { learning_rate = [1e-3] }
"""


@pytest.fixture
def hostile_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported, and must not be because a file names it."""
    (tmp_path / "hostile_module.py").write_text(
        "import flowrl\n@flowrl.register_reward('hostile')\ndef hostile(images, prompts):\n"
        "    'Of somebody else.'\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "hostile_module"
    sys.modules.pop("hostile_module", None)
    flowrl.envs.rewards.catalogue.REWARDS.pop("hostile", None)


def suite(tmp_path: Path, *changes: tuple[str, str], text: str = SUITE) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "a.toml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    return str(tmp_path / "a.toml")


# suites


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget", "\udcff", r"is damaged: 'utf-8' codec"),
        ("seeds = [0]", "seeds = " + "[" * 50_000 + "]" * 50_000, "is damaged"),
        ("seeds = [0]", f"seeds = [{'9' * 5000}]", "is damaged: Exceeds the limit"),
        ("seeds = [0]", "seeds = 0x" + "f" * 5000, "'seeds' of suite 'a' must be a list of whole .* too long"),
        ("seeds = [0]", "a." * 100_000 + "a = 1", "a line with more than 1000 dots"),
        ("seeds = [0]", "seeds = [-1]", r"'seeds' of suite 'a' must be a list of whole numbers .*, not \[-1\]"),
        ("seeds = [0]", "seeds = []", "'seeds' of suite"),
        ("seeds = [0]", "seeds = [true]", "'seeds' of suite"),
        ("seeds = [0]", "seeds = [0, 0]", "would write to the same folder"),
        (
            "seeds = [0]",
            f"seeds = [{', '.join(map(str, range(MOST_CELLS + 1)))}]",
            f"has {MOST_CELLS + 1} cells .*; {MOST_CELLS} at most",
        ),
        ("budget = 100", 'budget = "much"', "'budget' of suite 'a' must be a whole number above 0, not 'much'"),
        ("[envs.gaussians-linear]", "[envs]\ngaussians-linear = 1", "environment 'gaussians-linear' must be a table"),
        ("[envs.gaussians-linear]", "[envs.'flowrl/gaussians-linear-v/../../../x']", "Unknown environment"),
        ("[rows.DDPO]", "[rows.'..']", "must have a letter or digit"),
        ("[rows.DDPO]", f"[rows.{'x' * 300}]", "and 100 characters at most"),
        ("[rows.DDPO]", "[rows]\nb = 1\n[rows.DDPO]", "row 'b' must be a table, not 1"),
        (
            "[rows.DDPO]",
            "[rows.'ddpo!']\nalgo = 'ddpo'\nsweep = { learning_rate = [1e-3] }\n[rows.DDPO]",
            "same folder",
        ),
        ('algo = "ddpo"', "algo = 3", "'algo' of row 'DDPO' must be a text, not 3"),
        ('algo = "ddpo"', 'algo = "os:PathLike"', "'os:PathLike' is no FlowAlgorithm"),
        ("{ n_samples = 64 }", '{ n_samples = "64" }', "n_samples must be a whole number, not '64'"),
        ("{ n_samples = 64 }", "{ n_samples = 64.5 }", "n_samples must be a whole number, not 64.5"),
        ("{ n_samples = 64 }", f"{{ n_samples = {2**63} }}", "n_samples must be a whole number"),
        ("{ n_samples = 64 }", "{ compile = 1 }", "compile must be one of auto, off, blocks, whole, not 1"),
        ("{ n_samples = 64 }", "{ solver = [] }", r"solver must be one of euler, .*, not \[\]"),
        ("{ n_samples = 64 }", "{ weight_decay = nan }", "weight_decay must be a number, not nan"),
        ("{ n_samples = 64 }", "{ lora_targets = [1] }", r"lora_targets must be a list, not \[1\]"),
        ("{ n_samples = 64 }", "1", "'settings' of row 'DDPO' must be a table"),
        ("[1e-3]", '["x"]', "'sweep' of row 'DDPO' must be a table of lists of numbers"),
        ("[1e-3]", "[inf]", "'sweep' of row"),
        ("[1e-3]", "1", "'sweep' of row"),
        (
            'algo = "ddpo"',
            'algo = "ddpo"\non.gaussians-linear = 1',
            "'on.gaussians-linear' of row 'DDPO' must be a table",
        ),
    ],
)
def test_suites_that_say_what_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message) as raised:
        load_suite(suite(tmp_path, (old, new)))
    assert len(str(raised.value)) < 1500


def test_environment_settings_of_another_type(tmp_path: Path) -> None:
    text = SUITE.replace("[envs.gaussians-linear]", "[envs.sd3-compress]\nsettings = { decode_batch = 'x' }")
    with pytest.raises(ConfigError, match="'sd3-compress' decode_batch must be a whole number, not 'x'"):
        load_suite(suite(tmp_path, text=text))


def test_suite_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2**40)
    for name in ("folder", "pipe", "device"):
        with pytest.raises(ConfigError, match=rf"Cannot read .*{name}\.toml': it is no file"):
            load_suite(str(tmp_path / f"{name}.toml"))
    with pytest.raises(ConfigError, match="it has more than 1048576 bytes"):
        load_suite(str(tmp_path / "large.toml"))


def test_a_mark_of_utf_8_is_passed_over(tmp_path: Path) -> None:
    assert len(load_suite(suite(tmp_path, text="\ufeff" + SUITE))) == 1


def test_no_cell_leaves_its_folder() -> None:
    cell = Cell("../../x", "mod:a/../../b", "ddpo", 0, 1, 1)
    assert cell.folder == "cells/mod.a-..-..-b/..-..-x/seed-0"


def test_code_named_by_a_suite_is_not_imported(
    tmp_path: Path, hostile_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostile_module.py").write_text("from flowrl import DDPO as Algo\n")
    named = suite(tmp_path, ('"ddpo"', '"hostile_module:Algo"'))
    assert benchmark.main(["--suite", named, "--dry-run"]) == 2
    assert "names the module 'hostile_module', which is not imported here" in capsys.readouterr().err
    env = suite(tmp_path, ("[envs.gaussians-linear]", "[envs.'hostile_module:gaussians-linear']"))
    assert benchmark.main(["--suite", env, "--dry-run"]) == 2
    assert "add --modules NAME if you trust it" in capsys.readouterr().err
    assert hostile_module not in sys.modules
    named = suite(tmp_path, ('"ddpo"', '"hostile_module:Algo"'))
    assert benchmark.main(["--suite", named, "--dry-run", "--modules", hostile_module]) == 0
    assert "1 cells" in capsys.readouterr().out


def test_a_reward_named_by_a_suite_is_not_imported_by_its_cells(tmp_path: Path, hostile_module: str) -> None:
    from flowrl.suites.cell import run_cell

    settings = {"flow": "mini-sd3", "reward": "hostile_module:hostile"}
    cell = Cell("a", "sd3-compress", "ddpo", 0, 1, 1, env_settings=settings)
    (tmp_path / "cell.json").write_text(json.dumps(cell.to_dict()))
    with pytest.raises(ConfigError, match="The suite names the module 'hostile_module'"):
        run_cell(tmp_path)
    assert hostile_module not in sys.modules


# checkpoints and run folders


def test_rewards_named_by_a_checkpoint_are_not_imported(tmp_path: Path, hostile_module: str) -> None:
    settings = {"n_samples": 8, "batch_size": 8, "group_size": 4, "rollout_steps": 2, "seed": 0, "device": "cpu"}
    env = {"flow": "mini-sd3", "reward": "hostile_module:hostile:1+compress:0.1"}
    flowrl.ORWCFMW2("FlowPolicy", "sd3-compress", env_settings=env, **settings).save(tmp_path / "saved")
    sys.modules.pop(hostile_module)
    flowrl.envs.rewards.catalogue.REWARDS.pop("hostile")
    with pytest.raises(ConfigError, match=r"names the module 'hostile_module'.*name it \(--modules NAME\)"):
        FlowAlgorithm.load(tmp_path / "saved", device="cpu")
    assert hostile_module not in sys.modules
    model = FlowAlgorithm.load(tmp_path / "saved", env="hostile_module:sd3-compress", device="cpu")  # named by the user
    assert model.env.core.origin[1]["reward"] == env["reward"]


def test_held_out_rewards_named_by_a_run_folder_are_not_imported(
    tmp_path: Path, hostile_module: str, tiny_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_runs["points"], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run"]["eval_rewards"] = ["hostile_module:hostile"]
    (run / "config.json").write_text(json.dumps(config))
    before = sorted(tmp_path.rglob("*"))
    for options in (["--resume", str(run)], ["--config", str(run), "--out", str(tmp_path)]):
        assert main([*options, "--total-timesteps", "64"]) == 2
        assert "name its rewards again with --eval-rewards" in capsys.readouterr().err
    assert hostile_module not in sys.modules
    assert sorted(tmp_path.rglob("*")) == before  # no folder of a run that could not begin


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"log_every": "x"}, "log_every must be a whole number, not 'x'"),
        ({"eval_rewards": [1]}, "eval_rewards must be a list"),
        ({"progress": None}, "progress must be true or false"),
    ],
)
def test_run_folders_that_were_run_with_what_cannot_be(
    tmp_path: Path, tiny_runs: dict[str, Path], capsys: pytest.CaptureFixture[str], changes: dict, expected: str
) -> None:
    run = shutil.copytree(tiny_runs["points"], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["run"] |= changes
    (run / "config.json").write_text(json.dumps(config))
    assert main(["--resume", str(run)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, "damaged: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged: Exceeds the limit"),
        (b"\xff\xfe{\0}\0", "damaged: 'utf-8' codec"),
        (b" " * (LARGEST_JSON + 1), "it has more than 16777216 bytes"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        read_json(tmp_path / "a.json")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv", "a.txt"):
        os.mkfifo(tmp_path / name)
    for read, name in ((read_json, "a.json"), (read_rows, "a.csv"), (prompts_from, "a.txt")):
        with pytest.raises(FlowRLError, match="it is no file"):
            read(tmp_path / name)


def test_rows_that_were_cut_are_left_out(tmp_path: Path) -> None:
    """A run that was killed while it wrote must still be resumed, and reported on."""
    path = tmp_path / "metrics.csv"
    path.write_text("time/total_timesteps,a\n8,0.5\n16,\nx,1\n24,1e\n32,2.5\n" + "9" * 5000 + ",1\n40,1")
    assert [row.get("a") for row in read_rows(path)] == [0.5, None, 1, "1e", 2.5, 1]
    logger(tmp_path, 32).close()
    assert [row["time/total_timesteps"] for row in read_rows(path)] == [8, 16, 24, 32]
    assert [row.get("a") for row in read_metrics(path)] == [0.5, None, None, 2.5]
    path.write_text("a,b\n1,2\n")
    curves(read_metrics(path))
    assert read_rows(tmp_path / "none.csv") == []


@pytest.mark.parametrize("content", [[], {"reference": 3}, {"reward_ci": "ab", "components": [1]}, {"drift": {}}])
def test_results_that_are_none_do_not_break_a_card(content: object) -> None:
    assert "| reward | " in card._results(content if isinstance(content, dict) else {"components": content})


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    cell = Cell("a", "gaussians-linear", "ddpo", 0, 1, 1)
    folder = tmp_path / cell.folder
    folder.mkdir(parents=True)
    for text, expected in (
        ("{", "is damaged"),
        ("{}", r"KeyError 'reward_mean'\), in one of cells/gaussians-linear/a"),
    ):
        (folder / "result.json").write_text(text)
        with pytest.raises(CheckpointError, match=expected):
            collect([cell], tmp_path)
    with pytest.raises(ConfigError, match="says of no cell that it has finished"):
        benchmark.run_cells([cell], tmp_path, workers=1)


@pytest.mark.parametrize("name", ["x" * 100_000, "a\0b", "../a", "/etc/passwd", "", "."])
def test_exported_files_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / hub.MANIFEST).write_text(json.dumps({"files": [name]}))
    with pytest.raises(ConfigError, match="is no file of that folder") as raised:
        hub.exported_files(tmp_path)
    assert len(str(raised.value)) < 1000


# prompt files


def test_paths_of_prompts_that_cannot_be() -> None:
    for name in ("~nobody-of-this-name/a.txt", "a\0b.txt", "x" * 5000 + ".txt"):
        with pytest.raises(ConfigError, match="Cannot read the prompt file"):
            prompts_from(name)


# flows


def pipeline(folder: Path, file: str, **changes: object) -> str:
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.loads((ASSETS / "mini-sd3" / name).read_text()) | (changes if name == file else {})
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_libraries_named_by_a_pipeline_are_not_imported(tmp_path: Path, hostile_module: str) -> None:
    """diffusers would import them."""
    folder = pipeline(tmp_path / "flow", "model_index.json", vae=[hostile_module, "x"])
    with pytest.raises(ModelLoadError, match=r"'vae' .* is of 'hostile_module', not of diffusers or transformers"):
        source_of(folder)
    assert hostile_module not in sys.modules


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("model_index.json", {"_class_name": [1]}, r"is a \[1\], a class of pipelines that"),
        ("transformer/config.json", {"num_layers": 10**9}, "says num_layers = 1000000000"),
        ("transformer/config.json", {"patch_size": 0}, "is damaged"),
        ("transformer/config.json", {"sample_size": -4}, "is damaged"),
        ("transformer/config.json", {"patch_size": []}, "is damaged"),
        ("vae/config.json", {"encoder_block_out_channels": 3}, "is damaged"),
    ],
)
def test_configurations_of_pipelines(tmp_path: Path, file: str, changes: dict, expected: str) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        source_of(pipeline(tmp_path, file, **changes)).skeleton()


@pytest.mark.parametrize("changes", [{"dim": None}, {"width": 2**40}, {"depth": "4"}, {"depth": 10**6}, {"dim": True}])
def test_configurations_of_networks(tmp_path: Path, changes: dict) -> None:
    config = json.loads((ASSETS / "gaussians" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelLoadError, match="must say dim, width and depth"):
        source_of(str(tmp_path))


# types of settings


@dataclass
class Settings:
    many: int = 1
    share: float = 0.5
    word: str | None = None
    kind: Literal["a", "b"] = "a"
    words: tuple[str, ...] = ()
    anything: torch.Tensor | None = None


@pytest.mark.parametrize(
    "sound",
    [
        {"many": 2, "share": 1, "word": None, "kind": "b", "words": ["x"], "unknown": object()},
        {"word": "x", "share": float("inf"), "words": (), "anything": torch.zeros(1)},
        {"word": Path("x"), "anything": lambda: 1},  # objects are their maker's matter
    ],
)
def test_values_of_the_right_type(sound: dict) -> None:
    check_types(Settings, sound)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"many": 1.0}, "many must be a whole number, not 1.0"),
        ({"many": True}, "many must be a whole number, not True"),
        ({"many": torch.tensor(3)}, r"many must be a whole number, not tensor\(3\)"),  # the settings' own make it one
        ({"share": lambda: 1}, "share must be a number, not <function"),
        ({"share": 10**400}, "share must be a number"),
        ({"share": "x" * 10_000}, r"share must be a number, not 'xxx.*\.\.\.x"),
        ({"word": 3}, "word must be a text or nothing, not 3"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
        ({"words": "x"}, "words must be a list, not 'x'"),
        ({"words": [[]]}, "words must be a list"),
    ],
)
def test_values_of_another_type(wrong: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as raised:
        check_types(Settings, wrong)
    assert len(str(raised.value)) < 200
