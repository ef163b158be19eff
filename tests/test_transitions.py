"""Methods on the steps of an SDE sampler: the sampler's law, step probabilities, and their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from torch import nn

import flowrl
from flowrl.envs.gaussians import GaussianMixture, GaussiansEnv, QuadraticReward, eight_gaussians
from flowrl.errors import ConfigError
from flowrl.functional.advantages import best_and_worst, best_of_groups, group_advantage
from flowrl.functional.flow import score
from flowrl.functional.losses import clip_fraction, clipped_objective
from flowrl.functional.metrics import wasserstein2
from flowrl.functional.sde import SDE, GaussianStep, sde_sample
from flowrl.functional.solvers import time_grid
from flowrl.types import Batch

pytestmark = pytest.mark.on_device

KINDS = [SDE("flow", 0.7), SDE("flow", math.sqrt(2)), SDE("constant", 0.7), SDE("cps", 0.6)]
ALGORITHMS = (flowrl.DDPO, flowrl.DPOK, flowrl.FlowGRPO)


def some_step(sde: SDE) -> tuple[torch.Tensor, ...]:
    x, v = torch.randn(64, 3), torch.randn(64, 3)
    t = torch.linspace(0.05, 0.85, 64)
    return x, v, t, t + 0.1


@pytest.mark.parametrize("sde", [SDE("flow", 0.7), SDE("constant", 0.7)])
def test_step_is_the_euler_step_of_the_sde(sde: SDE) -> None:
    """mean = x + h (v + g^2 s / 2), std = g sqrt(h)."""
    x, v, t, t_next = some_step(sde)
    g = 0.7 * ((1 - t) / t).sqrt() if sde.kind == "flow" else torch.full_like(t, 0.7)
    drift = v + (g**2 / 2)[:, None] * score(v, x, t)
    step = sde.step(v, x, t, t_next)
    torch.testing.assert_close(step.mean, x + 0.1 * drift, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.std, g * math.sqrt(0.1), atol=1e-5, rtol=1e-5)


def test_first_step_as_published() -> None:
    """At t = 0: mean = x (1 - a^2 / 2) + h v, std = a."""
    x, v = torch.randn(5, 2), torch.randn(5, 2)
    step = SDE("flow", 0.7).step(v, x, torch.zeros(5), torch.full((5,), 0.1))
    torch.testing.assert_close(step.mean, x * (1 - 0.7**2 / 2) + 0.1 * v)
    torch.testing.assert_close(step.std, torch.full((5,), 0.7))


def test_noise_of_sqrt_2_is_memoryless() -> None:
    x, v, t, t_next = some_step(SDE())
    drift = (SDE("flow", math.sqrt(2)).step(v, x, t, t_next).mean - x) / 0.1
    torch.testing.assert_close(drift, 2 * v - x / t[:, None], atol=1e-4, rtol=1e-4)


def test_cps_keeps_the_share_of_noise() -> None:
    """With the exact velocity of one pair the state keeps sigma = 1 - t: old and fresh noise add up to it."""
    x_0, x_1, t, t_next = torch.zeros(4, 2), torch.ones(4, 2), torch.full((4,), 0.3), torch.full((4,), 0.5)
    step = SDE("cps", 0.6).step(x_1 - x_0, 0.3 * x_1, t, t_next)
    torch.testing.assert_close(step.mean, 0.5 * x_1)
    kept = SDE("cps", 0.6).step(-torch.ones(4, 2), 0.7 * torch.ones(4, 2), t, t_next).mean  # noise of ones, data of 0
    torch.testing.assert_close(kept[:, 0] ** 2 + step.std**2, torch.full((4,), 0.25))


def test_log_probability_and_divergence_against_torch() -> None:
    step = GaussianStep(torch.randn(6, 2, 3), torch.rand(6) + 0.5)
    other = GaussianStep(torch.randn(6, 2, 3), step.std)
    x = torch.randn(6, 2, 3)
    laws = [torch.distributions.Normal(s.mean, s.std[:, None, None]) for s in (step, other)]
    torch.testing.assert_close(step.mean_log_prob(x), laws[0].log_prob(x).mean((1, 2)))
    torch.testing.assert_close(step.kl(other), torch.distributions.kl_divergence(*laws).mean((1, 2)))


def test_step_divergence_is_the_closed_form() -> None:
    """h / 2 (1 + a^2 / 2)^2 / g^2 |v - v_ref|^2."""
    x, v, t, t_next = some_step(SDE())
    v_ref, sde = torch.randn(64, 3), SDE("flow", 0.7)
    g = 0.7 * ((1 - t) / t).sqrt()
    expected = 0.1 / 2 * (1 + 0.7**2 / 2) ** 2 / g**2 * (v - v_ref).square().mean(1)
    kl = sde.step(v, x, t, t_next).kl(sde.step(v_ref, x, t, t_next))
    torch.testing.assert_close(kl, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("sde", KINDS, ids=str)
def test_sde_keeps_the_marginals(sde: SDE, generator: torch.Generator) -> None:
    """With the exact field and 100 steps the samples are those of the mixture, within sampling error."""
    mixture, n = eight_gaussians(), 2000
    x_0 = torch.randn(n, 2, generator=generator)
    samples, _, _ = sde_sample(lambda x, t: mixture.velocity(t, x), x_0, time_grid(100).to(DEVICE), sde, generator)
    floor = wasserstein2(mixture.sample(n, generator), mixture.sample(n, generator))
    assert wasserstein2(samples, mixture.sample(n, generator)) <= 1.5 * floor + 0.05


@pytest.mark.parametrize("sde", KINDS[:3], ids=str)
def test_sde_keeps_the_spread_of_a_gaussian(sde: SDE, generator: torch.Generator) -> None:
    """Too much or too little drift for the noise shows here first."""
    target = GaussianMixture([[1.0]], [[0.25]])
    x_0 = torch.randn(20_000, 1, generator=generator)
    samples, _, _ = sde_sample(lambda x, t: target.velocity(t, x), x_0, time_grid(200).to(DEVICE), sde, generator)
    assert samples.mean().item() == pytest.approx(1.0, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, rel=0.03)


def test_noise_only_in_the_window(generator: torch.Generator) -> None:
    seen = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t[0].item())
        return torch.ones_like(x)

    x_0 = torch.randn(3, 2, generator=generator)
    times = time_grid(10).to(DEVICE)
    x_1, states, log_prob = sde_sample(field, x_0, times, SDE(), generator, window=range(4, 6))
    assert states.shape == (3, 3, 2)
    assert log_prob.shape == (3, 2)
    torch.testing.assert_close(states[:, 0], x_0 + times[4])  # ODE before
    torch.testing.assert_close(x_1, states[:, -1] + 1 - times[6])  # and after
    assert len(seen) == 10


@pytest.mark.parametrize("window", [range(0), range(-1, 2), range(8, 10)])
def test_window_must_fit(window: range, generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match="can be noisy in steps 0 to 8"):
        sde_sample(lambda x, t: x, torch.ones(1, 1), time_grid(10).to(DEVICE), SDE(), generator, window)


@pytest.mark.parametrize("settings", [("flow", 0.0), ("cps", 1.5), ("brown", 0.5)])
def test_sde_settings(settings: tuple) -> None:
    with pytest.raises(ConfigError, match=r"noise_level|Unknown sde"):
        SDE(*settings)


def recorded(cls: type, env: str, **settings: object) -> flowrl.FlowAlgorithm:
    """An algorithm whose buffer holds a rollout, and that has made no update since."""
    model = cls("FlowPolicy", env, seed=0, device=DEVICE, **settings)
    model._setup_learn(1, None, True, "", False)
    _, callback = model._setup_learn(1, None, True, "", False)
    model.collect(callback)
    return model


VARIANTS = {
    "plain": {},
    "lora": {"lora_rank": 4},
    "ema": {"ema_decay": 0.9},
    "guided": {"guidance_scale": 2.0},
    "cps": {"sde": "cps"},
    "lora, guided, lagging": {"lora_rank": 4, "guidance_scale": 3.0, "refresh_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_log_probability_is_the_stored_one(variant: str) -> None:
    """So every ratio is 1 before the first update, whatever the batch, the adapters or the guidance."""
    settings = {"n_samples": 8, "group_size": 4, "rollout_steps": 4, **VARIANTS[variant]}
    model = recorded(flowrl.FlowGRPO, "sd3-count", **settings)
    for batch_size in (1, 5, 24):
        for batch in model.buffer.batches(model.order(), batch_size):
            with torch.no_grad():
                steps = model.recorded(batch)
                step = model.step(steps, batch.context_ids)
            torch.testing.assert_close(step.mean_log_prob(steps.x_next), steps.log_prob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_minibatches_hold_every_step_once(cls: type) -> None:
    model = recorded(cls, "gaussians-linear", n_samples=32, batch_size=50, group_size=8)
    batches = list(model.minibatches())
    steps = torch.cat([model.recorded(b).k for b in batches])
    assert torch.bincount(steps).tolist() == [32] * 9
    starts = torch.cat([model.recorded(b).x_k for b in batches])[steps == 8]
    assert len(starts.unique(dim=0)) == 32
    times = model.policy.times()
    last = model.buffer.rows["states"][:, -1]
    t = times[9].expand(32)
    with torch.no_grad():
        x_1 = last + (1 - times[9]) * model.policy.velocity(last, t, ())
    torch.testing.assert_close(x_1, model.buffer.x_1)


class Shift(nn.Module):
    """Exact field of N(0, 1/4) plus a parameter times 1 - t before `until`."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until
        self.b = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        base = GaussianMixture([[0.0]], [[0.25]]).velocity(t, x)
        return base + (self.b * (1 - t) * (t < self.until))[:, None]


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (flowrl.DDPO, {}),
        (flowrl.DDPO, {"variant": "sf"}),
        (flowrl.DPOK, {"critic": False, "beta": 0.0, "standardise": "none"}),
        (flowrl.FlowGRPO, {"beta": 0.0, "group_size": 10}),
    ],
)
def test_policy_gradient_is_the_gradient_of_the_expected_reward(cls: type, own: dict) -> None:
    """Against finite differences over the same noise, on a 1-D flow; the last step, which has no noise, is fixed."""
    n, n_steps = 40_000, 5
    until = time_grid(n_steps).to(DEVICE)[-2].item()
    env = GaussiansEnv(
        GaussianMixture([[0.0]], [[0.25]]), QuadraticReward(((1.0,),), (1.0,)), flow=lambda: Shift(until)
    )
    settings = {"n_samples": n, "rollout_steps": n_steps, "batch_size": 10**6}
    model = recorded(cls, env, **settings, **own)
    reward = model.buffer.reward
    model.buffer.coefficient.copy_(reward - reward.mean())  # the plain advantage, not each method's scaling of it
    (batch,) = model.minibatches()
    loss, _ = model.loss(batch)
    (gradient,) = torch.autograd.grad(loss, model.policy.model.network.b)
    estimate = -gradient.item() * (n_steps - 1)  # the loss is a mean over steps, the gradient a sum
    per_sample = 0.6 * n_steps / math.sqrt(n)  # generous: |A| |d log p| is of order one per step

    def expected(b: float) -> torch.Tensor:
        field = Shift(until)
        field.b.data.fill_(b)
        with torch.no_grad():
            x_0 = torch.randn(n, 1, generator=(generator := torch.Generator(DEVICE).manual_seed(1)))
            x_1, _, _ = sde_sample(field, x_0, time_grid(n_steps).to(DEVICE), SDE("flow", 0.7), generator)
        return -0.5 * (x_1 - 1).square().mean()

    difference = ((expected(0.35) - expected(0.25)) / 0.1).item()
    assert difference > 0.2
    assert estimate == pytest.approx(difference, abs=3 * per_sample)


def test_clipped_objective_by_hand() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    assert clipped_objective(ratio, advantage, 0.2).tolist() == pytest.approx([-0.5, -1.0, -1.2, 0.8, 1.5])
    assert clip_fraction(ratio, 0.2).item() == pytest.approx(0.8)


def test_group_advantage_by_hand() -> None:
    reward = torch.tensor([1.0, 9.0, 5.0, 5.0, 7.0])  # the first group's standard deviation is 4
    expected = [-1.0, 1.0, 0.0, 0.0, 0.0]
    group = torch.tensor([0, 0, 1, 1, 2])
    assert group_advantage(reward, group).tolist() == pytest.approx(expected, abs=1e-3)
    order = torch.tensor([4, 2, 0, 3, 1])  # groups are an index, wherever their samples lie
    mixed = group_advantage(reward[order], group[order])
    assert mixed.tolist() == pytest.approx([expected[i] for i in order], abs=1e-3)
    assert group_advantage(torch.tensor([0.0] * 99 + [1.0]), torch.zeros(100, dtype=torch.long)).max() == 5.0


def test_best_of_groups_by_hand() -> None:
    reward = torch.tensor([1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    assert best_of_groups(reward, group).tolist() == [False, True, False, True, False, False, True]
    assert best_of_groups(reward, group, 2).tolist() == [False, True, True, True, True, False, True]
    order = torch.tensor([6, 1, 3, 0, 5, 2, 4])
    mixed = best_of_groups(reward[order], group[order], 2)
    assert mixed.tolist() == [[False, True, True, True, True, False, True][i] for i in order]


def test_pairs_are_the_best_and_the_worst_of_a_group() -> None:
    """By hand; a group that agrees and a group of one have no preference."""
    reward = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 0.0, 7.0, 8.0])
    group = torch.tensor([0, 0, 0, 4, 4, 5, 2, 2])
    assert best_and_worst(reward, group).tolist() == [[1, 0], [7, 6]]
    assert best_and_worst(torch.ones(4), torch.tensor([0, 0, 1, 1])).shape == (0, 2)


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (flowrl.DDPO, {}),
        (flowrl.DPOK, {"beta": 0.5, "critic": False, "reward_weight": 2.0}),
        (flowrl.DPOK, {"beta": 0.5, "reward_weight": 2.0}),
        (flowrl.FlowGRPO, {"beta": 0.5, "group_size": 8}),
    ],
)
def test_losses_by_hand(cls: type, own: dict) -> None:
    """Away from the policy that drew the samples, by laws of torch and a plain minimum."""
    model = recorded(cls, "gaussians-linear", n_samples=64, clip_range=0.05, **own)
    weights = [*model.policy.parameters_of("current").values()]
    weights += model.critic.module.parameters() if cls is flowrl.DPOK else []
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.02 * torch.randn_like(weight))
        (batch,) = model.buffer.batches(model.order(), 10**6)
        steps, advantage = model.recorded(batch), batch.advantage
        now, reference = (model.step(steps, batch.context_ids, role) for role in ("current", "reference"))
        now, reference = (torch.distributions.Normal(law.mean, law.std[:, None]) for law in (now, reference))
        ratio = (now.log_prob(steps.x_next).mean(1) - steps.log_prob).exp()
        kl = torch.distributions.kl_divergence(now, reference).mean(1)
        if own.get("critic", cls is flowrl.DPOK):
            advantage = advantage - model.critic(steps.x_k, model.policy.times()[steps.k], batch.context_ids)
        advantage = advantage.clamp(-5, 5)
    assert (ratio - 1).abs().max() > 0.1
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
    expected = (own.get("beta", 0.0) * kl - own.get("reward_weight", 1.0) * objective).mean()
    loss, metrics = model.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
    assert metrics["clip_fraction"].item() == pytest.approx(((ratio - 1).abs() > 0.05).float().mean().item(), abs=0.01)


def batch_of(context_ids: torch.Tensor, reward: torch.Tensor) -> Batch:
    """Samples without anything but contexts and rewards."""
    n = len(reward)
    return Batch(torch.zeros(n, 1), context_ids, reward, torch.ones(n), torch.arange(n))


def test_ddpo_statistics_are_those_of_all_rewards_of_a_context() -> None:
    model = flowrl.DDPO("FlowPolicy", "sd3-count", seed=0, device=DEVICE, n_samples=8)
    contexts, rewards = torch.randint(3, (5, 40)), torch.randn(5, 40) + 2
    for c, r in zip(contexts, rewards):
        advantage = model.advantage(batch_of(c, r))
    for i in range(3):
        seen = rewards[contexts == i]
        assert model.count[i] == len(seen)
        assert model.mean[i].item() == pytest.approx(seen.mean().item(), abs=1e-5)
        assert (model.square[i] / model.count[i]).item() == pytest.approx(seen.var(correction=0).item(), abs=1e-4)
    assert model.count.sum() == 200
    where = contexts[-1] == 1
    seen = rewards[contexts == 1]
    expected = (rewards[-1][where] - seen.mean()) / seen.std(correction=0)
    torch.testing.assert_close(advantage[where], expected, atol=1e-3, rtol=1e-3)
    for _ in range(2):
        assert model.advantage(batch_of(torch.full((40,), 7), torch.full((40,), 147.1))).abs().max() == 0


def test_score_function_needs_one_update_per_iteration() -> None:
    with pytest.raises(ConfigError, match="needs one gradient step per iteration, these settings make 36"):
        flowrl.DDPO("FlowPolicy", "gaussians-linear", variant="sf", batch_size=128)
    settings = {"variant": "sf", "batch_size": 128, "accumulation": 36}
    flowrl.DDPO("FlowPolicy", "gaussians-linear", device=DEVICE, **settings).learn(512)
    with pytest.raises(ConfigError, match="lags behind the trained one with refresh_every = 2: set refresh_every = 1"):
        flowrl.DDPO("FlowPolicy", "gaussians-linear", **settings, refresh_every=2)


def test_grpo_window_slides_and_returns() -> None:
    settings = {"window": 3, "window_start": 1, "window_stride": 2, "n_samples": 16, "rollout_steps": 8}
    model = flowrl.FlowGRPO("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)
    seen = []
    for _ in range(5):
        seen.append(model.window().start)
        model.learn(16, reset_num_timesteps=False)
        assert set(model.buffer.all().extra["first_step"].tolist()) == {seen[-1]}
        k = torch.cat([model.recorded(batch).k for batch in model.minibatches()])
        assert sorted(set(k.tolist())) == list(range(seen[-1], seen[-1] + 3))
    assert seen == [1, 3, 1, 3, 1]  # steps 1-3, 3-5; 5-7 would hold the last step


def test_grpo_branches_share_their_past() -> None:
    model = recorded(
        flowrl.FlowGRPO, "gaussians-linear", n_samples=32, group_size=8, window=1, window_start=3, branch=True
    )
    states = model.buffer.rows["states"]
    start, end = states[:, 0].view(4, 8, 2), states[:, 1].view(4, 8, 2)
    assert torch.equal(start, start[:, :1].expand(4, 8, 2))
    assert len(end.flatten(0, 1).unique(dim=0)) == 32


def test_guarded_ratio_has_a_logarithm_of_mean_zero() -> None:
    """After a step away, the plain ratio's logarithm has mean -KL, the guarded one's zero."""
    settings = {"n_samples": 4000, "group_size": 8, "window": 1, "window_start": 4, "learning_rate": 0.05}
    model = recorded(flowrl.FlowGRPO, "gaussians-linear", ratio="guard", clip_range=1.0, **settings)
    with torch.no_grad():
        for weight in model.policy.parameters_of("current").values():
            weight.add_(0.01 * torch.randn_like(weight))
    (batch,) = model.buffer.batches(model.order(), 10**6)
    with torch.no_grad():
        steps = model.recorded(batch)
        step = model.step(steps, batch.context_ids)
        guarded = model.ratio(batch, steps, step).log()
        plain = step.mean_log_prob(steps.x_next) - steps.log_prob
        old = model.step(steps, batch.context_ids, "behaviour")
    noise = (steps.x_next - old.mean) / old.std[:, None]
    torch.testing.assert_close(guarded, (noise * (step.mean - old.mean)).mean(1), atol=1e-4, rtol=1e-3)
    error = guarded.std() / math.sqrt(len(guarded))
    assert abs(guarded.mean()) < 4 * error
    assert plain.mean() < -step.kl(old).mean() / 2


@pytest.mark.parametrize("sde", ["flow", "constant", "cps"])
def test_noise_weighting_has_mean_one(sde: str) -> None:
    model = recorded(flowrl.FlowGRPO, "gaussians-linear", n_samples=32, step_weighting="noise", sde=sde)
    (batch,) = model.buffer.batches(model.order(), 10**6)
    weight = model.noise_weight(model.recorded(batch))
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-5)
    k = model.recorded(batch).k
    expected = model.sde.step(*([torch.zeros(len(k), 1)] * 2), model.policy.times()[k], model.policy.times()[k + 1]).std
    torch.testing.assert_close(weight, expected / expected.mean())
