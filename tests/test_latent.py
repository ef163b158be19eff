"""Generators through their latents: the exact flow of a standard normal, and any G(z) behind it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, Run, forgetting
from torch import nn

import flowrl
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.functional.flow import interpolate
from flowrl.functional.solvers import ode_sample, time_grid
from flowrl.models.loading import ASSETS, source_of
from flowrl.models.prior import generator_source, prior_velocity

pytestmark = pytest.mark.on_device

A = (1.0, -0.5)
TINY: dict[str, Any] = {"n_samples": 16, "batch_size": 16, "n_epochs": 1}


class Pictures(nn.Module):
    """A generator of pictures with what must be in evaluation mode: batch normalisation and dropout."""

    def __init__(self, channels: int = 3, low: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, channels * 36), nn.BatchNorm1d(channels * 36), nn.Dropout(0.5))
        self.channels, self.low = channels, low
        self.calls: list[int] = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(z))
        pictures = self.layers(z.flatten(1)).sigmoid().view(-1, self.channels, 6, 6)
        return self.low + (1 - self.low) * pictures


def brightness(images: torch.Tensor, contexts: Any) -> torch.Tensor:
    """Brighter is better."""
    return images.flatten(1).mean(1)


def linear(samples: torch.Tensor, contexts: Any) -> torch.Tensor:
    """Further along a direction is better."""
    return samples @ torch.tensor(A, device=samples.device)


def registered(reward: Any = brightness, name: str = "of-a-generator", **settings: Any) -> str:
    flowrl.register_env(name, **{"generator": Pictures(), "latent": 4, "bounds": (0, 1), **settings})(reward)
    return name


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    with forgetting():
        yield


def test_the_velocity_is_the_conditional_expectation(generator: torch.Generator) -> None:
    """E[(u - v) x_t] = 0 decides for a linear field; over 400,000 pairs at each of some times."""
    n = 400_000
    for time in (0.0, 0.2, 0.5, 0.7, 1.0):
        t = torch.full((n,), time)
        x_0, x_1 = (torch.randn(n, 1, generator=generator) for _ in range(2))
        x_t, u = interpolate(x_0, x_1, t)
        slope = ((u * x_t).mean() / x_t.square().mean()).item()
        assert prior_velocity(torch.ones(1, 1), t[:1]).item() == pytest.approx(slope, abs=0.01)


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9, 1.0])
def test_the_ode_scales_by_the_known_factor(time: float, generator: torch.Generator) -> None:
    """x_0 goes to s(t) x_0: samples stay N(0, s^2 I), and come back as they were."""
    x_0 = torch.randn(5, 3, 1, generator=generator)
    x = ode_sample(prior_velocity, x_0, time * time_grid(200, device=DEVICE), "rk4")
    torch.testing.assert_close(x, ((1 - time) ** 2 + time**2) ** 0.5 * x_0, atol=1e-4, rtol=1e-4)


def test_the_recommended_sampler_gives_the_reference_back(generator: torch.Generator) -> None:
    """Within a thousandth; the same work by Euler's method would shrink it by 8 %."""
    env = flowrl.make(registered(linear, generator=nn.Identity(), latent=2, bounds=(-10, 10)))
    policy = flowrl.FlowPolicy.of(env, device=DEVICE, seed=0)
    x_0 = torch.randn(64, 2, generator=generator)
    ids = torch.zeros(64, dtype=torch.long)
    torch.testing.assert_close(policy.sample(ids, x_0=x_0), x_0, rtol=1e-3, atol=0)
    ratio = policy.sample(ids, x_0=x_0, steps=16, solver="euler") / x_0
    assert ratio.mean().item() == pytest.approx(0.9227, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("tilt", {"tau": 1.0, "pool": 2048, "n_samples": 512, "batch_size": 128}),
        ("orw", {"tau": 0.25}),
        ("rwr", {"tau": 1.0}),
    ],
)
def test_a_linear_reward_moves_the_mean_alone(algo: str, settings: dict) -> None:
    """q* = N(lambda a, I), with lambda = tau; for `orw` 4 tau, after four refreshes that each tilt exactly."""
    env = flowrl.make(registered(linear, generator=nn.Identity(), latent=2, bounds=(-10, 10)))
    settings = {"n_samples": 1024, "batch_size": 256, "n_epochs": 4, **settings}
    if algo == "orw":
        settings = {**settings, "refresh_every": 6, "baseline": "mean", "weight_normalisation": "none"}
    settings["ema_decay"] = 0.98  # samples are of the average
    model = flowrl.algorithm_class(algo)("FlowPolicy", env, seed=0, device=DEVICE, **settings)
    model.learn(24 * settings["n_samples"])
    z = model.policy.sample(n=8000)
    assert z.mean(0).tolist() == pytest.approx(A, abs=0.1)
    assert z.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.08)


def test_the_generator_is_left_alone_and_shared_by_the_roles() -> None:
    g = Pictures().train()
    before = {name: tensor.clone() for name, tensor in g.state_dict().items()}
    model = flowrl.ORWCFMW2("FlowPolicy", registered(generator=g), seed=0, device=DEVICE, **TINY).learn(16)
    assert g.training
    assert all(p.requires_grad for p in g.parameters())
    flow = model.policy.model
    assert flow.decoder is not g
    assert not flow.decoder.training
    assert model.policy.networks.model_of("reference").decoder is flow.decoder
    for state in (g.state_dict(), flow.decoder.state_dict()):
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in state.items())
    held = {id(p) for p in flow.decoder.parameters()}
    assert not held & {id(p) for p in model.policy.parameters()}
    assert not any(p.requires_grad for p in flow.decoder.parameters())
    assert all(p.device.type == DEVICE for p in flow.decoder.parameters())
    flow.offload()
    assert flow.decode(torch.randn(2, 4)).shape == (2, 3, 6, 6)


def test_large_batches_are_decoded_in_parts_with_gradients() -> None:
    flow = flowrl.PriorFlow(Pictures().to(DEVICE), 4, decode_batch=3)
    z = torch.randn(8, 4, requires_grad=True)
    whole = flow.decoder(z.detach())
    flow.decoder.calls.clear()
    pictures = flow.decode(z)
    assert flow.decoder.calls == [3, 3, 2]
    torch.testing.assert_close(pictures.detach(), whole)
    pictures.sum().backward()
    assert z.grad.abs().min() > 0
    assert all(p.grad is None for p in flow.decoder.parameters())


def test_latents_of_any_shape_and_generators_in_half_precision() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            assert z.dtype == torch.bfloat16
            assert z.shape[1:] == (3, 1, 1)
            return z[:, :, 0, 0] * self.scale

    flow = flowrl.PriorFlow(Half(), (3, 1, 1)).to(DEVICE)
    x = torch.randn(4, 3, 1, 1)
    assert torch.equal(flow(x, torch.full((4,), 0.5), ()), torch.zeros_like(x))  # the exact field is 0 there
    assert flow.sample_shape == (3,)
    assert flow.decode(x).dtype == torch.float32


@pytest.mark.parametrize("encode", [None, lambda contexts: torch.tensor([[float(c == "left")] for c in contexts])])
def test_contexts_are_learnt_apart(encode: Any) -> None:
    def side(samples: torch.Tensor, contexts: Any) -> torch.Tensor:
        return samples[:, 0] * torch.tensor([-1.0 if c == "left" else 1.0 for c in contexts], device=samples.device)

    name = registered(side, generator=nn.Identity, latent=2, bounds=(-9, 9), prompts=["left", "right"], encode=encode)
    model = flowrl.Tilt("FlowPolicy", name, seed=0, device=DEVICE, tau=1.0, n_samples=512, batch_size=256, n_epochs=4)
    start = model.policy.sample(torch.tensor([0, 1]), x_0=torch.ones(2, 2))
    assert torch.equal(start[0], start[1])
    model.learn(8 * 512)
    left, right = (model.policy.sample(torch.full((2000,), i)).mean(0)[0].item() for i in (0, 1))
    assert left == pytest.approx(-1, abs=0.25)
    assert right == pytest.approx(1, abs=0.25)
    if encode is None:
        with pytest.raises(ConfigError, match="made for 2 contexts and 'up' is none of them: give encode="):
            model.policy.sample(["up"])
    else:
        assert model.policy.sample(["up"]).shape == (1, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_images(channels: int, tmp_path: Path) -> None:
    env = flowrl.make(registered(generator=Pictures(channels)))
    assert isinstance(env, TextToImageEnv)
    assert env.action_space.shape == (channels, 6, 6)
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=DEVICE, **TINY).learn(16)
    assert "entropy" in flowrl.evaluate(model, n_samples=8).side
    assert "from latents of dimension 4 through Pictures" in env.describe()[0]
    plain = flowrl.make(registered(bounds=(-3, 3)))
    assert not plain.flow.is_image
    with pytest.raises(ConfigError, match=r"Images have values in \[0, 1\], those of the generator are from -.*/ 2"):
        flowrl.make(registered(generator=Pictures(channels, low=-1)))


@pytest.mark.parametrize("algo", ["draft", "refl", "adjoint"])
def test_gradients_of_a_reward_flow_through_the_generator(algo: str) -> None:
    name = registered(lambda images, contexts: 100 * brightness(images, contexts))
    model = flowrl.algorithm_class(algo)("FlowPolicy", name, seed=0, device=DEVICE, n_samples=64)
    x_0, ids = torch.randn(256, 4), torch.zeros(256, dtype=torch.long)
    before = model.policy.sample(ids, x_0=x_0).mean()
    model.learn(10 * 64)
    assert model.policy.sample(ids, x_0=x_0).mean() > before + 0.005


class Listing(nn.Module):
    def forward(self, z: torch.Tensor) -> list[torch.Tensor]:
        return [z]


class Total(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow": "digits"}, r"both flow= and generator=: give the one"),
        ({"generator": None, "latent": None}, r"needs flow=, or generator= with latent="),
        ({"generator": None, "flow": "digits"}, r"latent= and encode= of 'wrong' go with generator="),
        ({"latent": None}, "needs latent=, the dimension or shape of one z"),
        ({"latent": 0}, r"a whole number from 1 to .* such as 100, or a shape such as \(100, 1, 1\); not 0"),
        ({"latent": "4"}, "not '4'"),
        ({"latent": 7}, r"cannot take z of shape \(2, 7\): RuntimeError: .*Give the shape of one z"),
        ({"generator": "gan"}, r"is a torch\.nn\.Module that maps z to samples.* not a str\. Put a function of z into"),
        ({"generator": lambda: 3}, r"the function given returned a int\. Put a function of z into the `forward`"),
        ({"generator": Listing()}, r"to a tensor of samples \(2, \.\.\.\), one for each z; it gave a list\. Put it"),
        ({"generator": Total()}, r"one for each z; it gave shape \(\)"),
        ({"encode": 3, "prompts": ["a"]}, "must be a function of a list of contexts, not 3"),
        ({"encode": len, "prompts": ["a"]}, r"encode must give a tensor of shape \(1, n\) for 1 contexts.*gave a int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_mistakes_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flowrl.FlowPolicy.of(flowrl.make(registered(name="wrong", **settings)), device=DEVICE)


def test_only_described_contexts_can_be_held_out() -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    with pytest.raises(ConfigError, match="only be held out where encode= describes them"):
        flowrl.make(registered(prompts=prompts), held_out_share=0.3)
    name = registered(prompts=prompts, encode=lambda contexts: torch.tensor([[float(c[7:])] for c in contexts]))
    model = flowrl.ORWCFMW2("FlowPolicy", name, env_settings={"held_out_share": 0.3}, device=DEVICE, **TINY)
    assert flowrl.evaluate(model, n_samples=8, prompts="held_out").n_prompts > 0


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_a_checkpoint_holds_the_flow_and_not_the_generator(lora_rank: int, tmp_path: Path) -> None:
    name = registered()
    model = flowrl.ORWCFMW2("FlowPolicy", name, seed=0, device=DEVICE, lora_rank=lora_rank, **TINY).learn(16)
    model.save(tmp_path / "saved")
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device=DEVICE)
    x_0, ids = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    for role in ("current", "reference"):
        assert torch.equal(*(m.policy.sample(ids, x_0=x_0, role=role) for m in (model, again)))
    for trained in (model, again):
        trained.learn(16, reset_num_timesteps=False)
    assert torch.equal(*(m.policy.sample(ids, x_0=x_0) for m in (model, again)))
    from safetensors import safe_open

    for path in (tmp_path / "saved").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            assert not any("BatchNorm" in key or "layers" in key for key in keys)


MODULE = '''
import flowrl, torch
from torch import nn

def generator():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh())

@flowrl.register_env("own-latents", generator=generator, latent=4, bounds=(-1, 1))
def right(samples, contexts):
    """To the right."""
    return samples[:, 0]
'''


@pytest.mark.on_device(False)
def test_runs_of_ones_own_module_go_on(tmp_path: Path, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_latents.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    size = ["--algo.n-samples", "16", "--eval-samples", "8", "--checkpoint-every", "1"]
    with forgetting("own_latents"):
        own = ["--modules", "own_latents"]
        args = ["--algo", "orw_w2", "--env", "own-latents", "--total-timesteps", "16", "--name", "one"]
        first = run_here("flowrl.run", *args, *own, *size)
        assert first.returncode == 0, first.stderr
        more = run_here("flowrl.run", "--resume", "runs/one", *own, "--total-timesteps", "32")
        assert more.returncode == 0, more.stderr
        assert run_here("flowrl.evaluate", "runs/one", *own, "--n-samples", "8").returncode == 0
    assert "own_latents" not in sys.modules


@pytest.mark.on_device(False)
def test_memory_is_predicted_without_a_generator_in_the_way() -> None:
    from flowrl.training.memory_plan import predict_memory

    env = flowrl.make(registered())
    config = flowrl.ORWCFMW2.Config(solver="midpoint", **TINY)
    plan = predict_memory(flowrl.ORWCFMW2, config, env)
    assert not plan.missing
    assert plan.parts["trained weights"] > 0
    source = generator_source(Pictures(), 4)
    assert sum(p.numel() for p in source.skeleton().network.parameters()) * 4 == plan.parts["trained weights"]


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_latent_digits_trains_saves_and_draws_the_same(lora_rank: int, tmp_path: Path) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "latent-digits", seed=0, device=DEVICE, lora_rank=lora_rank, **TINY)
    assert model.env.core.name == "latent-digits"
    assert "latents of a GAN" in model.env.core.describe()[0]
    model.learn(16)
    result = flowrl.evaluate(model, n_samples=16)
    assert {"entropy", "edge density"} == set(result.side)
    assert result.w2_to_optimum > 0
    model.save(tmp_path / "saved")
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device=DEVICE)
    x_0, index = torch.randn(3, 16), torch.zeros(3, dtype=torch.long)
    assert torch.equal(*(m.policy.sample(index, x_0=x_0) for m in (model, again)))


def test_the_shipped_generator_draws_digits() -> None:
    """The held-out classifier is sure of most samples, all ten digits are there, and the flow is exact."""
    env = flowrl.make("latent-digits")
    policy = flowrl.FlowPolicy.of(env, device=DEVICE, seed=0)
    z = torch.randn(512, 16)
    pictures = policy.sample(torch.zeros(512, dtype=torch.long), x_0=z)
    torch.testing.assert_close(pictures, policy.decode(z), atol=0.02, rtol=0)
    probability = env.judge.network.to(DEVICE)(pictures).softmax(1)
    assert (probability.amax(1) > 0.9).float().mean() > 0.6
    assert torch.bincount(probability.argmax(1), minlength=10).min() >= 20
    size = sum(path.stat().st_size for path in (ASSETS / "latent-digits").iterdir())
    assert size <= 500_000


def test_latent_digits_learns_even_ones() -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "latent-digits", seed=0, device=DEVICE).learn(4 * 4096)
    result = flowrl.evaluate(model, n_samples=512)
    assert result.reward_mean > result.reference.reward_mean + 0.2
    assert result.components["judged even"] > result.reference.components["judged even"] + 0.2


@pytest.mark.on_device(False)
@pytest.mark.parametrize("changes", [{"dim": 0}, {"decoder": 3}, {"decoder": {"size": 10**6, "width": 4, "depth": 2}}])
def test_a_folder_that_describes_no_generator_is_explained(changes: dict, tmp_path: Path) -> None:
    config = json.loads((ASSETS / "latent-digits" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelLoadError, match="must say dim, width and depth of the flow of latents, and size"):
        source_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(ASSETS / "latent-digits" / "model.safetensors", tmp_path)
    with pytest.raises(ModelLoadError, match=r"Cannot read '.*decoder\.safetensors'"):
        source_of(str(tmp_path)).load()
    shutil.copy(ASSETS / "latent-digits" / "decoder.safetensors", tmp_path)
    env = flowrl.make("latent-digits", flow=str(tmp_path))
    assert env.judge.network.size == 8
