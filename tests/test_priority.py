"""Priority: how often passes take samples, and that importance weights leave every gradient as it is in the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError
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


def test_a_run_by_priority_resumes_exactly(tmp_path):
    whole, first = make("orw_w2", priority=0.8), make("orw_w2", priority=0.8)
    whole.learn(64)
    first.learn(32)
    first.save(tmp_path / "half")
    second = flowrl.ORWCFMW2.load(tmp_path / "half")
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
    ],
)
def test_what_cannot_be_says_why(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)
