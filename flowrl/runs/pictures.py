"""Pictures of samples and of training, as PNG."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from flowrl.envs.base import GenerationEnv, plotted
from flowrl.errors import raised_by
from flowrl.evaluation.measure import EvaluationResult
from flowrl.runs.scatter import SIZE, scatter
from flowrl.storage.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = "time/total_timesteps"
FRAMES = 8
"""Frames of a video in a picture at most."""
VIDEOS = 8
"""Videos in a picture at most; one can be as large as a hundred images."""
SPECTROGRAM = (96, 192)
"""Height and width of a sound's picture."""
CURVES = {
    "rollout/reward_mean": "reward",
    "rollout/diversity": "diversity",
    "train/drift": "drift E|v - v_ref|²",
    "rollout/ess": "effective sample share",
}


def image_grid(images: torch.Tensor, columns: int = 0, pad: int = 2) -> Image.Image:
    """Put images (B, 1 or 3, H, W) in [0, 1] into one picture, row by row; about square unless `columns` is given.

    Of videos (B, T, 3, H, W), a row each: frames at equal distances, the first and the last among them.
    """
    if images.ndim == 5:
        times = torch.linspace(0, images.shape[1] - 1, min(FRAMES, images.shape[1])).round().long()
        images, columns = images[:, times].flatten(0, 1), len(times)
    images = images.expand(-1, 3, -1, -1)
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + pad) + pad, (i % columns) * (width + pad) + pad
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


def stacked(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Put pictures one below the other, `gap` white pixels between them."""
    height = sum(picture.height + gap for picture in pictures) - gap
    sheet, top = Image.new("RGB", (max(picture.width for picture in pictures), height), "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def as_images(samples: torch.Tensor, env: GenerationEnv) -> torch.Tensor:
    """Give what `image_grid` draws of samples: images, videos, spectrograms, or what the environment draws."""
    return spectrograms(samples) if env.flow.sample_rate and not env.renderer else env.pictures(samples)


def spectrograms(sounds: torch.Tensor) -> torch.Tensor:
    """Draw sounds (B, channels, N) as images (B, 1, *SPECTROGRAM): time to the right, frequency upwards, over 80 dB."""
    mono = sounds.detach().float().mean(1)
    n_fft = max(16, min(1024, mono.shape[1] // 8))
    window = torch.hann_window(n_fft, device=mono.device)
    spectrum = torch.stft(mono, n_fft, n_fft // 4, window=window, pad_mode="constant", return_complex=True).abs()
    level = 20 * F.adaptive_avg_pool2d(spectrum[:, None], SPECTROGRAM).clamp_min(1e-8).log10()
    return ((level - level.amax((1, 2, 3), keepdim=True)) / 80 + 1).clamp(0, 1).flip(2)


def n_shown(env: GenerationEnv, images: int = 36) -> int:
    """Give the number of samples in a picture of `images` images or sounds, of videos, or of points."""
    return 512 if not env.shows_images else min(images, VIDEOS) if env.flow.frame_rate else images


def save_picture(samples: torch.Tensor, contexts: Sequence[Any], env: GenerationEnv, path: Path) -> None:
    """Save a picture of samples as PNG: a grid of images or of spectrograms, or a scatter plot of points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as new:
        if env.shows_images:
            image_grid(as_images(samples, env)).save(new)
        else:
            _save_plots([("samples", samples)], env, new)


def save_before_after(result: EvaluationResult, env: GenerationEnv, path: Path) -> None:
    """Save a picture of reference and trained samples at the same noise, as PNG."""
    if env.shows_images:
        sides = (side[: n_shown(env)] for side in (result.reference_samples, result.samples))
        halves = [image_grid(as_images(side, env)) for side in sides]
        gap = 12
        both = Image.new("RGB", (2 * halves[0].width + gap, halves[0].height), "white")
        both.paste(halves[0], (0, 0))
        both.paste(halves[1], (halves[0].width + gap, 0))
        with written_whole(path) as new:
            both.save(new)
        return
    with written_whole(path) as new:
        _save_plots([("reference", result.reference_samples), ("trained", result.samples)], env, new)


def _save_plots(clouds: Sequence[tuple[str, torch.Tensor]], env: GenerationEnv, path: Path) -> None:
    if type(env).plot is GenerationEnv.plot:
        sheet = Image.new("RGB", (SIZE * len(clouds), SIZE), "white")
        for i, (title, points) in enumerate(clouds):
            sheet.paste(scatter(plotted(points), f"{title} ({len(points)})"), (SIZE * i, 0))
        sheet.save(path)
        return
    from matplotlib.figure import Figure

    with _collected():
        figure = Figure(figsize=(4 * len(clouds), 4))
        figure.subplots_adjust(0.18 / len(clouds), 0.13, 1 - 0.05 / len(clouds), 0.92, wspace=0.3)
        for i, (title, points) in enumerate(clouds):
            axes = figure.add_subplot(1, len(clouds), i + 1)
            with raised_by(f"The method plot of '{env.name}'"):
                env.plot(axes, points)
            axes.set(title=f"{title} ({len(points)})")
        figure.savefig(path, dpi=100)
        del axes, figure


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Collect a context's cyclic garbage at its end, without a look at what was there before.

    A figure is a cycle of some hundred kB, and training makes too little garbage to have it found.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def curves(rows: Sequence[dict[str, float]]) -> Figure:
    """Draw reward, diversity, drift and effective sample share against samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for i, (key, title) in enumerate(CURVES.items()):
        axes = figure.add_subplot(2, 2, i + 1)
        points = [(row[STEPS], row[key]) for row in rows if row.keys() >= {key, STEPS}]
        axes.plot(*zip(*points)) if points else None
        axes.set(title=title, xlabel="samples")
        axes.grid(alpha=0.3)
    return figure
