"""Files of samples that are no still pictures: videos and sounds."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError, raised_by
from flowrl.evaluation.measure import EvaluationResult
from flowrl.runs.pictures import image_grid
from flowrl.storage.files import write_json

WRITER = ("imageio", "imageio_ffmpeg")
"""Packages that write mp4; the extra [video]."""
SOUNDS = 4
"""Contexts of which an evaluation keeps a sound before and after."""
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


def save_sound(sound: torch.Tensor, path: Path, sample_rate: int) -> Path:
    """Write a sound (channels, N) with values in [-1, 1], others clipped, as wav of 16 bits; give the file.

    Args:
        sound: Its values.
        path: File to write; the ending is put in place of its own.
        sample_rate: Values per second.
    """
    path = path.with_suffix(".wav")
    values = (sound.detach().float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().T.contiguous()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(values.numpy().astype("<i2").tobytes())
    return path


def sounds_of(env: GenerationEnv, samples: torch.Tensor, contexts: Sequence[Any]) -> torch.Tensor:
    """Make what samples (B, *sample_shape) sound like: (B, channels, N).

    Raises:
        ConfigError: The environment's method raised, or gave something else.
    """
    with raised_by(f"The method sounds of '{env.name}'"):
        sounds = torch.as_tensor(env.sounds(samples, contexts))
    if sounds.dim() != 3 or len(sounds) != len(samples):
        raise ConfigError(
            f"The method sounds of '{env.name}' gave shape {tuple(sounds.shape)} for {len(samples)} samples; it must "
            f"give sounds ({len(samples)}, channels, N) with values in [-1, 1]."
        )
    return sounds


def save_sounds(result: EvaluationResult, env: GenerationEnv, folder: Path) -> list[Path]:
    """Write what the first sample of each of the first contexts sounds like before and after, where there is a sound.

    Args:
        result: Its kept samples are at the same noise before and after.
        env: Where samples have sounds (`sound_rate`).
        folder: Gets `0-before.wav`, `0-after.wav`, and so on, and `contexts.json`, which says what they are of.

    Returns:
        The folder; nothing where samples are not to be heard.
    """
    if not env.sound_rate:
        return []
    firsts: dict[str, int] = {}
    for i, context in enumerate(result.sample_contexts):
        firsts.setdefault(str(context), i)
    rows = list(firsts.values())[:SOUNDS]
    contexts = [result.sample_contexts[i] for i in rows]
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in (("before", result.reference_samples), ("after", result.samples)):
        for i, sound in enumerate(sounds_of(env, samples[rows], contexts)):
            save_sound(sound, folder / f"{i}-{name}", env.sound_rate)
    write_json(folder / "contexts.json", {"contexts": [str(context) for context in contexts]})
    return [folder]
