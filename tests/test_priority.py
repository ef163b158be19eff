"""Priority and pairs: how often passes take samples, and that every gradient stays as it is in the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError
from flowrl.training.noising import Noising
from flowrl.training.priority import best_with_worst
from flowrl.types import Pair

pytestmark = pytest.mark.on_device

SMALL: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "rollout_steps": 4, "group_size": 4}


def make(name: str, **settings: Any) -> Any:
    return flowrl.algorithm_class(name)("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **SMALL | settings)


def collected(name: str, **settings: Any) -> Any:
    """An algorithm with an iteration's samples and coefficients."""
    model = make(name, **settings)
    _, callback = model._setup_learn(32)
    model.collect(callback)
    return model


def give_noise_of_their_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every sample noise and a time of its own, so that only the choice of samples is random."""
    x_0, t = torch.randn(32, 2, device=DEVICE), torch.rand(32, device=DEVICE) * 0.8 + 0.1
    known = {tuple(row): i for i, row in enumerate(model.buffer.rows["x_1"].tolist())}
    pair = type(model).pair

    def own(self: Any, batch: Any, *given: Any, **named: Any) -> Pair:
        index = torch.tensor([known[tuple(row)] for row in batch.x_1.tolist()], device=DEVICE)
        return pair(self, batch, x_0[index], t[index])

    monkeypatch.setattr(type(model), "pair", own)
    monkeypatch.setattr(type(model), "couple", lambda self, batch: (batch, x_0[: len(batch.x_1)]))


METHODS = {
    "orw_w2": {"tau": 1.0},
    "orw_w2, local": {"tau": 1.0, "baseline": "local"},
    "orw_w2, plain": {"tau": 1.0, "target": "plain"},
    "nft": {},
    "ram": {"noisings": 2},
}


def sizes_of(model: Any) -> torch.Tensor:
    coefficient = model.buffer.coefficient
    if not model.has_weights:
        return coefficient.abs()
    return coefficient if model.config.target == "plain" else (coefficient - coefficient.mean()).abs()


@pytest.mark.parametrize("case", METHODS)
def test_a_pass_takes_samples_as_often_as_their_size_says(case):
    model = collected(case.split(",")[0], **METHODS[case], priority=0.75)
    size = sizes_of(model)
    expected = 0.25 + 0.75 * size / size.mean()
    counts = torch.stack([torch.bincount(model.order(), minlength=32) for _ in range(500)]).float()
    assert bool(((counts - expected).abs() < 1 + 1e-4).all())  # rounded up or down
    assert torch.allclose(counts.mean(0), expected, atol=0.09)
    assert bool((counts.sum(1) == 32).all())
    assert not torch.equal(model.order(), model.order().sort().values)  # shuffled


@pytest.mark.parametrize("case", METHODS)
def test_importance_weights_leave_the_gradient_as_it_is_in_the_mean(case, monkeypatch):
    model = collected(case.split(",")[0], **METHODS[case], priority=0.75)
    give_noise_of_their_own(model, monkeypatch)
    parameters = list(model.policy.parameters_of("current").values())
    with torch.no_grad():
        parameters[0].add_(0.1)  # not where it is the behaviour policy, whose differences are zero

    def gradient(order: torch.Tensor) -> torch.Tensor:
        (batch,) = model.buffer.batches(order, 32)
        model.policy.optimizer.zero_grad()
        model.loss(batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    if getattr(model, "critic", None) is not None:
        monkeypatch.setattr(model.critic, "improve", lambda loss: None)  # it is to stay the same
    drawn = [model.order() for _ in range(200)]
    weighted = torch.stack([gradient(order) for order in drawn]).mean(0)
    object.__setattr__(model.config, "priority", 0.0)
    each_once = gradient(torch.arange(32, device=DEVICE))
    unweighted = torch.stack([gradient(order) for order in drawn]).mean(0)
    assert (weighted - each_once).norm() < 0.08 * each_once.norm() < 0.6 * (unweighted - each_once).norm()


@pytest.mark.parametrize(
    ("name", "settings"), [("orw_w2", {"tau": 1.0}), ("awm", {"clip_range": 0.2, "noisings": 1, "decay_rate": 0.0})]
)
def test_time_weights_and_figures_are_of_all_samples_alike(name, settings, monkeypatch):
    model = collected(name, **settings, priority=0.75, time_weighting="variance")
    give_noise_of_their_own(model, monkeypatch)
    parameters = list(model.policy.parameters_of("current").values())
    with torch.no_grad():
        parameters[0].add_(0.1)

    def seen(order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a pass adds to the noise at each time, and one of its figures."""
        (batch,) = model.buffer.batches(order, 32)
        model.noise_at.zero_()
        figures = model.loss(batch)[1]
        return model.noise_at.clone(), figures["clip_fraction" if name == "awm" else "drift"].detach()

    drawn = [model.order() for _ in range(300)]
    noise, figure = (torch.stack(parts).mean(0) for parts in zip(*map(seen, drawn)))
    object.__setattr__(model.config, "priority", 0.0)
    noise_once, figure_once = seen(torch.arange(32, device=DEVICE))
    biased, figure_biased = (torch.stack(parts).mean(0) for parts in zip(*map(seen, drawn)))
    assert (noise - noise_once).norm() < 0.05 * noise_once.norm() < 0.5 * (biased - noise_once).norm()
    assert (figure - figure_once).abs() < 0.02 * figure_once < 0.5 * (figure_biased - figure_once).abs()


def test_weights_of_both_signs_are_taken_by_their_size():
    model = collected("orw_w2", target="plain", priority=0.75)
    model.buffer.coefficient[:16] *= -1  # a weigh of one's own may give such
    expected = 0.25 + 0.75 * model.buffer.coefficient.abs() / model.buffer.coefficient.abs().mean()
    assert torch.allclose(1 / model.importance(model.buffer.all()), expected)
    assert bool(((torch.bincount(model.order(), minlength=32) - expected).abs() < 1 + 1e-4).all())


def test_samples_that_carry_nothing_are_taken_seldom_and_all_alike_where_nothing_does():
    model = collected("nft", priority=0.9)
    model.buffer.coefficient.zero_()
    assert torch.equal(model.order().sort().values, torch.arange(32, device=DEVICE))
    assert model.importance(model.buffer.all()).eq(1).all()
    model.buffer.coefficient[0] = 3.0
    assert (model.order() == 0).sum() >= 28  # nine tenths of a pass, and its share of the last
    assert model.importance(model.buffer.all())[1:].allclose(torch.tensor(10.0, device=DEVICE))


def test_pairs_are_the_best_with_the_worst_of_a_group_and_so_on_inwards():
    coefficient = torch.tensor([3.0, 1, 2, 0, 5, 4, 6, 9, 7, 7, 7, 7], device=DEVICE)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3], device=DEVICE)
    order = best_with_worst(coefficient, group)
    assert torch.equal(order.sort().values, torch.arange(12, device=DEVICE))
    pairs = {frozenset(pair) for pair in order.view(-1, 2)[:4].tolist()}
    assert pairs == {frozenset({4, 7}), frozenset({0, 3}), frozenset({1, 2}), frozenset({5, 6})}  # 4 and 7 are over
    assert set(order[8:].tolist()) == {8, 9, 10, 11}


@pytest.mark.parametrize("priority", [0.0, 0.75])
def test_pairs_take_each_sample_as_often_and_are_in_no_order(priority):
    model = collected("nft", paired_noise=True, priority=priority)
    expected = 1 - priority + priority * model.buffer.coefficient.abs() / model.buffer.coefficient.abs().mean()
    orders = [model.order() for _ in range(300)]
    counts = torch.stack([torch.bincount(order, minlength=32) for order in orders]).float()
    assert bool(((counts - expected).abs() < 1 + 1e-4).all())
    pairs = torch.stack(orders).view(300, -1, 2)
    together = (model.buffer.group[pairs].diff() == 0).float().mean()
    assert together == 1 if priority == 0 else together > 0.8
    assert (model.buffer.coefficient[pairs].diff().abs().mean() > 1.3 * model.buffer.coefficient.std()).item()
    place = (model.buffer.group[pairs[:, :, 0]] * torch.arange(16, device=DEVICE)).float().mean()
    assert (
        abs(place - model.buffer.group.float().mean() * 7.5) < 4
    )  # 13 in order; the first group is not the first of the pass


@pytest.mark.parametrize(("name", "settings"), [("orw_w2", {"max_time": 0.5}), ("nft", {}), ("ram", {"noisings": 2})])
def test_a_pair_has_noise_and_time_in_common_and_only_a_pair(name, settings, monkeypatch):
    model = collected(name, paired_noise=True, **settings)
    seen: list[Pair] = []
    pair = Noising.pair
    monkeypatch.setattr(Noising, "pair", lambda self, *given: seen.append(pair(self, *given)) or seen[-1])
    batch = next(iter(model.minibatches()))
    model.loss(batch)
    x_0, t, _, u, _ = seen[0]
    n = 16 * settings.get("noisings", 1)
    assert torch.equal(x_0[0::2], x_0[1::2])
    assert torch.equal(t[0::2], t[1::2])
    assert len(x_0.unique(dim=0)) == len(t.unique()) == n // 2
    assert t.max() <= settings.get("max_time", 1.0)
    x_1 = x_0 + u
    for left, right in zip(x_1[0::2], x_1[1::2]):  # each such pair is one of the pass
        where = [int((batch.x_1 - x).square().sum(1).argmin()) for x in (left, right)]
        assert where[0] % 2 == 0
        assert where[1] == where[0] + 1


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("orw_w2", {"tau": 0.2, "baseline": "mean", "alpha": 0.0}, 1.1),  # its weights compare no groups here
        ("nft", {"noisings": 2, "critic_learning_rate": 0.0}, 0.85),
    ],
)
def test_noise_in_common_leaves_the_gradient_as_it_is_in_the_mean_with_less_noise(name, settings, share):
    model = collected(name, **settings)
    model.buffer.rows["x_1"] += 3 * torch.randn(8, 2, device=DEVICE).repeat_interleave(
        4, 0
    )  # what a group has in common

    def gradients(paired: bool) -> torch.Tensor:
        object.__setattr__(model.config, "paired_noise", paired)
        found = []
        for _ in range(150):
            for batch in model.minibatches():
                model.policy.optimizer.zero_grad()
                model.loss(batch)[0].backward()
                grads = (p.grad.flatten() for p in model.policy.parameters_of("current").values() if p.grad is not None)
                found.append(torch.cat(list(grads)))
        return torch.stack(found)

    apart, paired = gradients(False), gradients(True)
    noise = [(g - g.mean(0)).square().sum(1).mean() for g in (apart, paired)]
    assert noise[1] < share * noise[0]
    off = (apart.mean(0) - paired.mean(0)).square().sum()
    assert off < 4 * (noise[0] + noise[1]) / 300 < 0.05 * apart.mean(0).square().sum()


@pytest.mark.parametrize("settings", [{}, {"paired_noise": True}])
def test_a_run_by_priority_resumes_exactly(tmp_path, settings):
    whole, first = make("orw_w2", priority=0.8, **settings), make("orw_w2", priority=0.8, **settings)
    whole.learn(64)
    first.learn(32)
    first.save(tmp_path / "half")
    second = flowrl.ORWCFMW2.load(tmp_path / "half", device=DEVICE)
    second.learn(32, reset_num_timesteps=False)
    for name, parameter in whole.policy.parameters_of("current").items():
        assert torch.equal(parameter, second.policy.parameters_of("current")[name])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("orw_w2", {"priority": 1.0}, "priority must be at least 0 and less than 1, not 1.0"),
        ("nft", {"priority": -0.1}, "priority must be at least 0"),
        ("nft", {"priority": 0.5, "coupling": "ot"}, "leave priority at 0 with it"),
        ("raft", {"priority": 0.5}, "raft itself chooses which samples a pass takes"),
        ("raft", {"paired_noise": True}, "raft itself chooses which samples a pass takes"),
        ("nft", {"paired_noise": True, "coupling": "rectified"}, "leave paired_noise off with it"),
        ("orw_w2", {"paired_noise": True, "batch_size": 15}, "takes two samples at once: batch_size = 15 is odd"),
    ],
)
def test_what_cannot_be_says_why(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)
