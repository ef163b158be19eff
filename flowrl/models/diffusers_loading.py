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

from flowrl.checks import is_whole, shown
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.functional.solvers import time_grid
from flowrl.models.base import VelocityModel
from flowrl.models.flux import FluxFlow
from flowrl.models.pipeline import ENCODERS, PipelineFlow, PipelineOptions, Shapes
from flowrl.models.sd3 import SD3Flow
from flowrl.models.source import FlowSource, read_json
from flowrl.storage import revisions

ADAPTERS: dict[str, type[PipelineFlow]] = {adapter.PIPELINE: adapter for adapter in (SD3Flow, FluxFlow)}
CLIP_TOKENS = 77
LIBRARIES = ("diffusers", "transformers")
LARGEST_SIDE, LARGEST_SIZE, MOST_LAYERS = 2**16, 2**20, 1000
"""Of what a configuration says: pixels, any whole number, layers. Larger ones would take all memory, or for ever."""
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError)
"""What code raises when it is given other numbers than it expects."""
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
    fetch, revision = _fetcher(location)
    what = f"pipeline '{name}'"
    index = read_json(fetch("model_index.json"), what)
    adapter = _adapter(index, name, options)
    transformer, vae = (read_json(fetch(f"{part}/config.json"), what) for part in ("transformer", "vae"))
    shapes = _shapes(adapter, transformer, vae, options, what)
    source = location if Path(location).exists() else f"{revisions.split(location)[0]}@{revision}"
    length = _length(Path(location) / "sampling.json", what)

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> VelocityModel:
        def load_encoders() -> Any:
            return _load_pipeline(source, name, adapter, options, frozen_dtype, transformer=None, vae=None)

        dtypes = {"transformer": network_dtype, "default": frozen_dtype}
        pipeline = _load_pipeline(source, name, adapter, options, dtypes)
        return adapter(pipeline, shapes, options, length, load_encoders)

    def skeleton() -> VelocityModel:
        import diffusers

        try:
            with torch.device("meta"):
                network = getattr(diffusers, adapter.TRANSFORMER).from_config(transformer)
        except DAMAGE as error:
            raise ModelLoadError(f"The configuration of {what} is damaged: {str(error)[:300]}.") from error
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

    about = description.format(adapter.PIPELINE) + (f", commit {revision}" if revision else "")
    return FlowSource(name, about, shapes.sample, load, skeleton, imitation, is_image=True, revision=revision or "")


def _adapter(index: dict[str, Any], name: str, options: PipelineOptions) -> type[PipelineFlow]:
    """The adapter of a pipeline's class, if it is made of what flowrl loads."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        came = kind[:100] if isinstance(kind, str) else shown(kind)
        raise ModelLoadError(f"'{name}' is a {came}; flowrl has adapters for {' and '.join(ADAPTERS)}.")
    _check_libraries(index, name)
    if ADAPTERS[kind].NEEDS_T5 and not options.t5:
        raise ConfigError(f"'{name}' ({kind}) cannot do without T5: leave --env.t5 on.")
    return ADAPTERS[kind]


def _shapes(
    adapter: type[PipelineFlow], transformer: dict[str, Any], vae: dict[str, Any], options: PipelineOptions, what: str
) -> Shapes:
    _check_sizes(transformer, what)
    _check_sizes(vae, what)
    try:
        channels = vae.get("block_out_channels") or vae["encoder_block_out_channels"]  # the latter: AutoencoderTiny
        shapes = adapter.shapes(transformer, 2 ** (len(channels) - 1), options.resolution)
        if not all(is_whole(size, 1, LARGEST_SIDE) for size in (*shapes.latent, *shapes.sample)):
            raise ValueError(f"latents {shapes.latent} and images {shapes.sample} cannot be")
        return shapes
    except KeyError as error:
        raise ModelLoadError(f"The configuration of {what} lacks {error}.") from error
    except ConfigError:
        raise
    except DAMAGE as error:
        raise ModelLoadError(f"The configuration of {what} is damaged: {str(error)[:300]}.") from error


def _length(file: Path, what: str) -> int | None:
    """Tokens of the T5 context that a pipeline's folder asks for; optional."""
    if not file.exists():
        return None
    length = read_json(file, what).get("max_sequence_length")
    if not is_whole(length, 1, LARGEST_SIDE):
        raise ModelLoadError(f"'{file}' must say max_sequence_length as a whole number above 0.")
    return length


def _check_libraries(index: dict[str, Any], name: str) -> None:
    """Whether a pipeline consists of parts of diffusers and transformers: diffusers imports whatever is named there.

    Raises:
        ModelLoadError: It names another module.
    """
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        if library is not None and library not in LIBRARIES:
            raise ModelLoadError(
                f"The part '{part[:100]}' of the pipeline '{name}' is of {shown(library)}, not of "
                f"{' or '.join(LIBRARIES)}. Other code is not imported."
            )


def _check_sizes(config: dict[str, Any], what: str) -> None:
    """Whether the numbers of a network's configuration are of a size that networks have."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > (MOST_LAYERS if "layers" in key else LARGEST_SIZE):
                raise ModelLoadError(f"The configuration of {what} says {key[:100]} = {shown(number)}.")


def _unloaded(fetch: Callable[[str], Path], index: dict[str, Any], part: str, dtype: torch.dtype) -> Any:
    """A part of a pipeline as its configuration says, with the weights that it is initialised with."""
    library, name = index[part]
    cls = getattr(importlib.import_module(library), name)
    config = read_json(fetch(f"{part}/config.json"), part)
    _check_sizes(config, part)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
    finally:
        torch.set_default_dtype(default)
    return module.eval() if part == "transformer" else module.eval().requires_grad_(False)


def _tokens(tokenizer: dict[str, Any]) -> int:
    return min(int(tokenizer.get("model_max_length") or CLIP_TOKENS), CLIP_TOKENS)


def _fetcher(location: str) -> tuple[Callable[[str], Path], str | None]:
    """What gives a file of a folder or of a hub name; and of the latter the commit, of which all files will be."""
    if Path(location).exists():
        return lambda file: Path(location) / file, None

    def download(name: str, file: str) -> tuple[Path, str | None]:
        try:
            return revisions.fetch(name, file)
        except Exception as error:
            raise ModelLoadError(_hub_message(location, error)) from error

    repository, revision = revisions.split(location)
    revision = download(location, "model_index.json")[1] or revision or "main"
    return lambda file: download(f"{repository}@{revision}", file)[0], revision


def _load_pipeline(
    location: str, name: str, adapter: type[PipelineFlow], options: PipelineOptions, dtype: Any, **components: None
) -> Any:
    """The pipeline, or what of it is not set to None."""
    absent = _absent_components(location, name)
    repository, revision = (location, None) if Path(location).exists() else revisions.split(location)
    if not options.t5:
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    try:
        with _quiet():
            import diffusers

            pipeline = getattr(diffusers, adapter.PIPELINE).from_pretrained(
                repository, revision=revision, torch_dtype=dtype, use_safetensors=True, **absent, **components
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
        page = f"huggingface.co/{revisions.split(name)[0]}"
        remedy = f"Accept the licence at {page} and set HF_TOKEN to a token of that account"
    elif "NotFound" in type(error).__name__ and "Entry" not in type(error).__name__:
        remedy = "Check the name"
    else:
        remedy = "Check the network, or download the pipeline elsewhere and give its folder as --env.flow FOLDER"
    return f"Cannot get '{name}' from the hub: {reason} {remedy}; or use --env.flow mini-sd3, which ships with flowrl."
