"""Files of checkpoints and results: JSON and safetensors, never a pickle; unreadable ones give clear errors."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
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
    _as_usual(new, *new.rglob("*.safetensors"))
    old = target.with_name(f".{target.name}{ASIDE}{os.getpid()}")
    if target.exists():
        target.rename(old)
    new.rename(target)
    _sync(target.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    """Delete a folder, or the link that leads to one and not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _as_usual(*paths: Path) -> None:
    """Give files and folders the permissions of any others: safetensors and tempfile make them for their owner alone.

    Those of others are seen on a folder beside the first.
    """
    other = paths[0].with_name(
        f".usual-{paths[0].name}"
    )  # the umask cannot be read without setting it, for all threads
    other.mkdir(exist_ok=True)
    mode = stat.S_IMODE(other.stat().st_mode)
    other.rmdir()
    for path in paths:
        path.chmod(mode if path.is_dir() else mode & 0o666)


ASIDE = "-old-"
"""Mark in the name of a backup: the old folder, renamed while a new one takes its place."""


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what may be written alone
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def standing(folder: Path) -> Path:
    """Find the folder; if a crash left it renamed, the backup."""
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
                _remove(path)


def host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the host, sharing no memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors: on the host, contiguous, none sharing memory with another (`host_copies`)."""
    save_file(dict(tensors), path)
    _as_usual(path)


LARGEST_JSON = 2**24
"""Bytes; what flowrl writes has some thousands."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON with an indent; see `written_whole`."""
    with written_whole(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the place of a new file that takes the place of `path` in the end: what is there is whole at any moment.

    What is no plain file (a device, a pipe, a link) is written to itself.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    new = path.with_name(f".new-{path.name}")
    try:
        yield new
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def read_file(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes.

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
    """Parse JSON in UTF-8.

    Raises:
        ValueError: It is none, or nested too deeply to be read.
    """
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

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


def read_rows(path: Path) -> list[dict[str, int | float | str]]:
    """Read rows of a CSV file with a head: numbers, or text where it is none. A missing file has no rows.

    Empty cells are left out; so is a last line without an end, which was cut when a process was killed, and with a
    warning any other line that is none of such a file.

    Raises:
        CheckpointError: It cannot be read at all.
    """
    if not path.exists():
        return []
    try:
        text = read_file(path, LARGEST_CSV).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' cannot be read: {error}.") from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
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


def _number(text: str) -> int | float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if text.lstrip("-").isdigit() and abs(number) < 2**63 else number


PIECES, PIECE = 64, 4096
"""Pieces of a file that are hashed, and bytes of each: all of a small one."""


def weight_hashes(folder: Path) -> dict[str, str]:
    """Hash the .safetensors files of a flow's folder and its parts, by relative name (SHA-256).

    Of each file its size, and pieces spread over it: little of a large one, since weights that were trained on are
    others everywhere. Folders further down, runs for instance, are no parts of a flow.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    return {path.relative_to(folder).as_posix(): _hashed(path) for path in sorted(files)}


def _hashed(path: Path) -> str:
    size = path.stat().st_size
    seen = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(PIECES):
            file.seek(max(i * PIECE, i * (size - PIECE) // (PIECES - 1)))
            seen.update(file.read(PIECE))
    return seen.hexdigest()


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: Missing or damaged; names the file.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' is no complete checkpoint: the file '{path.name}' is missing.")
    try:
        return load_file(path, device=str(device))
    except Exception as error:
        raise CheckpointError(f"The file '{path}' is damaged: {error}.") from error
