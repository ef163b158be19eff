"""Reader of idx files, the format of MNIST: pictures and labels as arrays of bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from flowrl.errors import ConfigError

UNSIGNED_BYTE = 0x08
LARGEST = 2**30
"""Bytes of a file's content; full MNIST has 47 million."""


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read an idx file of unsigned bytes, gzipped or not: uint8 of `dimensions` dimensions.

    Raises:
        ConfigError: No such file, no idx file of bytes, of other dimensions, too large, or cut; names it.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = _shape(header, dimensions, path)
            n = math.prod(shape)
            if n > LARGEST:
                raise ConfigError(f"'{path}' says it holds {n:,} bytes, more than the {LARGEST:,} that are read.")
            content = file.read(n + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"Cannot read '{path}': {error}.") from error
    if len(content) != n:
        kind = "more" if len(content) > n else f"only {len(content):,}"
        raise ConfigError(f"'{path}' says it holds {' x '.join(map(str, shape))} bytes, but there are {kind}.")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).reshape(shape)


def _shape(header: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    if len(header) < 4 + 4 * dimensions or header[:2] != b"\0\0" or header[2] != UNSIGNED_BYTE:
        raise ConfigError(
            f"'{path}' is no idx file of unsigned bytes: it starts with {header[:4].hex(' ') or 'nothing'}."
        )
    if header[3] != dimensions:
        raise ConfigError(f"'{path}' is an idx file of {header[3]} dimensions, not of {dimensions}.")
    return struct.unpack(f">{dimensions}I", header[4:])


def read_pair(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pictures (n, H, W), labels (n,), uint8, of `PART-images-idx3-ubyte[.gz]`, `PART-labels-idx1-ubyte[.gz]`.

    Raises:
        ConfigError: A file is missing or damaged, there are no pictures, or their numbers differ.
    """
    pictures = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), 3)
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), 1)
    if len(pictures) != len(labels) or not pictures.numel():
        raise ConfigError(f"'{folder}' has {len(pictures)} pictures of '{part}' and {len(labels)} labels.")
    return pictures, labels


def _find(folder: Path, name: str) -> Path:
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise ConfigError(f"There is no '{name}' or '{name}.gz' in '{folder}'; docs/digits.md says where to get them.")
    return found[0]
