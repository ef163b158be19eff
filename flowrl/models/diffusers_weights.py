"""Weights of pipelines from a folder or the hub: read by diffusers and transformers, then checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowrl.errors import ModelLoadError
from flowrl.models.imports import first_failure, importing, looked_up
from flowrl.models.pipeline import PipelineFlow
from flowrl.models.pipeline_options import PipelineOptions
from flowrl.models.source import read_json
from flowrl.storage import revisions

VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model", "tokenizer.model")
OF_BYTES = ("ByT5Tokenizer",)
"""Tokenizers that need no vocabulary."""
SEES_VIDEOS = "VLProcessor"
"""End of the names of processors that transformers makes with torchvision only: they take videos, too."""
ADAPTER_FILE = "adapter_config.json"
"""In place of weights, where transformers saved a network with a LoRA: it names where the others are to be read."""
UNFUSED = (
    "A LoRA was still attached when it was saved. Where you have that pipeline: pipe.fuse_lora(), "
    "pipe.unload_lora_weights(), then save_pretrained again."
)


def load_pipeline(
    location: str,
    name: str,
    index: Mapping[str, Any],
    adapter: type[PipelineFlow],
    options: PipelineOptions,
    dtype: Any,
    **components: None,
) -> Any:
    """Load the pipeline, but for the parts that are set to None.

    Args:
        location: Folder or hub name.
        name: Name in messages.
        index: Its list of parts.
        adapter: Its adapter.
        options: Options of the pipeline.
        dtype: Type of the weights, or a mapping of parts ("default" for all others) to types.
        **components: Parts to do without, as None.

    Raises:
        ModelLoadError: Files are missing or damaged, weights are missing, or a library cannot be imported.
    """
    folder = Path(location)
    is_folder = folder.exists()
    absent: dict[str, None] = {**_absent_components(location, name), **components}
    repository, revision = (location, None) if is_folder else revisions.split(location)
    if not options.t5 and adapter.WITHOUT_T5:
        absent |= {adapter.WITHOUT_T5: None, adapter.WITHOUT_T5.replace("text_encoder", "tokenizer"): None}
    if is_folder:
        _check_parts(folder, name, {part: value for part, value in index.items() if part not in absent})
    trained = (adapter.NETWORK, *adapter.MORE_NETWORKS)
    parts = tuple(part for part in (*trained, "vae", *adapter.ENCODERS) if part not in absent)
    variants = _variants(folder, name, parts) if is_folder else {}
    try:
        with quiet():
            kind = looked_up("diffusers", adapter.PIPELINE)
            networks = {
                part: _network(index[part], repository, revision, part, name, _type_of(part, dtype), variants.get(part))
                for part in parts
                if isinstance(index.get(part), list) and index[part][0]
            }
            pipeline = kind.from_pretrained(repository, revision=revision, use_safetensors=True, **absent, **networks)
    except ModelLoadError:
        raise
    except Exception as error:
        raise _not_loaded(error, location, name, index, parts) from error
    for part in ("vae", *adapter.ENCODERS):
        if (network := getattr(pipeline, part, None)) is not None:
            network.requires_grad_(False).eval()
    return pipeline


def _not_loaded(
    error: Exception, location: str, name: str, index: Mapping[str, Any], parts: Sequence[str]
) -> ModelLoadError:
    """Say why a pipeline cannot be loaded."""
    folder = Path(location)
    sees = [part for part, value in index.items() if isinstance(value, list) and str(value[-1]).endswith(SEES_VIDEOS)]
    if sees and find_spec("torchvision") is None:
        return ModelLoadError(
            f"The part '{sees[0]}' of the pipeline '{name}' is made with torchvision, which is not installed: pip "
            "install torchvision, of the build of this torch."
        )
    if (failed := first_failure(error)) is not None:
        return ModelLoadError(failed)
    if not folder.exists():
        return ModelLoadError(hub_message(location, error))
    if quantised := [part for part in parts if _is_quantised(folder / part)]:
        return ModelLoadError(
            f"The pipeline folder '{name}' cannot be loaded: {error} It has weights in 8 bits or fewer "
            f"({', '.join(quantised)}), which were not tried: dequantize() them and save it in bfloat16."
        )
    return ModelLoadError(f"The pipeline folder '{name}' is damaged or incomplete: {error}")


def _type_of(part: str, dtype: Any) -> Any:
    return dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype


def _network(
    described: Any, repository: str, revision: str | None, part: str, name: str, dtype: Any, variant: str | None
) -> Any:
    """Load a network of a pipeline, all of its weights.

    Raises:
        ModelLoadError: Weights are missing; diffusers would leave those empty, transformers draw them at random.
    """
    library, kind = described
    cls = looked_up(library, kind)
    given = {"revision": revision, "variant": variant}
    given = {key: value for key, value in given.items() if value is not None}
    network, info = cls.from_pretrained(
        repository, subfolder=part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, **given
    )
    empty = {key for key, value in network.state_dict().items() if value.is_meta}
    missing = sorted({*info["missing_keys"], *empty})
    if missing:
        attached = any(".lora_A." in key for key in info["unexpected_keys"])
        raise ModelLoadError(
            f"The part '{part}' of the pipeline '{name}' lacks {len(missing)} weights, the first '{missing[0]}'. "
            + (UNFUSED if attached else "Its files are damaged, or of another version.")
        )
    return network


def _is_quantised(folder: Path) -> bool:
    """Tell whether a part of a pipeline says that its weights are quantised."""
    file = folder / "config.json"
    return file.is_file() and "quantization_config" in read_json(file, "pipeline")


def _variants(folder: Path, name: str, parts: Sequence[str]) -> dict[str, str]:
    """Find the variant (such as "fp16") of each part of a folder that has no plain weights.

    Raises:
        ModelLoadError: Several variants are there for a part, or a LoRA was saved in place of a network.
    """
    found: dict[str, str] = {}
    for part in parts:
        if not (folder / part).is_dir():
            continue
        if (folder / part / ADAPTER_FILE).exists():
            raise ModelLoadError(f"The part '{part}' of the pipeline '{name}' is a LoRA without its weights. {UNFUSED}")
        kinds = {_variant_of(file.name) for file in (folder / part).glob("*.safetensors")}
        if None in kinds or not kinds:
            continue
        if len(kinds) > 1:
            raise ModelLoadError(
                f"The part '{part}' of the pipeline folder '{name}' has no plain weights, but the variants "
                f"{' and '.join(sorted(filter(None, kinds)))}: keep one of them."
            )
        found[part] = kinds.pop() or ""
    return found


def _variant_of(file: str) -> str | None:
    """Read the variant from a file's name: "fp16" of `model.fp16.safetensors`; None of `model.safetensors`."""
    parts = file.removesuffix(".safetensors").split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of the libraries that load a pipeline; errors still raise."""
    with importing():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # older releases know no other
        warnings.filterwarnings("ignore", message="`torch.nn.utils.weight_norm` is deprecated")  # autoencoders of sound
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
    """Find the components that a local pipeline declares absent, and check that all others are there.

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
        elif (
            key.startswith("tokenizer")
            and value[1] not in OF_BYTES
            and not any((folder / key / file).exists() for file in VOCABULARIES)
        ):
            raise ModelLoadError(f"The pipeline folder '{name}' is incomplete: '{key}' holds no vocabulary.")
    return absent


def _check_parts(folder: Path, name: str, index: Mapping[str, Any]) -> None:
    """Check that a local pipeline has a folder with files for each part; the libraries would not name it.

    Raises:
        ModelLoadError: One has none.
    """
    for part, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)):
            continue
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise ModelLoadError(
                f"The pipeline folder '{name}' is incomplete: the part '{part}' ({value[1]}) has no files. Download or "
                "save the whole pipeline again."
            )


def hub_message(name: str, error: Exception) -> str:
    """Say what the hub's client raised, and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Gated" in type(error).__name__ or "401" in reason or "403" in reason:
        page = f"huggingface.co/{revisions.split(name)[0]}"
        remedy = f"Accept the licence at {page} and set HF_TOKEN to a token of that account"
    elif "NotFound" in type(error).__name__ and "Entry" not in type(error).__name__:
        remedy = "Check the name"
    else:
        remedy = "Check the network, or download the pipeline elsewhere and give its folder as --env.flow FOLDER"
    return f"Cannot get '{name}' from the hub: {reason} {remedy}; or use --env.flow mini-sd3, which ships with flowrl."
