"""Files of checkpoints and results: JSON and safetensors, never a pickle; what cannot be read gives a clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flowrl.errors import CheckpointError


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`; an existing target is moved aside first and deleted after."""
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    new.chmod(0o755)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, from any device, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


LARGEST_JSON = 2**24
"""Bytes; what flowrl writes has some thousands."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON with an indent."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: Missing or damaged; names the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")  # a device can be endless
        if path.stat().st_size > LARGEST_JSON:
            raise OSError(f"it has more than {LARGEST_JSON} bytes")
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{path.parent}' is no complete checkpoint: the file '{path.name}' is missing."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The file '{path}' is damaged: it holds no JSON object.")
    return content


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        CheckpointError: Missing or damaged; names the file.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' is no complete checkpoint: the file '{path.name}' is missing.")
    try:
        return load_file(path, device=str(device))
    except Exception as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}.") from error
