"""Pipelines of diffusers from a folder or the hub: choice of the declaration, checks of the files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from flowrl.checks import is_whole, shown
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.functional.solvers import time_grid
from flowrl.models.base import VelocityModel
from flowrl.models.diffusers_weights import hub_message, load_pipeline, quiet
from flowrl.models.families import declared
from flowrl.models.imports import looked_up
from flowrl.models.pipeline import PipelineFlow
from flowrl.models.pipeline_options import PipelineOptions, Shapes
from flowrl.models.schedules import check_scheduler
from flowrl.models.source import FlowSource, read_json
from flowrl.models.text_encoders import CLIP_TOKENS
from flowrl.storage import revisions
from flowrl.storage.files import weight_hashes

LIBRARIES = ("diffusers", "transformers")
LARGEST_SIDE, LARGEST_SIZE, MOST_LAYERS = 2**16, 2**20, 1000
"""Limits of a configuration: pixels, any whole number, layers. Larger ones would take all memory, or for ever."""
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError)
"""Errors of code that is given other numbers than it expects."""


def pipeline_source(location: str, description: str, name: str, options: PipelineOptions) -> FlowSource:
    """Make the source of a text-to-image pipeline from its small configuration files; no weights are read.

    Args:
        location: Folder or hub name.
        description: One line for people; `{}` stands for the pipeline's class.
        name: Name of the flow, as it is recorded.
        options: Options of the pipeline.

    Raises:
        ModelLoadError: Files are missing, the hub cannot be reached, or the pipeline is of another kind.
        ConfigError: A resolution that the pipeline cannot draw.
    """
    fetch, revision = _fetcher(location)
    what = f"pipeline '{name}'"
    index = read_json(fetch("model_index.json"), what)
    adapter = declared(index.get("_class_name"), name).form(index)
    index = {part: _named(value, adapter) for part, value in index.items()}
    _check_libraries(index, name)
    _check_encoders(index, name, adapter, options)
    transformer, vae = (
        _Configuration(read_json(fetch(f"{part}/config.json"), what), index.get(part))
        for part in (adapter.NETWORK, "vae")
    )
    shapes = _shapes(adapter, transformer, vae, options, what)
    source = location if Path(location).exists() else f"{revisions.split(location)[0]}@{revision}"
    _check_scheduler(index, fetch, location, what, adapter)
    length = options.sequence_length or _length(Path(location) / "sampling.json", what)
    trained = [adapter.NETWORK, *(part for part in adapter.MORE_NETWORKS if _is_there(index.get(part)))]

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> VelocityModel:
        def load_encoders() -> Any:
            without = {part: None for part in (*trained, "vae") if part not in adapter.ALWAYS_THERE}
            return load_pipeline(source, name, index, adapter, options, frozen_dtype, **without)

        dtypes = {**dict.fromkeys(trained, network_dtype), "default": frozen_dtype}
        pipeline = load_pipeline(source, name, index, adapter, options, dtypes)
        model = adapter(pipeline, shapes, options, length, load_encoders)
        model.files = weight_hashes(Path(source)) if Path(source).exists() else {}  # a commit of the hub is pinned
        return model

    def skeleton() -> VelocityModel:
        kind = looked_up("diffusers", adapter.TRANSFORMER)
        try:
            with torch.device("meta"):
                networks = {part: kind.from_config(transformer) for part in trained}
        except DAMAGE as error:
            raise ModelLoadError(f"The configuration of {what} is damaged: {str(error)[:300]}.") from error
        return adapter(SimpleNamespace(config=index, **networks), shapes, options)

    def imitation(network_dtype: torch.dtype, frozen_dtype: torch.dtype) -> VelocityModel:
        pipeline = SimpleNamespace(
            config=index,
            vae=_unloaded(fetch, index, "vae", frozen_dtype),
            tokenizer_max_length=_tokens(fetch, index),
        )
        for part in trained:
            setattr(pipeline, part, _unloaded(fetch, index, part, network_dtype).requires_grad_(True))
        for part in adapter.ENCODERS:
            if _is_there(index.get(part)) and (options.t5 or part != adapter.WITHOUT_T5):
                setattr(pipeline, part, _unloaded(fetch, index, part, frozen_dtype))
        model = adapter(pipeline, shapes, options, length, load_encoders=lambda: None)
        model.encode_chunks = model.imitate_chunks  # type: ignore[method-assign]
        model.encode_null = lambda: model.imitate_prompts([""])  # type: ignore[method-assign]
        model.times = time_grid  # type: ignore[method-assign]
        return model

    about = description.format(adapter.PIPELINE) + (f", commit {revision}" if revision else "")
    rate = adapter.values_per_second(vae)
    known: dict[str, Any] = {"is_image": not rate, "frame_rate": adapter.FRAME_RATE, "revision": revision or ""}
    return FlowSource(name, about, shapes.sample, load, skeleton, imitation, sample_rate=rate, **known)


class _Configuration(dict[str, Any]):
    """Configuration of a part; what the release that saved it did not write yet is as the part's class has it."""

    def __init__(self, written: dict[str, Any], described: Any) -> None:
        super().__init__(written)
        self.described = described

    def __missing__(self, key: str) -> Any:
        if not _is_there(self.described):
            raise KeyError(key)
        known = inspect.signature(looked_up(*self.described).__init__).parameters
        if key not in known or known[key].default is inspect.Parameter.empty:
            raise KeyError(key)
        return known[key].default


def _named(described: Any, adapter: type[PipelineFlow]) -> Any:
    """Name the library of a part that diffusers wrote down under another name."""
    if isinstance(described, list) and described and isinstance(described[0], str):
        libraries = {adapter.TRANSFORMERS_AS: "transformers", adapter.DIFFUSERS_AS: "diffusers"}
        return [libraries.get(described[0], described[0]), *described[1:]]
    return described


def _check_scheduler(
    index: dict[str, Any], fetch: Callable[[str], Path], location: str, what: str, adapter: type[PipelineFlow]
) -> None:
    """Look at the scheduler's configuration; where a folder has none, loading says so."""
    named, file = index.get("scheduler"), "scheduler/scheduler_config.json"
    if isinstance(named, list) and len(named) == 2 and not (Path(location).exists() and not fetch(file).exists()):
        config = read_json(fetch(file), what)
        if adapter.NO_NOISE_AGAIN and config.get("stochastic_sampling"):
            raise ModelLoadError(f"The scheduler of {what} says stochastic_sampling: {adapter.NO_NOISE_AGAIN}.")
        check_scheduler(named[1], config, what, adapter.INVERTED_LEVELS)


def _shapes(
    adapter: type[PipelineFlow], transformer: dict[str, Any], vae: dict[str, Any], options: PipelineOptions, what: str
) -> Shapes:
    _check_sizes(transformer, what)
    _check_sizes(vae, what)
    try:
        shapes = adapter.shapes(transformer, vae, options)
        if not all(is_whole(size, 1, LARGEST_SIDE) for size in (*shapes.latent, *shapes.sample)):
            raise ValueError(f"latents {shapes.latent} and samples {shapes.sample} cannot be")
        return shapes
    except KeyError as error:
        raise ModelLoadError(f"The configuration of {what} lacks {error}.") from error
    except ConfigError:
        raise
    except DAMAGE as error:
        raise ModelLoadError(f"The configuration of {what} is damaged: {str(error)[:300]}.") from error


def _length(file: Path, what: str) -> int | None:
    """Read the number of tokens of a prompt from a pipeline's folder; None where it does not say."""
    if not file.exists():
        return None
    length = read_json(file, what).get("max_sequence_length")
    if not is_whole(length, 1, LARGEST_SIDE):
        raise ModelLoadError(f"'{file}' must say max_sequence_length as a whole number above 0.")
    return length


def _check_libraries(index: dict[str, Any], name: str) -> None:
    """Check that a pipeline consists of parts of diffusers and transformers: diffusers imports whatever is named.

    Raises:
        ModelLoadError: It names another module.
    """
    for part, value in index.items():
        is_setting = isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)  # layers, levels
        library = value[0] if isinstance(value, list) and not is_setting else None
        if library is not None and library not in LIBRARIES:
            raise ModelLoadError(
                f"The part '{part[:100]}' of the pipeline '{name}' is of {shown(library)}, not of "
                f"{' or '.join(LIBRARIES)}. Other code is not imported."
            )


def _check_encoders(index: dict[str, Any], name: str, adapter: type[PipelineFlow], options: PipelineOptions) -> None:
    """Check that all text encoders are there, that the declaration names them, and does without the unwanted one.

    Raises:
        ModelLoadError: The pipeline lacks one.
        ConfigError: The declaration does not.
    """
    lacking = [part for part in adapter.ENCODERS if part not in index]
    kind = looked_up("diffusers", adapter.PIPELINE) if lacking else None
    taken = {*inspect.signature(kind.__init__).parameters} - {*kind._optional_components} if kind else ()
    if needed := [part for part in lacking if part in taken]:
        raise ModelLoadError(
            f"'{name}' has no {' and no '.join(needed)}, which its publisher leaves to be loaded from elsewhere: load "
            f"the {adapter.PIPELINE} in diffusers with what it lacks, save_pretrained it into a folder, and name that."
        )
    if adapter.WITHOUT_T5 is None and not options.t5:
        raise ConfigError(f"'{name}' ({adapter.PIPELINE}) cannot do without T5: leave --env.t5 on.")
    there = {part for part, value in index.items() if re.fullmatch(r"text_encoder(_\d)?", part) and _is_there(value)}
    if others := there - {*adapter.ENCODERS}:
        raise ConfigError(f"'{name}' has {', '.join(sorted(others))}, too: {adapter.__name__}.ENCODERS must name it.")


def _check_sizes(config: dict[str, Any], what: str) -> None:
    """Check that the numbers of a network's configuration are of a size that networks have."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > (MOST_LAYERS if "layers" in key else LARGEST_SIZE):
                raise ModelLoadError(f"The configuration of {what} says {key[:100]} = {shown(number)}.")


def _unloaded(fetch: Callable[[str], Path], index: dict[str, Any], part: str, dtype: torch.dtype) -> Any:
    """Build a part of a pipeline from its configuration, with the weights that it is initialised with."""
    library, name = index[part]
    cls = looked_up(library, name)
    config = read_json(fetch(f"{part}/config.json"), part)
    _check_sizes(config, part)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with quiet():
            module = _initialised(cls, config, library)
    finally:
        torch.set_default_dtype(default)
    return module.eval().requires_grad_(False)


def _initialised(cls: Any, config: dict[str, Any], library: str) -> Any:
    """Make a network; without values where those that it begins with are drawn until they fit, in a dry run."""
    made = cls.from_config if library == "diffusers" else lambda config: cls(cls.config_class.from_dict(config))
    try:
        return made(config)
    except DataDependentOutputException:
        with torch.device("meta"):
            return made(config).to_empty(device="cpu")


def _is_there(described: Any) -> bool:
    """Tell whether a pipeline has a part, as its list of parts says."""
    return isinstance(described, list) and bool(described) and described[0] is not None


def _tokens(fetch: Callable[[str], Path], index: dict[str, Any]) -> int:
    """Read the tokens that CLIP takes from its tokenizer's configuration, where a pipeline has a tokenizer."""
    file = fetch("tokenizer/tokenizer_config.json") if _is_there(index.get("tokenizer")) else None
    found = read_json(file, "tokenizer").get("model_max_length") if file is not None and file.exists() else None
    return min(int(found or CLIP_TOKENS), CLIP_TOKENS)


def _fetcher(location: str) -> tuple[Callable[[str], Path], str | None]:
    """Make what fetches files of a folder or a hub name; for the latter also its commit, which all files are of."""
    if Path(location).exists():
        return lambda file: Path(location) / file, None

    def download(name: str, file: str) -> tuple[Path, str | None]:
        try:
            return revisions.fetch(name, file)
        except Exception as error:
            raise ModelLoadError(hub_message(location, error)) from error

    repository, revision = revisions.split(location)
    revision = download(location, "model_index.json")[1] or revision or "main"
    return lambda file: download(f"{repository}@{revision}", file)[0], revision
