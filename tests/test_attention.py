"""Attention backends of diffusers: chosen, tried, refused; networks without them say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_pipelines
import torch
from diffusers.models import attention_dispatch as dispatch

import flowrl
from flowrl.errors import ConfigError
from flowrl.models import attention
from flowrl.runs.plan import dry_run

SMALL = {
    "n_samples": 4,
    "rollout_batch_size": 4,
    "group_size": 2,
    "batch_size": 2,
    "rollout_steps": 2,
    "n_epochs": 1,
    "guidance_scale": 1.0,
    "precision": "float32",
    "gradient_checkpointing": False,
    "lora_rank": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipelines.flux(tmp_path_factory.mktemp("attention") / "flux")


def algorithm(folder: Path | str, **settings: Any) -> flowrl.FlowAlgorithm:
    env = {"flow": str(folder), "prompts": tuple(small_pipelines.PROMPTS), "resolution": 16}
    return flowrl.ORWCFMW2(
        "FlowPolicy", "sd3-compress", env_settings=env, seed=0, device="cpu", **{**SMALL, **settings}
    )


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that compute, in turn."""
    names: list[str] = []
    for kind, compute in list(dispatch._AttentionBackendRegistry._backends.items()):

        def noted(*args: Any, kind: Any = kind, compute: Any = compute, **kwargs: Any) -> Any:
            names.append(kind.value)
            return compute(*args, **kwargs)

        monkeypatch.setitem(dispatch._AttentionBackendRegistry._backends, kind, noted)
    return names


def test_every_role_computes_with_the_backend(folder: Path, used: list[str]) -> None:
    own, other = algorithm(folder), algorithm(folder, attention_backend="_native_math", refresh_every=2)
    assert set(used) == {"_native_math"}, "tried once, before any network"
    used.clear()
    other.learn(4)
    assert set(used) == {"_native_math"}
    used.clear()
    x = torch.randn(2, *own.policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    velocities = [
        m.policy.velocity(x, torch.full((2,), 0.5), m.policy.condition(torch.arange(2)), "reference")
        for m in (own, other)
    ]
    assert set(used) == {"native", "_native_math"}, "another network of the process has diffusers' own choice"
    torch.testing.assert_close(*velocities, rtol=1e-5, atol=1e-5)


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    config, env = flowrl.ORWCFMW2.Config(attention_backend="native"), flowrl.make("gaussians-linear")
    with pytest.raises(ConfigError, match="for networks of diffusers, which a MLP is not"):
        dry_run(tmp_path, flowrl.ORWCFMW2, config, env, 4)


def test_names_that_cannot_be_used_list_those_that_can(folder: Path) -> None:
    usable = attention.usable_backends()
    assert {"native", "_native_math"} <= set(usable)
    with pytest.raises(
        ConfigError, match=r"'fast' cannot be used: diffusers knows none of this name\..* native"
    ) as caught:
        algorithm(folder, attention_backend="fast")
    assert all(name in str(caught.value) for name in usable)
    with pytest.raises(ConfigError, match="'flash_hub' cannot be used: it would fetch code from the hub and run it"):
        algorithm(folder, attention_backend="flash_hub")
    with pytest.raises(ConfigError, match=r"'_native_npu' cannot be used: .*torch_npu"):
        algorithm(folder, attention_backend="_native_npu")


def test_what_does_not_compute_here_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dispatch.AttentionBackendName._NATIVE_MATH

    def broken(query: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    backends = dispatch._AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, kind, broken)
    with pytest.raises(ConfigError, match=r"does not work on cpu in torch\.float32: no kernel image"):
        algorithm(folder, attention_backend="_native_math")
    monkeypatch.setitem(backends, kind, lambda query, key, value, **kwargs: query + key.detach() + value)
    with pytest.raises(ConfigError, match="gives no gradients"):
        algorithm(folder, attention_backend="_native_math")


def test_networks_without_a_choice_say_so() -> None:
    with pytest.raises(ConfigError, match="for networks of diffusers, which a MLP is not"):
        flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", device="cpu", attention_backend="native")
    with pytest.raises(ConfigError, match=r"A SD3Transformer2DModel .* scaled_dot_product_attention alone"):
        flowrl.ORWCFMW2("FlowPolicy", "sd3-aesthetic", device="cpu", attention_backend="native")


def test_programs_that_do_not_train_need_no_backend(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowrl.training.loading import load_checkpoint

    algorithm(folder, attention_backend="_native_math").save(tmp_path / "saved")
    monkeypatch.setattr(attention, "usable_backends", lambda: ["native"])
    loaded = load_checkpoint(flowrl.ORWCFMW2, tmp_path / "saved", device="cpu", to_train=False)
    assert loaded.config.attention_backend == ""
    with pytest.raises(ConfigError, match="cannot be used"):
        flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")


def test_parts_of_a_network_are_found() -> None:
    """Two networks within one, as of Wan 2.2."""
    part = torch.nn.Module()
    part.processor = SimpleNamespace(_attention_backend=None)  # type: ignore[assignment]
    told: list[str] = []
    for network in (whole := torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])):
        network.set_attention_backend = told.append  # type: ignore[assignment]
        network.part = part
    attention.set_attention_backend(whole, "native", torch.device("cpu"), torch.float32)
    assert told == ["native"] * 2
