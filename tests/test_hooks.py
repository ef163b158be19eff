"""Methods of an author's own: what they give is checked in the first iteration, and names that are nearly right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.errors import ConfigError
from flowrl.registry import ALGORITHMS, algorithm_class
from flowrl.training.hooks import LaterChecks
from flowrl.types import Batch

pytestmark = pytest.mark.on_device


def subclass(name: str, method: Any) -> type[flowrl.FlowAlgorithm]:
    """ORW-CFM-W2 with a method of an author's own."""
    return type("Mine", (flowrl.ORWCFMW2,), {name: method, "__doc__": "Mine."})


def learn(cls: type[flowrl.FlowAlgorithm], iterations: int = 1) -> flowrl.FlowAlgorithm:
    return cls("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=32, batch_size=16).learn(
        32 * iterations
    )


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("weigh", lambda self, rollout: rollout.reward.mean(), r"Mine\.weigh gave a float32 tensor of shape \(\)"),
        ("weigh", lambda self, rollout: None, r"Mine\.weigh gave nothing \(None\)"),
        ("weigh", lambda self, rollout: rollout.reward / 0, r"Mine\.weigh gave numbers that are not finite"),
        ("loss", lambda self, batch: (self.error(self.pair(batch)), {}), r"shape \(16,\).*take the mean"),
        ("loss", lambda self, batch: self.error(self.pair(batch)).mean(), r"Mine\.loss gave a float32 tensor"),
        ("loss", lambda self, batch: (self.error(self.pair(batch)).mean(), None), r"metrics nothing \(None\)"),
        ("loss", lambda self, batch: (self.error(self.pair(batch)).mean(), {"a": 1.0}), "a float as metric 'a'"),
        ("loss", lambda self, batch: (batch.reward.mean(), {}), "a loss without gradient"),
        ("loss", lambda self, batch: (self.error(self.pair(batch)).mean(), {"loss": batch.reward}), "named 'loss'"),
        ("weigh", lambda self, rollout: rollout.reward.sub_(1).exp(), r"Mine\.weigh changes rollout\.reward in place"),
        ("order", lambda self: torch.zeros(0, dtype=torch.long), r"Mine\.order gave a int64 tensor of shape \(0,\)"),
        ("order", lambda self: torch.arange(40), "indices from 0 to 39; it must give indices below 32"),
        ("order", lambda self: torch.rand(3), r"Mine\.order gave a float32 tensor of shape \(3,\)"),
        ("contexts", lambda self: torch.arange(32), "indices from 0 to 31; it must give indices below 1"),
        ("contexts", lambda self: torch.zeros(3, dtype=torch.long), r"shape \(3,\); it must .* shape \(32,\)"),
        ("draw", lambda self, ids: self.policy.sample_latents(ids), r"Mine\.draw gave a float32 tensor"),
        ("draw", lambda self, ids: (torch.zeros(len(ids), 3), {}), r"x_1 a float32 tensor of shape \(32, 3\)"),
        ("draw", lambda self, ids: (torch.zeros(len(ids), 2), {"a": torch.zeros(5)}), "first dimension 32"),
        ("draw", lambda self, ids: (torch.zeros(len(ids), 2), {"x_1": torch.zeros(32)}), "rows named 'x_1'"),
        ("rows_of", lambda self, output: {"a": output.reward.tolist()}, r"Mine\.rows_of gave a list as 'a'"),
        ("rows_of", lambda self, output: {"a": output.reward[:1]}, r"shape \(1,\) as 'a'.*first dimension 32"),
        ("rows_of", lambda self, output: output.reward, r"Mine\.rows_of gave a float32 tensor"),
        ("cautions", lambda self, logged: ["Lower tau."], r"Mine\.cautions gave a list; it must give texts by kind"),
    ],
)
def test_what_a_method_gives_is_checked_at_once(name: str, method: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learn(subclass(name, method))


def test_rows_of_a_reward_take_no_names_that_were_drawn() -> None:
    cls = subclass("rows_of", lambda self, output: {"a": output.reward})
    cls.draw = lambda self, ids: (torch.zeros(len(ids), 2), {"a": torch.zeros(len(ids))})  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"rows_of gave rows named 'a'; it must give other names"):
        learn(cls)


def test_the_tilt_of_an_algorithm_of_ones_own_may_be_a_number() -> None:
    """As a division of two settings is; logged, and aimed at."""

    def own(tilt: Any) -> type[flowrl.FlowAlgorithm]:
        return type("Mine", (flowrl.RWR,), {"tilt_of": lambda self, std: tilt(self.config), "__doc__": "Mine."})

    model = learn(own(lambda config: config.tau / 2))
    assert model.last_logged["rollout/target_lambda"] == pytest.approx(model.config.tau / 2)
    settings = {"n_samples": 32, "batch_size": 16, "target_lambda": 3.0}
    aimed = own(lambda config: config.tau / 2)("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, **settings)
    assert aimed.learn(32).config.tau == pytest.approx(6.0)
    for tilt, gave in (("1", "a str"), (torch.ones(2), r"a float32 tensor of shape \(2,\)")):
        with pytest.raises(ConfigError, match=rf"Mine\.tilt_of gave {gave}; it must give a number"):
            learn(own(lambda config, tilt=tilt: tilt))


class Plain:
    share = 0.5


class Undecorated(flowrl.FlowConfig):
    share: float = 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Config", Plain, "Config must derive from flowrl.FlowConfig"),
        ("Config", Undecorated, r"Undecorated, .* must be decorated by @dataclass\(frozen=True\)"),
        ("_setup_model", lambda self: None, r"must call super\(\)\._setup_model\(\)"),
    ],
)
def test_classes_that_are_no_algorithms_say_what_is_missing(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learn(subclass(name, value))


def test_a_metric_may_count() -> None:
    """Tensors of truth and of whole numbers have means, too."""

    def loss(self: Any, batch: Batch) -> Any:
        error = self.error(self.pair(batch))
        return error.mean(), {"all": (error >= 0).all(), "count": (error >= 0).sum()}

    logged = learn(subclass("loss", loss)).last_logged
    assert (logged["train/all"], logged["train/count"]) == (1.0, 16.0)


def test_an_algorithm_without_a_loss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = type("Unfinished", (flowrl.FlowAlgorithm,), {"weigh": lambda self, rollout: rollout.reward})
    monkeypatch.setitem(ALGORITHMS, "unfinished", unfinished)
    with pytest.raises(ConfigError, match="'unfinished' lacks the method loss"):
        algorithm_class("unfinished")


def test_a_loss_on_contexts_that_asks_for_no_reward_is_told_where_it_comes_from() -> None:
    """It ended in an error of an empty list."""

    class Mine(flowrl.FlowAlgorithm):
        """A reward that the log knows nothing of."""

        learns_from = "contexts"

        def loss(self, batch: Batch) -> Any:
            x_1 = self.policy.sample_latents(batch.context_ids, generator=self.generator, grad_steps=1, role="current")
            return -x_1[:, 0].mean(), {}

    with pytest.raises(ConfigError, match=r"Mine\.loss .*no reward.* self\.reward_of\(x_1, context_ids\)"):
        learn(Mine)


def test_losses_are_checked_in_the_first_iteration_only() -> None:
    model = learn(flowrl.ORWCFMW2)
    assert isinstance(model.checks, LaterChecks)
    model.checks.loss(None)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("weigh", lambda self, rollout: rollout.reward.max(), r"Mine\.weigh gave a float32 tensor of shape \(\)"),
        ("weigh", lambda self, rollout: rollout.reward.mul_(2), r"Mine\.weigh changes rollout\.reward in place"),
        ("contexts", lambda self: torch.zeros(5, dtype=torch.long), r"shape \(5,\); it must .* shape \(32,\)"),
        ("draw", lambda self, ids: (torch.zeros(1, 2), {}), r"x_1 a float32 tensor of shape \(1, 2\)"),
    ],
)
def test_shapes_are_checked_in_every_iteration(name: str, method: Any, message: str) -> None:
    """One number for all samples would go to each of them without a word."""
    usual = getattr(flowrl.ORWCFMW2, name)
    later = subclass(name, lambda self, *given: (method if self.iteration else usual)(self, *given))
    with pytest.raises(ConfigError, match=message):
        learn(later, iterations=2)


def test_weights_and_rows_that_carry_a_graph_are_taken_as_numbers() -> None:
    """The loss would be differentiated through them as well, or fail where a second minibatch uses that graph again."""

    class Plain(flowrl.ORWCFMW2):
        carries = False

        def draw(self, context_ids):
            x_1, rows = super().draw(context_ids)
            with torch.enable_grad():
                v = self.policy.velocity(x_1, torch.full((len(x_1),), 0.5, device=x_1.device), ())
            row = v if self.carries else v.detach()
            return x_1 + 0 * row, {**rows, "own": row}

    class Graph(Plain):
        carries = True

        def weigh(self, rollout):
            v = self.policy.velocity(rollout.x_1, torch.full_like(rollout.reward, 0.5), ())
            return flowrl.ORWCFMW2.weigh(self, rollout) + 0 * v.mean(1)

    for n_epochs in (1, 2):
        plain, graph = (
            cls("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=32, batch_size=32, n_epochs=n_epochs)
            for cls in (Plain, Graph)
        )
        for model in (plain, graph):
            model.learn(64)
        assert not graph.buffer.x_1.requires_grad
        ours, theirs = (list(m.policy.parameters_of("current").values()) for m in (plain, graph))
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("weight", "weigh"),
        ("advantages", "advantage"),
        ("los", "loss"),
        ("refresh_decays", "refresh_decay"),
        ("score", r"weigh \(for weights\) or advantage"),
        ("draw_latents", "draw"),
        ("minibatches", "order"),
        ("extra_state", "keep or add_network"),
    ],
)
def test_nearly_a_hook_is_an_error(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"Mine\.{name} is never called; the method for it is {meant}"):
        learn(subclass(name, lambda self: None))


def test_helpers_of_ones_own_are_no_hooks() -> None:
    cls = subclass("_weights", lambda self: None)
    cls.temperature = lambda self: 1.0  # type: ignore[attr-defined]
    learn(cls)


def test_weights_and_advantages_are_two_ways() -> None:
    with pytest.raises(ConfigError, match="both weigh and advantage"):
        learn(subclass("advantage", lambda self, rollout: rollout.reward))


def test_negative_weights_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"Mine\.weigh gave weights down to -"):
        learn(subclass("weigh", lambda self, rollout: rollout.reward))


def test_the_behaviour_policy_can_move_by_a_share() -> None:
    class Slow(flowrl.ORWCFMW2):
        """Keeps a quarter of the behaviour policy."""

        def refresh_decay(self) -> float:
            return 0.25

    model = Slow("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE, n_samples=32, batch_size=16)
    old = [p.detach().clone() for p in model.policy.parameters_of("behaviour").values()]
    model.learn(32)
    roles = (model.policy.parameters_of(role).values() for role in ("behaviour", "current"))
    for before, behaviour, current in zip(old, *roles):
        torch.testing.assert_close(behaviour.detach(), 0.25 * before + 0.75 * current.detach())


def test_a_policy_needs_no_algorithm() -> None:
    """It samples, is evaluated and steered; the same figures as those of an untrained algorithm."""
    env = flowrl.make("gaussians-linear")
    policy = flowrl.FlowPolicy.of(env, seed=1, device=DEVICE)
    alone = flowrl.evaluate(policy, env, n_samples=64)
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", seed=0, device=DEVICE)
    within = flowrl.evaluate(model, n_samples=64)
    assert alone.reward_mean == within.reward_mean == alone.reference.reward_mean
    assert alone.drift == 0
    assert policy.evaluations == 0
    assert flowrl.evaluate(policy, "gaussians-linear", n_samples=64).reward_mean == alone.reward_mean
    with pytest.raises(ConfigError, match=r"evaluate\(model, n_samples=64\)"):
        flowrl.evaluate(model, 64)
    with pytest.raises(ConfigError, match=r"evaluate\(policy, env\)"):
        flowrl.evaluate(policy)
    with pytest.raises(ConfigError, match="evaluated on its own environment"):
        flowrl.evaluate(model, env)
    with pytest.raises(TypeError, match=r"evaluate\(\) got an unexpected keyword argument 'stepz'"):
        flowrl.evaluate(model, stepz=4)
    mistakes: dict[str, tuple[Any, str]] = {
        "samples_per_context": (0, "must be a whole number, 1 or more, not 0"),
        "n_kept": (-3, "must be a whole number, 1 or more, not -3"),
        "seed": (1.5, "must be a whole number, 0 or more"),
        "steering": ("best_of_n", r"such as Steering\("),
        "eval_rewards": (["compress"], r"made by flowrl.envs.rewards.mixture.make_rewards\("),
    }
    for name, (value, message) in mistakes.items():
        with pytest.raises(ConfigError, match=f"{name}.* {message}"):
            flowrl.evaluate(model, n_samples=8, **{name: value})


def test_a_string_is_one_prompt() -> None:
    policy = flowrl.FlowPolicy.of("sd3-count", env_settings={"flow": "mini-sd3"}, seed=0, device=DEVICE)
    assert policy.sample("three red stars", steps=1).shape[0] == 1
    assert policy.sample(["three red stars", "two circles"], steps=1).shape[0] == 2


def test_rewards_may_take_gradients_of_their_own() -> None:
    """Also of samples that training drew, detached: they are no inference tensors."""
    env = flowrl.make("gaussians-linear")

    def sharpness(samples: torch.Tensor, contexts: Any) -> flowrl.RewardOutput:
        x = samples.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x.square().sum(), x)
        return flowrl.RewardOutput(gradient[:, 0])

    env.reward = sharpness  # type: ignore[method-assign]
    learn_on = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, n_samples=32, batch_size=16)
    learn_on.learn(32)
    assert not learn_on.buffer.reward.requires_grad
    flowrl.evaluate(learn_on, n_samples=16)


def test_a_reward_with_a_graph_leaves_none_behind() -> None:
    env = flowrl.make("gaussians-linear")
    weight = torch.ones(1, requires_grad=True)
    env.reward = lambda samples, contexts: flowrl.RewardOutput(  # type: ignore[method-assign,misc]
        samples[:, 0] * weight, {"part": samples[:, 1] * weight}
    )
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, n_samples=32, batch_size=16)
    model.learn(64)
    assert not model.buffer.reward.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("contexts", [[0, 0, 0, 0, 1, 1, 1, 1]])
def test_a_group_whose_samples_all_failed_carries_no_weight(contexts: list[int]) -> None:
    """Others stand in for it, of another context: they compare nothing there."""
    name = "two-contexts-of-a-test"

    @flowrl.register_env(name, flow=lambda: torch.nn.Linear(1, 1), sample_shape=(1,), prompts=["a", "b"])
    def fails_for_b(samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if "b" in prompts:
            raise ValueError("no b")
        return samples[:, 0]

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.shift - x

    try:
        env = flowrl.make(name)
        env.flow = flowrl.models.loading.source_of(Field, sample_shape=(1,))
        model = flowrl.FlowGRPO(
            "FlowPolicy", env, seed=0, device=DEVICE, n_samples=8, group_size=4, batch_size=8, rollout_steps=3,
            on_reward_error="drop", max_dropped=0.9,
        )  # fmt: skip
        model.contexts = lambda: torch.tensor(contexts)  # type: ignore[method-assign]
        model.learn(8)
        advantage = model.buffer.all().advantage
        assert advantage[:4].abs().max() > 0
        assert advantage[4:].abs().max() == 0
    finally:
        flowrl.registry.ENVIRONMENTS.pop(name, None)


class Plain(flowrl.FlowAlgorithm):
    """Flow matching on its own samples, with neither weights nor advantages."""

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (batch.weight * self.error(self.pair(batch))).mean(), {"weight": batch.weight.mean()}


def test_weights_are_one_where_an_algorithm_makes_none() -> None:
    """They were the rewards: of either sign, in any unit."""
    model = Plain("FlowPolicy", "gaussians-linear", seed=0, device="cpu", n_samples=32, rollout_steps=2, batch_size=32)
    model.learn(32)
    assert model.last_logged["train/weight"] == 1
