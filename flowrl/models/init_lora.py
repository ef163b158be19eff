"""LoRA weights of other people as a start: read by diffusers' own converters, put into the weights once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel
from flowrl.types import has_values

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of adapters."""
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
METADATA = "lora_adapter_metadata"
"""Where diffusers writes the adapter's settings in the header of a file."""
EXPRESSION = set("^$*+?{}[]|()\\")
"""Characters that make more of a name in `alpha_pattern`."""
NAMED, LONGEST = 5, 120
"""Keys that an error names, and characters of each."""


class Factors(NamedTuple):
    """Adapter of one module, its scale included: `down` (rank, in), `up` (out, rank)."""

    down: torch.Tensor
    up: torch.Tensor


def started_from(model: VelocityModel, place: str) -> VelocityModel:
    """Add the LoRA of a folder or file to the network's weights (in place), and keep it for exports.

    The network that comes out is the start of a training, and its reference.

    Args:
        model: A flow whose network has the adapted modules.
        place: Folder or .safetensors file, in diffusers' format, peft's, or another that diffusers converts.

    Raises:
        ConfigError: There is no such LoRA, or keys of it do not fit the network; names them.
    """
    if not place:
        return model
    with unset_fake_temporarily():  # a prediction of memory reads the file as it is
        factors = read_lora(model, Path(place))
        model.init_lora_hash = hashed(factors)
    modules = dict(model.network.named_modules())
    _check(factors, modules, place)
    if has_values(next(model.network.parameters())):
        with torch.no_grad():
            for name, (down, up) in factors.items():
                weight = modules[name].weight
                assert isinstance(weight, torch.Tensor)
                delta = (up.flatten(1).float() @ down.flatten(1).float()).view_as(weight)
                weight.copy_((weight.float() + delta).to(weight.dtype))
    model.init_lora = factors
    return model


def hashed(start: Mapping[str, Factors]) -> str:
    """Compute the SHA-256 of the names and values of adapters."""
    found = hashlib.sha256()
    for name, factors in sorted(start.items()):
        found.update(name.encode())
        for factor in factors:
            found.update(factor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def with_start(lora: Mapping[str, torch.Tensor], start: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Join trained adapters with the start that lies in the weights: one adapter for the network as it was published.

    All ranks are made the same, with zeros, since readers take one scale for all.

    Args:
        lora: `NAME.lora_A.weight` (rank, in) and `NAME.lora_B.weight` (out, rank), scale included.
        start: Factors by the module's name.
    """
    trained = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}
    rank = max((len(lora[f"{name}.lora_A.weight"]) for name in trained), default=0)
    rank += max((len(factors.down) for factors in start.values()), default=0)
    joined: dict[str, torch.Tensor] = {}
    for name in sorted(trained | start.keys()):
        parts = [start[name]] if name in start else []
        if name in trained:
            parts.append(Factors(lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"]))
        down = torch.cat([part.down.flatten(1).float().cpu() for part in parts])
        up = torch.cat([part.up.flatten(1).float().cpu() for part in parts], dim=1)
        joined[f"{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        joined[f"{name}.lora_B.weight"] = nn.functional.pad(up, (0, rank - up.shape[1]))
    return joined


def read_lora(model: VelocityModel, place: Path) -> dict[str, Factors]:
    """Read the adapter of each module, by its name.

    Raises:
        ConfigError: There is no safetensors file, or none of a LoRA for this network.
    """
    file = _file(place)
    state, metadata = _tensors(file)
    settings = _settings(file, metadata)
    pipeline: Any = getattr(model, "pipeline", None)
    alphas: Mapping[str, Any] = {}
    if any(key.startswith(PEFT_PREFIX) for key in state):
        state = {f"transformer.{key.removeprefix(PEFT_PREFIX)}": value for key, value in state.items()}
    elif pipeline is not None and hasattr(type(pipeline), "lora_state_dict"):
        state, alphas = _converted(type(pipeline), state, place)
    part = getattr(model, "NETWORK", "transformer") + "."
    others = sorted(key for key in state if not key.startswith(part))
    if others:
        raise ConfigError(
            f"init_lora: {len(others)} of {len(state)} keys of '{place}' are not of the {part[:-1]}, which is what is "
            f"trained here: {_listed(others)}. A LoRA of text encoders cannot be a start."
        )
    return _paired({key.removeprefix(part): value for key, value in state.items()}, alphas, settings, part, place)


def _file(place: Path) -> Path:
    if place.is_file() and place.suffix == ".safetensors":
        return place
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if len(found) == 1:
        return found[0]
    known = [file for file in found if file.name in (PEFT_WEIGHTS, LORA_WEIGHTS)]
    if len(known) == 1:
        return known[0]
    there = f"it holds {len(found)} .safetensors files" if place.is_dir() else "there is no such folder or file"
    raise ConfigError(f"init_lora: '{place}' is no LoRA: {there}. Name a folder with one, or a .safetensors file.")


def _tensors(file: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in sorted(opened.keys())}, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"init_lora: cannot read '{file}': {error}") from error


def _settings(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Read `r`, `lora_alpha` and `alpha_pattern` where they are written beside the weights."""
    try:
        if METADATA in metadata:
            found = json.loads(metadata[METADATA])
            return {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith("transformer.")}
        if file.name == PEFT_WEIGHTS and (file.parent / PEFT_CONFIG).is_file():
            config: Mapping[str, Any] = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
            return config
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"init_lora: cannot read the settings beside '{file}': {error}") from error
    return {}


def _converted(
    kind: Any, state: dict[str, torch.Tensor], place: Path
) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Convert keys of trainers to diffusers' own, by the pipeline's converters; and alphas, where they are apart."""
    try:
        found = kind.lora_state_dict(state, return_alphas=True)  # classes that keep no alphas apart pass over it
    except Exception as error:
        raise ConfigError(
            f"init_lora: diffusers cannot convert '{place}' for a {kind.__name__}: {str(error)[:300]} Its first keys "
            f"are {_listed(sorted(state))}."
        ) from error
    converted, alphas = (found[0], found[1] or {}) if isinstance(found, tuple) else (found, {})
    return converted, alphas


def _paired(
    state: Mapping[str, torch.Tensor], alphas: Mapping[str, Any], settings: Mapping[str, Any], part: str, place: Path
) -> dict[str, Factors]:
    """Find the two factors of each module, and put the scale into the second."""
    old = any(key.endswith(".lora.down.weight") for key in state)
    down, up = (".lora.down.weight", ".lora.up.weight") if old else (".lora_A.weight", ".lora_B.weight")
    names = [key.removesuffix(down) for key in state if key.endswith(down)]
    known = {f"{name}{end}" for name in names for end in (down, up, ".alpha")}
    unknown = sorted(set(state) - known) + [f"{name}{up}" for name in names if f"{name}{up}" not in state]
    if unknown or not names:
        raise ConfigError(
            f"init_lora: '{place}' is no LoRA that is understood: {_listed(unknown) or 'it has no factors'} "
            "do not belong to a pair of lora_A and lora_B."
        )
    factors: dict[str, Factors] = {}
    for name in names:
        rank = len(state[f"{name}{down}"])
        alpha = state.get(f"{name}.alpha", alphas.get(f"{part}{name}.alpha"))
        if alpha is None:
            alpha = _alpha_of(name, settings, rank, place)
        scale = float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
        factors[name] = Factors(state[f"{name}{down}"], scale * state[f"{name}{up}"].float())
    return factors


def _alpha_of(name: str, settings: Mapping[str, Any], rank: int, place: Path) -> Any:
    """Find the alpha of a module: of its name, or of the first end of it, in `alpha_pattern`, as peft does.

    Raises:
        ConfigError: Names there are expressions; one of somebody else's file could run for ever.
    """
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping) or any(EXPRESSION & set(key.removeprefix("^")) for key in pattern):
        raise ConfigError(
            f"init_lora: the alpha_pattern of '{place}' is not understood: only names of modules, or their ends, are. "
            "Merge the scales into the weights (alpha = rank) and save it anew."
        )
    for key, alpha in pattern.items():
        if name == key.removeprefix("^") or (key[:1] != "^" and name.endswith(f".{key}")):
            return alpha
    return settings.get("lora_alpha", rank)


def _check(factors: Mapping[str, Factors], modules: Mapping[str, nn.Module], place: str) -> None:
    """Check that each module is there, with a weight of the adapter's shape.

    Raises:
        ConfigError: Some are not.
    """
    wrong = []
    for name, (down, up) in factors.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor):
            wrong.append(f"{name} (no such module)")
        elif (len(weight), weight[0].numel()) != (len(up), down[0].numel()) or len(down) != up.shape[1]:
            wrong.append(f"{name} ({len(up)} x {down[0].numel()}, not {len(weight)} x {weight[0].numel()})")
    if wrong:
        raise ConfigError(
            f"init_lora: {len(wrong)} of the {len(factors)} modules of '{place}' do not fit this network: "
            f"{_listed(wrong)}. It was made for another model."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name[:LONGEST] for name in names[:NAMED]) + more
