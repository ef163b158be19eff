"""Rewards that fail: the run stops, asks again or leaves samples out, and never makes a score up."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import flowrl
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError, RewardError
from flowrl.training import reward_calls
from flowrl.training.reward_calls import RewardCalls, stand_ins
from flowrl.types import Contexts, RewardOutput


class Judge:
    """A reward, the first coordinate, that fails as it is told to."""

    def __init__(self, fail: Callable[[Judge, torch.Tensor], Any] | None = None) -> None:
        self.fail, self.calls = fail, 0

    def __call__(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        self.calls += 1
        if self.fail is not None:
            answer = self.fail(self, samples)
            if answer is not None:
                return RewardOutput(answer)
        return RewardOutput(samples[:, 0], {"second": samples[:, 1]})


def environment(judge: Judge) -> GenerationEnv:
    env = flowrl.make("gaussians-linear")
    env.reward = judge  # type: ignore[method-assign]
    return env


def broken_beyond(judge: Judge, samples: torch.Tensor) -> None:
    """Fails for batches with a first coordinate above 2."""
    if bool((samples[:, 0] > 2).any()):
        raise ValueError("too far right")


def not_a_number_beyond(judge: Judge, samples: torch.Tensor) -> torch.Tensor:
    return torch.where(samples[:, 0] > 2, torch.nan, samples[:, 0])


def first_two(judge: Judge, samples: torch.Tensor) -> None:
    if judge.calls <= 2:
        raise ConnectionError("busy")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    samples = torch.tensor([[0.0, 1], [3, 1], [1, 2], [5, 5], [-1, 0]])
    return samples, torch.zeros(5, dtype=torch.long)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(reward_calls.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("fail", [broken_beyond, not_a_number_beyond])
def test_samples_that_a_reward_fails_for_are_found(fail: Callable[..., Any]) -> None:
    calls = RewardCalls(environment(Judge(fail)), "drop")
    output, kept = calls(*batch())
    assert kept.tolist() == [0, 2, 4]
    assert output.reward.tolist() == [0, 1, -1]
    if fail is broken_beyond:
        assert output.components["second"].tolist() == [1, 2, 0]
    assert calls.errors > 0
    assert "gaussians-linear" in str(calls.last_error)


class Varying(Judge):
    """A component more for batches that go far right, and one more for the others."""

    def __call__(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        output = super().__call__(samples, contexts)
        name = "far" if bool((samples[:, 0] > 2).any()) else "near"
        return RewardOutput(output.reward, {name: samples[:, 0], **output.components})


def test_components_that_not_every_call_gives() -> None:
    """Those that all give are kept: the others ended in a KeyError."""
    env = environment(Varying(lambda judge, samples: broken_beyond(judge, samples - 2)))
    output, kept = RewardCalls(env, "drop")(*batch())
    assert kept.tolist() == [0, 1, 2, 4]
    assert list(output.components) == ["second"]
    model = flowrl.ORWCFMW2("FlowPolicy", environment(Varying()), n_samples=16, batch_size=16, seed=0, device="cpu")
    result = flowrl.evaluate(model.learn(16), n_samples=12, batch_size=1, samples_per_context=1)
    assert list(result.components) == ["second"]
    one_sided = dataclasses.replace(result, components={**result.components, "far": 1.0})
    assert "far" not in one_sided.table()
    assert result.reference is not None
    numbered: Any = {1: 0.5}  # names that are no text ended a run, after its training, in a TypeError
    before = dataclasses.replace(result.reference, components=numbered)
    told = dataclasses.replace(result, components=numbered, reference=before).table()
    assert "1                        0.5         0.5" in told


def test_a_reward_that_fails_for_all_is_an_error() -> None:
    def fail(judge: Judge, samples: torch.Tensor) -> None:
        raise ValueError("out of order")

    with pytest.raises(RewardError, match=r"all 5 samples .*--algo\.rollout-batch-size.* out of order"):
        RewardCalls(environment(Judge(fail)), "drop")(*batch())
    with pytest.raises(RewardError, match=r"ValueError: out of order.* the first None"):
        environment(Judge(fail)).evaluate(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_a_good_reward_is_asked_once() -> None:
    judge = Judge()
    output, kept = RewardCalls(environment(judge), "drop")(*batch())
    assert (judge.calls, kept.tolist(), output.reward.tolist()) == (1, [0, 1, 2, 3, 4], [0, 3, 1, 5, -1])


def test_asking_again(pauses: list[float]) -> None:
    judge = Judge(first_two)
    output, kept = RewardCalls(environment(judge), "retry", retries=3)(*batch())
    assert (judge.calls, len(kept), output.reward.tolist()) == (3, 5, [0, 3, 1, 5, -1])
    assert pauses == [1, 2]


def test_asking_again_ends(pauses: list[float]) -> None:
    judge = Judge(first_two)
    with pytest.raises(RewardError, match="busy"):
        RewardCalls(environment(judge), "retry", retries=1)(*batch())
    assert judge.calls == 2


def test_by_default_nothing_is_asked_twice() -> None:
    judge = Judge(first_two)
    with pytest.raises(RewardError, match="busy"):
        RewardCalls(environment(judge))(*batch())
    assert judge.calls == 1


def test_a_reward_that_hangs() -> None:
    def hang(judge: Judge, samples: torch.Tensor) -> None:
        time.sleep(5)

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer for 5 samples in 0\.1 seconds"):
        RewardCalls(environment(Judge(hang)), timeout=0.1)(*batch())
    assert time.monotonic() - start < 4


def test_in_time_errors_and_answers_are_passed_on() -> None:
    assert RewardCalls(environment(Judge()), timeout=30)(*batch())[0].reward.tolist() == [0, 3, 1, 5, -1]
    with pytest.raises(RewardError, match="too far right"):
        RewardCalls(environment(Judge(broken_beyond)), timeout=30)(*batch())


def test_running_statistics_are_put_back_where_a_reward_fails() -> None:
    class Counting(Judge):
        state = torch.zeros(1)

        def __call__(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
            self.state += len(samples)  # before it fails
            return super().__call__(samples, contexts)

    judge = Counting(broken_beyond)
    env = environment(judge)
    env.extra_state = lambda: {"seen": judge.state}  # type: ignore[method-assign]
    RewardCalls(env, "drop")(*batch())
    assert judge.state.item() == 3


def test_who_stands_in() -> None:
    contexts = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    kept = torch.tensor([0, 2, 3])
    index = stand_ins(contexts, kept)
    assert index[[0, 2, 3]].tolist() == [0, 2, 3]
    assert index[1].item() in (0, 2)
    assert index[4].item() == 3
    assert set(index[5:].tolist()) <= {0, 2, 3}


@pytest.mark.parametrize("algo", ["orw_w2", "flow_grpo"])
def test_training_leaves_samples_out_and_counts_them(algo: str) -> None:
    judge = Judge(broken_beyond)
    settings: dict[str, Any] = {"n_samples": 64, "rollout_batch_size": 32, "batch_size": 32, "group_size": 8}
    model = flowrl.registry.ALGORITHMS[algo](
        "FlowPolicy", environment(judge), seed=0, on_reward_error="drop", max_dropped=0.9, **settings
    )
    model.learn(64)
    assert model.buffer.full
    assert model.buffer.x_1[:, 0].max() <= 2  # no failed sample is trained on
    torch.testing.assert_close(model.buffer.x_1[:, 0], model.buffer.reward)  # each reward is its own sample's
    assert 0 < model.n_dropped < 64
    assert model.last_logged["rollout/dropped"] == model.n_dropped
    if algo == "flow_grpo":
        last, times = model.buffer.rows["states"][:, -1], model.policy.times()[-2:]
        v = model.policy.networks.copies["reference"](last, times[0].expand(len(last)))  # the network that drew them
        torch.testing.assert_close(last + times.diff() * v, model.buffer.x_1)  # each path ends at its own sample


def test_callbacks_are_told_the_contexts_of_what_stands_in() -> None:
    """Where all samples of a prompt fail those of another stand in, which judges must not take for the first's."""
    env = flowrl.make("sd3-compress", flow="mini-sd3", prompts=("a", "b"), resolution=32)

    def only_b(samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        return RewardOutput(torch.tensor([math.nan if context == "a" else 1.0 for context in contexts]))

    class Told(BaseCallback):
        def _on_step(self) -> bool:
            found.append(self.locals["contexts"].clone())
            return True

    env.reward, found = only_b, []  # type: ignore[method-assign]
    settings: dict[str, Any] = {"n_samples": 8, "group_size": 4, "batch_size": 8, "rollout_steps": 1, "ema_decay": 0.0}
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, on_reward_error="drop", max_dropped=0.9, **settings)
    model.learn(8, Told())
    assert torch.cat(found).tolist() == model.buffer.context_ids.tolist() == [1] * 8


def test_too_many_failures_stop_the_run() -> None:
    model = flowrl.ORWCFMW2(
        "FlowPolicy", environment(Judge(broken_beyond)), seed=0, on_reward_error="drop", max_dropped=0.01, n_samples=64
    )
    with pytest.raises(RewardError, match=r"failed for \d+ of 64 samples .* max_dropped = 0\.01 .* too far right"):
        model.learn(64)


def test_reference_samples_left_out_of_the_pool_count() -> None:
    settings: dict[str, Any] = {"n_samples": 64, "batch_size": 32, "pool": 128, "pool_group": 16}
    env = environment(Judge(broken_beyond))
    model = flowrl.Tilt("FlowPolicy", env, seed=0, on_reward_error="drop", max_dropped=0.9, **settings)
    model.pool.hold(model, torch.arange(len(env.contexts)))
    assert model.pool.x_1[..., 0].max() <= 2
    assert 0 < model.n_dropped < 128
    few = flowrl.Tilt("FlowPolicy", env, seed=0, on_reward_error="drop", max_dropped=0.01, **settings)
    with pytest.raises(RewardError, match=r"failed for \d+ of 128 samples .* max_dropped = 0\.01"):
        few.learn(64)


def test_running_statistics_are_not_left_to_a_reward_that_hangs() -> None:
    env = environment(Judge())
    env.extra_state = lambda: {"seen": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="reward_timeout to 0"):
        flowrl.ORWCFMW2("FlowPolicy", env, n_samples=64, reward_timeout=1.0)


def test_compared_samples_cannot_be_left_out() -> None:
    env = environment(Judge())
    env.groupwise = True
    with pytest.raises(ConfigError, match="cannot tell which"):
        flowrl.ORWCFMW2("FlowPolicy", env, n_samples=64, group_size=8, on_reward_error="drop")
