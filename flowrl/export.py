"""Make a folder to share out of a run: `python -m flowrl.export runs/NAME FOLDER [--push-to-hub OWNER/NAME]`.

What a folder holds, listed in its `export.json`:

- after LoRA: `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(FOLDER)`;
- after full fine-tuning of a pipeline in a local folder, or of one that ships with flowrl: the whole pipeline;
- after full fine-tuning of a pipeline from the hub: `transformer/` alone, the rest is on the hub;
- a model card (`README.md`) with its pictures, and `sampling.json`: how the run sampled.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError

from flowrl.errors import ConfigError, FlowRLError
from flowrl.models.tokenizer_files import split_tokenizers
from flowrl.pages.model_card import Kind, hub_name, write_card
from flowrl.runs.folder import as_word, load_model
from flowrl.runs.program import AlgorithmOfRun, Device, EnvironmentOfRun, OwnModules, run_program
from flowrl.storage import hub
from flowrl.storage.files import replace_folder, write_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.version import __version__

PROGRAM = "python -m flowrl.export"


@dataclass(frozen=True)
class ExportConfig:
    """Write the trained weights as diffusers loads them, with a model card; upload them to the Hugging Face hub."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run folder or checkpoint folder; or a folder that was exported before, to upload it."""
    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write; must not be there yet."""
    push_to_hub: str = ""
    """Upload to this repository, OWNER/NAME. The token is that of HF_TOKEN or of `hf auth login`."""
    public: bool = False
    """Let everybody see the repository; without it, it is private."""
    dry_run: bool = False
    """Write FOLDER, list what would be uploaded, with sizes, and where to; use no network."""
    device: Device = "auto"
    modules: OwnModules = ()
    algo: AlgorithmOfRun = ""
    env: EnvironmentOfRun = ""


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code."""
    return run_program(PROGRAM, ExportConfig, _export, args)


def _export(config: ExportConfig) -> int:
    if config.push_to_hub:
        hub.check_name(config.push_to_hub)
    elif config.dry_run or config.public:
        raise ConfigError("--dry-run and --public go with --push-to-hub OWNER/NAME.")
    folder = _folder(config)
    if config.push_to_hub:
        print(hub.push(folder, config.push_to_hub, private=not config.public, dry_run=config.dry_run))
    return 0


def _folder(config: ExportConfig) -> Path:
    """Write the folder to share, or find the one that was exported before."""
    if (config.source / hub.MANIFEST).is_file():
        if config.folder is not None or not config.push_to_hub:
            raise ConfigError(f"'{config.source}' was exported already: upload it with --push-to-hub OWNER/NAME.")
        return config.source
    if config.folder is None:
        raise ConfigError(f"Say where to write: {PROGRAM} {as_word(config.source)} FOLDER.")
    _must_be_new(config.folder)
    model = load_model(config.source, config.algo, config.env, config.device)
    files = export(model, config.source, config.folder, name=config.push_to_hub)
    print(f"written: {config.folder}")
    if not config.push_to_hub:
        print(hub.table(config.folder, files))
    return config.folder


def export(model: FlowAlgorithm, run: Path, folder: Path, name: str = "") -> list[str]:
    """Write the weights that `sample` uses into a new folder, with a model card.

    Args:
        model: The run's trained algorithm.
        run: The run folder, for the card's results and curves (left out where there are none).
        folder: Folder to write.
        name: What the card says to load: a name on the hub; the folder's own name when empty.

    Returns:
        The files written, relative to `folder`.

    Raises:
        ConfigError: The flow is no diffusers pipeline, or the folder is there already or cannot be written.
    """
    folder = folder.resolve()
    _must_be_new(folder)
    if getattr(model.policy.model, "pipeline", None) is None:
        raise ConfigError(
            f"The flow of '{model.env.core.name}' is no diffusers pipeline: there is nothing that other libraries "
            "could load. flowrl itself loads the checkpoint in the run folder's final/."
        )
    name = name or folder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            kind = _write_weights(model, temporary)
            sampling = sampling_settings(model)
            write_json(temporary / "sampling.json", sampling)
            write_card(temporary, model, run, name, kind, sampling)
            files = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
            files.append(hub.MANIFEST)
            about = {"flowrl": __version__, "name": name, "kind": kind, "files": files}
            write_json(temporary / hub.MANIFEST, about)
            _must_be_new(folder)  # made meanwhile
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except FlowRLError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"Cannot write '{folder}': {reason}. Nothing is left there; choose another place.") from error
    return files


def sampling_settings(model: FlowAlgorithm) -> dict[str, Any]:
    """Give the options with which a diffusers pipeline samples as the run did."""
    policy = model.policy
    flow: Any = policy.model
    return {"num_inference_steps": policy.steps, **flow.call_settings(policy.guidance_scale)}


def _must_be_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"'{folder}' is there already, and nothing is overwritten: choose another folder.")


def _write_weights(model: FlowAlgorithm, folder: Path) -> Kind:
    """Write the weights that `sample` uses; tell which kind of export they are."""
    policy = model.policy
    if policy.lora is not None:
        policy.networks.export(folder, policy.sampling_role)
        return "lora"
    if hub_name(model.env.core.flow):
        policy.networks.export(folder, policy.sampling_role)
        return "transformer"
    flow: Any = policy.model
    pipeline = flow.with_encoders(policy.networks.model_of(policy.sampling_role).network)
    with _in_float32([part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]):
        pipeline.save_pretrained(folder, safe_serialization=True)
    split_tokenizers(folder)
    flow.release_encoders()
    return "pipeline"


@contextmanager
def _in_float32(parts: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Keep weights of low precision as float32 on the host: loaded beside others, they would not fit those."""
    tensors = (tensor for part in parts for tensor in (*part.parameters(), *part.buffers()))
    low = {t: (t.device, t.dtype) for t in tensors if t.is_floating_point() and t.dtype != torch.float32}
    try:
        for tensor in low:
            tensor.data = tensor.data.to("cpu", torch.float32)
        yield
    finally:
        for tensor, (device, dtype) in low.items():
            tensor.data = tensor.data.to(device, dtype)


if __name__ == "__main__":
    sys.exit(main())
