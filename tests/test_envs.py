"""Environments: the contract over the whole registry, custom environments, and rewards that go wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

import flowrl
from flowrl.envs.base import GenerationVecEnv
from flowrl.envs.gaussians import GaussianMixture
from flowrl.envs.prompts import positions_of
from flowrl.envs.speech import PACKAGES
from flowrl.envs.text_to_image import embedded_for
from flowrl.errors import ConfigError, RewardError, UnknownNameError
from flowrl.models.loading import source_of
from flowrl.models.mlp import MLP, FieldFlow, ModuleFlow
from flowrl.registry import ALGORITHMS, ENVIRONMENTS
from flowrl.run import main
from flowrl.runs.media import sounds_of
from flowrl.runs.pictures import save_before_after, save_picture

SHIPPED = sorted(ENVIRONMENTS)


@pytest.fixture
def names() -> Iterator[Callable[[], str]]:
    """Names for environments that are forgotten after the test."""
    before, gymnasium_before = set(ENVIRONMENTS), set(gymnasium.registry)

    def new() -> str:
        return f"test-{len(ENVIRONMENTS)}"

    yield new
    for name in set(ENVIRONMENTS) - before:
        del ENVIRONMENTS[name]
    for name in set(gymnasium.registry) - gymnasium_before:
        del gymnasium.registry[name]


@pytest.fixture(scope="module", params=SHIPPED)
def env(request: pytest.FixtureRequest) -> flowrl.GenerationEnv:
    reward = request.param.removeprefix("sd3-")
    settings = {"flow": embedded_for(reward)} if request.param.startswith("sd3-") else {}
    if request.param == "speech-mos":
        missing = [module for module in PACKAGES if find_spec(module) is None]
        if missing:
            pytest.skip(f"not installed: {missing} (extra [speech])")
    return flowrl.make(request.param, **settings)


def test_gymnasium_checker(env: flowrl.GenerationEnv) -> None:
    made = gymnasium.make(ENVIRONMENTS[env.name].gymnasium_id)
    assert isinstance(made.unwrapped, flowrl.GenerationEnv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on normalised and image-shaped spaces
        gymnasium_check_env(made.unwrapped)


def test_stable_baselines3_checker(env: flowrl.GenerationEnv) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sb3_check_env(env)


def test_gymnasium_renders(env: flowrl.GenerationEnv) -> None:
    made = gymnasium.make(ENVIRONMENTS[env.name].gymnasium_id, render_mode="rgb_array")
    made.reset(seed=0)
    made.step(made.action_space.sample())
    picture = made.render()
    assert picture.dtype == np.uint8
    assert picture.ndim == 3


def test_a_picture_is_of_the_step_though_its_action_is_changed_later() -> None:
    made = gymnasium.make("flowrl/gaussians-linear-v0", render_mode="rgb_array")
    made.reset(seed=0)
    action = np.array([2.0, -3.0], dtype=np.float32)
    made.step(action)
    picture = made.render()
    action[:] = 0  # one array that a loop fills anew
    np.testing.assert_array_equal(made.render(), picture)


def actions(env: flowrl.GenerationEnv, n: int) -> torch.Tensor:
    low, high = float(env.action_space.low.min()), float(env.action_space.high.max())
    samples = torch.rand(n, *env.sample_shape, generator=torch.Generator().manual_seed(0))
    return low + (high - low) * samples


def test_a_batch_equals_single_steps(env: flowrl.GenerationEnv) -> None:
    samples = actions(env, 5)
    contexts = torch.arange(5) * 7 % len(env.contexts)
    output = env.evaluate(samples, contexts)
    assert output.reward.shape == (5,)
    assert output.reward.dtype == torch.float32
    assert bool(output.reward.isfinite().all())
    for i in range(5):
        observation, info = env.reset(options={"context": contexts[i].item()})
        assert env.observation_space.contains(observation)
        assert info["context"] == env.contexts[contexts[i]]
        _, reward, terminated, truncated, info = env.step(samples[i].numpy())
        assert (terminated, truncated) == (True, False)
        assert reward == pytest.approx(output.reward[i].item(), rel=1e-5)
        for key, values in output.components.items():
            assert info[key] == pytest.approx(values[i].item(), rel=1e-5)


def test_reset_is_seeded(env: flowrl.GenerationEnv) -> None:
    def draws(seed: int) -> list[int]:
        return [int(env.reset(seed=seed if i == 0 else None)[0]) for i in range(20)]

    assert draws(3) == draws(3)
    if len(env.contexts) > 1:
        assert draws(3) != draws(4)


def test_vectorised_form(env: flowrl.GenerationEnv) -> None:
    settings = {} if env.origin is None else env.origin[1]
    vec = flowrl.make_vec(env.name, 4, **settings)
    samples = actions(env, 4)
    vec.seed(0)
    first = vec.reset()
    expected = env.evaluate(samples, torch.from_numpy(first)).reward
    observations, rewards, dones, infos = vec.step(samples)
    assert isinstance(rewards, torch.Tensor)
    torch.testing.assert_close(rewards, expected)
    assert dones.tolist() == [True] * 4
    assert [info["terminal_observation"] for info in infos] == first.tolist()
    assert [info["context"] for info in infos] == [env.contexts[i] for i in first]
    vec.seed(0)
    assert vec.reset().tolist() == first.tolist()
    again, rewards, _, _ = vec.step(samples.numpy())
    assert isinstance(rewards, np.ndarray)
    np.testing.assert_allclose(rewards, expected.numpy(), rtol=1e-5)
    assert again.tolist() == observations.tolist()


def test_samples_of_another_shape(env: flowrl.GenerationEnv) -> None:
    with pytest.raises(RewardError, match=env.name):
        env.evaluate(torch.zeros(2, 9), torch.zeros(2, dtype=torch.long))


def test_shipped_environments_recommend_by_kind_and_name_no_algorithm(env: flowrl.GenerationEnv) -> None:
    parts = [cls.kind.split(".") for cls in ALGORITHMS.values()]  # type: ignore[attr-defined]
    kinds = {".".join(of[: i + 1]) for of in parts for i in range(len(of))}  # one of kind "a.b" is one of kind "a"
    prefixes = {key.rpartition(".")[0] for key in env.recommended} - {""}
    assert prefixes <= kinds - ALGORITHMS.keys()


def test_the_list_says_which_rewards_have_a_gradient(env: flowrl.GenerationEnv) -> None:
    assert env.origin is not None
    x_1 = torch.rand(4, *env.sample_shape, requires_grad=True)
    reward = env.evaluate(x_1, torch.arange(4) % len(env.contexts)).reward
    assert reward.requires_grad == ENVIRONMENTS[env.origin[0]].differentiable
    if reward.requires_grad:
        (gradient,) = torch.autograd.grad(reward.sum(), x_1)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_recommended_settings_suit_every_algorithm(env: flowrl.GenerationEnv, algo: str) -> None:
    flowrl.algorithm_class(algo).configure(recommended=env.recommended)


def test_indices_are_of_contexts_and_there_is_one_for_each_sample() -> None:
    env = flowrl.make("gaussians-linear")
    policy, samples, zeros = flowrl.FlowPolicy.of(env, device="cpu"), torch.zeros(2, 2), torch.zeros(2).long()
    vector = gymnasium.make_vec("flowrl/gaussians-linear-v0", num_envs=2)
    for index in (-1, 1):
        for call in (
            lambda i: env.evaluate(samples, zeros + i),
            lambda i: env.reset(options={"context": i}),
            lambda i: vector.reset(options={"context": i}),
            lambda i: policy.sample(zeros + i),
            lambda i: policy.predict(np.array([0, i])),
        ):
            with pytest.raises(ConfigError, match=f"no context {index}: they are numbered from 0 to 0"):
                call(index)
    for contexts in (zeros[:1], torch.zeros(3).long(), torch.zeros(2, 1).long()):
        with pytest.raises(ConfigError, match="2 samples came with contexts of shape"):
            env.evaluate(samples, contexts)
    batched = flowrl.make_vec("gaussians-linear", 4)
    batched.reset()
    with pytest.raises(ConfigError, match=r"3 samples came with contexts of shape \(4,\)"):
        batched.step(torch.ones(3, 2))
    with pytest.raises(ConfigError, match="num_envs must be a whole number, 1 or more, not 0"):
        flowrl.make_vec("gaussians-linear", 0)


def test_unknown_setting_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"'gaussians-linear' 'flwo'\. Did you mean 'flow'"):
        flowrl.make("gaussians-linear", flwo="exact")


def test_unknown_name_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'gaussians-linear'"):
        flowrl.make("gaussian-linear")


def test_names_and_gymnasium_ids_are_the_same_thing() -> None:
    for name in ("gaussians-ring", "flowrl/gaussians-ring-v0", "flowrl.envs.gaussians:gaussians-ring"):
        assert flowrl.make(name).name == "gaussians-ring"


def test_unknown_render_mode() -> None:
    with pytest.raises(ConfigError, match=r"rgb_array.*human"):
        flowrl.make("gaussians-linear", render_mode="human")


def test_sb3_ppo_learns_a_gaussian_environment() -> None:
    """Single-step episodes: with gamma 0 PPO is a bandit that moves its mean to the right."""
    model = PPO("MlpPolicy", "flowrl/gaussians-linear-v0", n_steps=128, learning_rate=5e-3, gamma=0, seed=0)
    before, _ = evaluate_policy(model, model.get_env(), 50, warn=False)
    model.learn(2048)
    after, _ = evaluate_policy(model, model.get_env(), 50, warn=False)
    assert after > before + 0.5


class Small(nn.Module):
    """A plain module that says its shape."""

    sample_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.network = MLP(3, width=8, depth=2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x, t)


MIXTURE = GaussianMixture([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], 0.2 * np.eye(3))
FLOWS = {
    "plain module": Small,
    "velocity model": lambda: ModuleFlow(MLP(3, 8, 2), (3,)),
    "exact field": lambda: FieldFlow(MIXTURE.velocity, 3, 8, 2),
}


@pytest.mark.parametrize("kind", FLOWS)
def test_a_factory_as_flow(kind: str, names: Callable[[], str]) -> None:
    name = names()

    @flowrl.register_env(name, flow=FLOWS[kind])
    def first(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        """The first coordinate."""
        return samples[:, 0]

    assert ENVIRONMENTS[name].summary == "The first coordinate."
    made = gymnasium.make(f"flowrl/{name}-v0")
    assert made.action_space.shape == (3,)
    made.reset(seed=0)
    assert made.step(np.array([2.0, 0.0, 0.0], dtype=np.float32))[1] == 2.0
    model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0, n_samples=32, batch_size=16, rollout_steps=2)
    reference = model.policy.sample(n=4, role="reference", x_0=torch.ones(4, 3), steps=20)
    model.learn(64)
    assert torch.equal(model.policy.sample(n=4, role="reference", x_0=torch.ones(4, 3), steps=20), reference)
    assert not torch.equal(model.policy.sample(n=4, x_0=torch.ones(4, 3), steps=20), reference)


def test_the_exact_field_generates_the_mixture(names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=FLOWS["exact field"])(lambda samples, contexts: samples[:, 0])
    model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0)
    samples = model.policy.sample(n=4000, steps=20, solver="heun")
    torch.testing.assert_close(samples.mean(0), MIXTURE.means.mean(0), atol=0.08, rtol=0)


def test_a_factory_without_a_shape(names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=lambda: MLP(2, 8, 2))(lambda samples, contexts: samples[:, 0])
    with pytest.raises(ConfigError, match="sample_shape"):
        flowrl.make(name)


def test_sample_shape_for_a_plain_module(names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=lambda: MLP(2, 8, 2), sample_shape=(2,))(lambda samples, contexts: samples[:, 0])
    assert flowrl.make(name).sample_shape == (2,)


@pytest.mark.parametrize(("flow", "message"), [(nn.Linear(2, 2), "flow=lambda: model"), (3, "not a int")])
def test_a_flow_that_is_none(flow: Any, message: str, names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=flow)(lambda samples, contexts: samples[:, 0])
    with pytest.raises(ConfigError, match=message):
        flowrl.make(name)


def test_a_factory_that_returns_no_module(names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=lambda: "a module", sample_shape=(2,))(lambda samples, contexts: samples[:, 0])
    with pytest.raises(ConfigError, match="returned a str"):
        flowrl.ORWCFMW2("FlowPolicy", name, seed=0)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_wrapped_model_is_not_trained_itself(lora_rank: int, names: Callable[[], str]) -> None:
    """`flow=lambda: model` is what the error message advises: a second algorithm must start from the same model."""
    module, name = Small(), names()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flowrl.register_env(name, flow=lambda: module)(lambda samples, contexts: samples[:, 0])
    settings = {"n_samples": 32, "batch_size": 16, "rollout_steps": 2, "lora_rank": lora_rank}
    for _ in range(2):
        model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0, **settings).learn(64)
        reference = model.policy.velocity(torch.ones(2, 3), torch.full((2,), 0.5), (), "reference")
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    torch.testing.assert_close(reference, module(torch.ones(2, 3), torch.full((2,), 0.5)).detach())


@pytest.mark.parametrize(
    ("name", "message"),
    [("my env/x", "letters, digits, .* not 'my env/x'"), ("gaussians-linear", "is there already: .* another name")],
)
def test_names_that_an_environment_cannot_have(name: str, message: str) -> None:
    before = ENVIRONMENTS["gaussians-linear"]
    with pytest.raises(ConfigError, match=message):
        flowrl.register_env(name, flow=Small)(lambda samples, contexts: samples[:, 0])
    assert ENVIRONMENTS["gaussians-linear"] is before


def test_prompts_reach_the_reward(names: Callable[[], str]) -> None:
    name, seen = names(), []

    @flowrl.register_env(name, flow="mini-sd3", prompts=["red stars", "two blue circles on white"])
    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    env = flowrl.make(name)
    assert (env.action_space.low.min(), env.action_space.high.max()) == (0, 1)
    images = torch.zeros(3, *env.sample_shape)
    images[1, 0] = 1
    reward = env.evaluate(images, torch.tensor([1, 0, 1])).reward
    assert reward.tolist() == [0, 1, 0]
    assert seen == ["two blue circles on white", "red stars", "two blue circles on white"]


def _raise(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
    raise KeyError("no such thing")


def _one_is(value: float) -> Callable:
    def reward(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        values = samples[:, 0].clone()
        values[2] = value
        return values

    return reward


PROMPTS = ["first prompt", "second prompt", "third prompt"]
WRONG: dict[str, tuple[Callable, list[str]]] = {
    "raises": (_raise, ["KeyError", "no such thing", "first prompt", "(4, 3)"]),
    "nan": (_one_is(float("nan")), ["nan", "sample 2", "third prompt"]),
    "inf": (_one_is(float("inf")), ["inf", "sample 2", "third prompt"]),
    "component": (
        lambda s, c: flowrl.RewardOutput(s[:, 0], {"part": _one_is(float("nan"))(s, c)}),
        ["component part", "sample 2", "third prompt"],
    ),
    "shape": (lambda s, c: s, ["shape (4, 3)", "(4,)"]),
    "scalar": (lambda s, c: s.mean(), ["shape ()", "(4,)"]),
    "too few": (lambda s, c: s[:2, 0], ["(2,)", "(4,)"]),
    "string": (lambda s, c: "much", ["returned a str"]),
    "none": (lambda s, c: None, ["NoneType"]),
    "list of strings": (lambda s, c: ["much"] * 4, ["returned a list"]),
    "pair": (lambda s, c: (s[:, 0], {"part": s[:, 1]}), ["returned a tuple", "flowrl.RewardOutput(reward, {name"]),
    "complex": (lambda s, c: s[:, 0] + 1j, ["complex numbers have no order"]),
    "components without names": (
        lambda s, c: flowrl.RewardOutput(s[:, 0], [s[:, 1]]),
        ["components", "{name: values}"],
    ),
}


def wrong_env(kind: str, name: str) -> flowrl.GenerationEnv:
    flowrl.register_env(name, flow=Small, prompts=PROMPTS)(WRONG[kind][0])
    return flowrl.make(name)


class Own(flowrl.GenerationEnv):
    """An environment of an author's own whose reward is a number for each sample, no `RewardOutput`."""

    def __init__(self, contexts: Any = ("a", "b"), low: float = -1.0) -> None:
        super().__init__(source_of(Small), contexts, low=low, high=1.0, name="own")

    def reward(self, samples: torch.Tensor, contexts: Any) -> Any:
        return samples[:, 0]


class NotMade(Own):
    """One that forgets to call `super().__init__`."""

    def __init__(self) -> None:
        self.name = "own"


def test_an_environment_may_give_the_numbers_alone() -> None:
    samples = torch.rand(4, 3)
    assert torch.equal(Own().evaluate(samples, torch.tensor([0, 1, 1, 0])).reward, samples[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Own(contexts=4), "contexts of 'own' must be a list of them, not 4"),
        (lambda: Own(contexts="a car"), "contexts of 'own' must be a list of them, not 'a car'"),
        (lambda: Own(low=3.0), "lie from low to high, not from 3.0 to 1.0"),
        (lambda: flowrl.ORWCFM("FlowPolicy", NotMade()), r"NotMade.__init__ must call super\(\).__init__"),
        (
            lambda: source_of(Small, sample_shape=3),
            r"A shape must be that of one sample, .*, not 3",
        ),
        (lambda: flowrl.register_env("x", flow=Small, recommended=["tau"]), "must be settings by name"),
        (lambda: flowrl.register_env("x", flow=Small, prompts=3), "must be a list of them, a file or a set, not 3"),
    ],
)
def test_mistakes_in_an_environment_of_ones_own(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_prompts_from_an_iterator_are_there_each_time(names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=Small, prompts=iter(PROMPTS))(lambda s, c: s[:, 0])
    assert flowrl.make(name).contexts == flowrl.make(name).contexts == PROMPTS


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_rewards_stop_with_a_clear_error(kind: str, names: Callable[[], str]) -> None:
    env = wrong_env(kind, names())
    with pytest.raises(RewardError) as caught:
        env.evaluate(torch.ones(4, 3), torch.tensor([0, 1, 2, 1]))
    for expected in [env.name, *WRONG[kind][1]]:
        assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["shape", "string", "none"])
def test_wrong_types_and_shapes_name_the_prompt(kind: str, names: Callable[[], str]) -> None:
    env = wrong_env(kind, names())
    with pytest.raises(RewardError, match="first prompt"):
        env.evaluate(torch.ones(4, 3), torch.tensor([0, 1, 2, 1]))


def test_a_wrong_reward_stops_training_and_keeps_what_was_computed(names: Callable[[], str]) -> None:
    name, calls = names(), []

    def third_time(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        calls.append(len(samples))
        return samples[:, 0] / (0 if len(calls) == 3 else 1)

    flowrl.register_env(name, flow=Small)(third_time)
    model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0, n_samples=16, rollout_steps=2)
    with pytest.raises(RewardError, match=name):
        model.learn(160)
    assert model.iteration == 2


def test_a_reward_may_change_what_it_is_given(names: Callable[[], str]) -> None:
    """Training, pictures, and judges that come after it go on with the samples as they were drawn."""

    def clean(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        return 2 * samples[:, 0]

    def in_place(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        return samples.mul_(2)[:, 0]

    def through_numpy(samples: torch.Tensor, contexts: list[Any]) -> torch.Tensor:
        array = samples.numpy()
        array *= 2
        return torch.from_numpy(array[:, 0].copy())

    results, judges = [], {"first": in_place, "second": clean}
    for reward in (clean, in_place, through_numpy):
        name = names()
        flowrl.register_env(name, flow=Small)(reward)
        torch.manual_seed(0)  # of the weights
        model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0, n_samples=32, batch_size=16, rollout_steps=2).learn(64)
        result = flowrl.evaluate(model, n_samples=16, eval_rewards=judges)
        results.append([*model.buffer.x_1.flatten().tolist(), result.reward_mean, *result.samples.flatten().tolist()])
        first, second = (float(result.side[f"held-out {judge}"]) for judge in judges)
        assert first == second
    assert results[0] == results[1] == results[2]


class Thin(Small):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x, t)[:, :1]  # would be broadcast


class Moving(Small):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x += 1
        return self.network(x, t)


class InTuple(Small):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return (self.network(x, t),)


class Timeless(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Swapped(Small):
    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.network(x, t)


@pytest.mark.parametrize("flow", [Timeless, Swapped])
def test_a_network_of_another_signature(flow: Any, names: Callable[[], str]) -> None:
    flowrl.register_env(name := names(), flow=flow)(lambda samples, contexts: samples[:, 0])
    with pytest.raises(ConfigError, match=rf"{flow.__name__}\.forward\(.*\) does not take \(x_t, t\): .*VelocityModel"):
        flowrl.FlowPolicy.of(name, device="cpu")


def test_policy_kwargs_are_for_policies_of_ones_own() -> None:
    class Wide(flowrl.FlowPolicy):
        def __init__(self, *args: Any, margin: float = 0.0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.margin = margin

    def policy(kind: Any, given: Any) -> Any:
        return flowrl.ORWCFMW2(kind, "gaussians-linear", n_samples=32, batch_size=16, policy_kwargs=given).policy

    assert policy(Wide, {"margin": 2.0}).margin == 2
    for kind, given in (("FlowPolicy", {"net_arch": [64]}), (Wide, {"seed": 3}), ("FlowPolicy", 5)):
        with pytest.raises(ConfigError, match="policy_kwargs must be a dict of arguments that a policy of your own"):
            policy(kind, given)


@pytest.mark.parametrize("array", [lambda x: torch.tensor([x]), lambda x: (torch.tensor([x]), "a")])
def test_contexts_that_are_arrays_are_told_apart_by_all_digits(array: Callable[[float], Any]) -> None:
    contexts = [array(0.12345), array(0.12349), array(5.0)]  # a tensor shows four digits
    assert positions_of([contexts[1], contexts[2], array(0.1235)], contexts[:2]) == ([1, 2, 3], [contexts[2], ANY])
    one_hot = flowrl.PriorFlow(torch.nn.Linear(2, 2), 2, contexts=contexts).encode(contexts)[0]
    assert torch.equal(one_hot, torch.eye(3))


@pytest.mark.parametrize("asked", ["two stars", 0.7])
def test_reset_takes_the_index_of_a_context(asked: Any) -> None:
    env = flowrl.make("gaussians-linear")
    for one in (env, gymnasium.make_vec("flowrl/gaussians-linear-v0", num_envs=2)):
        with pytest.raises(ConfigError, match="reset takes the index of a context"):
            one.reset(options={"context": asked})
    assert env.evaluate(torch.zeros(2, 2), [0, 0]).reward.shape == (2,)  # type: ignore[arg-type]


def test_what_cannot_be_sampled_is_said() -> None:
    policy = flowrl.FlowPolicy.of("gaussians-linear", device="cpu", seed=0)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"contexts": ["a prompt"]}, "unconditional and takes no contexts, as 'a prompt'"),
        ({"contexts": 5}, "Contexts are a list of them, or a tensor of their indices"),
        ({"contexts": [None, None], "n": 3}, "n = 3 goes with one prompt or none"),
        ({"n": 2, "x_0": torch.zeros(3, 2)}, r"x_0 must be noise of shape \(2, 2\), .*, not \(3, 2\)"),
    ]
    for given, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            policy.sample(**given)


class ScoreOfPoints:
    def __call__(self, samples: torch.Tensor, contexts: list[None]) -> torch.Tensor:
        return samples[:, 0]


def test_what_is_decorated_is_checked(names: Callable[[], str]) -> None:
    flowrl.register_env(name := names(), flow="gaussians")(ScoreOfPoints())  # without name or docstring of its own
    assert ENVIRONMENTS[name].summary == "reward ScoreOfPoints"
    no_name: Any = ScoreOfPoints()
    no_class: Any = 5
    for decorate, message in (
        (lambda: flowrl.register_env(no_name), "takes its name first"),
        (lambda: flowrl.register_algorithm(no_name), "takes its name first"),
        (lambda: flowrl.register_env(names(), flow="gaussians")(no_class), "decorates a reward function"),
        (lambda: flowrl.register_algorithm("five")(no_class), "decorates a class"),
        (lambda: flowrl.register_algorithm("bare")(type("Bare", (flowrl.FlowAlgorithm,), {})), "Bare has no loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            decorate()


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (InTuple, "gave a tuple, not a tensor"),
        (Thin, r"velocities of shape \(4, 1\) for points x_t of shape \(4, 3\)"),
        (Moving, "changes the points x_t"),
    ],
)
def test_a_network_that_no_sampler_would_notice(flow: Any, message: str, names: Callable[[], str]) -> None:
    name = names()
    flowrl.register_env(name, flow=flow)(lambda samples, contexts: samples[:, 0])
    policy = flowrl.FlowPolicy.of(name, device="cpu", seed=0)
    with pytest.raises(ConfigError, match=message):
        policy.sample(n=4)


def test_rewards_may_be_lists_arrays_or_carry_gradients(names: Callable[[], str]) -> None:
    for reward in (
        lambda s, c: s[:, 0].tolist(),
        lambda s, c: s[:, 0].double().numpy(),
        lambda s, c: s[:, 0] * torch.ones(1, requires_grad=True),
        lambda s, c: s[:, 0] > 0,
    ):
        name = names()
        flowrl.register_env(name, flow=Small)(reward)
        env = flowrl.make(name)
        output = env.evaluate(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)).reward
        assert output.dtype == torch.float32
        assert output.tolist() == [1.0] * 4
        assert env.step(np.ones(3))[1] == 1.0
        batched = GenerationVecEnv(env, 4)
        batched.reset()
        assert batched.step(np.ones((4, 3)))[1].tolist() == [1.0] * 4


def test_a_picture_of_ones_own(names: Callable[[], str], tmp_path: Path) -> None:
    """Grids, pictures before and after, and Gymnasium show what `render=` draws."""
    name = names()

    def stripes(samples: torch.Tensor) -> torch.Tensor:
        return samples[:, None, None, :].expand(-1, 1, 4, -1) / 4 + 0.5

    flowrl.register_env(name, flow="gaussians", render=stripes)(lambda samples, contexts: samples[:, 0])
    made = gymnasium.make(f"flowrl/{name}-v0", render_mode="rgb_array")
    made.reset(seed=0)
    made.step(np.array([2.0, 0.0], dtype=np.float32))
    picture = made.render()
    assert picture.shape == (4, 2, 3)
    assert picture[0, :, 0].tolist() == [255, 128]
    env = flowrl.make(name)
    save_picture(torch.zeros(4, 2), [None] * 4, env, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (10, 14)
    result = flowrl.evaluate(flowrl.FlowPolicy.of(env, device="cpu", seed=0), env, n_samples=100)
    assert len(result.samples) == 64
    save_before_after(result, env, tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").size == (2 * 26 + 12, 38)
    env.renderer = lambda samples: samples  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError, match=r"gave shape \(4, 2\) for 4 samples; it must give images \(4, 1 or 3, H, W\)"
    ):
        env.pictures(torch.zeros(4, 2))


def test_pictures_of_ones_own_that_fail_cost_no_training(
    names: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on to its weights and its report; before it has begun, the renderer is named instead."""
    name, calls = names(), []

    def render(samples: torch.Tensor) -> torch.Tensor:
        calls.append(len(samples))
        if len(calls) > good:
            raise KeyError("colour")
        return samples[:, None, None, :].expand(-1, 1, 4, -1) / 4 + 0.5

    flowrl.register_env(name, flow="gaussians", render=render)(lambda samples, contexts: samples[:, 0])
    given = ["--algo", "orw", "--env", name, "--algo.n-samples", "32", "--total-timesteps", "64", "--eval-samples", "8"]
    given += ["--picture-every", "1", "--out", str(tmp_path), "--name"]
    good = 1
    assert main([*given, "later"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"The renderer of '{name}' raised KeyError: 'colour'. Training goes on.") == 2
    assert f"The renderer of '{name}' raised KeyError: 'colour'. The report has no samples of before and after." in said
    assert {path.name for path in (tmp_path / "later").iterdir()} >= {"final", "evaluation.json", "report.html"}
    good, calls = 0, []
    assert main([*given, "at-once"]) == 2
    assert f"The renderer of '{name}' raised KeyError: 'colour'." in capsys.readouterr().err


def test_plots_and_sounds_of_ones_own_that_fail_are_named(tmp_path: Path) -> None:
    class Shown(Judged):
        """Samples that are plotted and heard, wrongly."""

        def plot(self, axes: Any, samples: torch.Tensor) -> None:
            """Fail."""
            raise RuntimeError("no axes")

        def sounds(self, samples: torch.Tensor, contexts: Any) -> torch.Tensor:
            """Give sounds without channels, or fail."""
            return samples if len(samples) > 1 else samples[5]

    env = Shown()
    with pytest.raises(ConfigError, match=r"The method plot of 'judged' raised RuntimeError: no axes\."):
        save_picture(torch.zeros(4, 2), [None] * 4, env, tmp_path / "points.png")
    with pytest.raises(ConfigError, match=r"gave shape \(4, 2\) for 4 samples; it must give sounds \(4, channels, N\)"):
        sounds_of(env, torch.zeros(4, 2), [None] * 4)
    with pytest.raises(ConfigError, match="The method sounds of 'judged' raised IndexError"):
        sounds_of(env, torch.zeros(1, 2), [None])


class Judged(flowrl.GenerationEnv):
    """Reward to the right; its judges see the second coordinate, and how far all are from the origin."""

    def __init__(self) -> None:
        super().__init__(source_of("gaussians"), contexts=[None], low=-10.0, high=10.0, name="judged")
        self.calls: list[int] = []

    def reward(self, samples: torch.Tensor, contexts: Any) -> flowrl.RewardOutput:
        """Reward the first coordinate."""
        return flowrl.RewardOutput(samples[:, 0])

    def errors(self, samples: torch.Tensor, contexts: Any) -> dict[str, torch.Tensor]:
        """Give the size of the second coordinate."""
        self.calls.append(len(samples))
        return {"height": samples[:, 1].abs()}

    def errors_of_all(self, samples: torch.Tensor, contexts: Any, seed: int) -> dict[str, float]:
        """Give the distance of the mean from the origin."""
        assert len(samples) == len(contexts)
        return {"off centre": samples.mean(0).norm().item() + seed}


@pytest.mark.parametrize(
    ("method", "gives", "message"),
    [
        ("errors", KeyError("k"), "The method errors of 'judged' raised KeyError: 'k'."),
        ("errors", {"height": torch.zeros(())}, r"returned shape \(\) for 8 samples"),
        ("errors_of_all", KeyError("k"), "The method errors_of_all of 'judged', .* raised KeyError: 'k'."),
        ("errors_of_all", {"off centre": None}, "The method errors_of_all of 'judged', .* raised TypeError"),
        ("errors_of_all", {"off centre": torch.zeros(8)}, "a number for each name, raised"),
    ],
)
def test_judges_that_fail_are_named(
    monkeypatch: pytest.MonkeyPatch, method: str, gives: Exception | dict[str, Any], message: str
) -> None:
    def judge(*given: Any) -> dict[str, Any]:
        if isinstance(gives, Exception):
            raise gives
        return gives

    env = Judged()
    policy = flowrl.FlowPolicy.of(env, device="cpu", seed=0)
    monkeypatch.setattr(env, method, judge)
    with pytest.raises(RewardError, match=message):
        flowrl.evaluate(policy, env, n_samples=8)


def test_judges_that_the_reward_never_saw() -> None:
    """Training does not call them; an evaluation does, for both flows, in batches."""
    env = Judged()
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cpu", n_samples=64, batch_size=32, rollout_steps=4)
    model.learn(128)
    assert env.calls == []
    result = flowrl.evaluate(model, n_samples=96, batch_size=64, seed=3)
    assert env.calls == [64, 32, 64, 32]
    reference = result.reference
    assert reference is not None
    for figures, samples in ((result, result.samples), (reference, result.reference_samples)):
        assert figures.side["height"] == pytest.approx(samples[:, 1].abs().mean().item(), rel=1e-5)
        assert figures.side["off centre"] == pytest.approx(3 + samples.mean(0).norm().item(), rel=1e-5)
    assert "off centre" in result.table()
