"""Agreement of a picture with its prompt: count, colour, shape and background by image analysis.

For pictures of the world of ``flowrl.envs.shapes``: flat objects of one colour on a flat background.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowrl.envs.rewards.catalogue import register_reward
from flowrl.envs.rewards.ranges import UNIT
from flowrl.envs.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, parse_prompt
from flowrl.types import RewardOutput

ATTRIBUTES = ("background", "colour", "count", "shape")

_PALETTE = {**COLOURS, **BACKGROUNDS}
_MIN_CONTRAST = 45.0  # RGB distance below which a pixel is background
_MIN_AREA = 24  # pixels at 64x64; the smallest drawn object has more than 60
_GRID = 16  # an object's cover is compared with templates on a grid of this many cells
_MIN_LIKENESS = 0.8  # correlation with the best template below which an object is not a clean shape

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Finding:
    """Findings of image analysis in one picture.

    Attributes:
        background: The nearest palette colour of the border.
        colours: The nearest palette colour of each object.
        shapes: The likeliest shape of each object.
        centres: The middle (x, y) of each object's bounding box, in shares of the picture.
        clean: Whether there is at least one object, and all are clean shapes of one kind and one colour.
    """

    background: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    centres: tuple[tuple[float, float], ...]
    clean: bool


@register_reward("count")
class CountReward:
    """Share of background, colour, number and shape that are right."""

    description = "share of background, colour, number and shape that are right"
    scale = 0.15
    takes = UNIT
    on_host = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with values in [0, 1]; see `count_components`."""
        parts = count_components(images, prompts)
        return RewardOutput(parts.pop("score"), parts)


def count_components(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Score pictures attribute by attribute.

    Args:
        images: (B, 3, H, W) in [0, 1], any device.
        prompts: B prompts; what they leave open counts as right.

    Returns:
        Tensors (B,) float32 on the CPU: ``background``, ``colour``, ``count``, ``shape`` (1 right, 0 wrong),
        ``score`` (their mean), ``all_right`` (their product), and ``clean`` (whatever the prompt: the
        picture holds only clean shapes of one kind and one colour).

    Raises:
        ValueError: If sizes differ or a prompt is not one of the world of shapes.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(f"expected images (B, 3, H, W) and B prompts, not {tuple(images.shape)} and {len(prompts)}")
    findings = analyse(images)
    rows = [_judge(finding, parse_prompt(prompt)) for finding, prompt in zip(findings, prompts)]
    right = torch.tensor(rows, dtype=torch.float32).view(len(prompts), len(ATTRIBUTES))
    components = dict(zip(ATTRIBUTES, right.unbind(dim=1)))
    components["score"] = right.mean(dim=1)
    components["all_right"] = right.prod(dim=1)
    components["clean"] = torch.tensor([finding.clean for finding in findings], dtype=torch.float32)
    return components


def analyse(images: Tensor) -> list[Finding]:
    """Find background and objects in each of the ``images`` (B, 3, H, W) in [0, 1]."""
    pixels = images.detach().float().cpu().clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    _templates()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_find, pixels))


def _judge(finding: Finding, asked: Scene) -> tuple[bool, bool, bool, bool]:
    """Judge whether background, colour, count and shape are right; objects must all agree."""
    return (
        asked.background in (None, finding.background),
        asked.colour is None or set(finding.colours) == {asked.colour},
        asked.count in (None, len(finding.shapes)),
        asked.shape is None or set(finding.shapes) == {asked.shape},
    )


def _find(pixels: FloatArray) -> Finding:
    """Analyse one picture, (H, W, 3) in [0, 255]."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    objects, stray = _objects(pixels, ground)
    background = _nearest(ground, BACKGROUNDS)
    colours = tuple(_nearest(colour, COLOURS) for colour, _, _ in objects)
    shapes, likeness = _classify([cover for _, cover, _ in objects])
    clean = (
        bool(objects)
        and stray < _MIN_AREA
        and len(set(colours)) == 1
        and len(set(shapes)) == 1
        and bool((likeness > _MIN_LIKENESS).all())
    )
    return Finding(background, colours, tuple(shapes), tuple(centre for _, _, centre in objects), clean)


Object = tuple[FloatArray, FloatArray, tuple[float, float]]


def _objects(pixels: FloatArray, ground: FloatArray) -> tuple[list[Object], int]:
    """Find colour (3,), cover (h, w) in [0, 1] and centre of each object, and the number of stray foreground pixels."""
    from scipy import ndimage  # here: importing it takes longer than all of flowrl does

    min_area = _MIN_AREA * pixels.shape[0] * pixels.shape[1] / 64**2
    offset = pixels - ground
    contrast = np.sqrt((offset**2).sum(axis=2))
    objects: list[Object] = []
    stray = 0
    for where, inside in _components(contrast > _MIN_CONTRAST):
        if inside.size == 1 < min_area:  # its own outline: what noise leaves, by the hundred
            stray += 1
            continue
        local = contrast[where]
        strongest = inside & (local >= np.percentile(local[inside], 70))
        direction = np.median(offset[where][strongest], axis=0)
        # 0 on the ground, 1 in the object: half is its outline, however strong the colour
        cover = np.clip(offset[where] @ direction / (direction @ direction + 1e-6), 0.0, 1.0)
        for part_where, part in _components(inside & (cover > 0.5)):
            area = int(part.sum())
            if area < min_area:
                stray += area
                continue
            part_cover = cover[part_where]
            core = part & (part_cover >= 0.8)
            colour = np.median(pixels[where][part_where][core if core.any() else part], axis=0)
            middles = [
                (outer.start + (inner.start + inner.stop) / 2) / n
                for outer, inner, n in zip(where, part_where, pixels.shape)
            ]
            objects.append((colour, part_cover * ndimage.binary_dilation(part), (middles[1], middles[0])))
    return objects, stray


def _components(mask: NDArray[np.bool_]) -> list[tuple[tuple[slice, slice], NDArray[np.bool_]]]:
    """Find bounding box and mask within it of every connected part of ``mask``."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    return [(box, labels[box] == i) for i, box in enumerate(ndimage.find_objects(labels), start=1)]


def _nearest(colour: FloatArray, palette: dict[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    return names[int(((np.array([palette[name] for name in names]) - colour) ** 2).sum(axis=1).argmin())]


def _on_grid(cover: FloatArray) -> FloatArray:
    """Stretch a cover to a square with an empty margin, flattened; mean 0 and norm 1."""
    stretched = Image.fromarray(cover).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    flat = np.pad(np.asarray(stretched, dtype=np.float32), 2).ravel()
    flat = flat - flat.mean()
    return flat / (np.linalg.norm(flat) + 1e-6)


def _classify(covers: list[FloatArray]) -> tuple[list[str], FloatArray]:
    """Classify the shape of each cover, with its correlation (n,) with the mean look of that shape."""
    if not covers:
        return [], np.zeros(0, dtype=np.float32)
    templates, directions, offsets = _templates()
    looks = np.stack([_on_grid(cover) for cover in covers])
    best = (looks @ directions.T + offsets).argmax(axis=1)
    return [SHAPES[i] for i in best], (looks * templates[best]).sum(axis=1)


@lru_cache(maxsize=1)
def _templates() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Fit a linear discriminant analysis to drawn examples, sharp and blurred.

    Returns:
        The mean look of each shape (n shapes, n cells), norm 1, and the directions (n shapes, n cells) and
        offsets (n shapes,) of the discriminant.
    """
    from scipy import ndimage

    rng = np.random.default_rng(0)
    means, residuals = [], []
    for shape in SHAPES:
        looks = []
        for count in (1, 2, 3, 4) * 8:
            picture = draw(Scene(count, "white", shape, "black"), rng).astype(np.float32)
            blur = rng.uniform(0.0, 1.6)
            picture = ndimage.gaussian_filter(picture, sigma=(blur, blur, 0.0))
            picture += rng.normal(scale=rng.uniform(0.0, 15.0), size=picture.shape)
            looks += [_on_grid(cover) for _, cover, _ in _objects(picture, picture[0, 0])[0]]
        means.append(np.mean(looks, axis=0))
        residuals.append(np.stack(looks) - means[-1])
    mean = np.stack(means)
    within = np.cov(np.concatenate(residuals), rowvar=False)
    within += 0.1 * within.trace() / len(within) * np.eye(len(within))
    directions = np.linalg.solve(within, mean.T).T
    offsets = -0.5 * (mean * directions).sum(axis=1)
    templates = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return templates.astype(np.float32), directions.astype(np.float32), offsets.astype(np.float32)
