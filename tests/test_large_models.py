"""What large models need: low precision, gradient checkpointing, compilation, offloading, small optimizers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from stable_baselines3.common.callbacks import CallbackList
from torch._dynamo.utils import counters

import flowrl
from flowrl.errors import CheckpointError, ConfigError
from flowrl.models.mlp import MLP
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.optimizers import state_shapes
from flowrl.types import Transitions

SMALL = {
    "n_samples": 4,
    "rollout_batch_size": 4,
    "group_size": 2,
    "batch_size": 2,
    "rollout_steps": 3,
    "n_epochs": 1,
    "ema_decay": 0.0,
    "lora_rank": 0,
    "guidance_scale": 1.0,
    "precision": "float32",
    "gradient_checkpointing": False,
    "offload": False,
    "half_buffer": False,
}
KINDS = {"sd3": small_pipelines.sd3, "flux": small_pipelines.flux}


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("large") / request.param)


def algorithm(folder: Path, name: str = "orw_w2", **settings: Any) -> flowrl.FlowAlgorithm:
    env = {"flow": str(folder), "prompts": tuple(small_pipelines.PROMPTS), "resolution": 16}
    cls = flowrl.algorithm_class(name)
    return cls("FlowPolicy", "sd3-compress", env_settings=env, seed=0, device="cpu", **{**SMALL, **settings})


def point(policy: flowrl.FlowPolicy) -> tuple[torch.Tensor, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, *policy.model.latent_shape, generator=generator)
    return x, torch.tensor([0.2, 0.5, 0.9]), policy.condition(torch.arange(3))


def gradients(model: flowrl.FlowAlgorithm) -> list[torch.Tensor]:
    policy = model.policy
    policy.set_training_mode(True)
    policy.velocity(*point(policy)).square().mean().backward()
    return [p.grad for p in policy.parameters_of("current").values() if p.grad is not None]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_bfloat16_is_close_and_trains_in_float32(folder: Path, lora_rank: int) -> None:
    exact, low = (algorithm(folder, lora_rank=lora_rank, precision=p) for p in ("float32", "bfloat16"))
    with torch.no_grad():
        a, b = (model.policy.velocity(*point(model.policy)) for model in (exact, low))
    assert b.dtype == torch.float32
    assert 1e-4 < (a - b).norm() / a.norm() < 0.05
    assert low.policy.model.pipeline.vae.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in low.policy.parameters_of("current").values())
    frozen = {p.dtype for n, p in low.policy.model.network.named_parameters() if ".base_layer." in n}
    assert frozen == ({torch.bfloat16} if lora_rank else set())
    low.learn(4)
    assert low.buffer.reward.dtype == low.buffer.coefficient.dtype == low.buffer.x_1.dtype == torch.float32
    for parameter in low.policy.parameters_of("current").values():
        assert bool(parameter.isfinite().all())
    assert {s["exp_avg"].dtype for s in low.policy.optimizer.state.values()} == {torch.float32}


def test_in_bfloat16_the_ratio_starts_at_one(folder: Path) -> None:
    """The recorded log-probability is computed again at the update, by the same network in the same precision."""
    model = algorithm(folder, "ddpo", precision="bfloat16", lora_rank=4)
    callback = CallbackList([])
    model._setup_learn(4, callback, True, "", False)
    model.collect(callback)
    for k in range(model.buffer.parts):
        states, log_prob = model.buffer.rows["states"], model.buffer.rows["log_prob"][:, k]
        steps = Transitions(states[:, k], states[:, k + 1], torch.full((4,), k), log_prob)
        with torch.no_grad():
            law = model.step(steps, model.buffer.all().context_ids)
        assert (law.mean_log_prob(steps.x_next) - log_prob).abs().max() <= 1e-5


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(folder: Path, lora_rank: int) -> None:
    kept, found = [], []
    for checkpointing in (False, True):
        model = algorithm(folder, lora_rank=lora_rank, gradient_checkpointing=checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            found.append(gradients(model))
        kept.append(sum(sizes))
    assert len(found[0]) == len(found[1]) > 0
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(bool(g.any()) for g in found[0])
    assert kept[1] < 0.7 * kept[0]


def test_a_network_without_gradient_checkpointing_says_so() -> None:
    with pytest.raises(ConfigError, match="MLP has no gradient checkpointing"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform == "win32", reason="torch.compile needs a compiler")
@pytest.mark.parametrize(("kind", "lora_rank"), [("blocks", 0), ("blocks", 2), ("whole", 2)])
def test_a_compiled_network_gives_the_same_velocities(kind: str, lora_rank: int) -> None:
    models = [
        flowrl.ORWCFMW2(
            "FlowPolicy", "gaussians-linear", device="cpu", seed=0, compile=c, lora_rank=lora_rank, refresh_every=2
        )
        for c in ("off", kind)
    ]
    for model in models:
        with torch.no_grad():
            for parameter in model.policy.parameters_of("current").values():
                parameter.add_(0.1)
    x, t = torch.randn(5, 2), torch.rand(5)
    gradients, before = [], counters["frames"]["ok"]
    for role in ("current", "reference", "behaviour"):
        a, b = (model.policy.velocity(x, t, (), role) for model in models)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counters["frames"]["ok"] > before
    for model in models:
        model.policy.velocity(x, t, ()).square().mean().backward()
        gradients.append([p.grad for p in model.policy.parameters_of("current").values() if p.grad is not None])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 * a.abs().max().item())  # values are up to 3e6
        assert (a - b).norm() <= 1e-5 * a.norm()
    network = models[1].policy.model.network
    compiled = [name for name, module in network.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ([f"hidden.{i}" for i in range(3)] if (kind, lora_rank) == ("blocks", 2) else [""])


def test_offloading_moves_the_autoencoder_between_phases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = algorithm(folder, lora_rank=2, offload=True)
    vae, moves = model.policy.model.pipeline.vae, []
    monkeypatch.setattr(vae, "to", lambda where: moves.append(str(where)) or vae)
    monkeypatch.setattr(model.policy.model, "device", torch.device("cpu", 0))  # a name to tell it from the host
    model.learn(4)
    assert moves == ["cpu:0", "cpu"]


def test_text_encoders_do_not_stay(folder: Path) -> None:
    policy = algorithm(folder, lora_rank=2).policy
    assert policy.model.pipeline.text_encoder is None
    assert policy.sample(["three red circles"], steps=2).shape == (1, 3, 16, 16)  # a new prompt: loaded again
    assert policy.model.pipeline.text_encoder is None


def test_half_of_the_buffer() -> None:
    whole, half = (RolloutBuffer(8, (4, 2, 2), "cpu", half=h) for h in (False, True))
    x_1 = torch.randn(8, 4, 2, 2)
    for buffer in (whole, half):
        buffer.add(x_1, torch.arange(8), torch.arange(8.0))
    assert whole.nbytes - half.nbytes == x_1.numel() * 2
    for batch in (half.all(), next(half.batches(torch.arange(8), 8))):
        assert batch.x_1.dtype == torch.float32
        torch.testing.assert_close(batch.x_1, x_1, rtol=1e-3, atol=1e-3)
        assert batch.reward.tolist() == list(range(8))


def test_half_of_the_buffer_is_a_setting(folder: Path) -> None:
    assert algorithm(folder, half_buffer=True).buffer.x_1.dtype == torch.float16


def test_lora_dropout_is_for_the_trained_adapter_in_updates_only(folder: Path) -> None:
    policy = algorithm(folder, lora_rank=4, lora_dropout=0.5, refresh_every=2).policy
    with torch.no_grad():
        for role in policy.roles:
            for parameter in policy.parameters_of(role).values():
                parameter.add_(0.1)
    for training, role, with_grad, same in (
        (True, "current", True, False),
        (True, "current", False, True),
        (True, "behaviour", True, True),
        (True, "reference", True, True),
        (False, "current", True, True),
    ):
        policy.set_training_mode(training)
        with torch.set_grad_enabled(with_grad):
            a, b = (policy.velocity(*point(policy), role) for _ in range(2))
        assert torch.equal(a, b) == same, (training, role, with_grad)


def test_lora_targets(folder: Path) -> None:
    few = algorithm(folder, lora_rank=4, lora_targets=("attn.to_q", "attn.to_v")).policy
    names = list(few.parameters_of("current"))
    assert names
    assert all(".attn.to_q." in name or ".attn.to_v." in name for name in names)
    assert len(names) < len(algorithm(folder, lora_rank=4).policy.parameters_of("current"))
    with pytest.raises(ConfigError, match=r"no module of this network is named 'no_such_layer'"):
        algorithm(folder, lora_rank=4, lora_targets=("no_such_layer",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "float8"},
        {"optimizer": "sgd"},
        {"guidance": "none"},
        {"lora_dropout": 1.0},
    ],
    ids=str,
)
def test_wrong_settings_name_the_known_ones(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", **wrong)


def test_an_optimizer_in_8_bits_learns_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    n = 64
    settings = {"n_samples": n, "batch_size": 32, "optimizer": "adamw8bit", "learning_rate": 1e-3}
    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", seed=0, **settings)
    model.learn(n)
    parameters = model.policy.parameters_of("current").values()
    states = [model.policy.optimizer.state[p] for p in parameters]
    large = [s["state1"].dtype for p, s in zip(parameters, states) if p.numel() >= 4096]
    assert set(large) == {torch.uint8}
    for parameter, state in zip(parameters, states):
        shapes = {key: tuple(torch.as_tensor(value).shape) for key, value in state.items()}
        assert shapes == state_shapes(model.config, parameter)
    model.save(tmp_path / "saved")
    model.learn(n, reset_num_timesteps=False)
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu").learn(n, reset_num_timesteps=False)
    for a, b in zip(parameters, again.policy.parameters_of("current").values()):
        assert torch.equal(a, b)
    plain = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", seed=0, n_samples=n, batch_size=32)
    plain.learn(n).save(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "optimizer.safetensors", tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*does not fit"):
        flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")


def test_a_missing_8_bit_optimizer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install .flowrl-torch\[8bit\]"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", optimizer="adamw8bit")


def test_cfg_zero_by_hand() -> None:
    from flowrl.functional.guidance import guided_velocity

    v, v_null = torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    t = torch.tensor([0.0, 0.5])
    plain = guided_velocity(v, v_null, 2.0, t)
    assert plain.tolist() == [[4.0, 2.0], [4.0, 2.0]]  # 2 v - v_null
    zero = guided_velocity(v, v_null, 2.0, t, "cfg_zero")
    # s = <v, v_null> / |v_null|^2 = 6 / 4; s v_null = (3, 0); (3, 0) + 2 ((3, 1) - (3, 0)) = (3, 2)
    assert zero.tolist() == [[0.0, 0.0], [3.0, 2.0]]
    assert guided_velocity(v, 0 * v, 2.0, t, "cfg_zero")[1].tolist() == [6.0, 2.0]  # no NaN


def test_cfg_zero_is_a_setting(folder: Path) -> None:
    if folder.name.startswith("flux"):
        pytest.skip("guidance is distilled")
    samples = []
    for guidance in ("cfg", "cfg_zero"):
        policy = algorithm(folder, guidance_scale=4.0, guidance=guidance).policy
        x_0 = torch.randn(2, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
        samples.append(policy.sample_latents(torch.arange(2), x_0=x_0, steps=4))
    assert (samples[0] - samples[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"compile": "off"}, []),
        ({"compile": "auto"}, ["compile: off, which pays for large networks on CUDA only"]),
        ({"compile": "blocks"}, ["compile: the whole network, as it repeats no blocks, in the first pass"]),
        ({"compile": "blocks", "lora_rank": 2}, ["compile: each kind of block that the network repeats, in the first"]),
        ({"compile": "whole", "cuda_graphs": True}, ["compile: the whole network", "CUDA graphs: off: for small"]),
        ({"compile": True, "lora_rank": 2}, ["compile: each kind of block"]),  # as of version 0.1.0
    ],
)
def test_a_run_says_what_is_compiled(asked: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    from flowrl.runs.plan import head_of

    model = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", **asked)
    lines = [line for line in head_of(model, tmp_path, 512).splitlines() if line.startswith(("compile", "CUDA"))]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said))


def test_blocks_that_several_processes_gather_are_there() -> None:
    """Of those that a network names, or one in it does; else those that it repeats."""
    from flowrl.models.by_time import ByTime
    from flowrl.models.compiling import gathered_blocks

    class Block(torch.nn.Module):
        pass

    class Repeating(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

    class Naming(Repeating):
        _no_split_modules = ("Block", "OfAnotherForm")

    assert gathered_blocks(Naming()) == gathered_blocks(Repeating()) == ["Block"]
    assert gathered_blocks(ByTime(Naming(), Naming(), 1.0)) == ["Block"]
    assert gathered_blocks(MLP(2)) == []
    adapted = flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", lora_rank=2).policy.model.network
    assert gathered_blocks(adapted) == []


def test_blocks_are_those_that_a_network_repeats(folder: Path) -> None:
    from flowrl.models.compiling import repeated_blocks

    network = algorithm(folder).policy.model.network
    expected = list(network.transformer_blocks) + list(getattr(network, "single_transformer_blocks", []))
    assert {id(block) for block in repeated_blocks(network)} == {id(block) for block in expected}
    linear = torch.nn.Linear(2, 2)
    assert repeated_blocks(linear) == [linear]
    mlp = MLP(2)  # a list of torch's own layers, whose `compile` compiles nothing
    assert repeated_blocks(mlp) == [mlp]
