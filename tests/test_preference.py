"""Methods on preferences within groups against closed forms: Flow-DPO, DGPO, CRD, FPO; the mask of DPPO; GDPO."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from safetensors.torch import load_file, save_file

import flowrl
from flowrl.envs.gaussians import GaussiansEnv, eight_gaussians
from flowrl.errors import CheckpointError, ConfigError
from flowrl.functional.advantages import decoupled_advantage, trusted
from flowrl.functional.endpoint import advantage_slope, advantages
from flowrl.functional.flow import x0_hat
from flowrl.functional.losses import squared_error
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import load_checkpoint
from flowrl.training.memory_plan import predict_memory
from flowrl.types import Batch, Pair, RewardOutput

pytestmark = pytest.mark.on_device

SIZE = {"n_samples": 64, "group_size": 8, "batch_size": 32, "rollout_steps": 4}
NAMES = ("flow_dpo", "dgpo", "crd", "fpo")
ENDPOINT_NAMES = ("adrpo", "awm", "nft", "ram", "rvm")


def make(name: str, env: Any = "gaussians-linear", **settings: Any) -> Any:
    return flowrl.algorithm_class(name)("FlowPolicy", env, seed=0, device=DEVICE, **{**SIZE, **settings})


def collected(name: str, env: Any = "gaussians-linear", **settings: Any) -> Any:
    """An algorithm whose buffer holds a rollout, and that has made no update since."""
    model = make(name, env, **settings)
    _, callback = model._setup_learn(1, None, True, "", False)
    model.collect(callback)
    return model


def move(model: Any, role: str, size: float = 0.05) -> None:
    """Move the weights of a role at random."""
    with torch.no_grad():
        for weight in model.policy.parameters_of(role).values():
            weight.add_(size * torch.randn_like(weight))


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters_of("current").values()]


def first_batch(model: Any) -> Batch:
    return next(model.buffer.batches(model.order(), 10**6))


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(model.policy.parameters_of("current").values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def loss_and_draws(model: Any, batch: Batch, n: int, repeats: int) -> tuple[torch.Tensor, dict, Pair]:
    """The loss, and the pair at the noise and times that it drew: n of each, for `repeats` samples in a row."""
    model.generator.manual_seed(3)
    loss, figures = model.loss(batch)
    model.generator.manual_seed(3)
    x_0, t = model.policy.noise(n, model.generator), torch.rand(n, generator=model.generator, device=DEVICE)
    x_0, t = x_0.repeat_interleave(repeats, 0), t.repeat_interleave(repeats)
    return loss, figures, FlowAlgorithm.pair(model, batch, x_0, model.config.max_time * t)


def error(model: Any, pair: Pair, role: str) -> torch.Tensor:
    return (model.policy.velocity(pair.x_t, pair.t, pair.cond, role) - pair.u).square().mean(1)


# ------------------------------------------------------------------------------------------------ Flow-DPO


def test_dpo_at_the_reference_is_half_way() -> None:
    """The sigmoid is 1/2 there: the gradient is beta / 4 of that of `mean (d_w - d_l)`, at the same noise and time."""
    model = collected("flow_dpo", beta=40.0)
    batch = first_batch(model)
    loss, figures, pair = loss_and_draws(model, batch, 8, 2)
    d = error(model, pair, "current")
    assert bool((batch.reward[0::2] > batch.reward[1::2]).all())
    expected = gradients(model, 40.0 / 4 * (d[0::2] - d[1::2]).mean())
    torch.testing.assert_close(gradients(model, loss), expected, atol=1e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    assert figures["winner_rise"].item() == figures["loser_rise"].item() == 0


def test_dpo_by_hand() -> None:
    """Away from the reference; both rises are logged by themselves."""
    model = collected("flow_dpo", beta=40.0)
    move(model, "current")
    batch = first_batch(model)
    loss, figures, pair = loss_and_draws(model, batch, 8, 2)
    rise = (error(model, pair, "current") - error(model, pair, "reference")).detach().double().tolist()
    margins = [w - other for w, other in zip(rise[0::2], rise[1::2])]
    expected = sum(-torch.sigmoid(torch.tensor(-20.0 * m, dtype=torch.float64)).log().item() for m in margins) / 8
    assert max(map(abs, margins)) > 1e-3
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert figures["winner_rise"].item() == pytest.approx(sum(rise[0::2]) / 8, rel=1e-3)
    assert figures["loser_rise"].item() == pytest.approx(sum(rise[1::2]) / 8, rel=1e-3)
    assert figures["accuracy"].item() == pytest.approx(sum(m < 0 for m in margins) / 8)


class Table:
    """A reward of so many samples after the other: given numbers, in turn."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.values[: len(samples)])


def given_rewards(values: list[float]) -> GaussiansEnv:
    return GaussiansEnv(eight_gaussians(), Table(values))  # type: ignore[arg-type]


def test_dpo_pairs_are_the_best_and_the_worst_and_ties_are_none() -> None:
    env = given_rewards([1.0, 3.0, 2.0, 0.5] + [5.0] * 4 + [7.0, 7.0, 7.0, 8.0])
    model = collected("flow_dpo", env, n_samples=12, group_size=4, batch_size=4)
    order = model.order()
    assert sorted(map(tuple, order.view(-1, 2).tolist())) == [(1, 3), (11, 8)]
    assert model.buffer.coefficient.tolist() == [0, 1, 0, -1, 0, 0, 0, 0, -1, 0, 0, 1]


def test_dpo_fills_the_last_minibatch_with_what_teaches_nothing() -> None:
    """The same number of entries on any number of ranks; gradient and figures are of the pairs alone."""
    env = given_rewards([1.0, 3.0, 2.0, 0.5] + [5.0] * 4 + [7.0, 7.0, 7.0, 8.0] + [2.0] * 4)
    model = collected("flow_dpo", env, n_samples=16, group_size=4, batch_size=6)
    assert len(model.order()) == 6
    batch = first_batch(model)
    assert batch.advantage.tolist() == [1.5, -1.5, 1.5, -1.5, 0, 0]
    move(model, "current")
    loss, figures, pair = loss_and_draws(model, batch, 3, 2)
    rise = error(model, pair, "current") - error(model, pair, "reference")
    assert figures["winner_rise"].item() == pytest.approx(rise[[0, 2]].mean().item(), rel=1e-4)
    expected = -torch.nn.functional.logsigmoid(-50 * (rise[[0, 2]] - rise[[1, 3]])).mean()
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), atol=1e-4, rtol=1e-3)


def test_dpo_without_any_pair_moves_nothing() -> None:
    model = make("flow_dpo", given_rewards([2.0] * 64))
    before = weights(model)
    with pytest.warns(UserWarning, match="Nothing was learnt"):
        model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))


def test_dpo_makes_no_pair_of_stand_ins() -> None:
    model = make("flow_dpo", n_samples=16, group_size=4, batch_size=2)
    stray = torch.zeros(16, dtype=torch.bool)
    stray[5] = True
    x_1, ids = torch.randn(16, 2), torch.zeros(16, dtype=torch.long)
    model.buffer.add(x_1, ids, torch.randn(16), {"stray": stray})
    model._weigh()
    assert len(model.order()) == 2 * 3
    assert 1 not in (model.order() // 4).tolist()
    assert model.buffer.coefficient[4:8].abs().max() == 0


def pairs_file(path: Path, n: int = 40) -> str:
    """Winners far to the right of losers."""
    winner, loser = 0.3 * torch.randn(2, n, 2)
    tensors = {"winner": winner + torch.tensor([2.0, 0.0]), "loser": loser - torch.tensor([2.0, 0.0])}
    save_file({**tensors, "contexts": torch.zeros(n, dtype=torch.long)}, path)
    return str(path)


def never(*args: Any) -> RewardOutput:
    raise AssertionError("the reward was asked")


def test_dpo_learns_from_given_pairs_without_a_reward(tmp_path: Path) -> None:
    env = flowrl.make("gaussians-linear")
    reward, env.reward = env.reward, never  # type: ignore[method-assign]
    settings = {"data": pairs_file(tmp_path / "pairs.safetensors"), "learning_rate": 1e-3, "n_samples": 256}
    model = make("flow_dpo", env, **settings, beta=10.0)
    model.learn(256 * 8)
    pair = model.buffer.all().x_1.view(-1, 2, 2)
    assert bool((pair[:, 0, 0] > pair[:, 1, 0]).all())
    assert first_batch(model).x_1[0::2, 0].min() > 0 > first_batch(model).x_1[1::2, 0].max()
    assert model.rollout_reward is None
    assert math.isnan(model.last_logged["rollout/reward_mean"]), "nothing was asked: 0 would be made up"
    rollouts = 4 * 256 * 8
    assert model.policy.evaluations < rollouts + 2 * 256 * 8 * 2  # updates and the drift, and no rollout
    env.reward = reward  # type: ignore[method-assign]
    result = flowrl.evaluate(model, n_samples=512)
    assert result.reward_mean > result.reference.reward_mean + 0.2


def test_dpo_on_given_pairs_resumes_exactly(tmp_path: Path) -> None:
    model = make("flow_dpo", data=pairs_file(tmp_path / "pairs.safetensors"))
    model.learn(64)
    model.save(tmp_path / "saved")
    model.learn(64, reset_num_timesteps=False)
    again = type(model).load(tmp_path / "saved", device=DEVICE)
    again.learn(64, reset_num_timesteps=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))


def test_given_pairs_are_those_that_training_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run named by a relative path goes on from any folder, and not on other pairs."""
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path / "pairs.safetensors")
    make("flow_dpo", data="pairs.safetensors").save(tmp_path / "saved")
    monkeypatch.chdir("/")
    again = flowrl.FlowDPO.load(tmp_path / "saved", device=DEVICE)
    assert again.config.data == str(tmp_path / "pairs.safetensors")
    pairs = load_file(tmp_path / "pairs.safetensors")
    pairs["loser"][-1] += 1e-3
    save_file(pairs, tmp_path / "pairs.safetensors")
    with pytest.raises(CheckpointError, match=r"was trained on other samples than .*pairs\.safetensors' holds now"):
        flowrl.FlowDPO.load(tmp_path / "saved", device=DEVICE)


@pytest.mark.parametrize("name", ["flow_dpo", "rwr"])
def test_memory_is_predicted_with_given_samples(tmp_path: Path, name: str) -> None:
    """They lie on the device, and count."""

    def predicted(n: int) -> int:
        rows = {row: torch.ones(n, 2) for row in ("x_1", "winner", "loser")}
        save_file({**rows, "contexts": torch.zeros(n, dtype=torch.long)}, tmp_path / "given.safetensors")
        cls, config = flowrl.algorithm_class(name), {**SIZE, "data": str(tmp_path / "given.safetensors")}
        plan = predict_memory(cls, cls.Config(**config), flowrl.make("gaussians-linear"))
        assert not plan.missing
        return plan.phases["training"]

    each = 4 * 2 * (2 if name == "flow_dpo" else 1) + 8
    assert predicted(1_000_000) - predicted(1_000) == pytest.approx(999_000 * each, rel=0.01)


@pytest.mark.parametrize("name", ["flow_dpo", "rwr"])
def test_who_does_not_train_needs_no_given_samples(tmp_path: Path, name: str) -> None:
    """A run is evaluated, sampled and exported where the file that it learnt from is not; the rest is still checked."""
    rows = {row: torch.ones(8, 2) for row in ("x_1", "winner", "loser")}
    save_file({**rows, "contexts": torch.zeros(8, dtype=torch.long)}, tmp_path / "given.safetensors")
    model = make(name, data=str(tmp_path / "given.safetensors"))
    model.save(tmp_path / "saved")
    (tmp_path / "given.safetensors").unlink()
    shown = load_checkpoint(FlowAlgorithm, tmp_path / "saved", device=DEVICE, to_train=False)
    assert flowrl.evaluate(shown, n_samples=8).n_samples == 8
    assert shown.learns_from == "data"
    with pytest.raises(ConfigError, match="Cannot read samples"):
        type(model).load(tmp_path / "saved", device=DEVICE)


def test_given_pairs_keep_their_contexts(tmp_path: Path) -> None:
    contexts = torch.arange(100, 140)
    winner = contexts.float().view(40, 1, 1, 1).repeat(1, 16, 8, 8)
    save_file({"winner": winner, "loser": -winner, "contexts": contexts}, tmp_path / "pairs.safetensors")
    settings = {"n_samples": 16, "data": str(tmp_path / "pairs.safetensors"), "flow": "mini-sd3"}
    flow = settings.pop("flow")
    model = make("flow_dpo", flowrl.make("sd3-count", flow=flow), **settings)
    drawn = model.contexts()
    assert len(drawn.unique()) > 4
    x_1, rows = model.draw(drawn)
    sign = torch.tensor([1.0, -1.0]).repeat(8)
    assert torch.equal(x_1[:, 0, 0, 0], sign * drawn)
    assert rows["wins"].tolist() == [1.0, 0.0] * 8


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"winner": torch.zeros(4, 2), "loser": torch.zeros(4, 3)}, r"loser must be \(N, 2\)"),
        ({"winner": torch.zeros(4, 2), "loser": torch.zeros(3, 2)}, r"loser must be \(N, 2\) and contexts \(N,\)"),
        ({"winner": torch.zeros(4, 2)}, "Cannot read samples.*'winner', 'loser' and 'contexts'"),
        ({"winner": torch.zeros(4, 2), "loser": torch.full((4, 2), torch.nan)}, "loser holds numbers that are not fin"),
        ({"winner": torch.zeros(4, 2), "loser": torch.ones(4, 2), "contexts": torch.full((4,), 0.7)}, "whole numbers"),
    ],
)
def test_dpo_says_what_is_wrong_with_given_pairs(tmp_path: Path, tensors: dict, message: str) -> None:
    save_file({"contexts": torch.zeros(4, dtype=torch.long), **tensors}, tmp_path / "pairs.safetensors")
    with pytest.raises(ConfigError, match=message):
        make("flow_dpo", data=str(tmp_path / "pairs.safetensors"))


# ------------------------------------------------------------------------------------------------ DGPO


def test_dgpo_at_the_reference_is_half_way() -> None:
    """The sigmoid is 1/2 there and nothing is frozen: the gradient is half of that of `mean A d`."""
    model = collected("dgpo")
    batch = first_batch(model)
    loss, figures, pair = loss_and_draws(model, batch, 8, 8)
    expected = gradients(model, 0.5 * (batch.advantage * error(model, pair, "current")).mean())
    torch.testing.assert_close(gradients(model, loss), expected, atol=1e-5, rtol=1e-4)
    assert figures["frozen"].item() == 0
    assert pair.t.max() <= 0.7


def test_dgpo_by_hand() -> None:
    """Away from all: groups one by one, with v, v_ref and v_old apart."""
    model = collected("dgpo", beta=30.0, clip_range=0.02)
    move(model, "current", 0.02)
    move(model, "behaviour", 0.01)
    batch = first_batch(model)
    loss, figures, pair = loss_and_draws(model, batch, 8, 8)
    d, d_ref, d_old = (error(model, pair, role) for role in ("current", "reference", "behaviour"))
    total, n_frozen = torch.zeros(()), 0
    for g in batch.group.unique():
        i = (batch.group == g).nonzero()[:, 0]
        score = (30.0 * batch.advantage[i] * (d[i] - d_ref[i])).sum() / 8
        for j in i:
            ratio = (d_old[j] - d[j]).exp().item()
            frozen = not 0.98 <= ratio <= 1.02
            n_frozen += frozen
            if not frozen:
                total = total + torch.sigmoid(score).detach() * batch.advantage[j] * d[j] / 64
    assert 0 < n_frozen < 64
    assert figures["frozen"].item() == pytest.approx(n_frozen / 64)
    torch.testing.assert_close(gradients(model, loss), gradients(model, total), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["dgpo", "crd"])
def test_minibatches_hold_whole_groups(name: str) -> None:
    model = collected(name)
    for batch in model.minibatches():
        assert batch.group.view(-1, 8).unique(dim=1).shape[1] == 1
    order = model.order()
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))


# ------------------------------------------------------------------------------------------------ CRD


@pytest.mark.parametrize("error_scale", ["none", "size"])
def test_crd_vanishes_where_the_log_ratio_is_the_centred_reward(error_scale: str) -> None:
    """With `v - u = s (v_old - u)`, R is (1 - s^2) |v_old - u|^2, or (1 - s) of it over its size: solved for s.

    Any constant c of a group is as good, and none of the whole minibatch: only differences within groups count.
    """
    model = make("crd", beta=10.0, error_scale=error_scale)
    x_1, a = torch.randn(32, 2), torch.randn(4, 8)
    a = 0.02 * (a - a.mean(1, keepdim=True)).flatten()
    batch = Batch(x_1, torch.zeros(32, dtype=torch.long), a, a, torch.arange(32) // 8)
    v_old = torch.randn(32, 2)
    model.generator.manual_seed(5)
    pair = model.group_pair(batch)
    gap = v_old - pair.u
    q = gap.square().sum(1) if error_scale == "none" else gap.square().mean(1)

    def loss_at(values: torch.Tensor) -> tuple[float, float]:
        """The loss where the log-ratios are values / beta, and the size of its gradient in v."""
        r = values / 10.0
        s = (1 - r / q).sqrt() if error_scale == "none" else 1 - r * gap.abs().mean(1) / q
        assert s.min() > 0
        v = (pair.u + s[:, None] * gap).requires_grad_()
        model.velocity = lambda pair, role="current": v if role == "current" else v_old
        model.generator.manual_seed(5)
        loss, _ = model.loss(batch)
        return loss.item(), torch.autograd.grad(loss, v)[0].abs().max().item()

    of_groups = 0.05 * torch.randn(4).repeat_interleave(8)
    for best in (a, a + of_groups):
        loss, gradient = loss_at(best)
        assert loss < 1e-9
        assert gradient < 1e-4
    for other in (torch.zeros(32), -a, 2 * a, a.roll(1)):
        assert loss_at(other)[0] > 1e-6
    assert loss_at(2 * a)[0] == pytest.approx(a.square().mean().item() / 10, rel=1e-2)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_crd_means_the_same_tilt_in_any_dimension(dim: int) -> None:
    """With noise alone, t = 0, log-ratios of the tilt of a linear reward are those that its advantages ask for."""
    model = make("crd", beta=0.4)
    a, x_0 = torch.randn(dim, device=DEVICE), torch.randn(1, dim, device=DEVICE)  # shared within the group
    x_1 = torch.randn(8, dim, device=DEVICE)
    reward = x_1 @ a
    std = reward.std(correction=0)
    advantage = (reward - reward.mean()) / std
    lam = model.tilt_of(std) / advantage_slope(std, "group", 8) * (1 - 1 / 8) / std  # of these very advantages
    v_ref, u = -x_0.expand(8, dim), x_1 - x_0
    log_ratio = model.likelihood(v_ref + lam * a, u) - model.likelihood(v_ref, u)
    expected = advantage / model.config.beta
    torch.testing.assert_close(log_ratio - log_ratio.mean(), expected, atol=1e-4, rtol=1e-4)


def test_crd_at_the_old_policy_is_a_linear_combination() -> None:
    """R is 0 there: the gradient is that of `2 mean a |v - u|^2 / w`, with advantages that are centred already."""
    model = collected("crd", beta=3.0, decay=0.9, error_scale="size")
    batch = first_batch(model)
    loss, _, pair = loss_and_draws(model, batch, 8, 8)
    v = model.policy.velocity(pair.x_t, pair.t, pair.cond, "current")
    w = (v - pair.u).abs().mean(1).detach()
    expected = gradients(model, 2 * (batch.advantage * squared_error(v, pair.u) / w).mean())
    torch.testing.assert_close(gradients(model, loss), expected, atol=1e-4, rtol=1e-3)


def test_crd_compares_with_a_policy_that_may_lag_behind() -> None:
    still, moving = (make("crd", decay=decay) for decay in (1.0, 0.5))
    first = weights(moving)
    moving.learn(64)
    copies = (moving.policy.parameters_of(role).values() for role in ("behaviour", "current"))
    for old, now, start in zip(*copies, first):
        torch.testing.assert_close(old, (now + start) / 2, atol=1e-6, rtol=1e-5)
    assert moving.behaviour_role == still.behaviour_role == "current"
    assert (moving.old_role, still.old_role) == ("behaviour", "reference")
    assert "behaviour" not in still.policy.roles


def test_crd_with_an_anchor() -> None:
    model = collected("crd", anchor=0.7)
    move(model, "current")
    batch = first_batch(model)
    (loss, figures, pair), free = loss_and_draws(model, batch, 8, 8), make("crd")
    free.policy = model.policy
    other, _, _ = loss_and_draws(free, batch, 8, 8)
    v, v_ref = (model.policy.velocity(pair.x_t, pair.t, pair.cond, role) for role in ("current", "reference"))
    drift = squared_error(v, v_ref).mean().item()
    assert figures["drift"].item() == pytest.approx(drift, rel=1e-4)
    assert loss.item() - other.item() == pytest.approx(0.7 * drift, rel=1e-3)


# ------------------------------------------------------------------------------------------------ FPO


@pytest.mark.parametrize(
    "settings", [{}, {"shared": True}, {"error": "noise"}, {"lora_rank": 4}, {"half_buffer": True}], ids=str
)
def test_fpo_starts_at_a_ratio_of_one(settings: dict) -> None:
    """There the gradient is that of `mean A d`, d the mean error over the kept draws."""
    model = collected("fpo", **settings)
    batch = first_batch(model)
    loss, figures = model.loss(batch)
    assert figures["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert figures["clip_fraction"].item() == 0
    x_0, t = batch.extra["x_0"], batch.extra["t"]
    assert x_0.shape == (64, 8, 2)
    errors = []
    for j in range(8):
        pair = model.pair(batch, x_0[:, j], t[:, j])
        v = model.policy.velocity(pair.x_t, pair.t, pair.cond, "current")
        noise = x0_hat(v, pair.x_t, pair.t)
        errors.append(squared_error(noise, x_0[:, j]) if "error" in settings else squared_error(v, pair.u))
    d = sum(errors) / 8
    torch.testing.assert_close(torch.stack(errors, 1), batch.extra["old"], atol=1e-4, rtol=1e-4)
    expected = gradients(model, (batch.advantage * d).mean())
    torch.testing.assert_close(gradients(model, loss), expected, atol=1e-5, rtol=1e-3)


def test_fpo_by_hand() -> None:
    """Away from the policy that drew: one ratio of the mean over draws, clipped where it helps."""
    model = collected("fpo", draws=3)
    move(model, "current", 0.02)
    batch = first_batch(model)
    loss, figures = model.loss(batch)
    x_0, t, old = (batch.extra[name] for name in ("x_0", "t", "old"))
    values = []
    for i in range(64):
        gap = 0.0
        for j in range(3):
            x_t = (1 - t[i, j]) * x_0[i, j] + t[i, j] * batch.x_1[i]
            v = model.policy.velocity(x_t[None], t[i, j][None], (), "current")[0].detach()
            gap += (old[i, j] - (v - batch.x_1[i] + x_0[i, j]).square().mean()).item() / 3
        ratio, advantage = torch.tensor(gap).exp().item(), batch.advantage[i].item()
        values.append(-min(ratio * advantage, min(max(ratio, 0.95), 1.05) * advantage))
    assert 0.05 < figures["clip_fraction"].item() < 1
    assert loss.item() == pytest.approx(sum(values) / 64, rel=1e-3, abs=1e-4)


def test_fpo_shares_draws_in_a_group_at_times_of_every_part() -> None:
    model = collected("fpo", shared=True, draws=4, rollout_batch_size=32)
    extra = model.buffer.all().extra
    x_0, t = extra["x_0"].view(8, 8, -1), extra["t"].view(8, 8, 4)
    assert torch.equal(x_0, x_0[:, :1].expand_as(x_0))
    assert torch.equal(t, t[:, :1].expand_as(t))
    assert len(x_0[:, 0].unique(dim=0)) == 8
    assert torch.equal((t * 4).floor(), torch.arange(4.0).expand_as(t))
    own = collected("fpo", draws=4).buffer.all().extra
    assert len(own["x_0"].flatten(0, 1).unique(dim=0)) == 64 * 4


# ------------------------------------------------------------------------------------------------ DPPO


def test_the_mask_leaves_out_what_is_far_and_moves_out() -> None:
    """All cases: far or near, advantage up or down, ratio above or below one."""
    table = [
        (1.0, 1.1, 2e-3, False),  # wanted, and more likely already
        (1.0, 0.9, 2e-3, True),  # wanted, and less likely than it was: leads back
        (-1.0, 0.9, 2e-3, False),  # unwanted, and less likely already
        (-1.0, 1.1, 2e-3, True),
        (1.0, 1.1, 5e-4, True),  # near
        (1.0, 0.9, 5e-4, True),
        (-1.0, 0.9, 5e-4, True),
        (-1.0, 1.1, 5e-4, True),
        (0.0, 1.1, 2e-3, True),  # teaches nothing anyway
        (1.0, 1.0, 2e-3, True),
    ]
    advantage, ratio, divergence, kept = (torch.tensor(column) for column in zip(*table))
    assert trusted(ratio, advantage, divergence, 1e-3).tolist() == kept.tolist()


@pytest.mark.parametrize(
    ("name", "own"),
    [("ddpo", {}), ("dpok", {"beta": 0.0, "critic": False}), ("flow_grpo", {"beta": 0.0})],
)
def test_masked_losses_by_hand(name: str, own: dict) -> None:
    """No clip; steps that are far and move out are gone, with means of the policy that drew them."""
    model = collected(name, mask="dppo", dppo_delta=2e-4, **own)
    model.config = replace(model.config, clip_range=1e-6)  # who gives it is told that it does nothing
    batch = first_batch(model)
    with torch.no_grad():
        _, figures = model.loss(batch)
    assert figures["masked"].item() == 0
    move(model, "current", 0.005)
    loss, figures = model.loss(batch)
    steps = model.recorded(batch)
    with torch.no_grad():
        now, old = (model.step(steps, batch.context_ids, role) for role in ("current", "behaviour"))
    laws = [torch.distributions.Normal(law.mean, law.std[:, None]) for law in (now, old)]
    distance = ((now.mean - old.mean).square().sum(1) / 2) / (2 * now.std.square())
    ratio = ((laws[0].log_prob(steps.x_next) - laws[1].log_prob(steps.x_next)).sum(1) / 2).exp()
    expected, masked = [], 0
    for r, a, far in zip(ratio.tolist(), batch.advantage.clamp(-5, 5).tolist(), (distance > 2e-4).tolist()):
        outward = (a > 0 and r > 1) or (a < 0 and r < 1)
        masked += far and outward
        expected.append(0.0 if far and outward else -a * r)
    assert 0.05 < masked / len(ratio) < 0.95
    assert figures["masked"].item() == pytest.approx(masked / len(ratio), abs=0.02)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), abs=2e-3)


def test_the_mask_needs_ratios() -> None:
    with pytest.raises(ConfigError, match="needs variant 'is'"):
        flowrl.DDPO.Config(variant="sf", mask="dppo", batch_size=10**6)
    with pytest.raises(ConfigError, match="mask must be one of none, dppo, not 'ppo'"):
        flowrl.DDPO.Config(mask="ppo")


# ------------------------------------------------------------------------------------------------ GDPO


def test_rewards_are_compared_each_by_itself() -> None:
    """By hand. Two rewards of spread 4 and 0.1: as a sum the second is lost, each by itself both count.

    Group 0: A_1 = (-1, 1), A_2 = (1, -1); group 1: A_1 = 0, A_2 = (-1, 1). With weights 1 and 0.5 the sums are
    (-0.5, 0.5, -0.5, 0.5), of standard deviation 0.5.
    """
    rewards = torch.tensor([[1.0, 9.0, 5.0, 5.0], [0.2, 0.0, 0.0, 0.2]])
    group = torch.tensor([0, 0, 1, 1])
    advantage = decoupled_advantage(rewards, torch.tensor([1.0, 0.5]), group)
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=3e-3, rtol=0)
    one = decoupled_advantage(rewards, torch.tensor([1.0, 2.0]), group)  # sums (1, -1, -2, 2), of deviation sqrt(2.5)
    torch.testing.assert_close(one, torch.tensor([1.0, -1.0, -2.0, 2.0]) / 2.5**0.5, atol=3e-3, rtol=0)
    assert decoupled_advantage(torch.ones(2, 4), torch.ones(2), group).abs().max() == 0
    assert decoupled_advantage(rewards, torch.tensor([1.0, 2.0]), group, maximum=1.0).abs().max() == 1


class Two:
    """The first coordinate, and a hundred times the second; fails far to the right where it is told to."""

    def __init__(self, limit: float = 100.0) -> None:
        self.limit, self.weights = limit, {"right": 1.0, "up": 0.5}

    def __call__(self, samples: torch.Tensor, contexts: Any) -> RewardOutput:
        if bool((samples[:, 0] > self.limit).any()):
            raise ValueError("too far right")
        parts = {"right": samples[:, 0], "up": 100 * samples[:, 1], "length": samples.norm(dim=1)}
        return RewardOutput(parts["right"] + 0.5 * parts["up"], parts)


def two_rewards(limit: float = 100.0) -> Any:
    env = flowrl.make("gaussians-linear")
    env.reward_function = Two(limit)
    env.reward = env.reward_function  # type: ignore[method-assign]
    return env


@pytest.mark.parametrize("name", ["flow_grpo", *NAMES, *ENDPOINT_NAMES])
@pytest.mark.parametrize("limit", [100.0, 1.5])
def test_components_are_rows_that_stay_with_their_samples(name: str, limit: float) -> None:
    env = two_rewards(limit)
    settings = {"reward_aggregation": "gdpo", "on_reward_error": "drop", "max_dropped": 0.9}
    model = collected(name, env, rollout_batch_size=32, **settings)
    rollout = model.buffer.all()
    assert {key for key in rollout.extra if key.startswith("reward/")} == {"reward/right", "reward/up"}
    torch.testing.assert_close(rollout.extra["reward/right"], rollout.x_1[:, 0])
    torch.testing.assert_close(rollout.extra["reward/up"], 100 * rollout.x_1[:, 1])
    assert (model.n_dropped > 0) == (limit < 100)
    rewards = torch.stack([rollout.x_1[:, 0], 100 * rollout.x_1[:, 1]])
    expected = decoupled_advantage(rewards, torch.tensor([1.0, 0.5]), rollout.group)
    if name == "flow_dpo":
        expected = expected.view(8, 8)
        assert (
            model.order().view(-1, 2)[:, 0].sort().values.tolist()
            == (8 * torch.arange(8) + expected.argmax(1)).tolist()
        )
        return
    if name in ENDPOINT_NAMES:
        spread, most = model.config.spread, model.config.max_advantage
        each = [advantages(reward, rollout.group, spread, float("inf")) for reward in rewards]
        total = each[0] + 0.5 * each[1]
        expected = (total / (total.square().mean().sqrt() + 1e-4)).clamp(-most, most)
    torch.testing.assert_close(model.advantage(rollout), expected)
    model.update()


def test_each_reward_has_a_unit_of_its_own() -> None:
    """In units of all rewards of the iteration, by hand; and without a unit there is nothing to compare by."""
    rewards = torch.tensor([[1.0, 3.0, 5.0, 5.0], [0.0, 40.0, 0.0, 0.0]])
    group = torch.tensor([0, 0, 1, 1])

    def compare(reward: torch.Tensor, group: torch.Tensor, maximum: float) -> torch.Tensor:
        return advantages(reward, group, "global", maximum)

    a = [-1 / 2.75**0.5 - 20 / 300**0.5, 1 / 2.75**0.5 + 20 / 300**0.5, 0.0, 0.0]
    found = decoupled_advantage(rewards, torch.ones(2), group, compare=compare)
    size = (sum(value**2 for value in a) / 4) ** 0.5
    torch.testing.assert_close(found, torch.tensor(a) / size, atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="take spread 'group' or 'global'"):
        make("nft", two_rewards(), reward_aggregation="gdpo", spread="none")
    for name in ("nft", "rvm", "ram", "crd", "flow_grpo"):
        settings = {"beta_ref": 0.5} if name == "rvm" else {}
        std = torch.tensor(1.0)
        assert make(name, two_rewards(), **settings).tilt_of(std) is not None
        assert make(name, two_rewards(), reward_aggregation="gdpo", **settings).tilt_of(std) is None


def test_both_rewards_rise() -> None:
    """As a sum the second decides; each by itself both are learnt."""
    gains = {}
    for kind in ("sum", "gdpo"):
        model = make("fpo", two_rewards(), n_samples=256, learning_rate=1e-3, reward_aggregation=kind)
        model.learn(256 * 8)
        gains[kind] = model.policy.sample(n=2000).mean(0)
    assert gains["gdpo"][0] > gains["sum"][0] + 0.2
    assert gains["gdpo"].min() > 0.2


def test_a_mixture_tells_its_weights() -> None:
    env = flowrl.make("sd3-count", flow="mini-sd3", reward="colourfulness:2+count:-0.5")
    assert dict(env.reward_weights) == {"colourfulness": 2.0, "count": -0.5}
    model = make("flow_grpo", env, n_samples=8, group_size=4, batch_size=8, reward_aggregation="gdpo")
    model.learn(8)
    assert {"reward/colourfulness", "reward/count"} <= model.buffer.numbers.keys()


def test_one_reward_cannot_be_compared_each_by_itself() -> None:
    for name in ("flow_grpo", *NAMES, *ENDPOINT_NAMES):
        with pytest.raises(ConfigError, match=r"'gaussians-linear' is no weighted sum.*--env.reward clip:0.7\+"):
            make(name, reward_aggregation="gdpo")
    for weights in (torch.ones(2), {"right": "1", "up": "2"}, {"right": 1.0, "up": float("nan")}):
        env = two_rewards()
        env.reward_function.weights = weights
        with pytest.raises(ConfigError, match=r"no weighted sum.*has a dictionary `weights`"):
            make("fpo", env, reward_aggregation="gdpo")
    env = two_rewards()
    env.reward_function.weights = {"right": 1.0, "down": 1.0}
    with pytest.raises(ConfigError, match="gave no 'down', only 'right', 'up'"):
        collected("fpo", env, reward_aggregation="gdpo")
    with pytest.raises(ConfigError, match="reward_aggregation must be one of sum, gdpo, not 'mean'"):
        make("fpo", reward_aggregation="mean")
    with pytest.raises(ConfigError, match="Given pairs have no rewards"):
        make("flow_dpo", two_rewards(), reward_aggregation="gdpo", data="pairs.safetensors")


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", ["flow_grpo", *NAMES])
def test_groups_of_one_are_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ConfigError, match=r"group_size must be at least 2, not 1.*--algo.group-size 8"):
        make(name, group_size=1)


@pytest.mark.parametrize("name", NAMES)
def test_times_end_at_the_largest_and_steps_to_draw_may_be_fewer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fewer = make(name, max_time=0.3, draw_steps=2), make(name, rollout_steps=2)
    pair, times = FlowAlgorithm.pair, []
    monkeypatch.setattr(FlowAlgorithm, "pair", lambda self, *given: times.append(given[2]) or pair(self, *given))
    model.learn(64)
    assert 0.2 < torch.cat(times).max() <= 0.3
    fewer.learn(64)
    assert torch.equal(model.buffer.all().x_1, fewer.buffer.all().x_1)
    assert model.policy.evaluations_per_sample() == 4


@pytest.mark.parametrize(("name", "value"), [("draw_steps", 2), ("max_own_loss", 1.5), ("max_drift", 0.5)])
def test_settings_of_own_samples_are_refused_beside_given_ones(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} = {value} does nothing for given pairs"):
        make("flow_dpo", data=pairs_file(tmp_path / "pairs.safetensors"), **{name: value})
    assert name != "draw_steps" or name in flowrl.RWR.Config(data="samples.safetensors").idle()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dgpo", {"batch_size": 12}, "group_size = 8 must divide batch_size = 12"),
        ("crd", {"batch_size": 4}, "group_size = 8 must divide batch_size = 4"),
        ("crd", {"decay": 1.5}, "decay must be in"),
        ("crd", {"beta": 0.0}, "beta must be positive"),
        ("dgpo", {"max_time": 0.0}, "max_time must be in"),
        ("dgpo", {"clip_range": -1.0}, "clip_range must not be negative"),
        ("flow_dpo", {"batch_size": 3}, "batch_size counts both samples of every pair"),
        ("flow_dpo", {"beta": -1.0}, "beta must be positive"),
        ("fpo", {"shared": True, "rollout_batch_size": 4}, "shared draws need whole groups"),
        ("fpo", {"draws": 0}, "draws must be positive"),
        ("fpo", {"error": "score"}, "error must be one of velocity, noise"),
    ],
)
def test_wrong_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dgpo", {"batch_size": 8}, "2 x group_size"),
        ("crd", {"batch_size": 48, "n_samples": 72}, "the last minibatch of an epoch"),
        ("flow_dpo", {"batch_size": 6, "n_samples": 64}, "whole pairs"),
        ("fpo", {"shared": True, "rollout_batch_size": 8}, "each of 2 processes"),
    ],
)
def test_ranks_need_whole_groups_and_pairs(name: str, settings: dict, message: str) -> None:
    config = flowrl.algorithm_class(name).Config(**{**SIZE, **settings})
    config.check_ranks(1)
    with pytest.raises(ConfigError, match=message):
        config.check_ranks(2)


@pytest.mark.parametrize("name", NAMES)
def test_they_raise_their_reward(name: str) -> None:
    rate = 5e-4 if name == "fpo" else 1e-3  # which nothing holds: at 1e-3 single samples can run away
    model = make(name, n_samples=256, learning_rate=rate).learn(256 * 8)
    result = flowrl.evaluate(model, n_samples=512)
    assert result.reward_mean > result.reference.reward_mean + 0.15
    assert result.w2_to_optimum < 0.9 * result.reference.w2_to_optimum


@pytest.mark.parametrize("name", ["crd", "fpo", "dgpo", "flow_dpo"])
def test_a_constant_reward_moves_nothing(name: str) -> None:
    model = make(name, given_rewards([147.1] * 64))
    before = weights(model)
    with pytest.warns(UserWarning, match="Nothing was learnt"):
        model.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))


@pytest.mark.filterwarnings("ignore:Nothing is learnt from the reward")
@pytest.mark.parametrize("name", NAMES)
def test_groups_of_stand_ins_teach_nothing(name: str) -> None:
    """Though the flow has moved, and equal advantages are a target for some."""
    model = collected(name, n_samples=16, batch_size=16, on_reward_error="drop")
    model.buffer.numbers["stray"][::8] = True
    model._weigh()
    move(model, "current")
    loss, _ = model.loss(first_batch(model))
    assert gradients(model, loss).abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [32, 8])
def test_they_can_be_tried_dry(name: str, batch_size: int) -> None:
    model = make(name, batch_size=batch_size)
    plan = predict_memory(type(model), model.config, model.env.core)
    assert plan.missing == ""


def test_several_rewards_can_be_tried_dry() -> None:
    model = make("flow_grpo", two_rewards(), reward_aggregation="gdpo")
    assert predict_memory(type(model), model.config, model.env.core).missing == ""


def test_the_tilts_that_they_state() -> None:
    std = torch.tensor(2.0)
    for name in ("flow_dpo", "dgpo", "fpo", "ddpo"):
        assert make(name).tilt_of(std) is None
    assert make("crd", beta=0.25).tilt_of(std).item() == pytest.approx(0.9650, rel=1e-3)
    assert make("crd", error_scale="size").tilt_of(std) is None
    assert make("crd", beta=0.25, decay=0.9).tilt_of(std) is None
    assert make("crd", beta=0.25, anchor=0.1).tilt_of(std) is None
    assert make("flow_grpo", beta=0.1).tilt_of(std).item() == pytest.approx(5.0 * 0.8444, rel=1e-3)
    assert make("flow_grpo", beta=0.0).tilt_of(std) is None
    assert make("dpok", beta=0.1, reward_weight=3.0).tilt_of(std).item() == pytest.approx(15.0, rel=1e-3)
    assert make("dpok", beta=0.1, standardise="none").tilt_of(std).item() == pytest.approx(10.0)
    assert make("dpok", beta=0.0).tilt_of(std) is None


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_tilts_of_group_relative_methods_are_those_of_their_advantages(size: int) -> None:
    """Of normal rewards: the regression on r of what a sample expects as its advantage; of CRD, within the group."""
    reward = 3 * torch.randn(100_000, size, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) + 2
    centred = reward - reward.mean(1, keepdim=True)
    a, within = centred / centred.square().mean(1, keepdim=True).sqrt(), centred.square().mean().sqrt()
    grpo = (reward - 2).mul(a).mean() / reward.var()
    crd = centred.mul(a).mean() / centred.square().mean()
    sizes = {"group_size": size, "beta": 0.25, "max_advantage": 50.0}
    assert make("flow_grpo", **sizes).tilt_of(within).item() == pytest.approx(grpo.item() / 0.25, rel=0.01)
    assert make("crd", **sizes).tilt_of(within).item() == pytest.approx(crd.item() / 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["crd", "flow_grpo", "dpok"])
def test_they_can_be_told_which_tilt_to_aim_at(name: str) -> None:
    model = make(name, target_lambda=0.5)
    model.learn(64)
    assert model.last_logged["rollout/target_lambda"] == pytest.approx(0.5, rel=1e-3)
