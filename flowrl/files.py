"""Files of checkpoints and results: JSON and safetensors, never a pickle; what cannot be read gives a clear error."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flowrl.errors import CheckpointError


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new`, once all of it is on the disk, to `target`.

    An existing target is moved aside first and deleted after; `standing` finds it when the process is killed between.
    """
    for path in (*new.rglob("*"), new):
        _sync(path)
    old = target.with_name(f".{target.name}{ASIDE}{os.getpid()}")
    if target.exists():
        target.rename(old)
    new.chmod(0o755)
    new.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


ASIDE = "-old-"
"""In the name of a folder that was moved aside."""


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def standing(folder: Path) -> Path:
    """The folder, or where it is missing what was moved aside to make place for it."""
    if folder.is_dir() or not folder.parent.is_dir():
        return folder
    aside = [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}{ASIDE}")]
    return max(aside, key=lambda path: path.stat().st_mtime, default=folder)


LEFT_BEHIND = re.compile(rf"\.(final|\d+)-(?:({ASIDE.strip('-')})-\d+|\w{{8}})")


def clear_away(folder: Path) -> None:
    """Delete checkpoints that killed processes left half-written in a folder; put back what they had moved aside."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if (match := LEFT_BEHIND.fullmatch(path.name)) and path.is_dir():
            name, aside = match.groups()
            if aside and not (folder / name).exists():
                path.rename(folder / name)
            else:
                shutil.rmtree(path, ignore_errors=True)


def host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the host, which share no memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors: on the host, contiguous, none sharing memory with another (`host_copies`)."""
    save_file(dict(tensors), path)


LARGEST_JSON = 2**24
"""Bytes; what flowrl writes has some thousands."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON with an indent; a file of that name is whole at any moment, the old one or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
