"""FlowPolicy: the network's copies, full and LoRA, on points and on pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE

import flowrl
from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.functional.solver_steps import evaluations_per_sample
from flowrl.models.base import VelocityModel
from flowrl.models.loading import source_of
from flowrl.training.construction import on_device
from flowrl.training.policy import FlowPolicy, LoRA

pytestmark = pytest.mark.on_device

PROMPTS = ("red stars on black", "two blue circles", "stars")
TINY = {"rollout_steps": 2, "ema_decay": 0.9, "refresh_every": 2, "learning_rate": 1e-2, "warmup_updates": 0}
KINDS = {
    "gaussians": ("gaussians-linear", {}, {"n_samples": 32, "batch_size": 16}),
    "mini-sd3": (
        "sd3-compress",
        {"flow": "mini-sd3", "prompts": PROMPTS},
        {"n_samples": 4, "batch_size": 2, "group_size": 2, "n_epochs": 1},
    ),
}


def algorithm(kind: str, lora_rank: int = 0, **settings: object) -> flowrl.ORWCFMW2:
    env, env_settings, sizes = KINDS[kind]
    settings = {**sizes, **TINY, "lora_rank": lora_rank, **settings}
    return flowrl.ORWCFMW2("FlowPolicy", env, env_settings=env_settings, seed=0, device=DEVICE, **settings)


def point(policy: FlowPolicy, n: int = 3) -> tuple:
    """Some x_t, t and condition."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    x = torch.randn(n, *policy.model.latent_shape, generator=generator)
    return x, torch.rand(n, generator=generator), policy.condition(torch.arange(n) % len(policy.contexts))


def loaded(model: flowrl.ORWCFMW2) -> VelocityModel:
    """The flow of the environment as it was before training."""
    flow = model.env.core.flow.load()
    flow.move_frozen(torch.device(DEVICE))
    flow.network.to(DEVICE)
    return flow


def change(policy: FlowPolicy, size: float = 0.1) -> None:
    """Move every trained weight, as training would."""
    with torch.no_grad():
        for parameter in policy.parameters_of("current").values():
            parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture(params=[(k, r) for k in KINDS for r in (0, 2)], ids=lambda p: f"{p[0]}-{'lora' if p[1] else 'full'}")
def model(request: pytest.FixtureRequest) -> flowrl.ORWCFMW2:
    return algorithm(*request.param)


@torch.no_grad()
def test_every_role_starts_as_the_untouched_flow(model: flowrl.ORWCFMW2) -> None:
    policy = model.policy
    untouched = loaded(model)
    x, t, _ = point(policy)
    cond = on_device(untouched.encode(policy.contexts[:3]), DEVICE)
    expected = untouched(x, t, cond)
    assert policy.roles == ("current", "behaviour", "ema")
    for role in (*policy.roles, "reference"):
        torch.testing.assert_close(policy.velocity(x, t, cond, role), expected, rtol=0, atol=0)


def test_training_moves_the_current_flow_and_not_the_reference(model: flowrl.ORWCFMW2) -> None:
    x, t, cond = point(model.policy)
    before = model.policy.velocity(x, t, cond, "reference")
    model.learn(model.config.n_samples)
    assert torch.equal(model.policy.velocity(x, t, cond, "reference"), before)
    for role in ("current", "ema"):
        assert not torch.equal(model.policy.velocity(x, t, cond, role), before)
    assert torch.equal(model.policy.velocity(x, t, cond, "behaviour"), before)  # refreshed every second iteration
    model.learn(model.config.n_samples, reset_num_timesteps=False)
    current = model.policy.velocity(x, t, cond).detach()
    torch.testing.assert_close(model.policy.velocity(x, t, cond, "behaviour"), current)


def test_only_the_current_flow_has_gradients(model: flowrl.ORWCFMW2) -> None:
    policy = model.policy
    x, t, cond = point(policy)
    for role in ("behaviour", "ema", "reference"):
        assert not policy.velocity(x, t, cond, role).requires_grad
    policy.velocity(x, t, cond).sum().backward()
    current = policy.parameters_of("current").values()
    assert any(p.grad is not None and bool(p.grad.any()) for p in current)
    mine = {id(p) for p in current}
    assert all(p.grad is None for p in policy.parameters() if id(p) not in mine)
    with torch.no_grad():
        assert not policy.velocity(x, t, cond).requires_grad


def flags(policy: FlowPolicy) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in policy.named_parameters()}


def test_switching_roles_leaves_the_current_flow_trainable(model: flowrl.ORWCFMW2) -> None:
    policy = model.policy
    before = flags(policy)
    trained = sum(before.values())
    assert trained == len(policy.parameters_of("current"))
    for role in ("reference", "behaviour", "ema", "current"):
        policy.velocity(*point(policy), role)
        assert flags(policy) == before


def test_a_role_switched_between_forward_and_backward_changes_no_gradient(model: flowrl.ORWCFMW2) -> None:
    policy = model.policy
    change(policy)
    gradients = []
    for interrupted in (False, True):
        v = policy.velocity(*point(policy))
        if interrupted:
            for role in ("reference", "behaviour", "ema"):
                policy.velocity(*point(policy), role)
        v.square().sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters_of("current").values()])
        for p in policy.parameters_of("current").values():
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_role_that_fails_leaves_the_current_flow_active() -> None:
    policy = algorithm("gaussians", 2).policy
    change(policy)
    x, t, cond = point(policy)
    before = policy.velocity(x, t, cond).detach()
    for role in ("reference", "ema"):
        with pytest.raises(RuntimeError):
            policy.velocity(torch.randn(3, 5), t, cond, role)  # wrong dimension
        assert torch.equal(policy.velocity(x, t, cond).detach(), before)


def test_the_lora_reference_is_the_adapter_switched_off() -> None:
    """Adapters of any size: the reference is the base network exactly, and holds no weights of its own."""
    model = algorithm("gaussians", 2)
    policy = model.policy
    x, t, cond = point(policy)
    base = loaded(model)(x, t, cond).detach()
    change(policy, size=1.0)
    assert torch.equal(policy.velocity(x, t, cond, "reference"), base)
    assert (policy.velocity(x, t, cond) - base).abs().max() > 0.1
    assert "reference" not in policy.networks.copies
    frozen = sum(p.numel() for n, p in policy.named_parameters() if "lora_" not in n)
    assert frozen == sum(p.numel() for p in loaded(model).parameters())


def test_lora_formula() -> None:
    """Adapted layer: W x + (alpha / rank) B A x."""
    model = algorithm("gaussians", lora_rank=4, lora_alpha=6.0)
    change(model.policy)
    layer = next(m for m in model.policy.model.network.modules() if hasattr(m, "lora_A"))
    x = torch.randn(5, layer.base_layer.in_features)
    a, b = layer.lora_A["current"].weight, layer.lora_B["current"].weight
    assert a.shape[0] == 4
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6.0 / 4 * x @ a.T @ b.T)
    assert LoRA.of(model.config) == LoRA(4, 6.0)
    assert LoRA.of(algorithm("gaussians", 4).config) == LoRA(4, 8.0)


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_update_copy(model: flowrl.ORWCFMW2, decay: float) -> None:
    policy = model.policy
    change(policy)
    old = {n: p.clone() for n, p in policy.parameters_of("ema").items()}
    new = {n: p.detach().clone() for n, p in policy.parameters_of("current").items()}
    policy.networks.update_copy("ema", decay)
    for name, parameter in policy.parameters_of("ema").items():
        torch.testing.assert_close(parameter, decay * old[name] + (1 - decay) * new[name])
        assert torch.equal(policy.parameters_of("current")[name], new[name])


def test_update_of_a_copy_that_is_not_kept_does_nothing() -> None:
    model = algorithm("gaussians", ema_decay=0.0)
    before = [p.clone() for p in model.policy.parameters()]
    change(model.policy, 0.0)
    model.policy.networks.update_copy("ema", 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters()))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_role_that_is_not_kept(lora_rank: int) -> None:
    model = algorithm("gaussians", lora_rank, ema_decay=0.0)
    with pytest.raises(ConfigError, match="ema"):
        model.policy.velocity(*point(model.policy), "ema")


@torch.no_grad()
def test_guidance() -> None:
    """v_null + s (v - v_null), from two separate evaluations."""
    policy = algorithm("mini-sd3").policy
    x, t, cond = point(policy)
    null = tuple(part.expand(3, *part.shape[1:]) for part in on_device(policy.model.encode([""]), DEVICE))
    v, v_null = policy.velocity(x, t, cond), policy.velocity(x, t, null)
    for scale in (1.0, 0.0, 4.5):
        guided = policy.field(cond, 3, guidance_scale=scale)(x, t)
        torch.testing.assert_close(guided, v_null + scale * (v - v_null), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(v, v_null, atol=1e-3)


def test_guidance_without_an_empty_context() -> None:
    policy = algorithm("gaussians").policy
    with pytest.raises(ConfigError, match="guidance_scale"):
        policy.sample(n=2, guidance_scale=2.0)


def test_sample_with_new_prompts() -> None:
    policy = algorithm("mini-sd3").policy
    x_0 = policy.noise(3)
    known = policy.sample(torch.tensor([1, 0, 1]), x_0=x_0)
    assert known.shape == (3, *policy.model.sample_shape)
    assert torch.equal(policy.sample(PROMPTS[1], n=3, x_0=x_0)[::2], known[::2])  # n of a single prompt, too
    by_name = policy.sample([PROMPTS[1], PROMPTS[0], PROMPTS[1]], x_0=x_0)
    assert torch.equal(by_name, known)
    new = policy.sample(["four white squares on red", PROMPTS[0], "four white squares on red"], x_0=x_0)
    torch.testing.assert_close(new[1], known[1], rtol=0, atol=1e-5)
    assert not torch.allclose(new[0], known[0], atol=1e-3)
    assert torch.equal(policy.sample(torch.tensor([1, 0, 1]), x_0=x_0), known)


def test_sample_without_contexts_and_with_a_generator() -> None:
    policy = algorithm("gaussians").policy
    first = policy.sample(n=5, generator=torch.Generator(DEVICE).manual_seed(3))
    assert first.shape == (5, 2)
    assert torch.equal(policy.sample(n=5, generator=torch.Generator(DEVICE).manual_seed(3)), first)
    assert not torch.equal(policy.sample(n=5), policy.sample(n=5))
    observations = np.zeros(5, dtype=np.int64)
    assert policy.predict(observations)[0].shape == (5, 2)
    assert policy.predict(observations[0])[0].shape == (2,)


def test_sampling_takes_the_moving_average() -> None:
    policy = algorithm("gaussians").policy
    change(policy)
    x_0 = policy.noise(4)
    assert torch.equal(policy.sample(n=4, x_0=x_0), policy.sample(n=4, x_0=x_0, role="ema"))
    assert not torch.equal(policy.sample(n=4, x_0=x_0), policy.sample(n=4, x_0=x_0, role="current"))


def test_evaluations_are_counted() -> None:
    policy = algorithm("gaussians").policy
    x, t, cond = point(policy)
    policy.velocity(x, t, cond, "reference")
    assert policy.evaluations == 3
    policy.velocity(x, t, cond)
    assert policy.evaluations == 3 + 9  # with a gradient: a forward and a backward of twice its cost
    with torch.no_grad():
        policy.velocity(x, t, cond)
    assert policy.evaluations == 3 + 9 + 3
    spent = policy.evaluations
    policy.sample(n=10, steps=6, solver="heun")
    assert policy.evaluations - spent == 10 * evaluations_per_sample("heun", 6) == 120


def test_guided_evaluations_are_counted_twice() -> None:
    policy = algorithm("mini-sd3", guidance_scale=2.0).policy
    assert policy.evaluations == 0
    policy.sample(torch.tensor([0, 1]), steps=3)
    assert policy.evaluations == 2 * 3 * 2
    assert policy.evaluations_per_sample() == 2 * 2


class Scaled(VelocityModel):
    """A flow with parts around its network: a buffer, a frozen parameter and a frozen module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(2, 2)
        self.frozen = torch.nn.Linear(2, 2)
        self.shift = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scale", torch.full((2,), 2.0))
        self.latent_shape = self.sample_shape = (2,)

    def forward(self, x_t, t, cond):
        return self.scale * self.network(self.frozen(x_t)) + self.shift


def test_a_flow_of_ones_own_goes_where_training_is() -> None:
    """All of it but the network, which the policy moves itself."""
    flow = source_of(Scaled).load()
    flow.move_frozen(torch.device("meta"))
    assert flow.network.weight.device.type != "meta"
    flow.network.to("meta")
    assert flow(torch.empty(3, 2, device="meta"), torch.empty(3, device="meta"), ()).device.type == "meta"


class Labelled(VelocityModel):
    """A flow of an author's own, with two labels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(4, 2)
        self.latent_shape = self.sample_shape = (2,)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.network(torch.cat([x_t, cond[0]], dim=1))

    def encode(self, contexts: Any) -> Any:
        return (torch.eye(2)[list(contexts)],)


def unset(name: str) -> Callable[[Labelled], None]:
    def init(self: Labelled) -> None:
        Labelled.__init__(self)
        delattr(self, name)

    return init


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "encode",
            lambda self, c: torch.eye(2),
            r"tuple of tensors, each with 2 rows.*not a float32 tensor of shape \(2, 2\)",
        ),
        (
            "encode",
            lambda self, c: (torch.eye(2)[:1],),
            r"each with 2 rows.*not a tuple of a float32 tensor of shape \(1, 2\)",
        ),
        ("null_condition", lambda self: torch.zeros(2), r"each with a row .*not a float32 tensor of shape \(2,\)"),
        (
            "null_condition",
            lambda self: (torch.zeros(1, 3),),
            r"for one context, of .*\[\(1, 2\)\], not \[\(1, 3\)\]",
        ),
        ("null_condition", lambda self: (torch.zeros(2, 2),), r"null_condition must give .*, not \[\(2, 2\)\]"),
        ("null_condition", lambda self: (), r"null_condition must give .*, not \[\]"),
        ("times", lambda self, steps: torch.linspace(1, 0, steps + 1), r"times\(4\) must give .* 5 times that rise"),
        ("times", lambda self, steps: torch.linspace(0, 1, steps), r"times\(4\) must give a tensor of 5 times"),
        ("times", lambda self, steps: torch.ones(steps + 1), r"times\(4\) must give .* 5 times that rise"),
        (
            "decode",
            lambda self, x_1: x_1[:1],
            r"decode must give a tensor of 3 samples .*not a float32 tensor of shape \(1, 2\)",
        ),
        ("decode", lambda self, x_1: None, r"decode must give a tensor of 3 samples .*not nothing \(None\)"),
        ("__init__", unset("latent_shape"), "Own must set self.latent_shape in its __init__"),
        ("__init__", unset("network"), "Own must set self.network in its __init__"),
    ],
)
def test_mistakes_in_a_flow_of_ones_own(name: str, value: Any, message: str) -> None:
    """Times of another number or order went through, and samples were of another flow."""
    own = type("Own", (Labelled,), {"null_condition": lambda self: (torch.zeros(1, 2),), name: value})
    with pytest.raises(ConfigError, match=message):
        drawn(own)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Errors take no notes")
@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("__init__", "the flow factory Own, which was to return a model"),
        ("forward", "the flow (Own with a Linear), asked for velocities"),
        ("decode", "Own.decode, which makes samples of the flow's latents"),
    ],
)
def test_an_error_in_a_flow_of_ones_own_says_whose_it_is(name: str, whose: str) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise LookupError("own")

    with pytest.raises(LookupError, match="own") as caught:
        drawn(type("Own", (Labelled,), {"null_condition": lambda self: (torch.zeros(1, 2),), name: fail}))
    assert caught.value.__notes__ == [f"Raised in {whose}."]


def drawn(own: type[VelocityModel]) -> torch.Tensor:
    core = flowrl.GenerationEnv(source_of(own), [0, 1], low=-1.0, high=1.0, name="own")
    settings = FlowConfig(rollout_steps=4, guidance_scale=2.0)
    return FlowPolicy.of(core, settings, device="cpu").sample([0, 1, 0])


def test_what_encodes_contexts_keeps_no_graph() -> None:
    """A second update went through the first one's."""
    own = type(
        "Own", (Labelled,), {"encode": lambda self, c: (torch.eye(2)[list(c)] * torch.ones(2).requires_grad_(),)}
    )
    core = flowrl.GenerationEnv(source_of(own), [0, 1], low=-1.0, high=1.0, name="own")
    core.reward = lambda samples, contexts: samples[:, 0]  # type: ignore[method-assign]
    settings = {"n_samples": 16, "batch_size": 8, "rollout_steps": 2}
    model = flowrl.ORWCFM("FlowPolicy", core, seed=0, device="cpu", **settings).learn(16)
    assert model._n_updates > 1


def test_contexts_that_a_flow_of_ones_own_does_not_know_are_named() -> None:
    class Words(Labelled):
        def encode(self, contexts: Any) -> Any:
            return (torch.tensor([[{"left": 0.0, "right": 1.0}[context]] for context in contexts]),)

    env = GenerationEnv(source_of(Words), contexts=["left", "right"], low=-9.0, high=9.0, name="words")
    policy = FlowPolicy.of(env, FlowConfig(rollout_steps=1), device=DEVICE)
    with pytest.raises(ConfigError, match=r"Words.encode, for \['up'\], raised KeyError: 'up'"):
        policy.sample(["left", "up"])
    assert policy.contexts == ["left", "right"]
