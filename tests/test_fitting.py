"""Settings chosen by the memory that is free: the search on a made-up plan, and whole runs on a made-up device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_pipelines
import torch

import flowrl
from flowrl.errors import ConfigError, OutOfMemoryError
from flowrl.runs.commandline import given_settings
from flowrl.runs.plan import dry_run, head_of
from flowrl.training import fitting
from flowrl.training.construction import without_given
from flowrl.training.fitting import SHARE, fit
from flowrl.training.memory_plan import MemoryPlan, predict_memory, ways_to_save

CLS = flowrl.ORWCFMW2
ALL = ("gradient_checkpointing", "batch_size", "rollout_batch_size", "decode_batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipelines.sd3(tmp_path_factory.mktemp("fitting") / "sd3")


def environment(folder: Path, **settings: Any) -> flowrl.GenerationEnv:
    return flowrl.make("sd3-compress", flow=str(folder), prompts=tuple(small_pipelines.PROMPTS), **settings)


def unloaded(folder: Path, **settings: Any) -> flowrl.GenerationEnv:
    """An environment for made-up plans, whose flow has nothing but what they ask for."""
    env = environment(folder, **settings)
    n = settings.get("decode_batch", 64)
    env.flow = replace(env.flow, load=lambda *dtypes: SimpleNamespace(decode_batch=n))
    return env


def made_up(cls: type, config: flowrl.FlowConfig, env: flowrl.GenerationEnv) -> MemoryPlan:
    """1000 bytes of weights, 500 of working copies, and activations as large as what is done at once."""
    copies = 500 if config.working_copies == "on" else 0
    decoded = env.flow.load().decode_batch
    phases = {
        "loading, encoding prompts": 10**9,  # on the host
        "drawing samples": 1000 + copies + 10 * config.rollout_batch_size,
        "decoding samples": 1000 + copies + 5 * config.rollout_batch_size + 40 * decoded,
        "training": 1000 + copies + (20 if config.gradient_checkpointing else 100) * config.batch_size,
    }
    return MemoryPlan({"copies to compute with": copies}, phases, 0)


def chosen(env: flowrl.GenerationEnv, needed: int, n_ranks: int = 1, **settings: Any) -> tuple[Any, ...]:
    config = CLS.configure(recommended=env.recommended, settings=settings)
    found = fit(CLS, config, env, int(needed / SHARE) + 1, n_ranks)
    assert found.config.fit_memory == ()
    assert replace(found.config, **{n: getattr(config, n) for n in CHANGED}) == config, "nothing else is changed"
    return (*(getattr(found.config, name) for name in CHANGED[:5]), found.env.flow.load().decode_batch)


CHANGED = (*ALL[:3], "accumulation", "working_copies", "fit_memory")


@pytest.mark.parametrize(
    ("needed", "expected"),
    [  # checkpointing, minibatch, drawn at once, minibatches a step, copies, decoded at once
        (2300, (False, 8, 8, 1, "on", 8)),
        (2299, (True, 8, 8, 1, "on", 8)),
        (1860, (True, 8, 8, 1, "on", 8)),
        (1859, (True, 8, 8, 1, "on", 4)),
        (1650, (True, 4, 8, 2, "on", 2)),  # 1000 + 500 + 8 * 10 drawn, + 8 * 5 + 2 * 40 decoded, + 4 * 20 trained
        (1520, (True, 8, 8, 1, "off", 8)),  # 1545 with copies, all else as small as can be
        (1160, (True, 8, 8, 1, "off", 2)),
    ],
)
def test_the_largest_settings_that_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, needed: int, expected: tuple[Any, ...]
) -> None:
    monkeypatch.setattr(fitting, "predict_memory", made_up)
    assert chosen(unloaded(folder), needed) == expected


def test_what_is_given_is_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "predict_memory", made_up)
    env = unloaded(folder)
    assert chosen(env, 1600, batch_size=4) == (True, 4, 8, 1, "on", 1)
    assert chosen(env, 1860, gradient_checkpointing=False)[:2] == (False, 2)
    assert chosen(env, 10**6, gradient_checkpointing=True)[0] is True
    assert chosen(env, 1580, accumulation=1, batch_size=8)[1] == 8
    assert chosen(unloaded(folder, decode_batch=16), 10**6)[5] == 16
    assert chosen(env, 1200, working_copies="on", rollout_batch_size=4, fit_memory=())[4] == "on"  # tried all the same
    assert chosen(env, 1200, fit_memory=()) == (True, 8, 8, 1, "off", 64)


def test_every_rank_has_its_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "predict_memory", made_up)
    assert chosen(unloaded(folder), 1900, n_ranks=2)[:2] == (False, 8)  # 4 of the 8 on each
    assert chosen(unloaded(folder), 1545, n_ranks=2)[1:3] == (4, 2)  # no fewer than a sample each


def test_where_nothing_fits_the_error_says_what_was_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "predict_memory", made_up)
    with pytest.raises(OutOfMemoryError) as caught:
        chosen(unloaded(folder), 900, batch_size=4)
    text = str(caught.value)
    for part in (
        "85 % are to be filled",
        "gradient checkpointing, 1 samples drawn at once, 1 decoded at once, working copies off",
        "drawing samples needs 0.00 GiB, 0.00 too much, decoding samples needs",
        "training needs",
        "Left as given: batch_size.",
        "--algo.fit-memory (and no names behind it)",
        "--algo.batch-size 2 --algo.accumulation 2",
        "a smaller --env.resolution",
    ):
        assert part in text, (part, text)
    assert "--algo.working-copies" not in text  # they are left out already


def test_a_plan_that_cannot_be_made_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = unloaded(folder)
    config = CLS.configure(recommended=env.recommended)

    def broken(*args: Any) -> MemoryPlan:
        raise RuntimeError("no rule for this operation")

    monkeypatch.setattr(fitting, "predict_memory", broken)
    found = fit(CLS, config, env, 1)
    assert found.config == replace(config, fit_memory=(), working_copies="on")
    assert "could not be predicted (RuntimeError: no rule for this operation)" in found.lines[0]
    monkeypatch.setattr(fitting, "predict_memory", lambda *args: replace(made_up(*args), missing="adaptive"))
    assert "(adaptive)" in fit(CLS, config, env, 1).lines[0]


def test_settings_of_the_command_line_are_given() -> None:
    args = ["--algo", "orw_w2", "--algo.batch-size", "8", "--algo.no-gradient-checkpointing", "--env.decode_batch=64"]
    assert {"batch_size", "gradient_checkpointing", "decode_batch"} <= given_settings(args)
    config = CLS.Config(fit_memory=ALL)
    assert without_given(config, given_settings(args)).fit_memory == ("rollout_batch_size",)
    assert without_given(config, {"accumulation"}).fit_memory == (ALL[0], *ALL[2:])
    with pytest.raises(ConfigError, match=r"fit_memory knows gradient_checkpointing, .*, not 'n_samples'"):
        CLS.Config(fit_memory=("n_samples",))


def test_on_the_cpu_nothing_is_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fitting, "predict_memory", None)
    env = environment(folder, resolution=16)
    model = CLS("FlowPolicy", env, device="cpu", seed=0)
    values = (True, 8, 8, ALL, "auto")
    names = (*ALL[:3], "fit_memory", "working_copies")
    assert tuple(getattr(model.config, name) for name in names) == values
    assert model.policy.model.decode_batch == 64
    assert model.env.core is env
    assert "memory: settings as they are; on cpu none are chosen" in head_of(model, tmp_path, 512)


SETTINGS = {
    "n_samples": 4,
    "rollout_batch_size": 4,
    "batch_size": 4,
    "group_size": 2,
    "rollout_steps": 2,
    "n_epochs": 1,
    "lora_rank": 4,
    "ema_decay": 0.0,
}


def test_a_run_keeps_what_was_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = environment(folder, resolution=16)
    config = CLS.configure(recommended={**env.recommended, **SETTINGS})
    plans: dict[bool, MemoryPlan] = {}

    def predicted(cls: Any, config: flowrl.FlowConfig, env: flowrl.GenerationEnv) -> MemoryPlan:
        if config.gradient_checkpointing not in plans:
            plans[config.gradient_checkpointing] = predict_memory(cls, config, env)
        return plans[config.gradient_checkpointing]

    plain = predicted(CLS, replace(config, gradient_checkpointing=False), env)
    free = int((plain.phases["training"] - 1) / SHARE)
    monkeypatch.setattr(fitting, "predict_memory", predicted)
    monkeypatch.setattr(fitting, "free_memory", lambda device: free)
    model = CLS("FlowPolicy", env, config=config, device="cpu", seed=0)
    said = head_of(model, tmp_path, 4)
    assert (
        "chosen by that: gradient checkpointing, minibatches of 4, 1 of them a gradient step, 4 samples drawn at once, "
        "4 decoded at once, working copies on" in said
    )
    assert said.splitlines()[-4] in dry_run(tmp_path, CLS, config, env, 4), "a dry run decides the same"
    assert (model.config.gradient_checkpointing, model.config.fit_memory) == (True, ())
    assert model.policy.model.decode_batch == 4
    model.learn(4).save(tmp_path / "saved")
    monkeypatch.setattr(fitting, "free_memory", lambda device: 10**12)
    monkeypatch.setattr(fitting, "predict_memory", None)  # not asked again
    again = CLS.load(tmp_path / "saved", device="cpu")
    assert again.config == model.config
    assert again.env.core.origin is not None
    assert again.env.core.origin[1]["decode_batch"] == again.policy.model.decode_batch == 4


def test_working_copies_are_a_way_to_save() -> None:
    low = CLS.Config(precision="bfloat16")
    assert "--algo.working-copies off" in ways_to_save(low)
    assert "--algo.working-copies off" not in ways_to_save(replace(low, working_copies="off"))
    assert "--algo.working-copies off" not in ways_to_save(CLS.Config())


def test_working_copies_that_do_not_fit_by_themselves_cost_one_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def heavy(cls: type, config: flowrl.FlowConfig, env: flowrl.GenerationEnv) -> MemoryPlan:
        tried.append(config.working_copies)
        plan = made_up(cls, config, env)
        return replace(plan, parts={**plan.parts, "frozen weights": 1000})

    monkeypatch.setattr(fitting, "predict_memory", heavy)
    assert chosen(unloaded(folder), 1490)[4] == "off"
    assert tried == ["on", "off", "off"]  # the last two: without gradient checkpointing and with it


def test_small_networks_are_not_planned_for_their_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fitting, "predict_memory", None)
    monkeypatch.setattr(fitting, "free_memory", lambda device: 24 * 2**30)
    model = CLS("FlowPolicy", "gaussians-linear", device="cpu", lora_rank=2)
    assert model.config.working_copies == "auto"
    assert "memory" not in head_of(model, tmp_path, 512)
    monkeypatch.setattr(fitting, "free_memory", lambda device: 2**20)
    model = CLS("FlowPolicy", "gaussians-linear", device="cpu", lora_rank=2)  # a plan is tried, and cannot be made here
    assert "working copies on; what they need could not be predicted" in head_of(model, tmp_path, 512)


def test_the_command_line_chooses_what_it_was_not_given(folder: Path) -> None:
    from flowrl.registry import environment_spec
    from flowrl.runs.commandline import second_pass

    def chosen_by(*more: str) -> tuple[str, ...]:
        args = ["--algo", "orw_w2", "--env", "sd3-compress", "--env.flow", str(folder), *more]
        config = second_pass(args, CLS, environment_spec("sd3-compress"), None)[1]
        assert config is not None
        assert (config.batch_size, config.rollout_batch_size) == (8, 8)
        return config.fit_memory

    assert chosen_by() == ALL
    assert chosen_by("--algo.batch-size", "8", "--env.decode-batch=64") == (ALL[0], ALL[2])  # as recommended, but given
    assert chosen_by("--algo.no-gradient-checkpointing") == ALL[1:]
    assert chosen_by("--algo.fit-memory") == ()
    assert chosen_by("--algo.fit-memory", "batch_size") == ("batch_size",)


def test_ranks_with_other_free_memory_decide_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose memory is empty waits for the one whose is full, and takes its decision."""
    free = [24 * 2**30, 2**20]
    said = []
    for rank in (0, 1):
        monkeypatch.setattr(fitting, "free_memory", lambda device, rank=rank: free[rank])
        ranks = SimpleNamespace(device=None, is_sharded=False, world_size=2)
        ranks.all_gather = lambda rows, n, rank=rank: torch.tensor(free) if rows.tolist() == [free[rank]] else rows
        config = CLS.configure(settings={"lora_rank": 2})
        said.append(fitting.fitted(CLS, config, flowrl.make("gaussians-linear"), "cpu", ranks))
    assert said[0].config == said[1].config
    assert said[0].lines == said[1].lines != ()
