"""Gradients that are not finite are left out and counted; many in a row stop the run, with what to look at."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError, NonFiniteError
from flowrl.registry import ALGORITHMS
from flowrl.training.optimizers import step_unless

pytestmark = pytest.mark.on_device


class Sometimes(flowrl.ORWCFMW2):
    """Loses its mind in the gradient steps named by `bad`."""

    bad: frozenset[int] = frozenset()

    def loss(self, batch: Any) -> Any:
        loss, metrics = super().loss(batch)
        return (loss * torch.nan if self._n_updates in self.bad else loss), metrics


def model(bad: set[int], **settings: Any) -> Sometimes:
    made = Sometimes("FlowPolicy", "gaussians-linear", seed=0, n_samples=64, batch_size=16, **settings)
    made.bad = frozenset(bad)
    return made


def weights(made: flowrl.FlowAlgorithm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.policy.parameters_of("current").values()])


def test_bad_gradients_are_left_out_and_counted() -> None:
    trained = model({1, 2})
    with pytest.warns(UserWarning, match="2 gradient steps were left out"):
        trained.learn(64)
    assert weights(trained).isfinite().all()
    assert trained.bad_updates.total == 2
    trained.learn(64, reset_num_timesteps=False)
    assert trained.bad_updates.total == 2
    assert trained.last_logged["train/bad_updates"] == 2


def test_a_resumed_run_knows_of_them(tmp_path: Path) -> None:
    trained = model({2, 3})
    with pytest.warns(UserWarning, match="2 gradient steps"):
        trained.learn(64)
    trained.save(tmp_path / "a")
    loaded = Sometimes.load(tmp_path / "a", device=DEVICE)
    assert (loaded.bad_updates.total, loaded.bad_updates.in_a_row) == (2, 2)


def test_a_step_that_is_left_out_leaves_everything_as_it_was() -> None:
    trained = model({0, 1, 2, 3}, ema_decay=0.5)
    before, ema = weights(trained), [p.clone() for p in trained.policy.parameters_of("ema").values()]
    with pytest.warns(UserWarning, match="4 gradient steps"):
        trained.learn(64)
    assert torch.equal(weights(trained), before)
    assert all(torch.equal(a, b) for a, b in zip(ema, trained.policy.parameters_of("ema").values()))
    for state in trained.policy.optimizer.state.values():
        assert state["step"].item() == 0
        assert not state["exp_avg"].any()


def test_many_in_a_row_stop_the_run_with_a_diagnosis() -> None:
    trained = model(set(range(6, 100)), max_bad_updates=7)
    with pytest.warns(UserWarning, match="were left out"), pytest.raises(NonFiniteError) as caught:
        trained.learn(64 * 10)
    text = str(caught.value)
    assert trained._n_updates == 16  # two good, then 2 + 4 + 4 bad, when the third iteration's end is looked at
    for fact in ("last 10 gradient steps", "loss of a minibatch nan", "tau 0.5", "effective sample share", "first '"):
        assert fact in text
    assert weights(trained).isfinite().all()


def test_now_and_then_does_not_stop_it() -> None:
    trained = model({n for n in range(100) if n % 4 != 3}, max_bad_updates=4)  # three of four
    with pytest.warns(UserWarning, match="3 gradient steps"):
        trained.learn(64 * 4)
    assert trained.bad_updates.total == 12


@pytest.mark.parametrize("fused", [True, False])
def test_both_kinds_of_optimizers(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    parameter.grad = torch.full((3,), torch.nan)
    step_unless(torch.tensor(1.0), optimizer)
    assert parameter.tolist() == [1, 1, 1]
    parameter.grad = torch.ones(3)
    step_unless(torch.tensor(0.0), optimizer)
    assert (parameter < 1).all()


def test_a_critic_is_not_poisoned() -> None:
    trained = flowrl.DPOK("FlowPolicy", "gaussians-linear", seed=0, n_samples=64, batch_size=64)
    critic = list(trained.critic.module.parameters())
    before = [p.clone() for p in critic]
    trained.critic.improve(sum(p.sum() for p in critic) * torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, critic))


def test_weights_on_a_few_samples_are_warned_of_once() -> None:
    with pytest.warns(UserWarning, match=r"worth .* % of the samples.*Lower tau \(now 50\)") as caught:
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, n_samples=256, tau=50.0).learn(512)
    assert sum("worth" in str(one.message) for one in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, n_samples=256).learn(256)


@pytest.mark.parametrize("name", ["awm", "ddpo", "flow_grpo"])
def test_rewards_whose_squares_overflow_are_told_as_such(name: str) -> None:
    @flowrl.register_env("huge-reward", flow="gaussians")
    def huge(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        return 1e30 * samples[:, 0]

    made = ALGORITHMS[name]("FlowPolicy", "huge-reward", seed=0, n_samples=16, batch_size=16, rollout_steps=2)
    with pytest.raises(ConfigError, match=r"rewards from -\d\S*e\+30 to \d.*beyond float32: scale the reward down"):
        made.learn(16)


def test_pairs_go_by_the_order_of_rewards_whatever_their_size() -> None:
    """Flow-DPO asks which of a group is best, so the largest rewards that float32 holds teach what small ones do."""
    trained = []
    for scale in (1.0, 2.0**110):

        @flowrl.register_env("scaled-reward", flow="gaussians")
        def scaled(samples: torch.Tensor, contexts: list[Any], scale: float = scale) -> torch.Tensor:
            return scale * samples[:, 0]

        made = flowrl.FlowDPO("FlowPolicy", "scaled-reward", seed=0, n_samples=32, batch_size=8, rollout_steps=2)
        trained.append(weights(made.learn(32)))
    assert made._n_updates > made.bad_updates.zeros == 0
    assert torch.equal(*trained)
