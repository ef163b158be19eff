"""The world of short words that the embedded ``mini-words`` draws: vocabulary, prompts and pictures.

A prompt names a word and up to two colours, '"SUN" in red on white'; a colour left out is open: '"SUN" on white'.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flowrl.envs.shapes import COLOURS

TEXTS: tuple[str, ...] = (
    *("ART", "BOX", "BUS", "CAT", "DOG", "EGG", "FUN", "HAT"),
    *("ICE", "KEY", "MAP", "PEN", "SKY", "SUN", "TEA", "ZOO"),
)
PAIRS: tuple[tuple[str, str], ...] = (
    *(("black", "white"), ("white", "black"), ("red", "white"), ("white", "red")),
    *(("blue", "white"), ("white", "blue"), ("black", "yellow"), ("yellow", "black")),
)
"""Ink and paper that are easy to tell apart."""

_SUPERSAMPLING = 4
_LETTERS = 25  # their size, in pixels at size 64
_LINES = (16, 32, 48)  # where the middle of the word can be, in y
_JITTER = 0.5  # of its centre


@dataclass(frozen=True)
class Sign:
    """Contents of a picture; ``None`` leaves a colour open.

    Attributes:
        text: One of ``TEXTS``.
        ink: Colour of the letters.
        paper: Colour behind them.
    """

    text: str
    ink: str | None = None
    paper: str | None = None

    @property
    def prompt(self) -> str:
        """The sign in words; the text stands in double quotes."""
        ink = f" in {self.ink}" if self.ink else ""
        paper = f" on {self.paper}" if self.paper else ""
        return f'"{self.text}"{ink}{paper}'


def all_signs() -> list[Sign]:
    """List every word in every pair of colours."""
    return [Sign(text, ink, paper) for text, (ink, paper) in itertools.product(TEXTS, PAIRS)]


def word_prompts() -> list[str]:
    """List the prompts that ask for everything: ``sd3-ocr`` trains on them."""
    return [sign.prompt for sign in all_signs()]


def draw_sign(sign: Sign, rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw one picture of ``sign``, whose colours are given; the line that the letters stand on is random.

    The letters are Pillow's own font.

    Args:
        sign: The sign to draw.
        rng: Source of all randomness; the same state draws the same picture.
        size: Height and width in pixels.

    Returns:
        Array (size, size, 3), uint8 RGB.
    """
    assert sign.ink
    assert sign.paper
    scale = size * _SUPERSAMPLING / 64.0
    canvas = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING), 0)
    font = ImageFont.load_default(_LETTERS * scale)
    x, y = ((middle + rng.uniform(-_JITTER, _JITTER)) * scale for middle in (32, rng.choice(_LINES)))
    pen = ImageDraw.Draw(canvas)
    pen.text((x, y), sign.text, fill=255, font=font, anchor="mm", stroke_width=round(0.4 * scale))
    cover = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255.0  # (size, size, 1)
    ink, paper = (np.array(COLOURS[name], dtype=np.float32) for name in (sign.ink, sign.paper))
    return np.rint(paper + cover * (ink - paper)).astype(np.uint8)
