"""LoRA weights of other people as a start: formats, scales, the reference, what an export holds, what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file

import flowrl
from flowrl.envs.text_to_image import TextToImageEnv
from flowrl.errors import CheckpointError, ConfigError
from flowrl.models.init_lora import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, started_from
from flowrl.models.loading import source_of
from flowrl.models.pipeline import PipelineFlow, PipelineOptions
from flowrl.pages.model_card import _summary

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
RANK = 3
SETTINGS: dict[str, Any] = {"n_samples": 4, "group_size": 2, "batch_size": 2, "rollout_steps": 2, "n_epochs": 1}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipelines.sd3(tmp_path_factory.mktemp("sd3"), t5=False)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipelines.flux(tmp_path_factory.mktemp("flux"))


def load(folder: Path) -> PipelineFlow:
    flow = source_of(str(folder), pipeline=PipelineOptions(resolution=16)).load()
    assert isinstance(flow, PipelineFlow)
    return flow


def adapter_of(flow: PipelineFlow, ends: tuple[str, ...] = ("attn.to_q", "attn.to_out.0", "ff.net.2")) -> Adapter:
    """Factors of some linear layers of the network's blocks, large enough to show."""
    generator = torch.Generator().manual_seed(1)
    found: Adapter = {}
    for name, module in flow.network.named_modules():
        if name.endswith(ends) and isinstance(module, torch.nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=generator)
            found[name] = down, 0.2 * torch.randn(module.out_features, RANK, generator=generator)
    assert len(found) >= 2
    return found


def as_diffusers(adapter: Adapter, folder: Path, scale: float) -> Path:
    """As `save_lora_weights` of diffusers does, which keeps no scale: it is in the weights."""
    layers = {f"{name}.lora_A.weight": down for name, (down, _) in adapter.items()}
    layers |= {f"{name}.lora_B.weight": scale * up for name, (_, up) in adapter.items()}
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def with_metadata(adapter: Adapter, folder: Path, scale: float) -> Path:
    """As newer releases of diffusers write, with the settings in the header."""
    layers = {f"transformer.{name}.lora_A.weight": down for name, (down, _) in adapter.items()}
    layers |= {f"transformer.{name}.lora_B.weight": up for name, (_, up) in adapter.items()}
    settings = {"r": RANK, "lora_alpha": scale * RANK, "target_modules": list(adapter)}
    folder.mkdir(exist_ok=True)
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(layers, folder / "pytorch_lora_weights.safetensors", metadata=header)
    return folder


def as_peft(adapter: Adapter, folder: Path, scale: float) -> Path:
    """As `PeftModel.save_pretrained` does."""
    folder.mkdir(exist_ok=True)
    layers = {f"{PEFT_PREFIX}{name}.lora_A.weight": down for name, (down, _) in adapter.items()}
    layers |= {f"{PEFT_PREFIX}{name}.lora_B.weight": up for name, (_, up) in adapter.items()}
    save_file(layers, folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": scale * RANK}))
    return folder


def as_kohya(adapter: Adapter, folder: Path, scale: float) -> Path:
    """As the common trainers write for FLUX: names of the original network, with an alpha for each module."""
    folder.mkdir(exist_ok=True)
    names = {"attn.to_out.0": "img_attn_proj", "ff.net.2": "img_mlp_2"}
    state: dict[str, torch.Tensor] = {}
    for name, (down, up) in adapter.items():
        _, block, end = name.split(".", 2)
        key = f"lora_unet_double_blocks_{block}_{names[end]}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(scale * RANK)
    save_file(state, folder / "trained.safetensors")
    return folder


def expected(flow: PipelineFlow, adapter: Adapter, scale: float) -> PipelineFlow:
    with torch.no_grad():
        for name, (down, up) in adapter.items():
            flow.network.get_submodule(name).weight.add_(scale * up @ down)  # type: ignore[operator,union-attr]
    return flow


def same_weights(one: PipelineFlow, other: PipelineFlow) -> bool:
    pairs = zip(one.network.state_dict().values(), other.network.state_dict().values())
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("write", [as_diffusers, with_metadata, as_peft])
def test_formats(write: Callable[..., Path], sd3: Path, tmp_path: Path) -> None:
    adapter = adapter_of(load(sd3))
    place = write(adapter, tmp_path / "lora", 0.5)
    ours = started_from(load(sd3), str(place))
    assert isinstance(ours, PipelineFlow)
    assert same_weights(ours, expected(load(sd3), adapter, 0.5))
    assert not same_weights(ours, load(sd3))
    if write is not as_peft:  # which diffusers' loader does not take
        theirs = load(sd3)
        theirs.pipeline.load_lora_weights(place)
        theirs.pipeline.fuse_lora()
        x, t = torch.randn(2, *ours.latent_shape), torch.tensor([0.2, 0.8])
        cond = ours.encode(small_pipelines.PROMPTS[:2])
        with torch.no_grad():
            assert (theirs(x, t, cond) - ours(x, t, cond)).abs().max() <= 1e-4


def test_scales_of_single_modules_are_found_as_peft_finds_them(sd3: Path, tmp_path: Path) -> None:
    """By the end of a name, by the whole, and the first that fits; expressions are refused."""
    adapter = adapter_of(load(sd3), ("attn.to_q", "attn.to_out.0"))
    place = as_peft(adapter, tmp_path / "lora", 1.0)
    whole = next(name for name in adapter if name.endswith("to_out.0"))
    pattern = {f"^{whole}": 3 * RANK, "to_q": 2 * RANK, "attn.to_q": 100, "to_out": 100, "o_out.0": 100}
    (place / PEFT_CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "alpha_pattern": pattern}))
    scales = {name: 2.0 if name.endswith("to_q") else 3.0 if name == whole else 1.0 for name in adapter}
    scaled = {name: (down, scales[name] * up) for name, (down, up) in adapter.items()}
    assert sorted({*scales.values()} - {1.0}) == [2.0, 3.0]
    started = started_from(load(sd3), str(place))
    assert isinstance(started, PipelineFlow)
    assert same_weights(started, expected(load(sd3), scaled, 1.0))
    for odd in ({"to_(q|k)": 8}, [1]):
        (place / PEFT_CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "alpha_pattern": odd}))
        with pytest.raises(ConfigError, match="alpha_pattern"):
            started_from(load(sd3), str(place))


def test_keys_of_other_trainers(flux: Path, tmp_path: Path) -> None:
    """By diffusers' own converter, alphas included."""
    adapter = {
        name: factors
        for name, factors in adapter_of(load(flux), ("attn.to_out.0", "ff.net.2")).items()
        if name.startswith("transformer_blocks")
    }
    place = as_kohya(adapter, tmp_path / "kohya", 0.5)
    ours = started_from(load(flux), str(place / "trained.safetensors"))
    assert isinstance(ours, PipelineFlow)
    assert same_weights(ours, expected(load(flux), adapter, 0.5))


def test_training_goes_on_and_exports_hold_both(sd3: Path, tmp_path: Path) -> None:
    """The reference is the start; other libraries load start and training from one adapter; a run can be resumed."""
    place = as_diffusers(adapter_of(load(sd3)), tmp_path / "lora", 0.5)
    env = TextToImageEnv(
        source_of(str(sd3), pipeline=PipelineOptions(resolution=16)),
        small_pipelines.PROMPTS,
        lambda images, prompts: images.flatten(1).mean(1),
    )
    model = flowrl.ORWCFMW2("FlowPolicy", env, seed=0, lora_rank=2, init_lora=str(place), **SETTINGS)
    start = started_from(load(sd3), str(place))
    policy = model.policy
    x, t, cond = torch.randn(2, *start.latent_shape), torch.tensor([0.2, 0.8]), policy.condition(torch.arange(2))
    with torch.no_grad():
        assert (policy.velocity(x, t, cond, "reference") - start(x, t, cond)).abs().max() <= 1e-5
    model.learn(4)
    with torch.no_grad():
        for parameter in policy.parameters_of("current").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours = policy.velocity(x, t, cond)
    model.save(tmp_path / "checkpoint")
    theirs = load(sd3)
    theirs.pipeline.load_lora_weights(tmp_path / "checkpoint")
    with torch.no_grad():
        assert (theirs(x, t, cond) - ours).abs().max() <= 1e-4
        assert (ours - start(x, t, cond)).abs().max() > 1e-2
    resumed = flowrl.ORWCFMW2.load(tmp_path / "checkpoint", env=env)
    with torch.no_grad():
        assert torch.equal(resumed.policy.velocity(x, t, cond), ours)
    assert "It began from other LoRA weights, which are in these." in _summary(model, "lora")
    as_diffusers(adapter_of(load(sd3)), place, 0.25)
    with pytest.raises(CheckpointError, match="was trained from other LoRA weights"):
        flowrl.ORWCFMW2.load(tmp_path / "checkpoint", env=env)


def test_what_does_not_fit_is_named(sd3: Path, flux: Path, tmp_path: Path) -> None:
    flow = load(sd3)
    of_flux = as_diffusers(adapter_of(load(flux), ("proj_mlp", "attn.to_q")), tmp_path / "flux", 1.0)
    with pytest.raises(ConfigError, match=r"modules of .* do not fit this network: .*proj_mlp \(no such module\)"):
        started_from(flow, str(of_flux))
    with pytest.raises(ConfigError, match="there is no such folder"):
        started_from(flow, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds 0 \.safetensors files"):
        started_from(flow, str(tmp_path / "empty"))
    save_file({"text_encoder.a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match=r"1 of 1 keys .* are not of the transformer"):
        started_from(flow, str(tmp_path / "text.safetensors"))
    save_file({"transformer.a.weight": torch.ones(1, 1)}, tmp_path / "full.safetensors")
    with pytest.raises(ConfigError, match="is no LoRA that is understood"):
        started_from(flow, str(tmp_path / "full.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ConfigError, match="cannot read"):
        started_from(flow, str(tmp_path / "broken.safetensors"))
    wrong = {name: (down[:, :5].contiguous(), up) for name, (down, up) in adapter_of(flow).items()}
    with pytest.raises(ConfigError, match="do not fit this network"):
        started_from(flow, str(as_peft(wrong, tmp_path / "wrong", 1.0)))
    assert same_weights(flow, load(sd3))  # nothing was touched
