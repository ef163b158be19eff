"""Rewards in a thread while the next samples are drawn: the same run to the last bit, and the same errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import flowrl
from flowrl.envs.rewards.catalogue import make_reward
from flowrl.envs.rewards.mixture import make_mixture
from flowrl.errors import ConfigError, RewardError
from flowrl.runs.plan import head_of
from flowrl.training.rollout import overlaps, roll_outs
from flowrl.types import RewardOutput

SETTINGS: dict[str, Any] = {"n_samples": 24, "rollout_batch_size": 6, "batch_size": 12, "n_epochs": 1}


def make(cls: type = flowrl.ORWCFMW2, **settings: Any) -> flowrl.FlowAlgorithm:
    return cls("FlowPolicy", "gaussians-linear", device="cpu", seed=0, **{**SETTINGS, "group_size": 2, **settings})


def weights(model: flowrl.FlowAlgorithm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters_of("current").values()])


def test_rewards_are_computed_while_the_next_are_drawn_in_order() -> None:
    log: list[str] = []
    drawing = threading.Event()

    def draw(ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        i = int(ids[0])
        log.append(f"draw {i}")
        if i > 0:
            drawing.set()
        return ids[:, None].float(), {}

    def reward(samples: torch.Tensor, ids: torch.Tensor) -> tuple[RewardOutput, torch.Tensor]:
        if int(ids[0]) == 0:
            assert drawing.wait(20), "the second chunk is drawn before the first has its rewards"
        log.append(f"reward {int(ids[0])}")
        assert threading.current_thread() is not threading.main_thread()
        return RewardOutput(samples[:, 0]), torch.arange(len(ids))

    chunks = [torch.tensor([i, i]) for i in range(4)]
    found = []
    for done in roll_outs(chunks, draw, lambda x: x, reward, overlap=True):
        found.append(int(done.output.reward[0]))
        log.append(f"done {found[-1]}")
    assert found == [0, 1, 2, 3]
    for kind in ("draw", "reward", "done"):
        assert [line for line in log if line.startswith(kind)] == [f"{kind} {i}" for i in range(4)]
    assert log.index("draw 2") > log.index("done 0"), "no more than one chunk ahead"


@pytest.mark.parametrize("name", ["orw_w2", "ddpo", "nft", "kl", "dgpo", "flow_dpo", "rwr", "tilt"])
def test_the_run_is_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    cls = flowrl.algorithm_class(name)
    own = {"divergence": "hutchinson", "rollout_steps": 4} if name == "kl" else {}  # signs are of a sample's place
    plain, ahead = (make(cls, overlap_rewards=o, **own).learn(2 * 24) for o in ("off", "on"))
    assert not overlaps(plain)
    assert overlaps(ahead)
    assert torch.equal(weights(plain), weights(ahead))
    assert torch.equal(plain.buffer.reward, ahead.buffer.reward)
    ahead.save(tmp_path / "saved")
    resumed = cls.load(tmp_path / "saved", device="cpu").learn(24, reset_num_timesteps=False)
    assert torch.equal(weights(resumed), weights(plain.learn(24, reset_num_timesteps=False)))


class Faulty:
    """A reward that fails once for its third batch, or always for one sample."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self, samples: torch.Tensor, contexts: Any) -> torch.Tensor:
        self.calls += 1
        reward = samples[:, 0].clone()
        if self.kind == "once" and self.calls == 3:
            raise RuntimeError("away for a moment")
        if self.kind == "some":
            reward[samples[:, 0] > 1.2] = torch.nan
        return reward


@pytest.mark.parametrize(("on_error", "kind"), [("raise", "once"), ("retry", "once"), ("drop", "some")])
def test_failures_are_met_as_without(on_error: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowrl.training import reward_calls

    monkeypatch.setattr(reward_calls, "FIRST_PAUSE", 0.01)
    outcomes, left_out = [], {"max_dropped": 0.9} if on_error == "drop" else {}
    for overlap in ("off", "on"):
        model = make(overlap_rewards=overlap, on_reward_error=on_error, **left_out)
        faulty = Faulty(kind)
        model.env.core.reward = lambda x, c, faulty=faulty: RewardOutput(faulty(x, c))  # type: ignore[method-assign]
        if on_error == "raise":
            with pytest.raises(RewardError, match="away for a moment"):
                model.learn(24)
            outcomes.append((model.num_timesteps, faulty.calls))
            assert not [t for t in threading.enumerate() if t.name.startswith("rewards")], "no thread is left"
        else:
            model.learn(24)
            assert model.n_dropped > 0 or on_error == "retry"
            outcomes.append((model.n_dropped, faulty.calls, weights(model).tolist()))
    assert outcomes[0] == outcomes[1]


class Looks(flowrl.ORWCFMW2):
    """Draws by what was rewarded before."""

    def draw(self, context_ids: torch.Tensor) -> Any:
        assert self.buffer.size % 6 == 0
        return super().draw(context_ids)


def test_it_is_done_only_where_it_is_right(tmp_path: Path) -> None:
    assert not overlaps(make()), "it has to be asked for"
    assert not overlaps(make(overlap_rewards="auto")), "on the CPU by name"
    assert not overlaps(make(overlap_rewards="on", rollout_batch_size=0)), "one chunk"
    asked = make(Looks, overlap_rewards="on")
    assert not overlaps(asked), "a draw of one's own, which does not say that it can"
    assert "rewards: not while samples are drawn" in head_of(asked, tmp_path, 24)
    assert "rewards: in a thread, while the next 6" in head_of(make(overlap_rewards="on"), tmp_path, 24)
    model = make(overlap_rewards="auto")
    model.device = torch.device("cuda")
    assert not overlaps(model), "a reward that computes where samples are"
    model.env.core.reward_function = make_reward("compress")  # type: ignore[attr-defined]
    assert overlaps(model)
    model.policy.graphs.is_on = True
    assert not overlaps(model), "what the thread asks of the device would end in the graph that is captured"
    with pytest.raises(ConfigError, match="overlap_rewards must be one of auto, on, off"):
        make(overlap_rewards="yes")


def test_rewards_say_where_they_compute() -> None:
    def on_host(text: str) -> bool:
        return bool(getattr(make_mixture(text), "on_host", False))

    assert on_host("compress")
    assert on_host("compress:1+count:2")
    assert on_host("winrate(incompress)")
    assert not on_host("compress:1+colourfulness:2")
    assert not on_host("colourfulness")


def test_a_stop_leaves_no_reward_behind() -> None:
    asked: list[int] = []

    def reward(samples: torch.Tensor, ids: torch.Tensor) -> tuple[RewardOutput, torch.Tensor]:
        time.sleep(0.01)
        asked.append(int(ids[0]))
        return RewardOutput(samples[:, 0]), torch.arange(len(ids))

    chunks = [torch.tensor([i]) for i in range(5)]
    for done in roll_outs(chunks, lambda ids: (ids[:, None].float(), {}), lambda x: x, reward, overlap=True):
        if int(done.context_ids[0]) == 1:
            break
    assert asked == [0, 1], "as without a thread: nothing beyond the stop is rewarded"
