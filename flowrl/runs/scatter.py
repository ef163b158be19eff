"""Scatter plots as PNG without matplotlib, whose import takes longer than a small run."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SIZE, LEFT, TOP, SIDE = 400, 48, 34, 336
"""Pixels of a panel, and where its frame stands in it."""
COLOUR, ALPHA, RADIUS = (31, 119, 180), 0.6, 1.4
TICKS = range(-4, 5, 2)


def scatter(points: np.ndarray, title: str, limit: float = 4.0) -> Image.Image:
    """Draw points (B, 2) within +-`limit` as dots that let others show through.

    Args:
        points: Their coordinates; those outside are left out.
        title: Text above the frame.
        limit: Where both axes end.
    """
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    dots = _dots((points + np.array([limit, -limit])) * [1, -1] * (SIDE / (2 * limit)))
    picture.paste(Image.fromarray(dots), (LEFT, TOP))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((LEFT, TOP, LEFT + SIDE - 1, TOP + SIDE - 1), outline="black")
    for tick in TICKS:
        along = (tick + limit) / (2 * limit) * (SIDE - 1)
        pen.line((LEFT + along, TOP + SIDE, LEFT + along, TOP + SIDE + 4), fill="black")
        pen.line((LEFT - 5, TOP + along, LEFT - 1, TOP + along), fill="black")
        pen.text((LEFT + along, TOP + SIDE + 6), str(tick), fill="black", anchor="mt" if _scales(pen) else None)
        pen.text((LEFT - 8, TOP + along), str(-tick), fill="black", anchor="rm" if _scales(pen) else None)
    pen.text((LEFT + SIDE / 2, TOP / 2), title, fill="black", anchor="mm" if _scales(pen) else None)
    return picture


def _scales(pen: ImageDraw.ImageDraw) -> bool:
    """Tell whether the font can be placed by its middle, as those that scale can."""
    return hasattr(pen.getfont(), "getbbox") and hasattr(pen.getfont(), "font_variant")


def _dots(places: np.ndarray) -> np.ndarray:
    """Paint dots at places (B, 2) in pixels into a white square of `SIDE`, as (SIDE, SIDE, 3) bytes."""
    reach = int(RADIUS + 1.5)
    places = places[np.isfinite(places).all(axis=1)]
    places = places[(np.abs(places) < 2 * SIDE).all(axis=1)]
    corner = np.floor(places).astype(int)
    seen = np.zeros((SIDE + 2 * reach, SIDE + 2 * reach))  # log of the share of white that is left
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            pixel = corner + np.array([dx, dy])
            distance = np.hypot(*(pixel + 0.5 - places).T)
            cover = ALPHA * np.clip(RADIUS + 0.5 - distance, 0, 1)
            held = ((pixel >= -reach) & (pixel < SIDE + reach)).all(axis=1) & (cover > 0)
            x, y = (pixel[held] + reach).T
            np.add.at(seen, (y, x), np.log1p(-cover[held]))
    white = np.exp(seen[reach:-reach, reach:-reach])[..., None]
    return (white * 255 + (1 - white) * np.array(COLOUR)).round().astype(np.uint8)
