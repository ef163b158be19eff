"""FlowAlgorithm: the loop, stable-baselines3's callbacks on it, determinism, no host synchronisation."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from dataclasses import replace

import gymnasium
import pytest
import torch
from conftest import DEVICE
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from torch.utils._python_dispatch import TorchDispatchMode

import flowrl
from flowrl.envs.gaussians import GaussiansEnv, LinearReward, eight_gaussians
from flowrl.errors import ConfigError, DeviceError, NonFiniteError, UnknownNameError
from flowrl.evaluation import statistics
from flowrl.registry import ALGORITHMS
from flowrl.runs.callbacks import IterationCallback
from flowrl.training.optimizers import clipped

pytestmark = pytest.mark.on_device

SMALL = {"n_samples": 64, "batch_size": 32, "rollout_steps": 4}


def small(algo: str = "orw_w2", **settings) -> flowrl.FlowAlgorithm:
    return ALGORITHMS[algo]("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **{**SMALL, **settings})


def weights(model: flowrl.FlowAlgorithm) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters_of("current").values()])


class Recorder(KVWriter):
    """Keeps every logged row."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_what_is_deleted_is_let_go(algo: str) -> None:
    """At once, not when the collector of circles comes by: it holds the memory of a device."""
    gc.disable()
    try:
        model = small(algo, **{"tilt": {"pool": 64}, "kl": {"tolerance": 100.0}}.get(algo, {}))
        model.learn(64)
        flowrl.evaluate(model, n_samples=8)
        gone = [weakref.ref(part) for part in (model, model.policy, model.policy.model.network, model.buffer)]
        del model
        assert [part() for part in gone] == [None] * 4
    finally:
        gc.enable()


WEIGHTED = {"kl", "orw", "orw_kl", "orw_w2", "raft", "rwr", "tilt"}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_logs_what_a_run_shows(algo):
    model, recorder = small(algo), Recorder()
    model.set_logger(Logger(None, [recorder]))
    model.learn(2 * 64)
    expected = {
        *(f"rollout/{key}" for key in ("reward_mean", "reward_std", "reward_min", "reward_max", "diversity")),
        *(f"train/{key}" for key in ("loss", "drift", "grad_norm", "learning_rate", "n_updates")),
        *(f"time/{key}" for key in ("iteration", "samples_per_second", "network_evaluations", "total_timesteps")),
    }
    assert len(recorder.rows) == 2
    if model.learns_from == "contexts":  # nothing is kept that a drift could be measured on
        expected.remove("train/drift")
    assert expected <= recorder.rows[-1].keys()
    assert ("rollout/ess" in recorder.rows[-1]) == model.has_weights == (algo in WEIGHTED)
    assert all(math.isfinite(value) for value in recorder.rows[-1].values())


def test_network_evaluations_are_counted():
    """64 samples x 4 steps; 2 minibatches of 32: current 3 (forward and backward), reference 1, v_old 1."""
    model = small()
    model.learn(64)
    assert model.policy.evaluations == 64 * 4 + 64 * (3 + 1 + 1)
    flowrl.evaluate(model, n_samples=16)
    assert model.policy.evaluations == 64 * 4 + 64 * (3 + 1 + 1)  # evaluation is not part of the method's cost


@pytest.mark.parametrize("settings", [{}, {"n_epochs": 3}, {"batch_size": 512}])
def test_a_drift_for_the_log_costs_a_fiftieth_of_an_update_and_is_not_counted(settings):
    """Without penalty nothing but the log wants v_ref: 512 samples, 3 evaluations each and epoch for the update."""
    made = {"n_samples": 512, "batch_size": 128, "rollout_steps": 4, "target": "plain", **settings}
    model, passes = ALGORITHMS["orw"]("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **made), []
    networks, velocity = model.policy.networks, model.policy.networks.velocity

    def counted(x_t, t, cond, role, exact=False):
        before = networks.spent[0]
        v = velocity(x_t, t, cond, role, exact)
        passes.append((role, networks.spent[0] - before))
        return v

    networks.velocity = counted
    training = 512 * 4 + 512 * 3 * made.get("n_epochs", 1)
    model.learn(2 * 512, log_interval=2)
    assert model.policy.evaluations == 2 * training
    spent = sum(cost for _, cost in passes) - 2 * training
    assert 0 < spent <= 0.02 * 512 * 3 * made.get("n_epochs", 1)
    assert sum(cost for role, cost in passes if role == "reference") == spent / 2
    passes.clear()
    model.learn(2 * 512, log_interval=None, reset_num_timesteps=False)  # who logs nothing pays nothing
    assert sum(cost for _, cost in passes) == 2 * training


def test_training_does_not_depend_on_what_is_logged():
    often, never = (small("raft", rollout_batch_size=16) for _ in range(2))
    often.learn(3 * 64)
    never.learn(3 * 64, log_interval=None)
    assert torch.equal(weights(often), weights(never))


def test_the_drift_of_the_log_is_that_of_the_flow():
    """In the mean over draws; times are even, so that few samples say much."""
    model = small("orw", learning_rate=3e-3, time_sampling="logit_normal", n_epochs=4)
    model.learn(4 * 64)
    rollout, found = model.buffer.all(), []
    for iteration in range(1500):
        model.iteration = iteration
        found.append(torch.stack(list(model.drift().values())))
    found = torch.stack(found).mean(0)
    g = torch.Generator(DEVICE).manual_seed(0)
    x_1 = rollout.x_1.repeat(400, 1)
    t = torch.randn(len(x_1), generator=g, device=DEVICE).sigmoid()
    x_t = (1 - t)[:, None] * torch.randn(*x_1.shape, generator=g, device=DEVICE) + t[:, None] * x_1
    with torch.no_grad():
        v, v_ref = (model.policy.velocity(x_t, t, (), role) for role in ("current", "reference"))
    u = (x_1 - x_t) / (1 - t)[:, None]
    exact = [(a - b).square().mean().item() for a, b in ((v, v_ref), (v, u), (v_ref, u))]
    assert found.tolist() == pytest.approx(exact, rel=0.1)


def test_same_seed_same_weights_and_another_seed_others():
    a, b, c = small(), small(), ALGORITHMS["orw_w2"]("FlowPolicy", "gaussians-linear", seed=1, device=DEVICE, **SMALL)
    for model in (a, b, c):
        model.learn(3 * 64)
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))


def test_without_a_seed_torchs_own_decides_and_nothing_is_seeded_anew():
    def drawn():
        torch.manual_seed(7)
        model = ALGORITHMS["orw_w2"]("FlowPolicy", "gaussians-linear", device=DEVICE, **SMALL)
        model.learn(64)
        return weights(model), torch.randn(1)

    (first, after), (again, after_again) = drawn(), drawn()
    assert torch.equal(first, again)
    assert torch.equal(after, after_again)


def test_looking_does_not_change_training():
    """Evaluation and predictions between iterations leave the training's random state alone."""

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            self.model.predict(0)
            flowrl.evaluate(self.model, n_samples=8)
            return True

    a, b = small(), small()
    a.learn(3 * 64)
    b.learn(3 * 64, callback=Look())
    assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(64, 1), (16, 4), (32, 4)])
def test_accumulation_makes_one_step_of_several_minibatches(batch_size, accumulation):
    model = small(batch_size=batch_size, accumulation=accumulation)
    model.learn(64)
    assert model._n_updates == 1 == model.config.updates_per_iteration()


class Squares(flowrl.ORWCFMW2):
    """A loss without noise: its gradient depends on the samples alone."""

    def loss(self, batch):
        t = torch.full_like(batch.reward, 0.5)
        return self.policy.velocity(batch.x_1, t, ()).square().mean(), {}


@pytest.mark.parametrize(
    ("n_samples", "others"),
    [(64, ((64, 1), (16, 4), (48, 2))), (96, ((64, 1), (16, 4), (32, 2))), (72, ((64, 1), (16, 4)))],
    ids=["whole", "a step of fewer", "a small minibatch"],
)
def test_accumulated_minibatches_have_the_gradient_of_a_large_one(n_samples, others):
    """Every sample counts alike, also in a last minibatch or step that is smaller than the others."""
    norms = []
    for batch_size, accumulation in others:
        settings = {**SMALL, "n_samples": n_samples, "batch_size": batch_size, "accumulation": accumulation}
        settings["learning_rate"] = 1e-12  # steps of the same weights
        model = Squares("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings).learn(n_samples)
        norms.append(model.last_logged["train/grad_norm"])
    assert norms[0] > 0
    assert norms[1:] == pytest.approx([norms[0]] * (len(norms) - 1), rel=1e-4)


class Noisy(torch.nn.Module):
    """A network with layers that are others in training: of noise, and with statistics of what they see."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(16, 2),
        )
        self.modes = []

    def forward(self, x, t):
        self.modes.append((torch.is_grad_enabled(), self.training))
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def test_networks_are_in_training_mode_in_updates_alone(tmp_path):
    """Samples, pictures, the drift and evaluations go without dropout, and leave running statistics as they are."""
    env = GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)), flow=Noisy)
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, **SMALL)
    x_0 = torch.randn(8, 2, device=DEVICE)

    def drawn(policy):
        before = {name: b.clone() for name, b in policy.networks.buffers_of("current").items()}
        first, second = (policy.sample(n=8, x_0=x_0) for _ in range(2))
        assert all(torch.equal(b, before[name]) for name, b in policy.networks.buffers_of("current").items())
        assert torch.equal(first, second)
        return first

    untrained = drawn(model.policy)
    model.learn(64)
    trained = drawn(model.policy)
    assert not torch.equal(untrained, trained)
    assert {*model.policy.model.network.modes} == {(False, False), (True, True)}
    first, second = (flowrl.evaluate(model, n_samples=32).reward_mean for _ in range(2))
    assert first == second
    model.save(tmp_path / "a")
    assert torch.equal(drawn(flowrl.ORWCFMW2.load(tmp_path / "a", env=env, device=DEVICE).policy), trained)
    drawn(flowrl.FlowPolicy.of(env, device=DEVICE))


def test_running_statistics_of_an_adapted_network_stay_those_of_the_reference():
    """Updates changed them, and the reference with them: all roles share the base network."""
    env = GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)), flow=Noisy)
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, lora_rank=2, **SMALL)
    x_0 = torch.randn(8, 2, device=DEVICE)
    before = model.policy.sample(n=8, x_0=x_0, role="reference")
    model.learn(64)
    assert torch.equal(model.policy.sample(n=8, x_0=x_0, role="reference"), before)
    assert (True, True) in model.policy.model.network.modes


def test_an_update_that_breaks_off_leaves_no_training_mode_and_no_half_step():
    class BreaksOff(Squares):
        n = 0

        def loss(self, batch):
            self.n += 1
            if self.n == 2:  # the first half of the step has its gradient by then
                raise KeyboardInterrupt
            return super().loss(batch)

    model, usual = (
        cls("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **{**SMALL, "batch_size": 32, "accumulation": 2})
        for cls in (BreaksOff, Squares)
    )
    with pytest.raises(KeyboardInterrupt):
        model.learn(64)
    assert not model.policy.model.network.training
    model.set_random_seed(0)
    usual.set_random_seed(0)
    assert torch.equal(weights(model.learn(64)), weights(usual.learn(64)))


def test_a_figure_of_some_minibatches_is_their_mean():
    class Sometimes(Squares):
        n, counted = 0, torch.zeros((), device=DEVICE)

        def loss(self, batch):
            self.n += 1
            loss, _ = super().loss(batch)
            self.counted.add_(1)  # a metric may be a tensor that the algorithm goes on to change
            return loss, {
                "counted": self.counted,
                **({"third": torch.tensor(6.0, device=DEVICE)} if self.n == 3 else {}),
            }

    settings = {**SMALL, "batch_size": 16, "accumulation": 1}
    model = Sometimes("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings).learn(64)
    assert model.n == 4
    assert (model.last_logged["train/third"], model.last_logged["train/counted"]) == (6, 2.5)


def test_figures_are_means_over_samples_however_large_the_last_minibatch_is():
    class Rewards(Squares):
        def loss(self, batch):
            return super().loss(batch)[0], {"reward": batch.reward.mean()}

    settings = {**SMALL, "batch_size": 48, "accumulation": 1}  # of 64 samples: one of 48 and one of 16
    model = Rewards("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings).learn(64)
    assert model.last_logged["train/reward"] == pytest.approx(model.last_logged["rollout/reward_mean"], rel=1e-5)


@pytest.mark.parametrize(("n_before", "decay"), [(0, 2 / 11), (1000, 0.9)])
def test_an_average_of_few_steps_forgets_its_start_sooner(n_before, decay):
    model = small(ema_decay=0.9, batch_size=64, learning_rate=0.01)
    model._n_updates = n_before
    start = weights(model)
    model.learn(64)
    average = torch.cat([p.detach().flatten() for p in model.policy.parameters_of("ema").values()])
    torch.testing.assert_close(average, decay * start + (1 - decay) * weights(model), atol=1e-5, rtol=0)
    assert (weights(model) - start).abs().max() > 5e-3


def test_behaviour_follows_at_the_refresh_only():
    model = small(refresh_every=2, n_samples=32)
    start = {n: p.detach().clone() for n, p in model.policy.parameters_of("behaviour").items()}
    model.learn(32)
    assert all(torch.equal(p, start[n]) for n, p in model.policy.parameters_of("behaviour").items())
    model.learn(32, reset_num_timesteps=False)
    current = model.policy.parameters_of("current")
    assert all(torch.equal(p, current[n]) for n, p in model.policy.parameters_of("behaviour").items())


def test_plain_target_needs_no_second_copy():
    assert small(target="plain").policy.roles == ("current",)
    assert set(small().policy.roles) == {"current", "behaviour"}


@pytest.mark.parametrize("maximum", [0.1, 1e9, torch.inf])
def test_gradients_are_clipped_as_torch_does(maximum: float) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n, 3, device=DEVICE)) for n in (1, 5, 40)] for _ in range(2))
    for a, b in zip(ours[:2], theirs[:2]):  # the last has none
        a.grad = torch.randn(a.shape, generator=torch.Generator(DEVICE).manual_seed(len(a)), device=DEVICE)
        b.grad = a.grad.clone()
    before = torch.cat([a.grad.flatten() for a in ours[:2]]).norm()
    norm = clipped(ours, maximum)
    torch.testing.assert_close(norm, before)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, maximum))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2]))
    assert clipped(ours[2:], maximum).item() == 0


def test_warm_up_raises_the_learning_rate_linearly():
    model, rates = small(warmup_updates=8, learning_rate=1e-3), []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def on_iteration_end(self) -> bool:
            rates.append(model.policy.optimizer.param_groups[0]["lr"])
            return True

    model.learn(5 * 64, callback=Watch())  # two updates an iteration
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


class Rates(IterationCallback):
    """Learning rates, one an iteration."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def on_iteration_end(self):
        self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
        return True


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_the_learning_rate_follows_its_schedule_to_the_end_of_the_run(schedule, shares):
    model, seen = small(lr_schedule=schedule, learning_rate=1e-3), Rates()
    model.learn(4 * 64, callback=seen)
    assert seen.rates == pytest.approx([1e-3 * share for share in shares])


def test_a_learning_rate_that_a_callback_sets_counts_and_is_kept(tmp_path):
    class Slower(Rates):
        def on_iteration_end(self):
            super().on_iteration_end()
            if self.model.iteration == 1:
                self.model.learning_rate = 1e-4
            else:
                self.model.config = replace(self.model.config, learning_rate=1e-5)
            return True

    model, seen = small(learning_rate=1e-3), Slower()
    model.learn(3 * 64, callback=seen)
    assert seen.rates == pytest.approx([1e-3, 1e-4, 1e-5])
    model.save(tmp_path / "kept")
    assert flowrl.ORWCFMW2.load(tmp_path / "kept", device=DEVICE).learning_rate == 1e-5
    with pytest.raises(ConfigError, match="learning_rate must be positive, not -1"):
        model.learning_rate = -1.0


def test_a_run_that_goes_on_takes_up_the_rate_of_its_place_in_the_longer_run():
    model, seen = small(lr_schedule="linear", learning_rate=1e-3), Rates()
    model.learn(2 * 64)
    model.learn(2 * 64, callback=seen, reset_num_timesteps=False)
    assert seen.rates == pytest.approx([5e-4, 2.5e-4])


def test_a_falling_rate_resumes_exactly(tmp_path):
    whole, first = small(lr_schedule="linear"), small(lr_schedule="linear")
    whole.learn(4 * 64)

    class Stop(IterationCallback):
        def on_iteration_end(self):
            return self.model.iteration < 2

    first.learn(4 * 64, callback=Stop())
    first.save(tmp_path / "half")
    second, seen = flowrl.ORWCFMW2.load(tmp_path / "half", device=DEVICE), Rates()
    second.learn(2 * 64, callback=seen, reset_num_timesteps=False)
    assert seen.rates == pytest.approx([whole.config.learning_rate * share for share in (0.5, 0.25)])
    for name, parameter in whole.policy.parameters_of("current").items():
        assert torch.equal(parameter, second.policy.parameters_of("current")[name])


def test_callbacks_of_stable_baselines3(tmp_path):
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, tau=2.0, alpha=0.0)
    stop = StopTrainingOnRewardThreshold(reward_threshold=0.4, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training and evaluation environments are of different types, as meant
        evaluation = EvalCallback(
            Monitor(gymnasium.make("flowrl/gaussians-linear-v0")),
            callback_on_new_best=stop,
            n_eval_episodes=64,
            eval_freq=2,
            best_model_save_path=str(tmp_path / "best"),
            log_path=str(tmp_path / "log"),
            verbose=0,
        )
        model.learn(512 * 40, callback=[evaluation, CheckpointCallback(2, str(tmp_path / "checkpoints"))])
    assert model.num_timesteps < 512 * 40  # stopped by the threshold
    assert evaluation.best_mean_reward >= 0.4
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved[0] == "rl_model_1024_steps"
    best = flowrl.ORWCFMW2.load(tmp_path / "best" / "best_model", device=DEVICE)
    assert best.num_timesteps > 0


def test_evaluate_policy_agrees_with_flowrl_evaluate(monkeypatch):
    monkeypatch.setattr(statistics, "W2_POINTS", 64)  # only the rewards are compared
    model = small()
    mean, std = evaluate_policy(model, flowrl.make_vec("gaussians-linear", 256), 2048, warn=False)
    assert mean == pytest.approx(flowrl.evaluate(model, n_samples=2048).reward_mean, abs=4 * std / math.sqrt(2048))


def test_progress_bar_counts_samples():
    model = small()
    model.learn(64, progress_bar=True)
    assert model.env.num_envs == 64


class Synchronisations(TorchDispatchMode):
    """Operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and str(kwargs.get("device", "")) == "cpu"
        if to_host or name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("algo", [a for a in ALGORITHMS if flowrl.algorithm_class(a).learns_from != "contexts"])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"ema_decay": 0.9, "accumulation": 2}])
def test_an_update_never_waits_for_the_device(algo, settings):
    model = small(algo, **settings)
    model.learn(64)
    with Synchronisations() as watch:
        model.update()
        model.refresh()
    assert watch.seen == []


def test_the_watch_sees_synchronisations():
    with Synchronisations() as watch:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
    assert len(watch.seen) >= 2


def test_unknown_setting_names_the_closest():
    with pytest.raises(UnknownNameError, match="'alpha'"):
        small(alhpa=0.3)


def test_unknown_environment_names_the_closest():
    with pytest.raises(UnknownNameError, match="gaussians-ring"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussian-ring")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": 0}, "n_samples must be positive"),
        ({"group_size": 3}, "group_size = 3 must divide"),
        ({"rollout_batch_size": 48}, "rollout_batch_size = 48 must divide"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"solver": "eulr"}, "solver must be one of"),
        ({"alpha": -1.0}, "alpha must not be negative"),
        ({"coupling": "ot"}, "use target 'plain'"),
    ],
)
def test_settings_without_meaning(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"total_timesteps": -64}, "total_timesteps must be a whole number, 0 or more, not -64"),
        ({"total_timesteps": 0.5}, "not 0.5"),
        ({"total_timesteps": math.nan}, "not nan"),
        ({"total_timesteps": math.inf}, "not inf"),
        ({"total_timesteps": "64"}, "not '64'"),
        ({"total_timesteps": 64, "log_interval": 0}, "log_interval must be a whole number, 1 or more, not 0"),
    ],
)
def test_lengths_that_no_run_has(given, message):
    with pytest.raises(ConfigError, match=message):
        small().learn(**given)


def test_lengths_are_taken_as_any_whole_number():
    assert small().learn(torch.tensor(64)).num_timesteps == small().learn(64.0).num_timesteps == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": lambda left: 1e-3 * left}, "learning_rate is a number here, .* lr_schedule"),
        ({"tau": lambda: 1.0}, "tau must be a number, not <function"),
        ({"n_samples": torch.ones(2)}, "n_samples must be a whole number, not tensor"),
        ({"config": {"tau": 1.0}}, "config must be a ORWCFMW2Config, not .* by their names"),
    ],
)
def test_objects_are_no_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


def test_an_unknown_policy_names_the_known_one():
    with pytest.raises(UnknownNameError, match=r"Unknown policy 'MlpPolicy'. Did you mean 'FlowPolicy'"):
        flowrl.ORWCFMW2("MlpPolicy", "gaussians-linear")


@pytest.mark.parametrize(("n", "steps"), [(-1, 4), (1.5, 4), (2, 0), (2, 2.5)])
def test_samples_and_steps_are_whole_numbers(n, steps):
    with pytest.raises(ConfigError, match="must be a whole number"):
        small().policy.sample(n=n, steps=steps)


def test_an_evaluation_has_samples():
    with pytest.raises(ConfigError, match="n_samples must be a whole number, 1 or more, not 0"):
        flowrl.evaluate(small(), n_samples=0)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_learning_where_gradients_are_off_is_refused_by_name(off):
    with off():
        model = small()
        with pytest.raises(ConfigError, match=r"switched off here: call it outside torch.no_grad\(\)"):
            model.learn(64)
        made = ALGORITHMS["draft"]("FlowPolicy", "gaussians-linear", device=DEVICE, **SMALL)  # looks for a gradient
    if off is torch.no_grad:
        made.learn(64)
    else:
        with pytest.raises(ConfigError, match=r"made under torch.inference_mode\(\) cannot learn"):
            made.learn(64)


def test_another_default_type_is_refused_by_name():
    torch.set_default_dtype(torch.float64)
    try:
        for make in (small, lambda: flowrl.FlowPolicy.of("gaussians-linear")):
            with pytest.raises(
                ConfigError, match=r"type is torch.float64: call torch.set_default_dtype\(torch.float32"
            ):
                make()
    finally:
        torch.set_default_dtype(torch.float32)


def test_orw_has_no_penalty():
    with pytest.raises(ConfigError, match="orw_w2"):
        small("orw", alpha=0.1)


def test_absent_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(DeviceError, match="Available: cpu"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cuda")


def test_overflowing_raw_weights_name_tau_and_the_reward():
    with pytest.raises(NonFiniteError, match=r"tau = 1000, largest reward = \d"):
        small(weight_normalisation="none", tau=1000.0).learn(64)
    small(tau=1000.0).learn(64)  # normalised weights cannot overflow


def test_a_frozen_flow_cannot_be_trained():
    def frozen():
        return flowrl.make("gaussians-linear").flow.load().network.requires_grad_(False)

    with pytest.raises(ConfigError, match="no trainable parameters"):
        flowrl.ORWCFMW2("FlowPolicy", GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)), frozen))


def test_contexts_come_in_groups_and_cover_all():
    prompts = ["a", "b", "c", "d", "e"]

    @flowrl.register_env("grouped", flow=flowrl.make("gaussians-linear").flow.load, prompts=prompts)
    def nothing(samples, contexts):
        return samples[:, 0]

    model = flowrl.ORWCFMW2("FlowPolicy", "grouped", seed=0, device=DEVICE, n_samples=24, group_size=4)
    contexts = model.contexts()
    assert (contexts.reshape(6, 4) == contexts.reshape(6, 4)[:, :1]).all()  # groups of four
    assert set(contexts[:20].tolist()) == set(range(5))  # each once before any again


def test_samples_of_the_reference_are_not_taken_for_the_flows_own():
    model = small("rwr", mode="offline")
    model.learn(64)
    assert "train/drift" in model.last_logged
    assert "train/own_loss" not in model.last_logged


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("orw_w2", {"alpha": 0.5}),
        ("orw", {}),
        ("nft", {"beta_ref": 0.1}),
        ("tilt", {"pool": 64}),  # these three give a drift of other samples, or no losses beside it
        ("crd", {"anchor": 0.1, "group_size": 4}),
        ("adjoint", {}),
    ],
)
def test_a_flow_that_no_longer_fits_its_own_samples_is_told_of(name, settings):
    model = small(name, learning_rate=1e-9, n_epochs=2, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(64)
    own, reference = (model.last_logged[f"train/{key}"] for key in ("own_loss", "reference_loss"))
    assert own == pytest.approx(reference, rel=1e-5)
    with torch.no_grad():
        for parameter in model.policy.parameters_of("current").values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(model.config.n_samples, reset_num_timesteps=False)  # once is chance: of few samples it varies
    with pytest.warns(UserWarning, match=r"fits its own samples worse than the reference does: .* [\d.]+ times"):
        model.learn(model.config.n_samples, reset_num_timesteps=False)
    assert model.last_logged["train/own_loss"] > 1.3 * model.last_logged["train/reference_loss"]


def test_a_default_device_whose_tensors_hold_no_values_is_told() -> None:
    env = flowrl.make("gaussians-linear")
    makers = lambda: flowrl.ORWCFM("FlowPolicy", "gaussians-linear"), lambda: flowrl.FlowPolicy.of(env)
    for make in (*makers, lambda: flowrl.make("gaussians-linear")):
        with torch.device("meta"), pytest.raises(ConfigError, match="default device is 'meta', whose tensors hold no"):
            make()
