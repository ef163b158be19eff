"""Faults of training as users met them: each with the value that is right."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common import callbacks
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

import flowrl
from flowrl.envs.base import GenerationVecEnv
from flowrl.errors import CheckpointError, ConfigError
from flowrl.orw_w2 import ORWCFMW2Config
from flowrl.runs.folder import load_model
from flowrl.runs.logs import logger, read_metrics
from flowrl.training.construction import as_generation_env
from flowrl.training.optimizers import laid_out_like

SMALL: dict[str, Any] = {"n_samples": 32, "batch_size": 16, "rollout_steps": 2}


def small(cls: type = flowrl.ORWCFMW2, env: Any = "gaussians-linear", **settings: Any) -> Any:
    return cls("FlowPolicy", env, seed=0, device="cpu", **{**SMALL, **settings})


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters_of("current").values()])


def warned_of(act: Callable[[], Any]) -> list[str]:
    """What flowrl warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if w.category is UserWarning]


# Other machines


@pytest.fixture
def of_a_gpu(tmp_path: Path) -> Path:
    """A checkpoint whose random states are those of a GPU: 16 bytes."""
    model = small()
    model.learn(32)
    model.save(tmp_path / "saved")
    states = load_file(tmp_path / "saved" / "random.safetensors")
    states |= {name: torch.arange(16, dtype=torch.uint8) + i for i, name in enumerate(("training", "policy"))}
    save_file(states, tmp_path / "saved" / "random.safetensors")
    return tmp_path / "saved"


def test_random_states_of_another_kind_of_device(of_a_gpu: Path) -> None:
    loaded: list[Any] = []
    (text,) = warned_of(lambda: loaded.append(flowrl.ORWCFMW2.load(of_a_gpu, device="cpu")))
    assert "not bit-exact" in text
    assert "'cuda'" in text
    assert "'cpu'" in text
    assert "\n" not in text
    again = flowrl.ORWCFMW2.load(of_a_gpu, device="cpu")
    for model in (loaded[0], again):
        model.learn(32, reset_num_timesteps=False)
    assert torch.equal(weights(loaded[0]), weights(again))
    assert not torch.equal(loaded[0].generator.get_state(), loaded[0].policy.generator.get_state())


def test_evaluation_needs_no_random_states(of_a_gpu: Path) -> None:
    (of_a_gpu / "random.safetensors").unlink()
    assert warned_of(lambda: load_model(of_a_gpu, device="cpu")) == []
    with pytest.raises(CheckpointError, match="random"):
        flowrl.ORWCFMW2.load(of_a_gpu, device="cpu")


def test_states_of_no_device_are_damage(of_a_gpu: Path) -> None:
    states = load_file(of_a_gpu / "random.safetensors")
    save_file(states | {"training": torch.zeros(17, dtype=torch.uint8)}, of_a_gpu / "random.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        flowrl.ORWCFMW2.load(of_a_gpu, device="cpu")


def test_the_kind_of_device_is_stored(of_a_gpu: Path) -> None:
    assert json.loads((of_a_gpu / "state.json").read_text())["device"] == "cpu"


def test_conditions_go_to_the_device_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = small(), []

    class Elsewhere(torch.Tensor):
        def to(self, device: torch.device) -> torch.Tensor:
            asked.append(device)
            return torch.zeros(1, 0, device=device)

    monkeypatch.setattr(model.policy.model, "encode", lambda contexts: (torch.ones(1, 0).as_subclass(Elsewhere),))
    (part,) = model.policy.encode([None])
    assert asked == [torch.device("cpu")]
    assert type(part) is torch.Tensor


# Wrappers


class Louder(gymnasium.Wrapper):
    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, 2 * reward, *rest


class Named(gymnasium.Wrapper):
    title = "a wrapper that changes nothing"


def points() -> Any:
    return gymnasium.make("flowrl/gaussians-linear-v0")


W = gymnasium.wrappers
CHANGING: dict[str, Callable[[], Any]] = {
    "TransformReward": lambda: W.TransformReward(points(), lambda r: -r),
    "NormalizeReward": lambda: W.NormalizeReward(points()),
    "ClipAction": lambda: W.ClipAction(points()),
    "TransformObservation": lambda: W.TransformObservation(points(), lambda o: o, points().observation_space),
    "TimeAwareObservation": lambda: W.TimeAwareObservation(W.TimeLimit(points(), 5)),
    "Louder": lambda: W.RecordEpisodeStatistics(Louder(points())),
    "VecNormalize": lambda: VecNormalize(GenerationVecEnv(as_generation_env(points()), 4), norm_obs=False),
}


@pytest.mark.parametrize("name", CHANGING)
def test_wrappers_that_change_something_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"The wrapper {name} changes .*without it"):
        small(env=CHANGING[name]())


@pytest.mark.parametrize(
    "wrapped",
    [
        points,
        lambda: W.RecordEpisodeStatistics(W.TimeLimit(points(), 5)),
        lambda: Monitor(points()),
        lambda: Named(points()),
        lambda: VecMonitor(GenerationVecEnv(as_generation_env(points()), 4)),
    ],
)
def test_wrappers_that_change_nothing_pass(wrapped: Callable[[], Any]) -> None:
    assert small(env=wrapped()).env.core.name == "gaussians-linear"


def test_batches_of_others_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not on a DummyVecEnv.*give one environment"):
        small(env=DummyVecEnv([points]))


# Setters of stable-baselines3


def test_set_env_refuses_another_environment() -> None:
    model = small()
    model.set_env(model.env)
    with pytest.raises(ConfigError, match=r"load\('folder', env="):
        model.set_env(as_generation_env("gaussians-ring"))
    assert model.env.core.name == "gaussians-linear"


def test_parameters_come_back() -> None:
    trained, other = small(), small(flowrl.ORWCFMW2)
    trained.learn(64)
    other.set_parameters(trained.get_parameters())
    assert torch.equal(weights(trained), weights(other))
    with pytest.raises(ConfigError, match=r"Checkpoints are folders: ORWCFMW2.load"):
        other.set_parameters("somewhere.zip")
    with pytest.raises(ConfigError, match="do not fit"):
        other.set_parameters({"policy": {}, "policy.optimizer": other.policy.optimizer.state_dict()})


def test_a_policy_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.save\('folder'\)"):
        small().policy.save(str(tmp_path / "policy"))
    with pytest.raises(ConfigError, match=r"load\('folder'\).policy"):
        flowrl.FlowPolicy.load(str(tmp_path / "policy"))
    assert list(tmp_path.iterdir()) == []


def test_set_random_seed_seeds_training() -> None:
    one, other = small(), small(flowrl.ORWCFMW2)
    other.generator.manual_seed(99)
    for model in (one, other):
        model.set_random_seed(5)
        model.learn(32)
    assert torch.equal(weights(one), weights(other))


# Moments


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_moments_take_the_strides_of_their_parameter(layout: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4, 3, 3), torch.randn(3, 6, 4, 3, 3)
    if layout == "channels_last":
        start = start.to(memory_format=torch.channels_last)
    else:
        start = torch.randn(4, 6, 3, 3).transpose(0, 1)

    def run(resumed: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            if i == 2 and resumed:
                state = optimizer.state_dict()
                stored = {k: v.contiguous() for k, v in state["state"][0].items()}
                optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
                optimizer.load_state_dict(
                    {**state, "state": {0: {k: laid_out_like(v, parameter) for k, v in stored.items()}}}
                )
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        return parameter.detach()

    assert not start.is_contiguous()
    assert torch.equal(run(True), run(False))


def test_a_run_with_transposed_weights_resumes_exactly(tmp_path: Path) -> None:
    def model() -> Any:
        made = small(flowrl.ORWCFM)
        for parameter in made.policy.parameters_of("current").values():
            if parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()
        return made

    whole = model()
    whole.learn(64)
    whole.save(tmp_path / "saved")
    resumed = model()
    from flowrl.training.loading import load_state

    load_state(resumed, tmp_path / "saved")
    for one in (whole, resumed):
        one.learn(64, reset_num_timesteps=False)
    assert torch.equal(weights(whole), weights(resumed))


# Numbers of numpy and torch


def test_scalars_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    model = flowrl.ORWCFMW2(
        *("FlowPolicy", "gaussians-linear"),
        tau=np.float32(0.5),
        n_samples=np.int64(64),
        batch_size=torch.tensor(32),
        rollout_steps=2,
        gradient_checkpointing=np.bool_(False),
        learning_rate=np.array(1e-3),
        seed=np.int64(3),
        device="cpu",
    )
    assert (model.config.tau, model.config.n_samples, model.config.batch_size) == (0.5, 64, 32)
    assert [type(v) for v in (model.config.tau, model.config.n_samples, model.seed)] == [float, int, int]
    model.learn(np.int64(64))
    model.save(tmp_path / "saved")
    loaded = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    assert loaded.config == model.config
    with pytest.raises(ConfigError, match="n_samples must be a whole number"):
        flowrl.ORWCFMW2.Config(n_samples=np.float64(64.5))  # type: ignore[arg-type]
    json.dumps(flowrl.evaluate(model, n_samples=np.int64(16)).to_dict())
    env = flowrl.make("gaussians-linear", tau=np.float32(2))
    assert env.origin == ("gaussians-linear", {"tau": 2.0})
    assert type(env.origin[1]["tau"]) is float


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_seeds_that_no_generator_takes(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=seed, device="cpu")


# Callbacks


def evaluated(**more: Any) -> Any:
    return callbacks.EvalCallback(Monitor(points()), n_eval_episodes=2, eval_freq=1, verbose=0, warn=False, **more)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda f: evaluated(best_model_save_path=str(f / "best"), log_path=str(f)), 96),
        (lambda f: evaluated(callback_on_new_best=callbacks.StopTrainingOnRewardThreshold(-99)), 32),
        (lambda f: evaluated(callback_after_eval=callbacks.StopTrainingOnNoModelImprovement(99)), 96),
        (lambda f: callbacks.StopTrainingOnMaxEpisodes(2), 64),
        (lambda f: callbacks.CheckpointCallback(1, str(f / "checkpoints")), 96),
        (lambda f: callbacks.ProgressBarCallback(), 96),
        (lambda f: callbacks.EveryNTimesteps(32, callbacks.CheckpointCallback(1, str(f / "checkpoints"))), 96),
        (lambda f: callbacks.LogEveryNTimesteps(32), 96),
        (lambda f: callbacks.CallbackList([callbacks.StopTrainingOnMaxEpisodes(1)]), 32),
        (lambda f: callbacks.ConvertCallback(lambda local, known: local["self"].num_timesteps < 64), 64),
        (lambda f: lambda local, known: True, 96),
    ],
)
def test_callbacks_of_stable_baselines3(make: Callable[[Path], Any], steps: int, tmp_path: Path) -> None:
    model = small()
    model.learn(96, callback=make(tmp_path))
    assert model.num_timesteps == steps
    for folder in (tmp_path / "best" / "best_model", tmp_path / "checkpoints" / "rl_model_64_steps"):
        if folder.parent.exists():
            assert flowrl.ORWCFMW2.load(folder, device="cpu").num_timesteps > 0


@pytest.mark.parametrize("name", ["StopTrainingOnRewardThreshold", "StopTrainingOnNoModelImprovement"])
@pytest.mark.parametrize("within", [lambda c: c, lambda c: [c], lambda c: callbacks.EveryNTimesteps(32, c)])
def test_callbacks_that_belong_into_another(name: str, within: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} .*EvalCallback\(env, callback_"):
        small().learn(32, callback=within(getattr(callbacks, name)(1)))


@pytest.mark.parametrize("callback", ["checkpoint", 3, [lambda *_: True, "checkpoint"]])
def test_what_is_no_callback(callback: Any) -> None:
    with pytest.raises(ConfigError, match=r"A callback is a BaseCallback .*, not (3|'checkpoint')"):
        small().learn(32, callback=callback)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_no_refresh_can_keep(share: float) -> None:
    class Kept(flowrl.ORWCFMW2):
        def refresh_decay(self) -> float:
            return share

    with pytest.raises(ConfigError, match=rf"share of the behaviour policy from 0 to 1, not {share} \(refresh_decay"):
        small(Kept).learn(32)


def test_settings_that_were_never_checked() -> None:
    @dataclass(frozen=True)
    class OwnConfig(ORWCFMW2Config):
        strength: float = 1.0

        def __post_init__(self) -> None:
            self.require(self.strength > 0, "strength must be positive.")

    class Own(flowrl.ORWCFMW2):
        Config = OwnConfig

    with pytest.raises(ConfigError, match=r"OwnConfig.__post_init__ must call super\(\).__post_init__\(\)"):
        small(Own, learning_rate=-1.0)


def test_logs_by_a_callback(tmp_path: Path) -> None:
    """With `log_interval=None` rows are those that the callback asks for, of the newest iteration."""
    from stable_baselines3.common.logger import configure

    model = small()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(160, callback=callbacks.LogEveryNTimesteps(64), log_interval=None)
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert len(lines) == 1 + 2


# Signal


def constant(samples: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(samples))


def environment(reward: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Points whose reward is a function of them alone."""
    env = flowrl.make("gaussians-linear")
    env.reward = lambda samples, contexts: flowrl.RewardOutput(reward(samples))  # type: ignore[method-assign]
    return env


def test_a_group_of_one_is_said_at_once() -> None:
    class Alone(flowrl.FlowAlgorithm):
        def advantage(self, rollout: Any) -> torch.Tensor:
            from flowrl.functional.advantages import group_advantage

            return group_advantage(rollout.reward, rollout.group)

        def loss(self, batch: Any) -> Any:
            return (batch.advantage * self.error(self.pair(batch))).mean(), {}

    model = small(Alone, group_size=1)
    texts = warned_of(lambda: model.learn(128))
    assert sum("compared with itself alone" in text and "--algo.group-size" in text for text in texts) == 1
    assert sum("gradients of all 8 gradient steps were zero" in text for text in texts) == 1
    assert len(texts) == 2
    assert warned_of(lambda: small(Alone, group_size=8).learn(128)) == []


def test_weights_that_are_all_equal_are_said_at_once() -> None:
    (text, *_) = warned_of(lambda: small(tau=1e-12).learn(32))
    assert "the weights of all 32 samples are equal, though rewards differ" in text
    assert "tau" in text
    assert warned_of(lambda: small(tau=1.0).learn(160)) == []


def test_constant_rewards_are_said_when_they_stay() -> None:
    model = small(env=environment(constant))
    assert warned_of(lambda: model.learn(4 * 32)) == ["Nothing was learnt: " + ANY_ZERO.format(8)]
    texts = warned_of(lambda: model.learn(4 * 32, reset_num_timesteps=False))
    assert sum("all samples had the same reward" in text for text in texts) == 1


def test_choosing_among_equal_rewards_is_said_too() -> None:
    model = small(flowrl.RAFT, env=environment(constant), group_size=4)
    texts = warned_of(lambda: model.learn(4 * 32))
    assert not texts
    texts = warned_of(lambda: model.learn(32, reset_num_timesteps=False))
    assert ["all samples had the same reward" in text for text in texts] == [True]


ANY_ZERO = (
    "the gradients of all {} gradient steps were zero, and the flow is as it was. Look at the rewards "
    "(rollout/reward_std in the metrics) and at how they are compared (group_size, standardisation, clipping)."
)


def test_a_constant_iteration_followed_by_others_is_no_alarm() -> None:
    calls = []

    def reward(samples: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return constant(samples) if len(calls) in (1, 2, 4) else samples[:, 0]

    assert warned_of(lambda: small(env=environment(reward)).learn(5 * 32)) == []


def test_a_learning_rate_of_zero() -> None:
    model = small(warmup_updates=3)
    model.lr_schedule = lambda progress: 0.0
    texts = warned_of(lambda: model.learn(96))
    assert sum("learning rate is 0 after warm-up" in text for text in texts) == 1


@pytest.mark.parametrize("targets", [("nowhere",), ("hidden.0", "nowhere")])
def test_lora_targets_that_match_nothing(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no module of this network is named 'nowhere'"):
        small(lora_rank=2, lora_targets=targets)


def test_trained_parameters_alone_move() -> None:
    model = small(trained_parameters=("inputs", "output.weight"), ema_decay=0.5)
    names = [name for name, _ in model.policy.networks.trained.named_parameters()]
    chosen = [name for name in names if "inputs" in name or "output.weight" in name]
    assert 0 < len(chosen) < len(names)
    assert list(model.policy.parameters_of("ema")) == chosen
    model.learn(64)
    tensors, before = (model.policy.networks.model_of(role).network.state_dict() for role in ("current", "reference"))
    assert [name for name in names if not torch.equal(tensors[name], before[name])] == chosen
    with pytest.raises(
        ConfigError, match=r"no parameter .* has 'nowhere' .* made of inputs, weight, bias, hidden, output"
    ):
        small(trained_parameters=("out", "nowhere"))


@pytest.mark.parametrize(
    ("targets", "parts", "adapted"),
    [
        ((), ("inputs", "output.weight"), {"inputs", "output"}),
        ((), ("hidden.1", "out"), {"hidden.1", "output"}),
        (("0", "1", "output"), ("hidden",), {"hidden.0", "hidden.1"}),
    ],
)
def test_with_lora_modules_of_those_names_alone_are_adapted(
    targets: tuple[str, ...], parts: tuple[str, ...], adapted: set[str]
) -> None:
    model = small(lora_rank=2, lora_targets=targets, trained_parameters=parts)
    names = {name.partition(".lora_")[0] for name in model.policy.parameters_of("current")}
    assert names == adapted


def test_with_lora_some_module_must_have_such_a_name() -> None:
    with pytest.raises(ConfigError, match="no module that lora_targets names has a parameter of trained_parameters"):
        small(lora_rank=2, lora_targets=("output",), trained_parameters=("hidden",))
    with pytest.raises(ConfigError, match="no parameter of this network has 'nowhere' in its name"):
        small(lora_rank=2, trained_parameters=("nowhere",))


@pytest.mark.parametrize("name", ["lora_targets", "trained_parameters"])
def test_an_empty_name_does_not_stand_for_all(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has an empty name in it"):
        small(**{name: ("output", "")})


def test_samples_to_learn_from_may_take_fewer_steps_than_those_to_show() -> None:
    few, many = small(rollout_steps=8, draw_steps=2), small(rollout_steps=2)
    for model in (few, many):
        model.learn(32)
    assert torch.equal(few.buffer.all().x_1, many.buffer.all().x_1)
    assert few.policy.evaluations_per_sample() == 8


# Samples that a reward failed for


@pytest.mark.parametrize("target", ["plain", "residual"])
def test_a_prompt_whose_samples_all_failed_moves_nothing(target: str) -> None:
    """Weights of zero in the residual target would push the flow away from them."""
    from flowrl.training.reward_calls import without_strays
    from flowrl.types import Batch

    own = {"baseline": "mean"} if target == "residual" else {}
    model = small(target=target, alpha=0.0, group_size=2, cls=flowrl.ORWCFMW2, **own)
    model.learn(32)
    everything = model.buffer.all()
    stray = torch.zeros(32, dtype=torch.bool)
    stray[5] = True
    rollout = Batch(*everything[:5], {"stray": stray})
    weight = without_strays(rollout, torch.rand(32) + 0.5)
    assert rollout.extra["stray"].nonzero().flatten().tolist() == [4, 5]  # the whole group, and no other
    assert weight[4:6].tolist() == [0, 0]
    assert (weight[:4] > 0).all()
    assert (weight[6:] > 0).all()
    model.buffer.coefficient.copy_(weight)
    pick = [4, 5]
    batch = Batch(*(part[pick] for part in model.buffer.all()[:5]), {"stray": rollout.extra["stray"][pick]})
    model.policy.optimizer.zero_grad()
    loss, _ = model.loss(batch)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.policy.parameters_of("current").values())


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (flowrl.ORWCFMW2, {"baseline": "local", "alpha": 0.0}),
        (flowrl.Tilt, {"pool": 64}),
        (flowrl.AWM, {"critic_learning_rate": 1e-2, "group_size": 2, "beta_ref": 0.0}),
        (flowrl.DPOK, {"rollout_steps": 3, "beta": 0.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_learnt_from_samples_that_stand_in_for_others(cls: type, own: dict[str, Any]) -> None:
    """By neither the flow nor a critic, wherever they lie: a weight of zero, which they have, is no target."""

    def learnt(scale: float) -> list[torch.Tensor]:
        model = small(cls=cls, batch_size=32, **own)
        model.learn(64)
        batch = next(model.minibatches())
        stray = torch.arange(len(batch.x_1)) % 4 == 0
        for rows in (batch.x_1, batch.coefficient, *batch.extra.values()):
            rows[stray] *= scale if rows.dim() > 1 else 0
        batch.extra["stray"] = stray
        model.policy.optimizer.zero_grad()
        with model.policy.in_update():
            loss, _ = model.loss(batch)
        loss.backward()
        flow = [p.grad for p in model.policy.parameters_of("current").values()]
        return [*flow, *(p.detach() for p in model.critic.module.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(learnt(1.0), learnt(1.1), strict=True))


@pytest.mark.parametrize("baseline", ["mean", "clipped"])
def test_equal_rewards_move_nothing_beside_samples_that_stand_in_for_others(baseline: str) -> None:
    model = small(target="residual", alpha=0.0, baseline=baseline, cls=flowrl.ORWCFMW2)
    model.learn(32)
    model.buffer.numbers["stray"] = torch.arange(32) < 3
    model.buffer.coefficient.copy_(~model.buffer.numbers["stray"])
    loss, _ = model.loss(next(model.minibatches()))
    model.policy.optimizer.zero_grad()
    loss.backward()
    assert all(not p.grad.any() for p in model.policy.parameters_of("current").values())


@pytest.mark.parametrize("group_size", [1, 2])
def test_strays_by_group(group_size: int) -> None:
    from flowrl.training.reward_calls import without_strays
    from flowrl.types import Batch

    stray, n = torch.tensor([False, True, False, False]), 4
    group = torch.arange(n) // group_size
    zeros = torch.zeros(n)
    rollout = Batch(torch.zeros(n, 2), zeros.long(), zeros, zeros, group, {"stray": stray})
    expected = [1, 0, 1, 1] if group_size == 1 else [0, 0, 1, 1]
    assert without_strays(rollout, torch.ones(n)).tolist() == expected


# Names in logs


def test_components_replace_no_figure(tmp_path: Path) -> None:
    names = [
        "reward_mean",
        "diversity",
        "ess",
        "a, b",
        'a "quoted"\nname',
        "наград" + "a" * 60 + "1",
        "наград" + "a" * 60 + "2",
    ]
    env = flowrl.make("gaussians-linear")
    env.reward = lambda samples, contexts: flowrl.RewardOutput(  # type: ignore[method-assign]
        samples[:, 0], {name: torch.full((len(samples),), 1000.0 + i) for i, name in enumerate(names)}
    )
    from flowrl.runs.logs import logger, read_metrics

    model = small(env=env)
    model.set_logger(logger(tmp_path, 0))
    model.learn(64)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert len(rows) == 2
    for row in rows:
        assert abs(row["rollout/reward_mean"]) < 10
        assert row["rollout/diversity"] < 10
        assert 0 < row["rollout/ess"] <= 1
        assert [row[f"reward/{name}"] for name in names] == [1000.0 + i for i in range(len(names))]
    assert model.rollout_reward == pytest.approx(rows[-1]["rollout/reward_mean"])
    assert not any(math.isnan(v) for row in rows for v in row.values())


def test_the_table_of_a_plain_algorithm_takes_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    env = flowrl.make("gaussians-linear")
    names = ["colourfulness:0.7+compress:0.3:running", "colourfulness:0.7+compress:0.3:fixed"]
    env.reward = lambda samples, contexts: flowrl.RewardOutput(  # type: ignore[method-assign]
        samples[:, 0], dict.fromkeys(names, samples[:, 0])
    )
    flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", verbose=1, **SMALL).learn(32)
    shown = capsys.readouterr().out
    assert "0.3:running" in shown
    assert "0.3:fixed" in shown


def test_tables_and_lines_for_ascii_terminals() -> None:
    import io

    from flowrl.training.writers import Table, printable

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printable("красно", stream).isascii()
    Table(stream).write({"reward/красно": 1.0, "reward/два": "текст"}, {"reward/красно": None, "reward/два": None})
    stream.flush()
    assert b"\\u0434" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ["--algo", "orw_w2", "--env", "gaussians-linear", "--seed", "-1"],
            "--seed must be from 0 to 4294967295, not -1",
        ),
        (
            [
                "--algo",
                "orw_w2",
                "--env",
                "sd3-aesthetic",
                "--env.reward",
                "winrate(compress)",
                "--algo.group-size",
                "2",
                "--eval-samples",
                "17",
            ],
            "Take 16 or 18 (--eval-samples)",
        ),
        (
            [
                "--algo",
                "orw_w2",
                "--env",
                "sd3-aesthetic",
                "--eval-rewards",
                "winrate(compress)",
                "--eval-samples",
                "17",
            ],
            "Take 16 or 18 (--eval-samples)",
        ),
    ],
)
def test_settings_that_would_fail_late_or_raw(
    arguments: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowrl.run import main

    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main([*arguments, "--device", "cpu", "--name", "r"])
    except SystemExit as end:  # the parser's own
        code = end.code
    assert code == 2
    shown = capsys.readouterr().err
    assert what in " ".join(shown.split())
    assert "Traceback" not in shown


def test_charts_read_components_of_old_and_new_runs() -> None:
    from flowrl.pages.run_files import RunFiles
    from flowrl.pages.training_charts import _drawn_metrics

    row = {"time/total_timesteps": 1.0, "rollout/reward_mean": 0.0, "rollout/reward_std": 0.0}
    old, new = ({**row, key: 1.0} for key in ("rollout/red", "reward/reward_mean"))
    runs = [RunFiles("r", {}, [part], {}, b"", []) for part in (old, new)]  # type: ignore[arg-type]
    drawn = _drawn_metrics(runs)
    assert drawn["rollout/red"] == "red"
    assert drawn["reward/reward_mean"] == "reward_mean"
    assert drawn["rollout/reward_mean"] == "reward"
    assert "rollout/reward_std" not in drawn


def test_the_last_iteration_has_a_row(tmp_path: Path) -> None:
    """Of eight iterations with a row for every third: 3, 6 and 8."""
    model = small(n_samples=32)
    model.set_logger(logger(tmp_path, 0))
    model.learn(8 * 32, log_interval=3)
    assert [row["time/iteration"] for row in read_metrics(tmp_path / "metrics.csv")] == [3, 6, 8]
