"""Prompts as data: files and their faults, the held-out split, weighted draws, shipped sets, evaluation."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from scipy import stats

import flowrl
from flowrl.envs import prompts as module
from flowrl.envs.base import draw_contexts
from flowrl.envs.prompts import Prompt, PromptSet, fingerprint, prompts_from, shares_of, shipped_sets
from flowrl.envs.registration import CustomConfig, anchored
from flowrl.envs.text_to_image import TextToImageConfig
from flowrl.errors import CheckpointError, ConfigError, UnknownNameError
from flowrl.evaluate import main as evaluate_main
from flowrl.models.loading import ASSETS
from flowrl.models.mlp import MLP
from flowrl.registry import ENVIRONMENTS
from flowrl.run import main

SHAPES = [
    {"prompt": "two red stars on blue", "weight": 3, "count": 2},
    {"prompt": "one green circle on white", "count": 1},
    {"prompt": "three white crosses on black", "count": 3},
    {"prompt": "four blue squares on red", "split": "held_out", "count": 4},
    {"prompt": "two yellow triangles on green", "split": "held_out", "count": 2},
]
SMALL = {"n_samples": 8, "group_size": 2, "batch_size": 8, "rollout_steps": 2, "n_epochs": 1, "ema_decay": 0.0}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write(tmp_path / "shapes.jsonl", *map(json.dumps, SHAPES))


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


def model(**env_settings: object) -> flowrl.FlowAlgorithm:
    settings = {"flow": "mini-sd3", **env_settings}
    return flowrl.ORWCFMW2("FlowPolicy", "sd3-count", env_settings=settings, seed=0, device="cpu", **SMALL)


def test_a_prompt_is_the_string_everywhere() -> None:
    prompt = Prompt("two stars", {"count": 2}, weight=3)
    assert prompt == "two stars"
    assert hash(prompt) == hash("two stars")
    assert repr(prompt) == repr("two stars")
    assert json.dumps(prompt) == '"two stars"'
    assert {"two stars": 1}[prompt] == 1
    assert (prompt.fields["count"], prompt.weight) == (2, 3.0)
    for other in (copy.copy(prompt), copy.deepcopy(prompt), copy.deepcopy([prompt])[0]):
        assert (other, other.fields, other.weight) == (prompt, prompt.fields, 3.0)


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "bed", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bed left of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "white"}, {"class": "cat", "count": 1, "color": "red"}],
        "prompt": "a photo of a white cup and a red cat",
    },
]


def test_metadata_of_geneval_are_prompts_with_fields(tmp_path: Path) -> None:
    read = prompts_from(write(tmp_path / "evaluation_metadata.jsonl", *map(json.dumps, GENEVAL))).train
    assert [str(prompt) for prompt in read] == [line["prompt"] for line in GENEVAL]
    assert [prompt.fields["tag"] for prompt in read] == [line["tag"] for line in GENEVAL]
    assert read[1].fields["include"][0]["count"] == 2
    assert read[1].fields["exclude"][0] == {"class": "clock", "count": 3}
    assert read[2].fields["include"][1]["position"] == ("left of", 0)
    with pytest.raises(TypeError):
        read[0].fields["include"][0]["count"] = 3
    other = json.loads(json.dumps(GENEVAL))
    other[1]["include"][0]["count"] = 4
    changed = prompts_from(write(tmp_path / "other.jsonl", *map(json.dumps, other))).train
    assert fingerprint(read) is not None
    assert fingerprint(read) != fingerprint(changed)


@pytest.mark.parametrize(
    "things",
    [
        ["bench"],
        [{"count": 1}],
        [{"class": "bench", "count": 0}],
        [{"class": "bench", "count": 1.5}],
        [{"class": "bench", "color": 3}],
        [{"class": "bench", "position": ["left of", 1]}],
        [{"class": "bench", "position": "left"}],
    ],
)
def test_metadata_that_is_none(tmp_path: Path, things: list[object]) -> None:
    line = json.dumps({"prompt": "a photo of a bench", "include": things})
    with pytest.raises(ConfigError, match=r"line 1: the field 'include' must list things as GenEval does, such as"):
        prompts_from(write(tmp_path / "a.jsonl", line))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end(tmp_path: Path, end: str) -> None:
    lines = ["two stars", "", "# not this", "a circle"]
    (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
    assert prompts_from(tmp_path / "a.txt").train == ("two stars", "a circle")
    (tmp_path / "a.jsonl").write_bytes(end.join(json.dumps({"prompt": line}) for line in ("a", "b")).encode())
    assert prompts_from(tmp_path / "a.jsonl").train == ("a", "b")
    (tmp_path / "b.txt").write_bytes(f"one{end}one".encode())
    with pytest.raises(ConfigError, match="line 2: the prompt 'one' is in line 1 already"):
        prompts_from(tmp_path / "b.txt")


def test_prompts_of_a_command_line_in_another_encoding() -> None:
    """What Python makes of UTF-8 where the locale is "C"; other bytes are no prompt."""
    garbled = "ein Käfer".encode().decode("ascii", "surrogateescape")
    assert prompts_from([garbled, "a star"]).train == ("ein Käfer", "a star")
    with pytest.raises(ConfigError, match=r"is not UTF-8. Set a locale of UTF-8 \(LC_ALL=C.UTF-8\)"):
        prompts_from([b"ein K\xe4fer".decode("ascii", "surrogateescape")])


def test_relative_paths_are_stored_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run goes on from another folder; names of what ships stay names, whatever lies in the folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.txt", "stars", "circles")
    shutil.copytree(ASSETS / "mini-sd3", tmp_path / "sd3")
    for name in ("animals", "mini-sd3", "auto", "cat"):
        (tmp_path / name).mkdir()
    env = flowrl.make("sd3-compress", flow="sd3", prompt_file="mine.txt", reward_options=("compress.quality=90",))
    assert env.origin == (
        "sd3-compress",
        {"flow": "sd3", "prompt_file": str(tmp_path / "mine.txt"), "reward_options": ("compress.quality=90",)},
    )
    env = flowrl.make("sd3-compress", flow="./sd3", prompt_file=Path("mine.txt"))
    assert env.origin[1] == {"flow": str(tmp_path / "sd3"), "prompt_file": tmp_path / "mine.txt"}
    assert env.flow.source == str(tmp_path / "sd3")
    kept = {"flow": "mini-sd3", "prompt_file": "animals", "reward_options": ("classifier.label=cat", "clip.model=A/B")}
    assert anchored(kept) == kept
    assert anchored({"reward_options": ["clip.model=cat"]}) == {"reward_options": (f"clip.model={tmp_path / 'cat'}",)}
    assert anchored({"flow": "none/here", "prompts": ("a",)}) == {"flow": "none/here", "prompts": ("a",)}


def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.txt", "stars", "circles")
    model(prompt_file="mine.txt").save(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    assert again.env.core.contexts == ["stars", "circles"]
    with pytest.raises(ConfigError, match=r"Cannot read the prompt file 'mine.txt' \(from the folder '.*elsewhere'\)"):
        prompts_from("mine.txt")


def test_a_prompt_file_in_the_place_of_prompts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name would be trained on."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.txt", "stars")
    with pytest.raises(ConfigError, match=r"'mine.txt' is a file: --env.prompt-file mine.txt"):
        flowrl.make("sd3-compress", flow="mini-sd3", prompts=("a star", "mine.txt"))


def test_fields_are_read_only() -> None:
    given = {"count": 2}
    prompt = Prompt("two stars", given)
    given["count"] = 5
    assert prompt.fields == {"count": 2}
    with pytest.raises(TypeError):
        prompt.fields["count"] = 3  # type: ignore[index]


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, 10**400, True, "2", None])
def test_a_weight_without_meaning(weight: object) -> None:
    with pytest.raises(ConfigError, match="weight must be a finite number above 0"):
        Prompt("a", weight=weight)  # type: ignore[arg-type]


def test_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffa red car\r", "", "# no prompt", "  Größe 3 \u2028", "a house")
    assert prompts_from(path) == PromptSet(("a red car", "Größe 3", "a house"))
    assert prompts_from(str(path)).train[0].weight == 1


def test_json_file(shapes: Path) -> None:
    read = prompts_from(shapes)
    assert read.train == tuple(entry["prompt"] for entry in SHAPES[:3])
    assert read.held_out == tuple(entry["prompt"] for entry in SHAPES[3:])
    assert [prompt.weight for prompt in read.train] == [3, 1, 1]
    assert [dict(prompt.fields) for prompt in (*read.train, *read.held_out)] == [{"count": e["count"]} for e in SHAPES]


FIRST = '{"prompt": "a"}'
FAULTS = {
    "no json": ("{prompt: a}", "expected a JSON object"),
    "an array": ('["a"]', "expected a JSON object"),
    "deep": ("[" * 9000, "expected a JSON object"),
    "no prompt": ('{"text": "a"}', '"prompt" must be a text that is not empty, not None'),
    "empty prompt": ('{"prompt": "  "}', '"prompt" must be a text that is not empty'),
    "number as prompt": ('{"prompt": 3}', '"prompt" must be a text that is not empty, not 3'),
    "half a pair": ('{"prompt": "\\ud800"}', "surrogate"),
    "text as weight": ('{"prompt": "b", "weight": "2"}', "weight must be a finite number above 0, not '2'"),
    "zero weight": ('{"prompt": "b", "weight": 0}', "weight must be a finite number above 0, not 0"),
    "endless weight": ('{"prompt": "b", "weight": 1e999}', "weight must be a finite number above 0, not inf"),
    "nan": ('{"prompt": "b", "weight": NaN}', "NaN is no number of JSON"),
    "list as field": ('{"prompt": "b", "colours": ["red"]}', "field 'colours' must be a text, a finite number"),
    "null as field": ('{"prompt": "b", "colour": null}', "field 'colour' must be"),
    "field twice": ('{"prompt": "b", "count": 3, "count": 4}', "the field 'count' is there twice"),
    "thing twice": ('{"prompt": "b", "include": [{"class": "a", "class": "b"}]}', "the field 'class' is there twice"),
    "split": ('{"prompt": "b", "split": "test"}', '"split" must be "train" or "held_out", not \'test\''),
    "duplicate": ('{"prompt": "a ", "count": 2}', "the prompt 'a' is in line 1 already"),
    "long": (json.dumps({"prompt": "b" * 10_000}), "a line may have 10000"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_is_named(fault: str, tmp_path: Path) -> None:
    line, message = FAULTS[fault]
    path = write(tmp_path / "bad.jsonl", FIRST, "", line)
    with pytest.raises(ConfigError) as caught:
        prompts_from(path)
    assert str(caught.value).startswith(f"'{path}', line 3: ")
    assert message in str(caught.value)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a car\nGr\xf6\xdfe\n")
    with pytest.raises(ConfigError, match=r"bad\.txt', line 2: byte 3 is not UTF-8"):
        prompts_from(tmp_path / "bad.txt")


def test_duplicates_in_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3: the prompt 'a car' is in line 1 already"):
        prompts_from(write(tmp_path / "a.txt", "a car", "a house", " a car"))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 20)
    with pytest.raises(ConfigError, match=r"large\.txt' is larger than"):
        prompts_from(write(tmp_path / "large.txt", "a" * 21))
    assert prompts_from(write(tmp_path / "whole.txt", "a" * 20)).train == ("a" * 20,)
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompts_from(write(tmp_path / "empty.txt", "", "# nothing"))
    with pytest.raises(ConfigError, match=r"ends in \.txt .* or \.jsonl"):
        prompts_from(write(tmp_path / "a.yaml", "- a"))
    with pytest.raises(ConfigError, match=r"none\.txt': No such file"):
        prompts_from(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.txt': Is a directory"):
        prompts_from(tmp_path / "folder.txt")


@pytest.mark.parametrize("name", ["animal", "a photo of a cat " * 30])
def test_an_unknown_set_names_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"Shipped sets: animals, colours, .*\.jsonl"):
        prompts_from(name)


def test_the_closest_set_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'colours'"):
        prompts_from("colors")


MANY = [f"prompt {i}" for i in range(1000)]


def test_the_split_depends_on_each_text_alone() -> None:
    whole, turned = prompts_from(MANY, 0.3), prompts_from(MANY[::-1], 0.3)
    assert set(whole.held_out) == set(turned.held_out)
    assert set(prompts_from(MANY[::2], 0.3).held_out) == set(whole.held_out) & set(MANY[::2])
    assert set(whole.held_out) < set(prompts_from(MANY, 0.4).held_out)
    assert not set(whole.train) & set(whole.held_out)
    assert [p for p in MANY if p in set(whole.train)] == list(whole.train)  # in the order given
    assert abs(len(whole.held_out) - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7)


def test_the_split_is_that_of_every_machine() -> None:
    """SHA-256 of "prompt 19" begins with 0b54 (0.044 of the way), of "prompt 0" with 481d (0.282), by sha256sum."""
    assert prompts_from(["prompt 0", "prompt 19"], 0.05).held_out == ("prompt 19",)
    assert prompts_from(["prompt 0", "prompt 19", "prompt 7"], 0.25).train == ("prompt 0",)


def test_a_group_is_held_out_as_a_whole() -> None:
    """Of the group's text alone: "prompt 19" is 0.044 of the way, "prompt 0" 0.282."""
    prompts = [Prompt(f"{name} {i}", {"group": name}) for i in range(3) for name in ("prompt 0", "prompt 19")]
    split = prompts_from([*prompts, "prompt 19", Prompt("prompt 0", {"colour": "red"})], 0.05)
    assert split.held_out == ("prompt 19 0", "prompt 19 1", "prompt 19 2", "prompt 19")


def test_shares_without_meaning(shapes: Path) -> None:
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match="held_out_share must be in"):
            prompts_from(MANY, share)
    with pytest.raises(ConfigError, match="says itself which prompts are held out"):
        prompts_from(shapes, 0.2)
    with pytest.raises(ConfigError, match="holds out 0 and leaves 2"):
        prompts_from(["prompt 0", "prompt 1"], 0.01)
    with pytest.raises(ConfigError, match="None is none"):
        prompts_from([None], 0.2)


def test_a_set_that_is_all_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "two stars", "split": "held_out"}')
    with pytest.raises(ConfigError, match="All 1 prompts of 'sd3-count' are held out"):
        flowrl.make("sd3-count", flow="mini-sd3", prompt_file=str(path))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n_contexts", "n_samples", "group_size"), [(5, 24, 4), (500, 512, 8), (3, 7, 2), (1, 4, 2)])
def test_equal_weights_draw_as_before_weights(n_contexts: int, n_samples: int, group_size: int) -> None:
    prompts = [Prompt(f"{i}", weight=0.3) for i in range(n_contexts)]
    assert shares_of(prompts) is None
    n_groups, before = math.ceil(n_samples / group_size), generator(3)
    order: list[int] = []
    while len(order) < n_groups:
        order += torch.randperm(n_contexts, generator=before).tolist() if n_contexts > 1 else [0] * n_groups
    expected = [i for i in order[:n_groups] for _ in range(group_size)][:n_samples]
    after = generator(3)
    assert draw_contexts(n_contexts, n_samples, group_size, after).tolist() == expected
    assert torch.equal(before.get_state(), after.get_state())


WEIGHTS = [8.0, 3.0, 1.0, 0.5, 0.1, 2.3]
SHARES = np.array(WEIGHTS) / sum(WEIGHTS)


@pytest.mark.parametrize("n_groups", [4, 7, 64])
def test_weighted_draws_follow_the_shares(n_groups: int) -> None:
    """Each iteration gives a context its mean, rounded up or down; every group by itself follows the shares."""
    rng, repeats = generator(n_groups), 6000
    shares = torch.tensor(SHARES, dtype=torch.float32)
    drawn = torch.stack([draw_contexts(6, n_groups, 1, rng, shares) for _ in range(repeats)]).numpy()
    counts = np.stack([(drawn == i).sum(1) for i in range(6)], 1)
    assert (np.abs(counts - n_groups * SHARES) < 1 + 1e-4).all()
    fraction = n_groups * SHARES % 1
    z = (counts.mean(0) - n_groups * SHARES) / np.sqrt(fraction * (1 - fraction) / repeats)
    assert np.abs(z).max() < 4.5
    for k in (0, 1, n_groups - 1):
        observed = np.bincount(drawn[:, k], minlength=6)
        assert stats.chisquare(observed, repeats * SHARES).pvalue > 1e-3, k


def test_small_shares_never_come_twice() -> None:
    """As with equal weights: where no context is due a whole group, the groups of an iteration all differ."""
    shares = torch.linspace(1, 3, 200) / torch.linspace(1, 3, 200).sum()
    rng = generator(0)
    orders = [draw_contexts(200, 60, 1, rng, shares) for _ in range(50)]
    assert all(len(order.unique()) == 60 for order in orders)
    together = torch.stack([torch.zeros(200).index_fill(0, order, 1) for order in orders])
    assert len(together.unique(dim=0)) == 50  # another set of contexts every time


def test_weighted_draws_come_in_groups() -> None:
    shares = torch.tensor(SHARES, dtype=torch.float32)
    drawn = draw_contexts(6, 30, 4, generator(0), shares)
    assert drawn.shape == (30,)
    assert all(len(group.unique()) == 1 for group in drawn.split(4))


def test_shares_of_extreme_weights() -> None:
    shares = shares_of([Prompt("a", weight=1e308), Prompt("b", weight=1e308), Prompt("c", weight=1e-308)])
    assert shares is not None
    assert shares.tolist() == [0.5, 0.5, 0.0]


def plain_env(name: str, prompts: object, **settings: object) -> flowrl.GenerationEnv:
    flowrl.register_env(name, flow=lambda: MLP(2, 8, 2), sample_shape=(2,), prompts=prompts)(lambda s, c: s[:, 0])
    try:
        return flowrl.make(name, **settings)
    finally:
        del ENVIRONMENTS[name]


def test_gymnasium_draws_follow_the_weights() -> None:
    env = plain_env("weighted", [Prompt(f"{i}", weight=w) for i, w in enumerate(WEIGHTS)], held_out_share=0.0)
    single = np.bincount([int(env.reset(seed=0 if i == 0 else None)[0]) for i in range(4000)], minlength=6)
    vec = flowrl.GenerationVecEnv(env, 4000)
    vec.seed(0)
    for observed in (single, np.bincount(vec.reset(), minlength=6)):
        assert stats.chisquare(observed, 4000 * SHARES).pvalue > 1e-3


def test_gymnasium_draws_of_equal_weights_are_as_before() -> None:
    env = plain_env("equal", ["a", "b", "c"])
    rng = np.random.default_rng(5)
    vec = flowrl.GenerationVecEnv(env, 10)
    vec.seed(5)
    assert vec.reset().tolist() == rng.integers(3, size=10).tolist()
    env.reset(seed=5)
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5)))
    first = int(expected.integers(3))
    assert [int(env.reset(seed=5)[0]), int(env.reset()[0])] == [first, int(expected.integers(3))]


def test_rewards_read_fields_and_weights_shape_training(shapes: Path) -> None:
    algorithm = model(prompt_file=str(shapes))
    core = algorithm.env.core
    assert core.contexts == [entry["prompt"] for entry in SHAPES[:3]]
    assert core.describe()[-1] == "prompts: 3 to train on, 2 held out, drawn in proportion to their weights"
    assert [context.fields["count"] for context in core.contexts] == [2, 1, 3]
    groups = torch.stack([algorithm.contexts() for _ in range(300)])[:, ::2]
    np.testing.assert_allclose(np.bincount(groups.flatten()) / groups.numel(), [0.6, 0.2, 0.2], atol=0.03)
    assert torch.equal(algorithm.policy.sample(core.contexts[:1], x_0=torch.ones(1, 16, 8, 8), steps=1),
                       algorithm.policy.sample(torch.tensor([0]), x_0=torch.ones(1, 16, 8, 8), steps=1))  # fmt: skip
    assert len(algorithm.policy.contexts) == 3  # known, not encoded again


def test_every_text_to_image_reward_sees_prompts() -> None:
    assert all(isinstance(c, Prompt) for c in flowrl.make("sd3-count", flow="mini-sd3").contexts)


def test_registered_environments_take_files(shapes: Path) -> None:
    env = plain_env("from-a-file", str(shapes))
    assert (len(env.contexts), len(env.held_out)) == (3, 2)
    assert plain_env("other", ["a", "b"], prompt_file=str(shapes)).contexts == env.contexts
    env = plain_env("from-a-set", "words")
    assert env.contexts[0].fields == {"text": "GO", "surface": "neon sign"}
    env = plain_env("split", MANY, held_out_share=0.3)
    assert (tuple(env.contexts), tuple(env.held_out)) == (
        prompts_from(MANY, 0.3).train,
        prompts_from(MANY, 0.3).held_out,
    )
    assert plain_env("labels", [0, 1, 2]).contexts == [0, 1, 2]


def test_prompts_and_a_file_are_too_much(shapes: Path) -> None:
    with pytest.raises(ConfigError, match=r"--env\.prompts and --env\.prompt-file"):
        flowrl.make("sd3-count", flow="mini-sd3", prompts=("stars",), prompt_file=str(shapes))


def test_held_out_prompts_are_evaluated_as_any_others(shapes: Path) -> None:
    """The figures are those of a model that has these prompts as its own; the model is left as it was."""
    algorithm = model(prompt_file=str(shapes))
    encoded, n, state = algorithm.policy._condition, algorithm.policy.evaluations, algorithm.generator.get_state()
    held_out = flowrl.evaluate(algorithm, n_samples=8, prompts="held_out", samples_per_context=2)
    assert set(held_out.sample_contexts) == {entry["prompt"] for entry in SHAPES[3:]}
    assert (held_out.prompts, held_out.n_prompts) == ("held_out", 2)
    assert "prompts: held_out (2)" in held_out.table()
    assert math.isnan(held_out.ess)
    own = flowrl.evaluate(
        model(prompts=tuple(entry["prompt"] for entry in SHAPES[3:])), n_samples=8, samples_per_context=2
    )
    assert own.prompts == "train"
    torch.testing.assert_close(held_out.samples, own.samples)
    assert held_out.reward_mean == pytest.approx(own.reward_mean)
    assert algorithm.policy._condition is encoded
    assert algorithm.policy.evaluations == n
    assert torch.equal(algorithm.generator.get_state(), state)
    assert algorithm.env.core.contexts == [entry["prompt"] for entry in SHAPES[:3]]


def test_evaluation_weighs_and_takes_lists_and_files(shapes: Path) -> None:
    algorithm = model(prompts=("stars",))
    given = [Prompt("two stars", weight=3), "one circle on red"]
    result = flowrl.evaluate(algorithm, n_samples=8, prompts=given, samples_per_context=1, steps=1)
    assert sorted(result.sample_contexts) == ["one circle on red"] * 2 + ["two stars"] * 6
    assert (result.prompts, result.n_prompts) == ("given", 2)
    result = flowrl.evaluate(algorithm, n_samples=4, prompts=shapes, steps=1)
    assert result.n_prompts == 5
    assert result.table().splitlines()[-2].endswith("shapes.jsonl (1 of 5)")  # eight samples of a prompt, or all


def test_statistics_per_context_do_not_hinder_evaluation(shapes: Path) -> None:
    """DDPO keeps a row per context it trains on; there are more prompts here."""
    settings = {key: value for key, value in SMALL.items() if key != "ema_decay"}
    algorithm = flowrl.DDPO(
        "FlowPolicy", "sd3-count", env_settings={"flow": "mini-sd3", "prompts": ("stars",)}, seed=0, **settings
    )
    assert flowrl.evaluate(algorithm, n_samples=10, prompts=shapes, samples_per_context=2, steps=1).n_prompts == 5


def test_nothing_to_evaluate_on() -> None:
    algorithm = model(prompts=("stars",))
    with pytest.raises(ConfigError, match=r"holds no prompts out.*--env\.held-out-share"):
        flowrl.evaluate(algorithm, n_samples=4, prompts="held_out")
    with pytest.raises(ConfigError, match="the list is empty"):
        flowrl.evaluate(algorithm, n_samples=4, prompts=[])
    unconditional = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0)
    with pytest.raises(ConfigError, match="unconditional"):
        flowrl.evaluate(unconditional, n_samples=4, prompts=["stars"])
    assert "prompts" not in flowrl.evaluate(unconditional, n_samples=4).table()


def test_a_changed_prompt_file_is_noticed(shapes: Path, tmp_path: Path) -> None:
    model(prompt_file=str(shapes)).save(tmp_path / "saved")
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    assert fingerprint(again.env.core.contexts) == fingerprint(prompts_from(shapes).train)
    write(shapes, *map(json.dumps, [{**SHAPES[0], "weight": 2}, *SHAPES[1:]]))
    with pytest.raises(CheckpointError, match="other prompts than 'sd3-count' has now"):
        flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    other = flowrl.make("sd3-count", flow="mini-sd3", prompt_file=str(shapes))
    assert flowrl.ORWCFMW2.load(tmp_path / "saved", env=other, device="cpu").env.core is other


PARTS = {
    "animals": ["animal", "scene"],
    "colours": ["colour", "object"],
    "counts": ["count", "object"],
    "spatial": ["object", "relation", "reference"],
    "words": ["text", "surface"],
}


def test_the_sets_are_these_and_the_help_names_them() -> None:
    assert shipped_sets() == sorted(PARTS)
    for config in (TextToImageConfig, CustomConfig):
        assert ", ".join(shipped_sets()) in inspect.getsource(config)


@pytest.mark.parametrize("name", PARTS)
def test_shipped_sets(name: str) -> None:
    """Every part is seen in training; a fifth of the combinations is not."""
    read = prompts_from(name)
    everything = (*read.train, *read.held_out)
    assert 40 <= len(everything) <= 120
    assert 0.17 <= len(read.held_out) / len(everything) <= 0.23
    assert all(list(prompt.fields) == PARTS[name] for prompt in everything)
    combinations = [tuple(prompt.fields.values()) for prompt in everything]
    assert len(set(combinations)) == len(everything)
    for part in PARTS[name]:
        assert {p.fields[part] for p in read.train} == {p.fields[part] for p in everything}


NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@pytest.mark.parametrize("name", PARTS)
def test_fields_say_what_the_prompt_says(name: str) -> None:
    for prompt in (*prompts_from(name).train, *prompts_from(name).held_out):
        for value in prompt.fields.values():
            assert (NUMBER_WORDS[value] if isinstance(value, int) else value) in prompt
    spatial = {tuple(p.fields.values()) for p in prompts_from("spatial").train + prompts_from("spatial").held_out}
    assert not {(b, relation, a) for a, relation, b in spatial} & spatial  # a turned pair would give away an answer


def test_the_script_gives_the_shipped_sets() -> None:
    script = runpy.run_path(str(REPOSITORY / "pretrain" / "prompt_sets.py"))
    for name, make in script["SETS"].items():
        assert (module.SETS / f"{name}.jsonl").read_text() == script["lines"](make())


def test_the_sets_are_packaged() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["flowrl.envs"]
    for path in (REPOSITORY / "envs").rglob("*"):
        inside = str(path.relative_to(REPOSITORY / "envs"))
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), inside


Run = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = [
    "--algo.n-samples", 8, "--algo.group-size", 2, "--algo.batch-size", 8, "--algo.rollout-steps", 2,
    "--algo.n-epochs", 1, "--eval-samples", 4,
]  # fmt: skip
CHOICE = ["--algo", "orw_w2", "--env", "sd3-count", "--env.flow", "mini-sd3"]


def test_dry_run_says_which_prompts(run_here: Run, shapes: Path, tmp_path: Path) -> None:
    done = run_here("flowrl.run", *CHOICE, "--env.prompt-file", "shapes.jsonl", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "prompts: 3 to train on, 2 held out, drawn in proportion to their weights" in done.stdout
    assert list(tmp_path.iterdir()) == [shapes]


def test_a_run_on_a_file_and_its_evaluation_on_held_out_prompts(run_here: Run, shapes: Path, tmp_path: Path) -> None:
    arguments = [*CHOICE, "--env.prompt-file", "shapes.jsonl", *TINY, "--total-timesteps", 16, "--name", "r"]
    done = run_here("flowrl.run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "prompts: train (1 of 3)" in done.stdout
    folder = tmp_path / "runs" / "r"
    settings = json.loads((folder / "config.json").read_text())["environment"]["settings"]
    assert settings == {"flow": "mini-sd3", "prompt_file": str(shapes)}
    before = (folder / "evaluation.json").read_text()
    done = run_here("flowrl.evaluate", "runs/r", "--prompts", "held_out", "--n-samples", 4)
    assert done.returncode == 0, done.stderr
    assert "prompts: held_out (1 of 2)" in done.stdout
    assert "report-held_out.html" in done.stdout
    result = json.loads((folder / "evaluation-held_out.json").read_text())
    assert (result["prompts"], result["n_prompts"]) == ("held_out", 2)
    assert "prompts: held_out (1 of 2)" in (folder / "report-held_out.html").read_text()
    assert (folder / "evaluation.json").read_text() == before


def test_evaluations_of_files_of_the_same_name_stand_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one of the same file, of whatever folder it is named from, takes the place of the one before."""
    env = flowrl.make("sd3-compress", flow="mini-sd3", prompts=("stars", "circles"))
    sizes = {"n_samples": 2, "group_size": 2, "batch_size": 2, "rollout_steps": 1}
    flowrl.ORWCFMW2("FlowPolicy", env, seed=0, **sizes).save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name, prompt in (("a", "red stars"), ("b", "blue stars")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.txt").write_text(prompt)
    for place in ("a/p.txt", "b/p.txt", str(tmp_path / "a" / "p.txt")):
        assert evaluate_main(["run", "--prompts", place, "--n-samples", "2"]) == 0
    assert "evaluation-p-txt-2.json" in capsys.readouterr().out
    of = {path.name: json.loads(path.read_text())["prompts"] for path in sorted(Path("run").glob("evaluation-*.json"))}
    assert of == {
        "evaluation-p-txt-2.json": str(tmp_path / "b" / "p.txt"),
        "evaluation-p-txt.json": str(tmp_path / "a" / "p.txt"),
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--env.prompt-file", "animal"], ["no prompt set 'animal'", "'animals'"]),
        (["--env.prompt-file", "words", "--env.prompts", "stars"], ["--env.prompts and --env.prompt-file"]),
        (["--env.prompt-file", "words", "--env.held-out-share", 0.2], ["says itself"]),
        (["--env.prompt-file", "bad.txt"], ["bad.txt', line 2", "is in line 1 already"]),
    ],
)
def test_mistakes(
    arguments: list,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.txt", "stars", "stars")
    assert main([str(argument) for argument in (*CHOICE, *arguments, "--dry-run")]) == 2
    message = capsys.readouterr().err
    for text in expected:
        assert text in message
