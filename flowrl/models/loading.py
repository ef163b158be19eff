"""Sources of flows by name: a shipped name, a folder, a hub name, or a factory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowrl.checks import is_whole, python_value, shown
from flowrl.errors import ConfigError, ModelLoadError, did_you_mean, tell_whose
from flowrl.models.base import VelocityModel
from flowrl.models.pipeline_options import DEFAULTS, PipelineOptions
from flowrl.models.prior import PriorFlow
from flowrl.models.source import ASSETS, EMBEDDED, SMALL, FlowSource, read_json
from flowrl.storage import revisions
from flowrl.storage.files import weight_hashes

__all__ = ["ASSETS", "EMBEDDED", "SMALL", "FlowSource", "chosen_sd3", "read_json", "source_of"]

DEFAULT_SD3 = "stabilityai/stable-diffusion-3.5-medium"
LARGEST_MLP, DEEPEST_MLP, LARGEST_PICTURE = 2**14, 100, 256


def source_of(
    flow: Any,
    sample_shape: tuple[int, ...] | None = None,
    pipeline: PipelineOptions = DEFAULTS,
    embedded: str = "mini-sd3",
) -> FlowSource:
    """Find what a user gives as `flow=`.

    Args:
        flow: "sd3" or "auto" (see `chosen_sd3`), a shipped name, a folder, a hub name, or a factory
            `() -> VelocityModel | nn.Module`.
        sample_shape: Needed when a factory returns a plain module.
        pipeline: Options of a text-to-image pipeline.
        embedded: The shipped pipeline that "auto" takes where it does not take Stable Diffusion 3.5.

    Raises:
        ModelLoadError: No such name or folder, or the folder is missing files.
        ConfigError: A factory that does not return a model.
    """
    if isinstance(flow, FlowSource):
        return flow
    if callable(flow) and not isinstance(flow, nn.Module):
        return _from_factory(flow, sample_shape)
    if not isinstance(flow, str | Path):
        raise ConfigError(
            f"flow must be a name, a folder or a factory (a function that returns a model), not a "
            f"{type(flow).__name__}. Wrap a model as `flow=lambda: model`."
        )
    return _from_name(str(flow), pipeline, embedded)


def _from_factory(factory: Callable[[], Any], sample_shape: tuple[int, ...] | None) -> FlowSource:
    from flowrl.models.mlp import ModuleFlow

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> VelocityModel:
        model = build()
        model.network.to(network_dtype)
        return model

    def build() -> VelocityModel:
        try:
            model = copy.deepcopy(factory())  # `lambda: model` gives the same object every time
        except Exception as error:
            tell_whose(error, f"the flow factory {origin}, which was to return a model")
            raise
        if isinstance(model, VelocityModel):
            for name in ("network", "latent_shape", "sample_shape"):
                if not hasattr(model, name):
                    raise ConfigError(f"{type(model).__name__} must set self.{name} in its __init__.")
            _checked_shape(model.latent_shape)
            return model
        if not isinstance(model, nn.Module):
            raise ConfigError(f"The flow factory returned a {type(model).__name__}, not a torch module.")
        _check_signature(model)
        shape = sample_shape or getattr(model, "sample_shape", None)
        if shape is None:
            raise ConfigError(
                "The flow factory returned a plain module: say the shape of one sample, as the module's "
                "attribute `sample_shape` or as `sample_shape=` where the environment is registered."
            )
        return ModuleFlow(model, _checked_shape(shape))

    origin = getattr(factory, "__qualname__", type(factory).__name__)
    known: Any = factory if sample_shape else build()
    shape = sample_shape or known.sample_shape
    rate = getattr(known, "sample_rate", 0) or getattr(getattr(known, "network", None), "sample_rate", 0)
    return FlowSource(
        "", f"from factory {origin}", _checked_shape(shape), load, build, load, reloadable=False, sample_rate=int(rate)
    )


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """Check the shape of one sample."""
    sizes = tuple(map(python_value, shape)) if isinstance(shape, tuple | list) else ()
    if not sizes or not all(is_whole(n, 1) for n in sizes):
        raise ConfigError(f"A shape must be that of one sample, such as (2,) or (3, 32, 32), not {shown(shape)}.")
    return sizes


def _check_signature(network: nn.Module) -> None:
    """Check that a plain network can be called with points and times, in this order."""
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # of compiled code, which has none
        return
    try:
        signature.bind(None, None)
        fits = next(iter(signature.parameters)) not in ("t", "time", "times", "timestep", "timesteps")
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{type(network).__name__}.forward({', '.join(signature.parameters)}) does not take (x_t, t): a plain "
            "network is called with points x_t (B, *sample_shape) and times t (B,), from 0 (noise) to 1 (data), in "
            "this order, and gives velocities. Put a flowrl.VelocityModel around it, whose forward(x_t, t, cond) calls "
            "it, and whose encode gives cond where it takes contexts."
        )


def chosen_sd3(embedded: str = "mini-sd3") -> tuple[str, str]:
    """Choose what "auto" takes, and say why.

    Stable Diffusion 3.5 medium where there is a CUDA device and its files can be had (from the local cache, or the hub
    answers for them), the embedded pipeline anywhere else. The hub is asked once per process.
    """
    if not torch.cuda.is_available():
        return embedded, "there is no CUDA device"
    there, why = _sd3_at_hand()
    if there:
        return DEFAULT_SD3, f"a CUDA device is there and {why}"
    return embedded, f"a CUDA device is there, but not the files of {DEFAULT_SD3}: {why}"


@lru_cache(maxsize=1)
def _sd3_at_hand() -> tuple[bool, str]:
    return revisions.at_hand(DEFAULT_SD3)


def _from_name(name: str, options: PipelineOptions, embedded: str) -> FlowSource:
    if name in ("auto", "sd3"):
        chosen, why = chosen_sd3(embedded)
        source = _from_name(chosen, options, embedded)
        other = embedded if chosen == DEFAULT_SD3 else DEFAULT_SD3
        return replace(
            source,
            description=f"{source.description}, as {why}; choose with --env.flow, e.g. --env.flow {other}",
        )
    folder = ASSETS / name if name in EMBEDDED else Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        return _with_size(_folder_source(folder, name), options)
    if not folder.exists() and ("/" not in name or name.startswith((".", "/", "~"))):
        raise ModelLoadError(
            f"There is no flow '{name}': not a shipped name ({', '.join(EMBEDDED)}), not a folder here, and not "
            f"a hub name (OWNER/NAME or OWNER/NAME@REVISION).{did_you_mean(name, EMBEDDED)}"
        )
    from flowrl.models.diffusers_loading import pipeline_source

    kind = "the embedded small Stable Diffusion 3" if name in EMBEDDED else "a {}"
    return pipeline_source(str(folder) if folder.exists() else name, f"{name} ({kind})", name, options)


def _with_size(source: FlowSource, options: PipelineOptions) -> FlowSource:
    """Check that a source of fixed size draws samples of the size that is asked for, and give it back."""
    resolution = options.resolution
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    asked = {"frames": options.frames}
    if sides is not None and source.sample_shape[-2:] != sides:
        asked["resolution"] = resolution if isinstance(resolution, int) else "{}x{}".format(*sides)  # type: ignore[assignment]
    for name, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"The flow '{source.source}' draws samples of shape {source.sample_shape}, of no other {name}: leave "
                f"{name} = {value} out, or choose a pipeline of diffusers as the flow."
            )
    return source


def _folder_source(folder: Path, name: str) -> FlowSource:
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ModelLoadError(
            f"The folder '{folder}' holds an adapter (LoRA), which is no flow by itself: take the flow that it was "
            f"trained on (--env.flow), and start from it by --algo.init-lora {folder}."
        )
    config = read_json(folder / "config.json", f"flow '{name}'")
    kind = config.get("model")
    if kind not in BUILDERS:
        known = " or ".join(f'"{name}"' for name in BUILDERS)
        raise ModelLoadError(
            f"The folder '{folder}' is no flow: it has neither model_index.json (a diffusers pipeline) nor a "
            f'config.json that says "model": {known}.'
        )
    sample_shape, build = BUILDERS[kind](config, folder)

    def cast(model: VelocityModel, dtype: torch.dtype) -> VelocityModel:
        nn.Module.to(model.network, dtype)  # diffusers' own `to` warns of an empty list
        return model

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> VelocityModel:
        model = build()
        _fill(model.network, folder / "model.safetensors")
        if isinstance(model, PriorFlow):
            _fill(model.decoder, folder / "decoder.safetensors")
        model.files = weight_hashes(folder)
        return cast(model, network_dtype)

    def skeleton() -> VelocityModel:
        with torch.device("meta"):
            return build()

    def imitation(network_dtype: torch.dtype, frozen_dtype: torch.dtype) -> VelocityModel:
        return cast(build(), network_dtype)

    about = str(config.get("description", kind))[:200]
    return FlowSource(name, f"{name} ({about})", sample_shape, load, skeleton, imitation, is_image=kind in PICTURES)


def _fill(module: nn.Module, path: Path) -> None:
    """Put the weights of a file into a module, in float32."""
    from safetensors.torch import load_file

    try:
        module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except Exception as error:
        raise ModelLoadError(f"Cannot read '{path}': {error}") from error


def _mlp_builder(config: dict[str, Any], folder: Path) -> tuple[tuple[int, ...], Callable[[], VelocityModel]]:
    dim, width, depth = (config.get(key, 0) for key in ("dim", "width", "depth"))
    if not (is_whole(dim, 1, LARGEST_MLP) and is_whole(width, 1, LARGEST_MLP) and is_whole(depth, 1, DEEPEST_MLP)):
        raise ModelLoadError(
            f"'{folder / 'config.json'}' must say dim, width and depth of the MLP: whole numbers from 1 to "
            f"{LARGEST_MLP}, depth to {DEEPEST_MLP}."
        )

    def build() -> VelocityModel:
        from flowrl.models.mlp import MLP, ModuleFlow

        return ModuleFlow(MLP(dim, width, depth), (dim,))

    return (dim,), build


def _unet_builder(config: dict[str, Any], folder: Path) -> tuple[tuple[int, ...], Callable[[], VelocityModel]]:
    from flowrl.models.unet import UNetFlow, UNetShape

    try:
        shape = UNetShape.of(config)
    except ConfigError as error:
        raise ModelLoadError(f"'{folder / 'config.json'}' describes no U-Net: {error}") from error
    return (shape.channels, shape.size, shape.size), lambda: UNetFlow(shape)


def _darcy_builder(config: dict[str, Any], folder: Path) -> tuple[tuple[int, ...], Callable[[], VelocityModel]]:
    from flowrl.models.darcy import DarcyFlow, check_scales
    from flowrl.models.unet import UNetShape

    scales = {key: config[key] for key in ("scale", "order", "log_scale") if key in config}
    try:
        shape = UNetShape.of({"channels": 2, **config})
        check_scales(shape, **scales)
    except ConfigError as error:
        raise ModelLoadError(f"'{folder / 'config.json'}' describes no flow of 'darcy': {error}") from error
    return (2, shape.size, shape.size), lambda: DarcyFlow(shape, **scales)


def _latent_builder(config: dict[str, Any], folder: Path) -> tuple[tuple[int, ...], Callable[[], VelocityModel]]:
    from flowrl.models.decoder import PictureDecoder

    described = config.get("decoder")
    own = described if isinstance(described, dict) else {}
    dim, width, depth = (config.get(key, 0) for key in ("dim", "width", "depth"))
    size, decoder_width, decoder_depth = (own.get(key, 0) for key in ("size", "width", "depth"))
    limits = [(n, LARGEST_MLP) for n in (dim, width, decoder_width)]
    limits += [(depth, DEEPEST_MLP), (decoder_depth, DEEPEST_MLP), (size, LARGEST_PICTURE)]
    if not all(is_whole(n, 1, largest) for n, largest in limits):
        raise ModelLoadError(
            f"'{folder / 'config.json'}' must say dim, width and depth of the flow of latents, and size, width and "
            f"depth of its decoder: whole numbers from 1 to {LARGEST_MLP}, depth to {DEEPEST_MLP}, size to "
            f"{LARGEST_PICTURE}."
        )
    shape = (1, size, size)

    def build() -> VelocityModel:
        decoder = PictureDecoder(dim, size, decoder_width, decoder_depth)
        return PriorFlow(decoder, dim, sample_shape=shape, width=width, depth=depth)

    return shape, build


def _prosody_builder(config: dict[str, Any], folder: Path) -> tuple[tuple[int, ...], Callable[[], VelocityModel]]:
    from flowrl.models.prosody import ProsodyFlow

    keys = ("sentences", "words", "centre", "scale", "width", "depth")
    settings: dict[str, Any] = {key: config.get(key) for key in keys}

    def build() -> VelocityModel:
        return ProsodyFlow(**settings)

    try:
        with torch.device("meta"):
            return build().sample_shape, build
    except ConfigError as error:
        raise ModelLoadError(f"'{folder / 'config.json'}' describes no flow of prosodies: {error}") from error


BUILDERS = {
    "mlp": _mlp_builder,
    "unet": _unet_builder,
    "darcy": _darcy_builder,
    "latent": _latent_builder,
    "prosody": _prosody_builder,
}
"""By the kind of model that a folder's config.json names: the shape of a sample, and how to build the flow."""
PICTURES = ("unet", "latent")
"""Kinds of model whose samples are pictures."""
