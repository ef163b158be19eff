"""Baselines against closed forms, and what each of them needs."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from safetensors.torch import save_file
from toys import RATE, narrow, narrow_linear

import flowrl
from flowrl.envs.gaussians import GaussianMixture, LinearReward
from flowrl.errors import ConfigError, NonFiniteError
from flowrl.evaluation.steering import Steering, steer
from flowrl.functional.flow import interpolate
from flowrl.functional.likelihood import log_prob
from flowrl.functional.metrics import wasserstein2
from flowrl.types import Batch

pytestmark = pytest.mark.on_device

N = 1200  # points in a comparison by optimal transport, which takes the cube of it
FIT = {"n_samples": 1024, "batch_size": 512, "n_epochs": 8, "rollout_steps": 6, "solver": "midpoint"}
FIT |= {"learning_rate": 1e-3, "ema_decay": 0.98}


def assert_matches(model, exact) -> None:
    generator = torch.Generator(DEVICE).manual_seed(7)
    floor = wasserstein2(exact(N, generator), exact(N, generator))
    samples = model.policy.sample(n=N, steps=20, solver="midpoint")
    assert wasserstein2(samples, exact(N, generator)) <= 1.2 * floor + 0.05


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_offline_rwr_gives_the_tilt(target: str) -> None:
    """C6: q_ref e^{tau r} / Z, however long it goes on."""
    env = flowrl.make("gaussians-linear")
    own = {"target": target} | ({"baseline": "mean"} if target == "residual" else {})
    model = flowrl.RWR("FlowPolicy", env, seed=0, device=DEVICE, tau=0.8, **own, **FIT)
    model.learn(15 * 1024)
    assert_matches(model, env.mixture.tilt(0.8, linear=(1.0, 0.0)).sample)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_who_draws_for_rwr(mode: str) -> None:
    model = flowrl.RWR("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, mode=mode, rollout_steps=4)
    with torch.no_grad():
        for weight in model.policy.parameters_of("current").values():
            weight.add_(0.1 * torch.randn_like(weight))
    contexts = torch.zeros(8, dtype=torch.long)
    model.generator.manual_seed(5)
    drawn, _ = model.draw(contexts)
    model.generator.manual_seed(5)
    x_0 = model.policy.noise(8, model.generator)
    role, other = ("reference", "current") if mode == "offline" else ("current", "reference")
    torch.testing.assert_close(drawn, model.policy.sample_latents(contexts, x_0=x_0, role=role))
    assert (drawn - model.policy.sample_latents(contexts, x_0=x_0, role=other)).abs().max() > 1e-3


def test_online_rwr_goes_on_tilting() -> None:
    env = narrow_linear()
    settings = {**FIT, "n_samples": 2048, "refresh_every": 10, "learning_rate": RATE}
    model = flowrl.RWR("FlowPolicy", env, seed=0, device=DEVICE, mode="online", tau=0.4, **settings)
    model.learn(2 * 10 * 2048)
    assert_matches(model, env.mixture.tilt(2 * 0.4, linear=(1.0, 0.0)).sample)


def test_rwr_fits_given_samples(tmp_path) -> None:
    """Samples of another law than the flow's, tilted: no sample of the flow is drawn."""
    env, other = narrow_linear(), GaussianMixture([[1.0, 1.0]], [[[0.5, 0.2], [0.2, 0.3]]])
    file = tmp_path / "samples.safetensors"
    n = 20_000
    save_file({"x_1": other.sample(n), "contexts": torch.zeros(n, dtype=torch.long)}, file)
    model = flowrl.RWR(
        "FlowPolicy",
        env,
        seed=0,
        device=DEVICE,
        tau=0.5,
        data=str(file),
        **{**FIT, "n_epochs": 4, "learning_rate": RATE},
    )
    model.learn(75 * 1024)
    assert_matches(model, other.tilt(0.5, linear=(1.0, 0.0)).sample)
    assert model.policy.evaluations <= 75 * 1024 * 4 * 4  # updates and drift, no rollout


def test_given_samples_keep_their_contexts(tmp_path) -> None:
    contexts = torch.arange(4, 44)
    x_1 = contexts.float().view(40, 1, 1, 1).repeat(1, 16, 8, 8)
    save_file({"x_1": x_1, "contexts": contexts}, tmp_path / "samples.safetensors")
    settings = {"n_samples": 16, "group_size": 1, "data": str(tmp_path / "samples.safetensors")}
    prompts = {"prompts": tuple(f"{n} stars on blue" for n in range(44))}
    model = flowrl.RWR("FlowPolicy", "sd3-compress", seed=0, device=DEVICE, env_settings=prompts, **settings)
    drawn = model.contexts()
    assert len(drawn.unique()) > 8
    assert torch.equal(model.draw(drawn)[0][:, 0, 0, 0], drawn.float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x_1": torch.zeros(4, 3), "contexts": torch.zeros(4, dtype=torch.long)}, r"x_1 must be \(N, 2\)"),
        ({"x_1": torch.zeros(4, 2), "contexts": torch.ones(4, dtype=torch.long)}, "indices from 0 to 0"),
        ({"x_1": torch.zeros(4, 2)}, "Cannot read samples"),
        ({"x_1": torch.zeros(4, 2) + 0j, "contexts": torch.zeros(4, dtype=torch.long)}, "numbers, not torch.complex64"),
        ({"x_1": torch.zeros(4, 2).byte(), "contexts": torch.zeros(4, dtype=torch.long)}, "numbers, not torch.uint8"),
        ({"x_1": torch.zeros(4, 2), "contexts": torch.zeros(4) > 0}, "indices from 0 to 0"),
        ({"x_1": torch.zeros(4, 2), "contexts": torch.zeros(4) + 0j}, "indices from 0 to 0"),
    ],
)
def test_rwr_says_what_is_wrong_with_given_samples(tmp_path, tensors: dict, message: str) -> None:
    save_file(tensors, tmp_path / "samples.safetensors")
    with pytest.raises(ConfigError, match=message):
        flowrl.RWR("FlowPolicy", "gaussians-linear", device=DEVICE, data=str(tmp_path / "samples.safetensors"))


def test_rwr_settings_that_contradict_each_other() -> None:
    for settings in ({"mode": "online", "data": "x"}, {"target": "residual", "data": "x"}, {"mode": "both"}):
        with pytest.raises(ConfigError):
            flowrl.RWR.Config(**settings)


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_raft_moves_as_far_as_the_best_of_k(target: str) -> None:
    """One round on N(0, 1) with r = x gives the law of the largest of K: KL log K - (K - 1) / K to the reference."""
    k = 4
    env = narrow(GaussianMixture([[0.0]], [[1.0]]), LinearReward((1.0,)))
    settings = {**FIT, "n_samples": 2048, "refresh_every": 10**6, "target": target}
    settings |= {"baseline": "mean"} if target == "residual" else {}
    settings |= {"learning_rate": RATE}
    model = flowrl.RAFT("FlowPolicy", env, seed=0, device=DEVICE, group_size=k, **settings)
    model.learn(20 * 2048)
    best = torch.randn(N, k).amax(1, keepdim=True)
    samples = model.policy.sample(n=N, steps=20, solver="midpoint")
    assert wasserstein2(samples, best) < 0.1
    # of the reference's quantile u, the largest of K has density K u^(K-1): the KL is that of u to uniform
    quantile = torch.special.ndtr(model.policy.sample(n=50_000, steps=20, solver="midpoint").flatten().double())
    density = torch.histc(quantile.float(), 50, 0, 1) / 50_000 * 50
    kl = (density * density.clamp_min(1e-9).log()).mean().item()
    assert kl == pytest.approx(math.log(k) - (k - 1) / k, abs=0.06)


def test_raft_weights_by_hand() -> None:
    model = flowrl.RAFT("FlowPolicy", "gaussians-linear", device=DEVICE, group_size=4, n_best=2, threshold=0.5)
    reward = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.6])
    ids, group = torch.zeros(8, dtype=torch.long), torch.arange(8) // 4
    weight = model.weigh(Batch(torch.zeros(8, 2), ids, reward, reward, group))
    assert weight.tolist() == pytest.approx([0, 0, 8 / 3, 8 / 3, 0, 0, 0, 8 / 3])


def test_raft_fits_only_what_it_keeps() -> None:
    model = flowrl.RAFT("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=64, group_size=8)
    model.learn(64)
    kept = torch.cat([batch.reward for batch in model.minibatches()])
    assert sorted(kept.tolist()) == sorted(model.buffer.reward.view(8, 8).amax(1).tolist())


def test_raft_with_the_penalty_goes_a_known_part_of_the_way() -> None:
    """A kept sample weighs K: where kept samples pass, the best velocity lies K / (K + alpha) of the way to RAFT's."""
    moves = []
    for alpha in (0.0, 8.0):
        settings = {**FIT, "refresh_every": 10**6, "learning_rate": RATE, "seed": 0, "device": DEVICE}
        model = flowrl.RAFT("FlowPolicy", narrow_linear(), group_size=8, alpha=alpha, **settings)
        model.learn(10 * 1024)
        kept = torch.cat([batch.x_1 for batch in model.minibatches()]).repeat(20, 1)
        generator = torch.Generator(DEVICE).manual_seed(5)
        x_0, t = torch.randn(kept.shape, generator=generator), torch.rand(len(kept), generator=generator)
        x_t, _ = interpolate(x_0, kept, t)
        with torch.no_grad():
            v, v_ref = (model.policy.velocity(x_t, t, (), role) for role in (model.policy.sampling_role, "reference"))
        moves.append(v - v_ref)
    way = (moves[0] * moves[1]).sum() / moves[0].square().sum()
    assert way.item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("n_best", [0, 8, 9])
def test_raft_must_choose(n_best: int) -> None:
    with pytest.raises(ConfigError, match="leaves nothing to choose"):
        flowrl.RAFT.Config(group_size=8, n_best=n_best)


def steered(env, steering: Steering, n: int, steps: int = 30) -> torch.Tensor:
    model = flowrl.ORWCFM("FlowPolicy", env, seed=0, device=DEVICE, rollout_steps=steps)
    generator = torch.Generator(DEVICE).manual_seed(3)
    return steer(model.policy, model.env.core, steering, torch.zeros(n, dtype=torch.long), generator)


def test_best_of_n_is_the_law_of_the_best() -> None:
    """KL log n - (n - 1) / n, and W2 to the largest of n normals."""
    env = narrow(GaussianMixture([[0.0]], [[1.0]]), LinearReward((1.0,)))
    n = 6
    samples = steered(env, Steering("best_of_n", n), 10_000)
    assert wasserstein2(samples[:N], torch.randn(N, n).amax(1, keepdim=True)) < 0.1
    density = torch.histc(torch.special.ndtr(samples.flatten()), 50, 0, 1) / 10_000 * 50
    kl = (density * density.clamp_min(1e-9).log()).mean().item()
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=0.05)


def test_smc_reaches_the_tilt() -> None:
    """q_ref e^{r / lambda}; best-of-n with as many samples is somewhere else."""
    env = narrow_linear()
    exact = env.mixture.tilt(1 / 1.25, linear=(1.0, 0.0)).sample
    samples = steered(env, Steering("smc", 16, temperature=1.25), N)
    generator = torch.Generator(DEVICE).manual_seed(7)
    floor = wasserstein2(exact(N, generator), exact(N, generator))
    assert wasserstein2(samples, exact(N, generator)) <= 1.2 * floor + 0.05
    best = steered(env, Steering("best_of_n", 16), N, steps=8)
    assert wasserstein2(best, exact(N, generator)) > 0.5


def test_steering_of_one_is_no_steering() -> None:
    env = narrow_linear()
    for method in ("best_of_n", "smc"):
        samples = steered(env, Steering(method, 1), N)
        generator = torch.Generator(DEVICE).manual_seed(7)
        exact = env.mixture.sample
        assert (
            wasserstein2(samples, exact(N, generator))
            <= 1.2 * wasserstein2(exact(N, generator), exact(N, generator)) + 0.05
        )


def test_steering_keeps_contexts_apart() -> None:
    prompts = {"prompts": ("three red stars on blue", "two green squares on black", "one white circle on black")}
    settings = {"env_settings": prompts, "rollout_steps": 4}
    model = flowrl.ORWCFM("FlowPolicy", "sd3-count", seed=0, device=DEVICE, **settings)
    contexts = torch.tensor([0, 2, 1])
    for steering in (Steering("best_of_n", 3), Steering("smc", 3, 0.1)):
        x_1 = steer(
            model.policy,
            model.env.core,
            steering,
            contexts,
            torch.Generator(DEVICE).manual_seed(0),
            guidance_scale=2.0,
        )
        assert x_1.shape == (3, *model.policy.model.latent_shape)
        assert model.env.core.evaluate(model.policy.decode(x_1), contexts).reward.shape == (3,)


@pytest.mark.parametrize("settings", [{"n": 0}, {"temperature": 0.0}, {"ess_threshold": 2.0}, {"method": "magic"}])
def test_steering_settings(settings: dict) -> None:
    with pytest.raises(ConfigError):
        Steering(**settings)


def test_evaluation_of_steering_counts_its_cost() -> None:
    model = flowrl.ORWCFM("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, rollout_steps=10)
    result = flowrl.evaluate(model, n_samples=256, steering=Steering("best_of_n", 5))
    assert result.evaluations_per_sample == 50
    assert "drift" not in result.table()
    assert result.reward_mean > result.reference.reward_mean + 0.5
    assert flowrl.evaluate(model, n_samples=256).evaluations_per_sample == 10
    assert model.policy.evaluations == 0


def test_no_log_prob_of_a_flow_that_has_diverged() -> None:
    """The solver's assertions ended a run in a traceback, without a word of how to go on."""
    for last in (1.0, 0.5):  # where velocities are none from the start, and on the way
        with pytest.raises(NonFiniteError, match=r"likelihood of 2 samples .*solver ends with '.*diverged"):
            log_prob(lambda x, t, last=last: x / (t[:, None] > last), torch.ones(2, 2))  # type: ignore[misc]


def test_log_prob_of_the_exact_field() -> None:
    """Against the mixture's own density; exact divergence and Hutchinson's estimate."""
    mixture = GaussianMixture([[0.0, 1.0], [1.5, -0.5]], [[[0.3, 0.1], [0.1, 0.4]], [[0.2, 0.0], [0.0, 0.5]]])
    x = mixture.sample(200, torch.Generator(DEVICE).manual_seed(0))
    field = lambda x, t: mixture.velocity(t, x)  # noqa: E731
    exact = log_prob(field, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact, mixture.log_prob(x), atol=2e-3, rtol=0)
    generator = torch.Generator(DEVICE).manual_seed(1)
    estimate = log_prob(field, x, divergence="hutchinson", n_probes=200, generator=generator)
    assert (estimate - exact).mean().abs() < 0.02
    assert (estimate - exact).std() < 0.2


def test_likelihoods_ask_the_field_at_flow_times_only() -> None:
    """A network knows nothing of t < 0, where an adaptive solver may well look if it is not stopped."""
    times: list[float] = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t[0].item())
        return -x

    value = log_prob(field, torch.zeros(2, 3), rtol=0.1, atol=0.1)
    assert 0 <= min(times) < 0.05
    assert 0.95 < max(times) <= 1
    # x(t) = x_0 e^-t: the density at zero is that of the normal, times e^3
    torch.testing.assert_close(value, torch.full((2,), 3 - 1.5 * math.log(2 * math.pi)), atol=1e-3, rtol=0)


def test_likelihoods_give_the_divergence_between_mixtures() -> None:
    """E_p[log p - log q] from the flows' likelihoods, and the integral of t / (1 - t) |v_p - v_q|^2 (orw_kl's)."""
    p = GaussianMixture([[-1.0], [1.5]], [[[0.3]], [[0.2]]], [0.4, 0.6])
    q = p.tilt(0.7, linear=(1.0,))
    n = 20_000
    x = p.sample(n, torch.Generator(DEVICE).manual_seed(0))
    values = [log_prob(lambda x, t, m=m: m.velocity(t, x), x[:4000]) for m in (p, q)]
    true = (p.log_prob(x) - q.log_prob(x)).mean().item()
    assert (values[0] - values[1]).mean().item() == pytest.approx(true, abs=0.03)
    t = torch.rand(n) * 0.999
    x_t = (1 - t)[:, None] * torch.randn(n, 1) + t[:, None] * x
    cheap = (t / (1 - t)) * (p.velocity(t, x_t) - q.velocity(t, x_t)).square().sum(1)
    assert cheap.mean().item() == pytest.approx(true, abs=0.03)


def test_exact_kl_is_taken_off_the_reward() -> None:
    """`r - beta (log p_theta - log p_ref)`, the first of the policy that drew the samples."""
    model = flowrl.ExactKL("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, beta=0.5)
    x_1, contexts, reward = torch.randn(64, 2), torch.zeros(64, dtype=torch.long), torch.randn(64)
    with torch.no_grad():
        for weight in model.policy.parameters_of("behaviour").values():
            weight.add_(0.02 * torch.randn_like(weight))
    old, reference = (model.log_prob(x_1, contexts, role) for role in ("behaviour", "reference"))
    assert (old - reference).abs().mean() > 0.05
    drawn, rows = model.draw(contexts)
    ratio = model.log_prob(drawn, contexts, "behaviour") - model.log_prob(drawn, contexts, "reference")
    torch.testing.assert_close(rows["log_ratio"], ratio)
    group, extra = torch.arange(64), {"log_ratio": old - reference}
    weight = model.weigh(Batch(x_1, contexts, reward, reward, group, extra))
    plain = flowrl.ORWCFMW2.weigh(model, Batch(x_1, contexts, reward - 0.5 * (old - reference), reward, group))
    torch.testing.assert_close(weight, plain)


@pytest.mark.slow
def test_exact_kl_agrees_with_the_cheap_one() -> None:
    """`kl` with beta stops at q_ref e^{r / beta}."""
    env = flowrl.make("gaussians-linear")
    settings = {**FIT, "n_samples": 256, "batch_size": 256, "beta": 1.25, "tau": 0.5}
    model = flowrl.ExactKL("FlowPolicy", env, seed=0, device=DEVICE, **settings)
    model.learn(20 * 256)
    assert_matches(model, env.mixture.tilt(1 / 1.25, linear=(1.0, 0.0)).sample)


@pytest.mark.parametrize(
    ("cls", "strength", "values", "own"),
    [
        (flowrl.ORWCFMW2, "alpha", (0.1, 1.0, 10.0), {"tau": 0.5}),
        (flowrl.ORWCFMKL, "alpha", (0.1, 1.0, 10.0), {"tau": 0.5}),
        (flowrl.DPOK, "beta", (0.0, 1.0, 30.0), {"clip_range": 0.1}),
        (flowrl.FlowGRPO, "beta", (0.0, 1.0, 30.0), {"clip_range": 0.1}),
    ],
)
def test_regularisation_trades_reward_for_closeness(cls: type, strength: str, values: tuple, own: dict) -> None:
    """The stronger, the nearer to the reference and the lower the reward; the weakest gets far above it."""
    settings = {"n_samples": 256, "batch_size": 256, "n_epochs": 2, "learning_rate": RATE, "rollout_steps": 8, **own}
    drifts, rewards = [], []
    for value in values:
        model = cls("FlowPolicy", narrow_linear(), seed=0, device=DEVICE, **{strength: value}, **settings)
        result = flowrl.evaluate(model.learn(10 * 256), n_samples=512)
        drifts.append(result.drift)
        rewards.append(result.reward_mean)
    assert drifts == sorted(drifts, reverse=True)
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] > rewards[-1] + 1.0


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (flowrl.ORWCFM, {"tau": 0.5}),
        (flowrl.RAFT, {"n_epochs": 4}),
        (flowrl.DDPO, {}),
        (flowrl.DDPO, {"variant": "sf", "accumulation": 7}),
        (flowrl.DPOK, {"beta": 0.0}),
        (flowrl.FlowGRPO, {"beta": 0.0}),
    ],
)
def test_without_regularisation_the_best_point_is_found(cls: type, own: dict) -> None:
    """`gaussians-quadratic` is best at one point, (1, 1), with reward 0; the reference's mean reward is -3."""
    settings = {"n_samples": 256, "batch_size": 256, "learning_rate": 1e-3, "rollout_steps": 8, **own}
    model = cls("FlowPolicy", "gaussians-quadratic", seed=0, device=DEVICE, **settings)
    result = flowrl.evaluate(model.learn(40 * 256), n_samples=512)
    assert result.reference.reward_mean == pytest.approx(-3.0, abs=0.3)
    assert result.reward_mean > -0.2


def test_raft_plans_the_updates_it_makes() -> None:
    for target in ("plain", "residual"):
        settings = {"group_size": 8, "batch_size": 16, "target": target}
        model = flowrl.RAFT("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)
        model.learn(512)
        assert model._n_updates == model.config.updates_per_iteration() == (4 if target == "plain" else 32)
