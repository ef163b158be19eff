"""The world of two coloured shapes beside or above each other that the embedded ``mini-spatial`` draws.

A prompt names two things and how the first one lies to the second: "a red circle left of a blue square". A colour left
out is open: "a circle left of a blue square".
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowrl.envs.prompts import Prompt
from flowrl.envs.shapes import Placed, paint

RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Place of the first thing, seen from the second: steps to the right and down."""
OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "blue")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
BACKGROUND = "white"
WORDS: tuple[str, ...] = ("a", *COLOURS, *SHAPES, *dict.fromkeys(" ".join(RELATIONS).split()))

_REACH = 16.0  # of each thing's centre from the middle, in pixels at size 64
_JITTER = (2.0, 8.0)  # along that direction, and across it
_RADII = (10.0, 13.0)
_THING = rf"a (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_FORM = re.compile(rf"{_THING} ({'|'.join(RELATIONS)}) {_THING}")


@dataclass(frozen=True)
class Thing:
    """A shape of some colour; ``None`` leaves the colour open."""

    colour: str | None
    shape: str

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.colour, self.shape) if word)


@dataclass(frozen=True)
class Pair:
    """Contents of a picture: two things that differ in shape, and in colour.

    Attributes:
        first: The thing that is placed.
        relation: A key of ``RELATIONS``.
        second: The thing that it is placed by.
    """

    first: Thing
    relation: str
    second: Thing

    @property
    def prompt(self) -> str:
        """The pair in words; ``parse_pair`` reads them back."""
        return f"{self.first} {self.relation} {self.second}"

    @property
    def things(self) -> tuple[Thing, Thing]:
        """Both things."""
        return self.first, self.second

    @property
    def reversed(self) -> Pair:
        """The same things the other way round, which the prompt does not ask for."""
        return Pair(self.first, OPPOSITE[self.relation], self.second)


def parse_pair(text: str) -> Pair:
    """Parse "a [colour] shape RELATION a [colour] shape".

    Raises:
        ValueError: For any other text; says the form and the words.
    """
    found = _FORM.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise ValueError(
            f"prompt {text!r} is not of the form 'a [colour] shape RELATION a [colour] shape', such as 'a red circle "
            f"left of a blue square' (relations: {', '.join(RELATIONS)}; colours: {', '.join(COLOURS)}; shapes: "
            f"{', '.join(SHAPES)})"
        )
    colour, shape, relation, other_colour, other_shape = found.groups()
    return Pair(Thing(colour, shape), relation, Thing(other_colour, other_shape))


def all_pairs() -> list[Pair]:
    """List every pair of things that differ in colour and shape, in every relation."""
    things = [Thing(colour, shape) for colour, shape in itertools.product(COLOURS, SHAPES)]
    return [
        Pair(first, relation, second)
        for first, relation, second in itertools.product(things, RELATIONS, things)
        if first.colour != second.colour and first.shape != second.shape
    ]


def pair_prompts() -> list[str]:
    """List the prompts that ask for everything: ``sd3-spatial`` trains on them.

    All eight of the same two things are a group: when it is held out, training sees the two together in no order.
    """
    return [Prompt(pair.prompt, {"group": " and ".join(sorted(map(str, pair.things)))}) for pair in all_pairs()]


def draw_pair(pair: Pair, rng: np.random.Generator, size: int = 64) -> NDArray[np.uint8]:
    """Draw one picture of ``pair``, whose colours are given; sizes and places are random.

    The things neither touch each other nor leave the picture.

    Args:
        pair: The pair to draw.
        rng: Source of all randomness; the same state draws the same picture.
        size: Height and width in pixels.

    Returns:
        Array (size, size, 3), uint8 RGB.
    """
    direction = np.array(RELATIONS[pair.relation], dtype=np.float64)
    placed = []
    for thing, side in ((pair.first, 1), (pair.second, -1)):
        assert thing.colour
        along, across = rng.uniform(-1, 1, size=2) * _JITTER
        x, y = 32 + direction * (side * _REACH + along) + direction[::-1] * across
        placed.append(Placed(thing.shape, thing.colour, x, y, rng.uniform(*_RADII)))
    return paint(placed, BACKGROUND, size)
