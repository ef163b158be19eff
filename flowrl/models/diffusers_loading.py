"""Pipelines of diffusers from a folder or the hub: which adapter, which files, what is missing."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flowrl.errors import ConfigError, ModelLoadError
from flowrl.models.base import VelocityModel
from flowrl.models.flux import FluxFlow
from flowrl.models.loading import FlowSource, read_json
from flowrl.models.pipeline import ENCODERS, PipelineFlow, PipelineOptions
from flowrl.models.sd3 import SD3Flow
from flowrl.sampler import time_grid

ADAPTERS: dict[str, type[PipelineFlow]] = {adapter.PIPELINE: adapter for adapter in (SD3Flow, FluxFlow)}
CLIP_TOKENS = 77
VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model")


def pipeline_source(location: str, description: str, name: str, options: PipelineOptions) -> FlowSource:
    """Source of a text-to-image pipeline; reads small configuration files, no weights.

    Args:
        location: Folder or hub name.
        description: One line for people; `{}` stands for the pipeline's class.
        name: What to record as the flow's name.
        options: How the pipeline is used.

    Raises:
        ModelLoadError: Files are missing, the hub cannot be reached, or the pipeline is of another kind.
        ConfigError: A resolution that the pipeline cannot draw.
    """
    fetch = _fetcher(location)
    what = f"pipeline '{name}'"
    index = read_json(fetch("model_index.json"), what)
    kind = index.get("_class_name")
    if kind not in ADAPTERS:
        raise ModelLoadError(f"'{name}' is a {kind}; flowrl has adapters for {' and '.join(ADAPTERS)}.")
    adapter = ADAPTERS[kind]
    if adapter.NEEDS_T5 and not options.t5:
        raise ConfigError(f"'{name}' ({kind}) cannot do without T5: leave --env.t5 on.")
    transformer = read_json(fetch("transformer/config.json"), what)
    vae = read_json(fetch("vae/config.json"), what)
    try:
        channels = vae.get("block_out_channels") or vae["encoder_block_out_channels"]  # the latter: AutoencoderTiny
        shapes = adapter.shapes(transformer, 2 ** (len(channels) - 1), options.resolution)
    except KeyError as error:
        raise ModelLoadError(f"The configuration of {what} lacks {error}.") from error

    sampling = Path(location) / "sampling.json"  # optional: what the pipeline's call would need to be told
    length = read_json(sampling, what)["max_sequence_length"] if sampling.exists() else None

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> VelocityModel:
        def load_encoders() -> Any:
            return _load_pipeline(location, name, adapter, options, frozen_dtype, transformer=None, vae=None)

        dtypes = {"transformer": network_dtype, "default": frozen_dtype}
        pipeline = _load_pipeline(location, name, adapter, options, dtypes)
        return adapter(pipeline, shapes, options, length, load_encoders)

    def skeleton() -> VelocityModel:
        import diffusers

        with torch.device("meta"):
            network = getattr(diffusers, adapter.TRANSFORMER).from_config(transformer)
        return adapter(SimpleNamespace(transformer=network), shapes)

    def imitation(network_dtype: torch.dtype, frozen_dtype: torch.dtype) -> VelocityModel:
        pipeline = SimpleNamespace(
            transformer=_unloaded(fetch, index, "transformer", network_dtype),
            vae=_unloaded(fetch, index, "vae", frozen_dtype),
            tokenizer_max_length=_tokens(read_json(fetch("tokenizer/tokenizer_config.json"), what)),
        )
        encoders = [part for part in ENCODERS if index.get(part, [None])[0] and (options.t5 or part != ENCODERS[2])]
        for part in encoders:
            setattr(pipeline, part, _unloaded(fetch, index, part, frozen_dtype))
        model = adapter(pipeline, shapes, options, length, load_encoders=lambda: None)
        model.encode_prompts = model.imitate_prompts  # type: ignore[method-assign]
        model.times = time_grid  # type: ignore[method-assign]
        return model

    return FlowSource(name, description.format(kind), shapes.sample, load, skeleton, imitation, is_image=True)


def _unloaded(fetch: Callable[[str], Path], index: dict[str, Any], part: str, dtype: torch.dtype) -> Any:
    """A part of a pipeline as its configuration says, with the weights that it is initialised with."""
    library, name = index[part]
    cls = getattr(importlib.import_module(library), name)
    config = read_json(fetch(f"{part}/config.json"), part)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
    finally:
        torch.set_default_dtype(default)
    return module.eval() if part == "transformer" else module.eval().requires_grad_(False)


def _tokens(tokenizer: dict[str, Any]) -> int:
    return min(int(tokenizer.get("model_max_length") or CLIP_TOKENS), CLIP_TOKENS)


def _fetcher(location: str) -> Callable[[str], Path]:
    if Path(location).exists():
        return lambda file: Path(location) / file

    def download(file: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(location, file))
        except Exception as error:
            raise ModelLoadError(_hub_message(location, error)) from error

    return download


def _load_pipeline(
    location: str, name: str, adapter: type[PipelineFlow], options: PipelineOptions, dtype: Any, **components: None
) -> Any:
    """The pipeline, or what of it is not set to None."""
    absent = _absent_components(location, name)
    if not options.t5:
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    try:
        with _quiet():
            import diffusers

            pipeline = getattr(diffusers, adapter.PIPELINE).from_pretrained(
                location, torch_dtype=dtype, use_safetensors=True, **absent, **components
            )
    except Exception as error:
        if Path(location).exists():
            raise ModelLoadError(f"The pipeline folder '{name}' is damaged or incomplete: {error}") from error
        raise ModelLoadError(_hub_message(location, error)) from error
    for part in (*ENCODERS, "vae"):
        if getattr(pipeline, part, None) is not None:
            getattr(pipeline, part).requires_grad_(False).eval()
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and advice of the libraries that load a pipeline; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # older releases know no other
        for log, _ in levels:
            log.set_verbosity_error()
            log.disable_progress_bar()
        try:
            yield
        finally:
            for log, level in levels:
                log.set_verbosity(level)
                log.enable_progress_bar()


def _absent_components(location: str, name: str) -> dict[str, None]:
    """Components that a local pipeline says it does not have; those that it has must be there.

    Raises:
        ModelLoadError: A component's folder is missing or empty (transformers would make an empty tokenizer).
    """
    folder = Path(location)
    if not folder.exists():
        return {}
    index = read_json(folder / "model_index.json", f"pipeline '{name}'")
    absent: dict[str, None] = {}
    for key, value in index.items():
        if not isinstance(value, list):
            continue
        if value[0] is None:
            absent[key] = None
        elif key.startswith("tokenizer") and not any((folder / key / file).exists() for file in VOCABULARIES):
            raise ModelLoadError(f"The pipeline folder '{name}' is incomplete: '{key}' holds no vocabulary.")
    return {key: None for key in ("text_encoder_3", "tokenizer_3") if key in absent}


def _hub_message(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Gated" in type(error).__name__ or "401" in reason or "403" in reason:
        remedy = f"Accept the licence at huggingface.co/{name} and set HF_TOKEN to a token of that account"
    elif "NotFound" in type(error).__name__ and "Entry" not in type(error).__name__:
        remedy = "Check the name"
    else:
        remedy = "Check the network, or download the pipeline elsewhere and give its folder as --env.flow FOLDER"
    return f"Cannot get '{name}' from the hub: {reason} {remedy}; or use --env.flow mini-sd3, which ships with flowrl."
