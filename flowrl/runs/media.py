"""Files of samples that are no still pictures: videos."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.runs.pictures import image_grid

WRITER = ("imageio", "imageio_ffmpeg")
"""Packages that write mp4; the extra [video]."""
NO_WRITER = "Videos are animated PNGs here; for mp4: pip install imageio imageio-ffmpeg."


def writes_mp4() -> bool:
    """Tell whether there is a writer of mp4."""
    return all(find_spec(name) is not None for name in WRITER)


def save_video(video: torch.Tensor, path: Path, frame_rate: float) -> Path:
    """Write a video (T, 3, H, W) with values in [0, 1]: as mp4, or as an animated PNG where there is no writer of that.

    Args:
        video: Its frames.
        path: File to write; the ending is put in place of its own.
        frame_rate: Frames per second.

    Returns:
        The file.
    """
    frames = [image_grid(frame[None], pad=0) for frame in video]
    if writes_mp4():
        writers: Any = import_module("imageio.v2")
        path = path.with_suffix(".mp4")
        with writers.get_writer(path, fps=frame_rate, macro_block_size=2) as writer:  # players want even sides
            for frame in frames:
                writer.append_data(np.asarray(frame))
    else:
        path = path.with_suffix(".png")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 / frame_rate, loop=0)
    return path
