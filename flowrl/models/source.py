"""Sources of flows: everything known of a flow before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import ModelLoadError
from flowrl.models.base import VelocityModel
from flowrl.storage.files import LARGEST_JSON, parsed_json, read_file

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SMALL = ("gaussians", "plans", "digits", "latent-digits", "emoji", "darcy", "speech")
"""Shipped flows that are no pipelines of diffusers."""
EMBEDDED = (*SMALL, "mini-sd3", "mini-words", "mini-spatial")


@dataclass(frozen=True)
class FlowSource:
    """A flow that is not loaded yet, with what is known of it before any weight is read.

    Attributes:
        source: A shipped name (`EMBEDDED`), a folder, a hub name (OWNER/NAME or OWNER/NAME@REVISION), or "" for a
            factory.
        description: One line for people.
        sample_shape: Shape of one decoded sample.
        load: Builds a fresh model on the CPU. Takes the types of the network's weights and of the frozen parts',
            both float32 by default.
        skeleton: Builds a model without weights (meta device), to count parameters.
        imitation: As `load`, with any weights, to predict memory: it is called where tensors have no storage.
        reloadable: The same weights can be had again from `source` (not so for a factory).
        is_image: Samples are images (C, H, W) with values in [0, 1], or videos (T, C, H, W) of such.
        frame_rate: Frames per second of videos; 0 for anything else.
        sample_rate: Values per second of sounds (channels, values), in [-1, 1]; 0 for anything else.
        revision: Commit of a flow from the hub; empty for others.
    """

    source: str
    description: str
    sample_shape: tuple[int, ...]
    load: Callable[..., VelocityModel]
    skeleton: Callable[[], VelocityModel]
    imitation: Callable[..., VelocityModel]
    reloadable: bool = True
    is_image: bool = False
    revision: str = ""
    frame_rate: float = 0
    sample_rate: int = 0

    @property
    def is_media(self) -> bool:
        """Whether a sample is a picture, a video or a sound, which has a file of its own."""
        return self.is_image or bool(self.sample_rate)

    @property
    def is_embedded(self) -> bool:
        """Whether it is a small model shipped with flowrl."""
        return self.source in EMBEDDED


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelLoadError: The file is missing or is no JSON object; names it.
    """
    try:
        content = parsed_json(read_file(path, LARGEST_JSON))
    except FileNotFoundError as error:
        raise ModelLoadError(f"The {what} is missing the file '{path}'.") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"Cannot read '{path}' of the {what}: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"'{path}' of the {what} is no JSON object.")
    return content
