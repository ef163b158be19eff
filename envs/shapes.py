"""The world of coloured shapes that the embedded ``mini-sd3`` draws: vocabulary, prompts and pictures.

A prompt names up to four attributes, "three red stars on blue"; each one left out is open, and pictures of
that prompt vary freely in it: "three stars", "stars on blue", "shapes".
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

NUMBERS: dict[str, int] = {"one": 1, "two": 2, "three": 3, "four": 4}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": COLOURS["white"],
    "black": COLOURS["black"],
    "red": COLOURS["red"],
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
OPEN_SHAPE = "shape"  # the noun of a prompt that leaves the shape open
WORDS: tuple[str, ...] = (
    *NUMBERS,
    *dict.fromkeys([*COLOURS, *BACKGROUNDS]),
    *(noun + ending for noun in (*SHAPES, OPEN_SHAPE) for ending in ("", "s" if noun != "cross" else "es")),
    "on",
)

_SUPERSAMPLING = 4
# Placement, in pixels at size 64: at most one object in each quadrant, off its centre by up to the jitter.
_CENTRES = (16.0, 48.0)
_JITTER = 3.0
_RADII = (9.0, 11.5)
# Placement when free, by count: range of radii, and the gap between the circles around two objects.
_FREE_RADII = {1: (9.0, 16.0), 2: (8.5, 13.0), 3: (8.0, 11.5), 4: (8.0, 10.5)}
_FREE_GAP = 4.0


@dataclass(frozen=True)
class Scene:
    """Contents of a picture; ``None`` leaves an attribute open.

    Attributes:
        count: Number of objects, 1 to 4.
        colour: A key of ``COLOURS``.
        shape: One of ``SHAPES``.
        background: A key of ``BACKGROUNDS``, never the same as ``colour``.
    """

    count: int | None = None
    colour: str | None = None
    shape: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        allowed = {
            "count": tuple(NUMBERS.values()),
            "colour": tuple(COLOURS),
            "shape": SHAPES,
            "background": tuple(BACKGROUNDS),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))} or None, not {value!r}")
        if self.colour is not None and self.colour == self.background:
            raise ValueError(f"{self.colour} objects cannot be seen on {self.background}")

    @property
    def prompt(self) -> str:
        """The scene in words; ``parse_prompt`` reads them back."""
        number = {count: word for word, count in NUMBERS.items()}.get(self.count or 0)
        noun = _noun(self.shape or OPEN_SHAPE, plural=self.count != 1)
        ground = f"on {self.background}" if self.background else None
        return " ".join(word for word in (number, self.colour, noun, ground) if word)

    @property
    def is_full(self) -> bool:
        """Whether every attribute is given."""
        return all(getattr(self, field.name) is not None for field in fields(self))


def parse_prompt(text: str) -> Scene:
    """Parse "[number] [colour] shape(s) [on background]".

    Raises:
        ValueError: For a word outside the vocabulary (names it and the closest one) or in the wrong place.
    """
    words = text.lower().split()
    for word in words:
        if word not in WORDS:
            closest = difflib.get_close_matches(word, WORDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown word {word!r} in prompt {text!r}; the closest known word is {closest!r}")
    rest = list(words)
    count = NUMBERS[rest.pop(0)] if rest and rest[0] in NUMBERS else None
    colour = rest.pop(0) if rest and rest[0] in COLOURS else None
    nouns = {_noun(shape, plural=count != 1): shape for shape in (*SHAPES, OPEN_SHAPE)}
    shape = nouns.get(rest.pop(0)) if rest else None
    background = rest[1] if len(rest) == 2 and rest[0] == "on" and rest[1] in BACKGROUNDS else None
    if shape is None or (rest and background is None):
        raise ValueError(
            f"prompt {text!r} is not of the form '[number] [colour] shapes [on background]', "
            "such as 'three red stars on blue' or 'one star'"
        )
    return Scene(count, colour, None if shape == OPEN_SHAPE else shape, background)


def all_scenes() -> list[Scene]:
    """List every fully specified scene."""
    return [
        Scene(count, colour, shape, background)
        for count, colour, shape, background in itertools.product(NUMBERS.values(), COLOURS, SHAPES, BACKGROUNDS)
        if colour != background
    ]


def full_prompts() -> list[str]:
    """List the prompts that ask for everything: ``sd3-count`` trains on them."""
    return [scene.prompt for scene in all_scenes()]


def open_prompts() -> list[str]:
    """List prompts that leave at least colour and background open: for rewards on what is not asked."""
    counts = (None, *NUMBERS.values())
    return [Scene(count, None, shape, None).prompt for count in counts for shape in (None, *SHAPES)]


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Fill the open attributes of ``scene`` at random, uniformly."""
    count = scene.count or int(rng.choice(list(NUMBERS.values())))
    shape = scene.shape or str(rng.choice(SHAPES))
    colour, background = scene.colour, scene.background
    if colour is None:
        colour = str(rng.choice([name for name in COLOURS if name != background]))
    if background is None:
        background = str(rng.choice([name for name in BACKGROUNDS if name != colour]))
    return Scene(count, colour, shape, background)


def draw(scene: Scene, rng: np.random.Generator, size: int = 64, *, free: bool = False) -> NDArray[np.uint8]:
    """Draw one picture of ``scene``; open attributes, positions and sizes are random.

    Objects neither touch each other nor leave the picture; edges are anti-aliased.

    Args:
        scene: The scene to draw.
        rng: Source of all randomness; the same state draws the same picture.
        size: Height and width in pixels.
        free: Any positions and sizes, instead of one object in each quadrant at most.

    Returns:
        Array (size, size, 3), uint8 RGB.
    """
    scene = complete(scene, rng)
    assert scene.count
    assert scene.colour
    assert scene.shape
    assert scene.background
    circles = (_place_freely if free else _place)(scene.count, rng)
    return paint([Placed(scene.shape, scene.colour, *circle) for circle in circles], scene.background, size)


class Placed(NamedTuple):
    """A shape of a colour within the circle around (x, y), in pixels at size 64."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def paint(objects: Sequence[Placed], background: str, size: int = 64) -> NDArray[np.uint8]:
    """Draw objects that do not touch each other, with anti-aliased edges.

    Returns:
        Array (size, size, 3), uint8 RGB.
    """
    scale = size * _SUPERSAMPLING / 64.0
    picture = np.array(BACKGROUNDS[background], dtype=np.float32)
    for colour in dict.fromkeys(placed.colour for placed in objects):
        canvas = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING), 0)
        pen = ImageDraw.Draw(canvas)
        for shape, of, x, y, radius in objects:
            if of == colour:
                _draw_shape(pen, shape, x * scale, y * scale, radius * scale)
        cover = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255.0  # (size, size, 1)
        picture = picture + cover * (np.array(COLOURS[colour], dtype=np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def _noun(shape: str, plural: bool) -> str:
    return shape + ("es" if shape == "cross" else "s") if plural else shape


def _place(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw circles (x, y, radius) in random quadrants, all of one size."""
    radius = rng.uniform(*_RADII)
    quadrants = rng.choice(4, size=count, replace=False)
    jitter = rng.uniform(-_JITTER, _JITTER, size=(count, 2))
    return [(_CENTRES[q % 2] + dx, _CENTRES[q // 2] + dy, radius) for q, (dx, dy) in zip(quadrants, jitter)]


def _place_freely(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw random circles (x, y, radius) in the 64-pixel square that keep their distance."""
    while True:
        base = rng.uniform(*_FREE_RADII[count])
        placed: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            radius = base * rng.uniform(0.9, 1.1)
            x, y = rng.uniform(radius + 2.0, 62.0 - radius, size=2)
            if all((x - a) ** 2 + (y - b) ** 2 > (radius + r + _FREE_GAP) ** 2 for a, b, r in placed):
                placed.append((x, y, radius))
                if len(placed) == count:
                    return placed


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
    """Draw ``shape`` within the circle around (x, y)."""
    if shape == "circle":
        r = 0.9 * radius
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        return
    outline = _OUTLINES[shape] * radius + (x, y)
    pen.polygon([(float(a), float(b)) for a, b in outline], fill=255)


def _outlines() -> dict[str, NDArray[np.float64]]:
    """Compute the corners (n, 2) of every shape but the circle, in the unit circle, y downwards."""

    def on_circle(degrees: list[float], radii: list[float]) -> NDArray[np.float64]:
        angle = np.deg2rad(degrees)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array(radii)[:, None]

    arm, reach = 0.32, 0.95
    cross = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
    cross += [(-a, -b) for a, b in cross]
    return {
        "square": on_circle([45, 135, 225, 315], [1.0] * 4),
        "triangle": on_circle([-90, 30, 150], [1.0] * 3) + np.array([0.0, 0.12]),
        "star": on_circle([-90 + 36 * i for i in range(10)], [1.0, 0.45] * 5),
        "cross": np.array(cross),
    }


_OUTLINES = _outlines()
