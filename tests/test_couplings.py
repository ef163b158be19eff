"""How noise is paired with samples, and which times are learnt from: closed forms, and rows that stay together."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import nn

import flowrl
from flowrl.envs.base import GenerationEnv
from flowrl.envs.gaussians import GaussianMixture, GaussiansEnv, LinearReward
from flowrl.errors import ConfigError
from flowrl.functional.endpoint import ROWS, endpoint_loss
from flowrl.functional.losses import squared_error
from flowrl.functional.transport import conditional_permutation, ot_permutation
from flowrl.models.base import VelocityModel
from flowrl.models.loading import source_of
from flowrl.training.noising import embedding_of
from flowrl.types import Batch, Condition, Contexts, Pair, RewardOutput

pytestmark = [pytest.mark.on_device, pytest.mark.filterwarnings("ignore:coupling 'rectified'")]

SMALL: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "rollout_steps": 4, "group_size": 4}


def make(name: str, env: Any = "gaussians-linear", **settings: Any) -> Any:
    return flowrl.algorithm_class(name)("FlowPolicy", env, seed=0, device=DEVICE, **{**SMALL, **settings})


class Goal(nn.Module):
    """A velocity that depends on a point given as the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat([x, goal, t[:, None]], dim=1))


class GoalFlow(VelocityModel):
    """A flow in the plane whose contexts are points of it."""

    latent_shape = sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.network = Goal()

    def encode(self, contexts: Contexts) -> Condition:
        return (torch.tensor(contexts, dtype=torch.float32),)


class Goals(GenerationEnv):
    """Five goals, near which samples are rewarded."""

    def __init__(self) -> None:
        goals = [(-2.0, 0.0), (-1.9, 0.0), (0.0, 1.0), (2.0, 0.0), (2.0, 0.1)]
        super().__init__(source_of(GoalFlow, sample_shape=(2,)), goals, low=-10, high=10, name="goals")

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        return RewardOutput(-(samples - torch.tensor(contexts).to(samples)).norm(dim=1))


def cost(x_0: torch.Tensor, x_1: torch.Tensor, c: torch.Tensor, weight: float, order: Any) -> float:
    """Total cost of a coupling by the definition."""
    order = torch.as_tensor(order)
    distances = (x_0[order] - x_1).square().mean(1) + weight * (c[order] - c).square().sum(1)
    return float(distances.sum())


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_conditional_transport_costs_least_of_all_permutations(weight: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x_0, x_1, c = (torch.randn(6, n, generator=g) for n in (3, 3, 2))
    x_1 = 3 * x_1 + 5
    found = conditional_permutation(x_0, x_1, c, weight, torch.zeros(6, dtype=torch.long))
    best = min(itertools.permutations(range(6)), key=lambda order: cost(x_0, x_1, c, weight, order))
    assert cost(x_0, x_1, c, weight, found) == pytest.approx(cost(x_0, x_1, c, weight, best), rel=1e-6)


def test_conditional_transport_lies_between_plain_transport_and_that_within_contexts() -> None:
    """Without weight it is the monotone map over all contexts, with a large one that of each context."""
    ids = torch.randint(0, 3, (90,), device=DEVICE)
    x_0, x_1 = torch.randn(90, 1, device=DEVICE), torch.randn(90, 1, device=DEVICE) + ids[:, None]
    c, together = torch.eye(3, device=DEVICE)[ids], torch.zeros_like(ids)
    plain = conditional_permutation(x_0, x_1, c, 0.0, together)
    assert torch.equal(x_0[plain].argsort(0), x_1.argsort(0))
    within = conditional_permutation(x_0, x_1, c, 1e6, together)
    assert torch.equal(within, ot_permutation(x_0, x_1, ids))
    shares = [
        float((ids[conditional_permutation(x_0, x_1, c, w, together)] == ids).double().mean()) for w in (0.0, 0.3, 3.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < 1
    apart = conditional_permutation(x_0, x_1, c, 0.0, ids)  # noise never passes from one number to another
    assert torch.equal(apart, within)


def test_without_conditions_conditional_transport_is_the_plain_one() -> None:
    x_0, x_1 = torch.randn(40, 2, device=DEVICE), torch.randn(40, 2, device=DEVICE)
    none = embedding_of((), 1).to(DEVICE)[torch.zeros(40, dtype=torch.long)]
    together = torch.zeros(40, dtype=torch.long, device=DEVICE)
    ours = conditional_permutation(x_0, x_1, none, 5.0, together)
    assert torch.equal(ours, ot_permutation(x_0, x_1, together))


def test_embeddings_are_one_apart_in_the_mean() -> None:
    tokens, pooled, label = torch.randn(7, 5, 3), 9 * torch.randn(7, 4), torch.tensor([3, 3, 1, 0, 1, 2, 9])
    for condition in ((pooled,), (tokens, pooled), (label,), (label, pooled)):
        distances = torch.cdist(embedding_of(condition, 7), embedding_of(condition, 7)).square()
        assert float(distances.sum() / (7 * 6)) == pytest.approx(1)
    c = embedding_of((tokens,), 7)
    ratio = c / (tokens.double().mean(1))
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    labels = torch.cdist(embedding_of((label,), 7), embedding_of((label,), 7))
    assert labels[0, 1] == 0
    assert float(labels[0, 2]) == pytest.approx(float(labels[3, 6]))
    assert not embedding_of((pooled[:1],), 1).isnan().any()


def test_a_linear_flow_gives_straight_pairs() -> None:
    """Noise N(0, 1) to N(1, 1/4): x_1 = 1 + x_0 / 2, so u is known from x_t alone, and a weight changes nothing."""
    env = GaussiansEnv(GaussianMixture([[1.0]], [[[0.25]]]), LinearReward((1.0,)))
    model = make("orw_w2", env, coupling="rectified", target="plain", solver="rk4", rollout_steps=32, n_samples=256)
    model.learn(256)
    rollout = model.buffer.all()
    x_0 = rollout.extra["x_0"]
    torch.testing.assert_close(rollout.x_1, 1 + x_0 / 2, atol=1e-3, rtol=0)
    batch, noise = model.couple(rollout)
    pair = model.pair(batch, noise)
    assert torch.equal(pair.u, batch.x_1 - x_0)
    t = pair.t[:, None]
    straight = 1 - 0.5 * (pair.x_t - t) / (1 - t / 2)  # of the only pair that passes there
    torch.testing.assert_close(pair.u, straight, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("orw_w2", {}), ("orw_w2", {"target": "plain"}), ("raft", {}), ("nft", {"noisings": 3}), ("kl", {})],
)
def test_a_sample_keeps_the_noise_that_it_came_from(name: str, settings: dict[str, Any]) -> None:
    settings = {"learning_rate": 1e-12, "rollout_batch_size": 16, **settings}  # samples can be drawn again
    model = make(name, coupling="rectified", **settings)
    pairs = []
    pair = model.pair
    model.pair = lambda batch, x_0=None, t=None: (pairs.append((batch, pair(batch, x_0, t))), pairs[-1][1])[1]
    model.learn(32)
    assert len(pairs) >= (1 if name == "raft" else 2)
    for batch, made in pairs:
        again = model.policy.sample_latents(batch.context_ids, role="reference", x_0=made.x_0)
        torch.testing.assert_close(again, batch.x_1, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(made.u, batch.x_1 - made.x_0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = make(name, **settings)
    other.learn(32)
    torch.testing.assert_close(other.buffer.all().x_1, model.buffer.all().x_1)  # the same are drawn, noise is kept


def test_what_stands_in_for_a_sample_brings_its_own_noise() -> None:
    class Failing(GaussiansEnv):
        def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
            if bool((samples[:, 0] > 1.2).any()):
                raise ValueError("no")
            return super().reward(samples, contexts)

    env = Failing(GaussianMixture([[0.0, 0.0]], torch.eye(2)), LinearReward((1.0, 0.0)))
    model = make("rvm", env, coupling="rectified", on_reward_error="drop", max_dropped=0.5, learning_rate=1e-12)
    model.learn(32)
    rollout = model.buffer.all()
    assert model.n_dropped > 0
    assert len(rollout.x_1.unique(dim=0)) == 32 - model.n_dropped
    again = model.policy.sample_latents(rollout.context_ids, role="reference", x_0=rollout.extra["x_0"])
    torch.testing.assert_close(again, rollout.x_1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("coupling", ["ot", "c2ot"])
@pytest.mark.parametrize("name", ["nft", "adrpo"])
def test_transport_of_advantages_keeps_their_pull_and_the_noise_normal(name: str, coupling: str) -> None:
    """Samples N(0, 1) with A = x: E[A x_1] = 1 and E[A x_0] = 0; noise in order with samples of either sign."""
    model = make(name, GaussiansEnv(GaussianMixture([[0.0]], [[[1.0]]]), LinearReward((1.0,))), coupling=coupling)
    pull, tilt, signs = [], [], []
    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(40):
        x_1 = torch.randn(256, 1, generator=generator, device=DEVICE)
        rows = torch.arange(256, device=DEVICE)
        batch, pair = model.noised(Batch(x_1, torch.zeros_like(rows), x_1[:, 0], x_1[:, 0], rows))
        a = batch.advantage
        torch.testing.assert_close(a.abs(), x_1.abs().mean().expand(256))
        assert torch.equal(a.sign(), batch.x_1[:, 0].sign())
        for side in (a > 0, a < 0):
            ordered = batch.x_1[side][pair.x_0[side][:, 0].argsort()]
            assert bool((ordered.diff(dim=0) >= 0).all())
        pull.append((a * batch.x_1[:, 0]).mean())
        tilt.append((a * pair.x_0[:, 0]).mean())
        signs.append((a > 0).double().mean())
    assert float(torch.stack(pull).mean()) == pytest.approx(1, abs=0.05)
    assert float(torch.stack(tilt).mean()) == pytest.approx(0, abs=0.05)
    assert float(torch.stack(signs).mean()) == pytest.approx(0.5, abs=0.03)


def test_weights_that_are_all_zero_couple_all_the_same() -> None:
    model = make("nft", coupling="ot")
    nothing, rows = torch.zeros(16, device=DEVICE), torch.arange(16, device=DEVICE)
    batch, pair = model.noised(Batch(torch.randn(16, 2, device=DEVICE), 0 * rows, nothing, nothing, rows))
    assert not batch.advantage.any()
    assert bool(pair.u.isfinite().all())


def test_contexts_that_are_alike_share_their_noise() -> None:
    """Goals 0 and 1, and 3 and 4, lie nearly together: noise passes between these, not across the plane."""
    model = make("orw", Goals(), coupling="c2ot", context_weight=20.0, target="plain", n_samples=60, batch_size=60)
    assert torch.equal(model.embedding(), model.embedding())
    ids = torch.arange(60, device=DEVICE) % 5
    moved: set[tuple[int, int]] = set()
    noise, kept = model.policy.noise, []
    model.policy.noise = lambda n, generator=None: (kept.append(noise(n, generator)), kept[-1])[1]
    for _ in range(10):
        kept.clear()
        state = model.generator.get_state()
        batch, x_0 = model.couple(Batch.of(torch.randn(60, 2, device=DEVICE), ids)._replace(coefficient=ids * 0 + 1.0))
        model.generator.set_state(state)
        model.policy.noise(60, model.generator)
        index = torch.multinomial(torch.ones(60, device=DEVICE), 60, replacement=True, generator=model.generator)
        assert torch.equal(ids[index], batch.context_ids)
        from_row = (x_0[:, None] == kept[0][None]).all(2).double().argmax(1)
        moved |= set(zip(ids[index][from_row].tolist(), batch.context_ids.tolist()))
    assert {(0, 1), (1, 0), (3, 4), (4, 3)} < moved
    assert moved <= {(i, j) for group in ((0, 1), (2,), (3, 4)) for i in group for j in group}
    make("orw", Goals(), coupling="c2ot", target="plain").learn(32)


RESUMED = {
    "c2ot": ("orw_w2", {"coupling": "c2ot", "target": "plain", "context_weight": 0.5}),
    "ot, advantages": ("ram", {"coupling": "ot", "noisings": 2}),
    "rectified": ("nft", {"coupling": "rectified"}),
    "rectified, plain": ("rwr", {"coupling": "rectified", "mode": "online"}),
    "times": ("orw_w2", {"time_weighting": "variance", "max_time": 0.7}),
    "fewer": ("tilt", {"draw_steps": 1, "trained_parameters": ("layer",), "pool": 80}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_as_if_it_had_not_stopped(case: str, tmp_path: Path) -> None:
    name, settings = RESUMED[case]
    whole, part = (make(name, Goals(), **settings) for _ in range(2))
    whole.learn(96)
    part.learn(64)
    part.save(tmp_path / "saved")
    again = type(part).load(tmp_path / "saved", env=Goals(), device=DEVICE)
    again.learn(32, reset_num_timesteps=False)
    ours, theirs = (model.policy.parameters_of("current") for model in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("orw_w2", {"coupling": "rect"}, "coupling must be one of independent, ot, c2ot, rectified, not 'rect'"),
        ("orw_w2", {"coupling": "c2ot"}, "'c2ot' draws samples by their weight"),
        ("nft", {"coupling": "c2ot", "context_weight": -1.0}, "context_weight must not be negative"),
        ("rwr", {"coupling": "rectified", "data": "given"}, "no noise that given samples come from"),
        ("rvm", {"max_time": 0.0}, "max_time must be in"),
        ("awm", {"draw_steps": -1}, "draw_steps must not be negative"),
        ("ram", {"time_weighting": "even"}, "time_weighting must be one of none, variance, not 'even'"),
    ],
)
def test_settings_without_meaning_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)


@pytest.mark.filterwarnings("default:coupling 'rectified'")
def test_it_is_told_that_straightening_hides_the_reward() -> None:
    with pytest.warns(UserWarning, match="the reward moves it only where paths cross"):
        make("orw_w2", coupling="rectified")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("orw_w2", {"baseline": "clipped"}), ("orw_w2", {"target": "plain"}), ("rvm", {"critic_learning_rate": 0.0})],
)
def test_times_are_weighed_and_end_at_the_largest(name: str, settings: dict[str, Any]) -> None:
    """The loss by hand, with weights of time that are known: of every sample's whole loss."""
    model = make(name, time_weighting="variance", max_time=0.6, learning_rate=1e-12, **settings)
    model.learn(32)
    seen: dict[str, torch.Tensor] = {}

    def weight(pair: Pair, base: torch.Tensor, importance: torch.Tensor | float) -> torch.Tensor:
        seen.update(t=pair.t, noise=squared_error(pair.u, base))
        return 1 + pair.t

    assert model.noise_at[1].sum() == 32
    model.time_weight = weight
    batch, state = model.buffer.all(), model.generator.get_state()
    loss, _ = model.loss(batch)
    model.generator.set_state(state)
    pair = model.noised(batch)[1] if name == "rvm" else model.pair(batch, model.couple(batch)[1])
    assert torch.equal(seen["t"], pair.t)
    assert float(pair.t.max()) <= 0.6
    assert float(pair.t.max()) > 0.4
    v, v_ref = model.velocity(pair), model.velocity(pair, "reference").detach()
    torch.testing.assert_close(seen["noise"], squared_error(pair.u, v_ref))  # nothing has moved: all roles agree
    if name == "rvm":
        row = ROWS["rvm"](0.0, 1.0, 0.1)
        velocities: Any = {"current": v, "reference": v_ref, "behaviour": v_ref}
        expected = endpoint_loss(v, row.gradient(pair.u, batch.advantage, velocities, 1 + pair.t))
    else:
        w, b = batch.weight, torch.minimum(batch.weight + model.config.alpha, batch.weight.mean())
        fit = squared_error(v, pair.u)
        expected = (1 + pair.t) * ((w if "target" in settings else w - b) * fit)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("coupling", ["ot", "c2ot"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_advantages_that_are_not_finite_are_left_out_where_samples_are_drawn_by_them(
    coupling: str, value: float
) -> None:
    """Not only the samples that carry them: all of the step, as without a coupling."""
    model = make("awm", coupling=coupling)
    model.learn(32)
    before = [p.clone() for p in model.policy.parameters_of("current").values()]
    model.advantage = lambda rollout: torch.where(rollout.reward > rollout.reward.min(), rollout.reward, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(32, reset_num_timesteps=False)
    after = model.policy.parameters_of("current").values()
    assert all(p.isfinite().all() for p in after)
    assert not all(torch.equal(p, q) for p, q in zip(before, after))
    assert model.bad_updates.total == 1
    assert [str(one.message)[:34] for one in caught] == ["1 gradient steps were left out: th"]
