"""Algorithms against closed forms (docs/algorithms.md, C1 to C7): not "reward goes up" but the exact answer."""

from __future__ import annotations

import math

import pytest
import small_pipelines
import torch
from conftest import DEVICE
from toys import RATE, narrow, narrow_linear

import flowrl
from flowrl.envs.gaussians import GaussianMixture, LinearReward, eight_gaussians
from flowrl.errors import NonFiniteError
from flowrl.functional.flow import interpolate
from flowrl.functional.losses import (
    kl_time_weight,
    residual_baseline,
    residual_weighted_loss,
    reward_weighted_loss,
    squared_errors,
)
from flowrl.functional.metrics import wasserstein2
from flowrl.types import Batch

pytestmark = pytest.mark.on_device

N = 1200  # points in a comparison by optimal transport, which takes the cube of it


def trained(cls, env, iterations, *, refresh_every=1, n_samples=1024, n_epochs=8, seed=0, **settings):
    """An algorithm after `iterations`, with raw weights, exact tilts and a second-order sampler."""
    config = cls.Config(
        weight_normalisation="none",
        n_samples=n_samples,
        batch_size=512,
        n_epochs=n_epochs,
        rollout_steps=6,
        solver="midpoint",
        ema_decay=0.98,
        refresh_every=refresh_every,
        **{"baseline": "mean", "learning_rate": 1e-3, **settings},
    )
    model = cls("FlowPolicy", env, config=config, seed=seed, device=DEVICE)
    return model.learn(iterations * n_samples)


def assert_matches(model, exact):
    """W2 within 1.5 x of what equally many exact samples give against each other, plus 0.05."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    floor = wasserstein2(exact(N, generator), exact(N, generator))
    samples = model.policy.sample(n=N, steps=20, solver="midpoint")
    assert wasserstein2(samples, exact(N, generator)) <= 1.2 * floor + 0.05


def first_step_answer(base: GaussianMixture, tau: float, alpha: float):
    """Sampler of C3, `(e^{tau x} + alpha) q / (Z + alpha)`: a mixture of the tilted and the base mixture."""
    tilted = base.tilt(tau, linear=(1.0, 0.0))
    mean, variance = base.means[:, 0], base.covariances[:, 0, 0]
    z = (base.weights * (tau * mean + tau**2 * variance / 2).exp()).sum().item()

    def exact(n, generator):
        from_tilted = torch.rand(n, generator=generator) < z / (z + alpha)
        return torch.where(from_tilted[:, None], tilted.sample(n, generator), base.sample(n, generator))

    return exact


@pytest.mark.parametrize("target", ["plain", "residual"])
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_one_step_with_penalty_gives_the_flattened_tilt(target, lora_rank):
    env = narrow_linear()
    settings = {"lora_rank": lora_rank, "learning_rate": RATE, "refresh_every": 10**6}
    model = trained(flowrl.ORWCFMW2, env, 10, tau=0.5, alpha=1.0, target=target, **settings)
    assert_matches(model, first_step_answer(env.mixture, tau=0.5, alpha=1.0))


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_refreshes_without_penalty_add_up_their_tilts(target):
    env = narrow_linear()
    settings = {"refresh_every": 10, "n_samples": 2048, "learning_rate": RATE}
    model = trained(flowrl.ORWCFM, env, 2 * 10, tau=0.4, target=target, **settings)
    tilted = env.mixture.tilt(2 * 0.4, linear=(1.0, 0.0))
    assert_matches(model, tilted.sample)


class LinearlyWeighted(flowrl.ORWCFMW2):
    """ORW-CFM-W2 whose weight is the (linear) reward itself, as C4 has it."""

    def weigh(self, rollout: Batch) -> torch.Tensor:
        return rollout.reward


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_fixed_point_of_a_linear_weight(target):
    mean, variance, a, b, alpha = 0.5, 1.0, 0.3, 0.6, 0.5
    env = narrow(GaussianMixture([[mean]], [[variance]]), LinearReward((a,), b))
    settings = {"refresh_every": 3, "n_epochs": 4, "learning_rate": RATE}
    model = trained(LinearlyWeighted, env, 15 * 3, alpha=alpha, target=target, **settings)
    expected = GaussianMixture([[mean + variance * a / alpha]], [[variance]])
    assert_matches(model, expected.sample)
    samples = model.policy.sample(n=8000, steps=20, solver="midpoint")
    assert samples.mean().item() == pytest.approx(1.1, abs=0.08)
    assert samples.std().item() == pytest.approx(1.0, abs=0.08)


def minimiser_on_a_grid(target: str, alpha: float) -> tuple[torch.Tensor, ...]:
    """At t = 1/2 in bins of x: free minimiser of the loss, C1, and C1 with the residual target's own error term."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    mixture = GaussianMixture([[-1.0], [1.5]], [[[0.3]], [[0.2]]], [0.4, 0.6])
    n, t = 400_000, torch.full((400_000,), 0.5)
    x_1 = mixture.sample(n, generator)
    x_t, u = interpolate(torch.randn(n, 1, generator=generator), x_1, t)
    weight = (0.7 * x_1[:, 0]).exp()
    v_old, v_ref = mixture.velocity(t, x_t), mixture.velocity(t, x_t) + 0.5
    bins = torch.bucketize(x_t[:, 0], torch.linspace(-1.0, 1.2, 23)).long()
    v = torch.zeros(24, requires_grad=True)
    penalty = torch.full((n,), alpha)
    at = v[bins][:, None]
    if target == "plain":
        loss = reward_weighted_loss(squared_errors(at, u, v_ref), weight, penalty).sum()
    else:
        loss = residual_weighted_loss(squared_errors(at, u, v_old, v_ref), weight, weight.mean(), penalty).sum()
    (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), v)  # bins do not interact: one Newton step is exact
    minimiser = (v - gradient / curvature).detach()

    def mean(values):
        return (torch.zeros(24).index_add_(0, bins, values) / torch.bincount(bins, minlength=24))[1:-1]

    m, w = mean(weight * u[:, 0]), mean(weight)
    c1 = (m + alpha * mean(v_ref[:, 0])) / (w + alpha)
    own_error = weight.mean() * (mean(v_old[:, 0]) - mean(u[:, 0])) / (w + alpha)  # zero but for sampling noise
    return minimiser[1:-1], c1, c1 + own_error


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_pointwise_minimiser(alpha):
    plain, c1, _ = minimiser_on_a_grid("plain", alpha)
    torch.testing.assert_close(plain, c1, atol=1e-3, rtol=0)
    residual, c1, with_own_error = minimiser_on_a_grid("residual", alpha)
    torch.testing.assert_close(residual, with_own_error, atol=1e-3, rtol=0)
    assert (residual - c1).abs().mean() < 0.03


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_errors_of_the_field_grow_with_the_mean_baseline_only(alpha):
    """What v_old has too much comes back E[b | x] / (E[w | x] + alpha) times as large; 1-D, t = 0.9, by regression."""
    n, t = 200_000, 0.9
    x_1 = torch.randn(n, 1)
    x_t, u = interpolate(torch.randn(n, 1), x_1, torch.full((n,), t))
    w = (0.8 * x_1[:, 0]).exp()
    w = w / w.mean()
    bins = torch.bucketize(x_t[:, 0], torch.linspace(-1.5, 1.5, 11))
    zero = torch.zeros_like(u)
    largest = {}
    for kind in ("mean", "clipped"):
        penalty, minimisers = torch.full((n,), alpha), []
        b = residual_baseline(w, w.mean(), penalty, kind)
        for v_old in (zero, zero + 1):
            v = torch.zeros(12, requires_grad=True)
            loss = residual_weighted_loss(squared_errors(v[bins][:, None], u, v_old, zero), w, b, penalty).sum()
            (gradient,) = torch.autograd.grad(loss, v, create_graph=True)
            (curvature,) = torch.autograd.grad(gradient.sum(), v)
            minimisers.append((v - gradient / curvature).detach())
        largest[kind] = (minimisers[1] - minimisers[0]).max().item()
    assert largest["mean"] > 1.5
    assert largest["clipped"] <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("baseline", "bounded"), [("clipped", True), ("mean", False)])
def test_many_refreshes(baseline, bounded):
    """60 refreshes with alpha + w < 1 for many samples: exact tilts run away in the end, clipped ones stay."""
    settings = {"tau": 0.5, "alpha": 0.3, "learning_rate": 1e-3, "n_epochs": 2, "rollout_steps": 8}
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, baseline=baseline, **settings)
    try:
        model.learn(60 * 512)
    except NonFiniteError:  # what running away comes to
        assert not bounded
        return
    result = flowrl.evaluate(model, n_samples=512)
    assert (result.drift < 2) == bounded
    assert (result.reward_mean > result.reference.reward_mean + 0.5) == bounded


def test_flattened_weight_example():
    """The number given for C3: q = N(0, 1), w = e^x, alpha = 1 has mean 0.6225."""
    z = math.exp(0.5)
    assert z / (z + 1) * 1.0 == pytest.approx(0.6225, abs=1e-4)
    env = narrow(GaussianMixture([[0.0]], [[1.0]]), LinearReward((1.0,)))
    settings = {"target": "plain", "refresh_every": 10**6, "learning_rate": RATE}
    model = trained(flowrl.ORWCFMW2, env, 15, tau=1.0, alpha=1.0, **settings)
    assert model.policy.sample(n=8000, steps=20, solver="midpoint").mean().item() == pytest.approx(0.6225, abs=0.07)


def test_kl_penalty_integrates_to_the_exact_kl():
    p = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.6 * torch.eye(2), [0.3, 0.7])
    q = GaussianMixture([[-0.5, 0.3], [1.0, -0.5]], 0.8 * torch.eye(2), [0.6, 0.4])
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = p.sample(200_000, generator)
    exact = (p.log_prob(x) - q.log_prob(x)).mean().item()
    t = (torch.arange(400_000) + 0.5) / 400_000  # stratified
    x_t, _ = interpolate(torch.randn(len(t), 2, generator=generator), p.sample(len(t), generator), t)
    difference = (p.velocity(t, x_t) - q.velocity(t, x_t)).square().sum(1)
    assert (kl_time_weight(t) * difference).mean().item() == pytest.approx(exact, rel=0.03)


def test_orw_kl_weights_the_same_penalty_by_time():
    model = flowrl.ORWCFMKL("FlowPolicy", "gaussians-linear", alpha=0.7, seed=0, device=DEVICE)
    t = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(model.penalty(t), 0.7 * torch.tensor([1 / 3, 1.0, 3.0]))


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_the_loss_is_that_of_the_three_networks(target):
    """Eq. 12 and its residual form, each term with the network it names, on the noise and times that were drawn."""
    model = flowrl.ORWCFMW2(
        "FlowPolicy",
        "gaussians-linear",
        target=target,
        alpha=0.7,
        refresh_every=2,
        **({"baseline": "mean"} if target == "residual" else {}),
        seed=0,
        device=DEVICE,
    )
    for role in ("current", "behaviour"):
        for weight in model.policy.parameters_of(role).values():
            weight.data.add_(0.05 * torch.randn_like(weight))
    x_1, w, contexts = torch.randn(512, 2), torch.rand(512), torch.zeros(512, dtype=torch.long)
    model.buffer.add(x_1, contexts, w)
    model.buffer.coefficient.copy_(w)
    model.generator.manual_seed(3)
    loss, metrics = model.loss(model.buffer.all())
    model.generator.manual_seed(3)
    x_0, t = model.policy.noise(512, model.generator), torch.rand(512, generator=model.generator)
    x_t, u = (1 - t)[:, None] * x_0 + t[:, None] * x_1, x_1 - x_0

    def distance(role, other):
        return (model.policy.velocity(x_t, t, (), role) - other).square().mean(1)

    fit, drift = distance("current", u), distance("current", model.policy.velocity(x_t, t, (), "reference"))
    if target == "residual":
        own = distance("current", model.policy.velocity(x_t, t, (), "behaviour"))
        expected = (w - w.mean()) * fit + w.mean() * own + 0.7 * drift
    else:
        expected = w * fit + 0.7 * drift
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert metrics["drift"].item() == pytest.approx(drift.mean().item(), rel=1e-4)
    assert metrics["fit"].item() == pytest.approx((w * fit).mean().item(), rel=1e-4)


def reward_signal(model: flowrl.ORWCFMW2) -> float:
    """Slope with which the loss pulls the velocity towards samples of higher reward, averaged over minibatches.

    The gradient of the fit with respect to a constant shift of v is `-2 E[w (u - v)]`. Samples have reward
    x[0] and the field of the unweighted samples; so its first coordinate shows whether weight and sample
    still belong together.
    """
    generator = torch.Generator(DEVICE).manual_seed(1)
    mixture, pulls = model.env.core.mixture, []
    for _ in range(40):
        x_1 = mixture.sample(256, generator)
        weight = (0.5 * x_1[:, 0]).exp()
        batch = Batch(x_1, torch.zeros(256, dtype=torch.long), x_1[:, 0], weight, torch.arange(256))
        batch, x_0 = model.couple(batch)
        pulls.append((batch.weight[:, None] * (batch.x_1 - x_0)).mean(0)[0] / batch.weight.mean())
    return torch.stack(pulls).mean().item()


class PairedAgain(flowrl.ORWCFMW2):
    """The published code's bug, on purpose: samples are re-paired after their weights were computed."""

    def couple(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        x_0 = self.policy.noise(len(batch.x_1), self.generator)
        order = torch.randperm(len(x_0), generator=self.generator)
        return batch._replace(x_1=batch.x_1[order]), x_0


def make_pairing(cls: type[flowrl.ORWCFMW2], coupling: str) -> flowrl.ORWCFMW2:
    return cls("FlowPolicy", "gaussians-linear", target="plain", coupling=coupling, seed=0, device=DEVICE)


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_the_loss_carries_the_reward(coupling):
    tilted = eight_gaussians().tilt(0.5, linear=(1.0, 0.0))
    exact = (tilted.weights @ tilted.means)[0].item()
    assert exact > 0.5
    assert reward_signal(make_pairing(flowrl.ORWCFMW2, coupling)) == pytest.approx(exact, abs=0.1)
    assert abs(reward_signal(make_pairing(PairedAgain, coupling="independent"))) < 0.1  # what the bug leaves


def test_optimal_transport_keeps_the_noise_standard_normal():
    """Weights are spent on drawing samples, so the noise paired with good samples is not tilted."""
    model = flowrl.ORWCFMW2(
        "FlowPolicy", "gaussians-linear", target="plain", coupling="ot", tau=2.0, seed=0, device=DEVICE
    )
    x_1 = model.env.core.mixture.sample(256, torch.Generator(DEVICE).manual_seed(1))
    weight = (2 * x_1[:, 0]).exp()
    weighted = []
    drawn = Batch(x_1, torch.zeros(256, dtype=torch.long), x_1[:, 0], weight / weight.mean(), torch.arange(256))
    for _ in range(20):
        batch, x_0 = model.couple(drawn)
        weighted.append((batch.weight[:, None] * x_0).mean(0))
    assert torch.stack(weighted).mean(0).abs().max() < 0.06


def constant_reward(images, prompts):
    return torch.ones(len(images))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A Stable Diffusion 3 of a few weights."""
    return small_pipelines.sd3(tmp_path_factory.mktemp("oracles") / "sd3")


def movement(pipeline, target: str, *, lora_rank: int = 0) -> float:
    """Largest change of samples at fixed noise after 8 refreshes of a pipeline with a constant reward."""
    flowrl.register_env("constant", flow=str(pipeline), prompts=small_pipelines.PROMPTS[:2])(constant_reward)
    model = flowrl.ORWCFMW2(
        "FlowPolicy",
        "constant",
        seed=0,
        device=DEVICE,
        target=target,
        alpha=0.1,
        tau=1.0,
        n_samples=8,
        group_size=4,
        batch_size=8,
        n_epochs=1,
        rollout_steps=2,
        ema_decay=0.0,
        lora_rank=lora_rank,
    )
    contexts, x_0 = torch.tensor([0, 1]), model.policy.noise(2)
    before = model.policy.sample_latents(contexts, x_0=x_0, steps=4)
    model.learn(8 * 8)
    assert model.iteration == 8
    return (model.policy.sample_latents(contexts, x_0=x_0, steps=4) - before).abs().max().item()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_constant_reward_does_not_move_the_residual_target(pipeline, lora_rank):
    assert movement(pipeline, "residual", lora_rank=lora_rank) <= 1e-6


@pytest.mark.filterwarnings("ignore:Nothing was learnt")
@pytest.mark.parametrize(("algo", "precision"), [("orw_w2", "float32"), ("dpok", "float32"), ("dpok", "bfloat16")])
def test_constant_reward_moves_no_weight_of_a_pipeline(pipeline, monkeypatch, algo, precision):
    """Roles are compared by passes of one size and type: the rest of a rounding is a full step of Adam's."""
    flowrl.register_env("constant", flow=str(pipeline), prompts=small_pipelines.PROMPTS[:2])(constant_reward)
    settings = {"n_samples": 8, "batch_size": 8, "n_epochs": 1, "rollout_steps": 3, "precision": precision}
    model = flowrl.algorithm_class(algo)("FlowPolicy", "constant", seed=0, device=DEVICE, **settings)
    flow, sizes = type(model.policy.model), []
    forward = flow.forward
    monkeypatch.setattr(flow, "rows_at_once", lambda self: 3)
    monkeypatch.setattr(flow, "forward", lambda self, x, *rest: sizes.append(len(x)) or forward(self, x, *rest))
    before = {name: weight.detach().clone() for name, weight in model.policy.parameters_of("current").items()}
    model.learn(8)
    assert all(torch.equal(before[name], weight) for name, weight in model.policy.parameters_of("current").items())
    sizes.clear()
    model.update()
    assert set(sizes) == {8 if algo == "orw_w2" else 16}  # with guidance, whose halves are one pass


def test_constant_reward_moves_the_plain_target(pipeline):
    assert movement(pipeline, "plain") > 1e-2


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_expected_gradient_of_a_constant_reward(target):
    """On a rough field v_old, the residual gradient vanishes exactly for each minibatch, the plain one does not."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x_1, x_0 = torch.randn(2, 64, 2, generator=generator)
    t = torch.rand(64, generator=generator)
    x_t, u = interpolate(x_0, x_1, t)
    v = (0.3 * x_t).requires_grad_()
    one, zero = torch.ones(64), torch.zeros(64)
    if target == "plain":
        loss = reward_weighted_loss(squared_errors(v, u), one, zero)
    else:
        loss = residual_weighted_loss(squared_errors(v, u, v.detach()), one, one.mean(), zero)
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert (gradient.abs().max().item() == 0) == (target == "residual")
