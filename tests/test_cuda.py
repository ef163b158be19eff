"""What only a GPU can show: `FLOWRL_TEST_DEVICE=cuda python -m pytest`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, TINY_SD3, Run

import flowrl
from flowrl.envs.gaussians import GaussiansEnv, LinearReward, eight_gaussians
from flowrl.training.algorithm import FlowAlgorithm

pytestmark = [
    pytest.mark.on_device,
    pytest.mark.skipif(DEVICE != "cuda", reason="of CUDA only: FLOWRL_TEST_DEVICE=cuda and a GPU"),
]

N = 64
SETTINGS = {"n_samples": N, "batch_size": 16, "rollout_steps": 4, "ema_decay": 0.9, "refresh_every": 2}
KINDS = {
    "points": ("gaussians-linear", {}),
    "points-lora": ("gaussians-linear", {"lora_rank": 2}),
    "pictures-lora": ("sd3-count", {"lora_rank": 2, "n_samples": 8, "group_size": 4, "batch_size": 8}),
}


def make(kind: str = "points", device: str = "cuda", **settings: object) -> flowrl.ORWCFMW2:
    env, own = KINDS[kind]
    return flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device=device, **{**SETTINGS, **own, **settings})


def weights(model: FlowAlgorithm) -> list[torch.Tensor]:
    return [p.detach().cpu() for role in model.policy.roles for p in model.policy.parameters_of(role).values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_the_other_device(kind: str, there: str, here: str, tmp_path: Path) -> None:
    """With the same weights, and one warning: the numbers that follow are others."""
    model = make(kind, there)
    n = model.config.n_samples
    model.learn(n).save(tmp_path / "a")
    with pytest.warns(UserWarning, match=f"of a device of kind '{there}', this is '{here}'") as caught:
        loaded = flowrl.ORWCFMW2.load(tmp_path / "a", device=here)
    assert sum("not bit-exact" in str(one.message) for one in caught) == 1
    assert {p.device.type for p in loaded.policy.parameters()} == {loaded.buffer.reward.device.type} == {here}
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(loaded)))
    x_0 = model.policy.noise(4)
    samples = [m.policy.sample(n=4, x_0=x_0.to(m.device)).cpu() for m in (model, loaded)]
    torch.testing.assert_close(*samples, atol=1e-3, rtol=1e-3)
    loaded.learn(n, reset_num_timesteps=False)
    assert loaded.num_timesteps == 2 * n
    assert all(bool(w.isfinite().all()) for w in weights(loaded))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_exactly_on_the_gpu(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    n = model.config.n_samples
    model.learn(2 * n).save(tmp_path / "a")
    model.learn(2 * n, reset_num_timesteps=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The continuation is not bit-exact")
        again = flowrl.ORWCFMW2.load(tmp_path / "a", device="cuda")
    again.learn(2 * n, reset_num_timesteps=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights(kind: str) -> None:
    models = [make(kind) for _ in range(2)]
    for model in models:
        model.learn(2 * model.config.n_samples)
    assert all(torch.equal(a, b) for a, b in zip(*map(weights, models)))


def test_a_run_of_the_gpu_is_evaluated_sampled_and_exported_on_the_cpu(run_here: Run, tmp_path: Path) -> None:
    done = [
        run_here("flowrl.run", *TINY_SD3, "--algo.lora-rank", 4, "--device", "cuda", "--name", "gpu"),
        run_here("flowrl.evaluate", "runs/gpu", "--n-samples", 8, "--device", "cpu"),
        run_here("flowrl.sample", "runs/gpu", "--n", 1, "--device", "cpu", "--out", "pictures"),
        run_here("flowrl.export", "runs/gpu", "shared", "--device", "cpu"),
    ]
    assert [program.returncode for program in done] == [0] * 4, [program.stderr for program in done]
    assert any((tmp_path / "pictures").iterdir())
    assert (tmp_path / "shared" / "pytorch_lora_weights.safetensors").is_file()


@pytest.fixture
def as_in_training() -> Iterator[None]:
    """Algorithms as training takes them, deterministic or not; a synchronisation with the host is an error."""
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"accumulation": 2}], ids=str)
def test_an_update_never_waits_for_the_gpu(settings: dict, request: pytest.FixtureRequest) -> None:
    model = make(**settings)
    model.learn(N)
    request.getfixturevalue("as_in_training")
    logged = model.update()
    model.refresh()
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(value.isfinite()) for value in logged.values())


def test_the_watch_sees_a_synchronisation(as_in_training: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def test_exact_fields_follow_the_samples_to_the_gpu() -> None:
    env = GaussiansEnv(eight_gaussians(), LinearReward((1.0, 0.0)))  # its flow: the exact field, made on the CPU
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, device="cuda", **SETTINGS)
    x, t = model.policy.noise(32), torch.rand(32)
    exact = env.mixture.velocity(t.cpu(), x.cpu())
    torch.testing.assert_close(model.policy.velocity(x, t, ()).detach().cpu(), exact, atol=1e-4, rtol=1e-4)
    generator = torch.Generator("cuda").manual_seed(0)
    assert env.oracle.sample(8, generator).device.type == "cuda"
    assert model.learn(N).policy.sample(n=4).device.type == "cuda"


def test_conditions_of_a_factory_follow_to_the_gpu() -> None:
    """Also of contexts that are new, and without one."""
    policy = flowrl.FlowPolicy.of("sd3-count", env_settings={"flow": "mini-sd3"}, seed=0, device="cuda")
    assert {part.device.type for part in policy.condition(torch.tensor([0, 1]))} == {"cuda"}
    pictures = policy.sample(["a prompt of its own", "two circles"], steps=2, guidance_scale=3.0)
    assert pictures.device.type == "cuda"
    assert bool(pictures.isfinite().all())
