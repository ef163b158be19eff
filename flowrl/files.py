"""Files of checkpoints and results: JSON and safetensors, never a pickle; what cannot be read gives a clear error."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import warnings
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


def read_file(path: Path, most: int) -> bytes:
    """Content of a file, which may have so many bytes at most.

    Raises:
        OSError: Missing, unreadable, longer, or no file: a device can be endless, and a pipe silent for ever.
        ValueError: No path can be like this.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"it has more than {most} bytes")
    return data


def parsed_json(data: bytes) -> Any:
    """JSON in UTF-8.

    Raises:
        ValueError: It is none, or nested too deeply to be read.
    """
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: Missing or damaged; names the file.
    """
    try:
        content = parsed_json(read_file(path, LARGEST_JSON))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{path.parent}' is no complete checkpoint: the file '{path.name}' is missing."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The file '{path}' is damaged: it holds no JSON object.")
    return content


LARGEST_CSV = 2**28
"""Bytes; a row of metrics has some hundreds."""


def read_rows(path: Path) -> list[dict[str, int | float]]:
    """Rows of numbers of a CSV file with a head; empty cells are left out, and a missing file has no rows.

    A row that holds anything else was cut when a process was killed, or the disk was full: it is left out with a
    warning, so that a run can go on.

    Raises:
        CheckpointError: It cannot be read at all.
    """
    if not path.exists():
        return []
    try:
        text = read_file(path, LARGEST_CSV).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' cannot be read: {error}.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows, odd = [], 0
    while True:
        try:
            row = next(reader, None)
            if row is None:
                break
            rows.append({name: _number(value) for name, value in row.items() if name and value})
        except (ValueError, TypeError, AttributeError, csv.Error):
            odd += 1
    if odd:
        warnings.warn(f"{odd} damaged rows of '{path}' are left out.", stacklevel=2)
    return rows


def _number(text: str) -> int | float:
    number = float(text)
    return int(text) if text.lstrip("-").isdigit() and abs(number) < 2**63 else number


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
