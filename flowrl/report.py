"""Pictures of samples and the report page of a run."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from flowrl.evaluation import EvaluationResult
from flowrl.files import read_json, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowrl.envs.base import GenerationEnv

STEPS = "time/total_timesteps"
CURVES = {
    "rollout/reward_mean": "reward",
    "rollout/diversity": "diversity",
    "train/drift": "drift E|v - v_ref|²",
    "rollout/ess": "effective sample share",
}


def image_grid(images: torch.Tensor, columns: int = 0, pad: int = 2) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1] as one picture, row by row; about square unless `columns` is given."""
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + pad) + pad, (i % columns) * (width + pad) + pad
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


def save_picture(samples: torch.Tensor, contexts: Sequence[Any], env: GenerationEnv, path: Path) -> None:
    """Picture of samples as PNG: a grid of images, or a scatter plot of points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if env.flow.is_image:
        image_grid(samples).save(path)
    else:
        _points([("samples", samples)]).savefig(path, dpi=100)


def save_before_after(result: EvaluationResult, env: GenerationEnv, path: Path) -> None:
    """Reference and trained samples at the same noise, as PNG."""
    if env.flow.is_image:
        halves = [image_grid(s[:36]) for s in (result.reference_samples, result.samples)]
        gap = 12
        both = Image.new("RGB", (2 * halves[0].width + gap, halves[0].height), "white")
        both.paste(halves[0], (0, 0))
        both.paste(halves[1], (halves[0].width + gap, 0))
        both.save(path)
    else:
        _points([("reference", result.reference_samples), ("trained", result.samples)]).savefig(path, dpi=100)


def _points(clouds: Sequence[tuple[str, torch.Tensor]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(clouds), 4), layout="constrained")
    for i, (title, points) in enumerate(clouds):
        axes = figure.add_subplot(1, len(clouds), i + 1)
        flat = points.flatten(1).cpu().numpy()
        axes.plot(flat[:, 0], flat[:, min(1, flat.shape[1] - 1)], ".", markersize=2, alpha=0.6)
        axes.set(title=f"{title} ({len(points)})", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    return figure


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a run's `metrics.csv`; empty cells are left out."""
    return [{name: float(value) for name, value in row.items()} for row in read_rows(path)]


def curves(rows: Sequence[dict[str, float]]) -> Figure:
    """Reward, diversity, drift and effective sample share against samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for i, (key, title) in enumerate(CURVES.items()):
        axes = figure.add_subplot(2, 2, i + 1)
        points = [(row[STEPS], row[key]) for row in rows if row.keys() >= {key, STEPS}]
        axes.plot(*zip(*points)) if points else None
        axes.set(title=title, xlabel="samples")
        axes.grid(alpha=0.3)
    return figure


def write_report(folder: Path, result: EvaluationResult, tag: str = "") -> Path:
    """Self-contained `report{tag}.html` of a run: what was run, curves, before and after.

    Args:
        folder: Run folder with config.json, metrics.csv and before_after{tag}.png.
        result: Final evaluation.
        tag: End of the files' names, for an evaluation beside the run's own.
    """
    config = read_json(folder / "config.json")
    stream = io.BytesIO()
    curves(read_metrics(folder / "metrics.csv")).savefig(stream, format="png", dpi=110)
    before_after = (folder / f"before_after{tag}.png").read_bytes()
    title = html.escape(folder.resolve().name)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; background: white; }} pre {{ overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1>
<h2>Before and after</h2>
<p>Reference (left) and trained flow (right), same noise and contexts.</p>
<img alt="samples before and after" src="data:image/png;base64,{_base64(before_after)}">
<pre>{html.escape(result.table())}</pre>
<h2>Training</h2>
<img alt="training curves" src="data:image/png;base64,{_base64(stream.getvalue())}">
<h2>Settings</h2>
<pre>{html.escape(json.dumps(config, indent=1))}</pre>
</body></html>
"""
    path = folder / f"report{tag}.html"
    path.write_text(page, encoding="utf-8")
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
