"""Writes the shipped prompt sets: python pretrain/prompt_sets.py"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "envs" / "prompt_sets"

ANIMALS = ("cat", "dog", "fox", "horse", "rabbit", "owl", "bear", "frog", "elephant", "tiger", "duck", "turtle")
SCENES = (
    "in the snow",
    "in tall grass",
    "on a beach",
    "by a river",
    "in a forest",
    "at night",
    "in the rain",
    "in fog",
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
COUNTED = (
    *("apple", "banana", "orange", "book", "bottle", "cup", "chair", "clock"),
    *("vase", "umbrella", "dog", "cat", "bird", "horse", "car", "bicycle"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOURED = ("car", "bicycle", "chair", "cup", "umbrella", "book", "vase", "bench", "suitcase")
PLACED = ("dog", "chair", "bicycle", "cat", "umbrella", "vase", "horse", "bench", "bottle", "clock")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
WORDS = (
    *("GO", "TEA", "OPEN", "SALE", "STOP", "EXIT", "BOOKS", "MUSIC"),
    *("HELLO", "FRESH", "COFFEE", "GARDEN", "SUMMER", "BAKERY", "WELCOME", "TOMORROW"),
)
SURFACES = ("wooden sign", "neon sign", "chalkboard", "poster", "T-shirt", "postcard")

Line = tuple[int, dict[str, Any]]  # place in the square of combinations, and the prompt with its fields


def animals() -> Iterator[Line]:
    """An animal in a scene."""
    for i, animal in enumerate(ANIMALS):
        for j, scene in enumerate(SCENES):
            yield i + 2 * j, {"prompt": f"a photo of {_a(animal)} {scene}", "animal": animal, "scene": scene}


def counts() -> Iterator[Line]:
    """A number of equal objects."""
    for i, thing in enumerate(COUNTED):
        for j, number in enumerate(NUMBERS):
            noun = thing if j == 0 else f"{thing}s"
            yield i + 2 * j, {"prompt": f"a photo of {number} {noun}", "count": j + 1, "object": thing}


def colours() -> Iterator[Line]:
    """An object of a colour."""
    for i, colour in enumerate(COLOURS):
        for j, thing in enumerate(COLOURED):
            yield i + 2 * j, {"prompt": f"a photo of {_a(colour)} {thing}", "colour": colour, "object": thing}


def spatial() -> Iterator[Line]:
    """One object beside another; each pair in one order only: its turned relation would ask for the same picture."""
    n = len(PLACED)
    pairs = [(PLACED[i], PLACED[(i + step) % n]) for step in (1, 3) for i in range(n)]
    for i, (thing, other) in enumerate(pairs):
        for j, (relation, words) in enumerate(RELATIONS.items()):
            prompt = f"a photo of {_a(thing)} {words} {_a(other)}"
            yield i + 2 * j, {"prompt": prompt, "object": thing, "relation": relation, "reference": other}


def words() -> Iterator[Line]:
    """A word to be read in the picture."""
    for i, text in enumerate(WORDS):
        for j, surface in enumerate(SURFACES):
            yield i + 2 * j, {"prompt": f'a {surface} that says "{text}"', "text": text, "surface": surface}


def lines(entries: Iterator[Line]) -> str:
    """A set as JSON lines; a fifth of the combinations is held out, along diagonals, so that each part is seen."""
    return "".join(
        json.dumps({**entry, "split": "train" if place % 5 else "held_out"}) + "\n" for place, entry in entries
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


SETS = {make.__name__: make for make in (animals, colours, counts, spatial, words)}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, make in SETS.items():
        (FOLDER / f"{name}.jsonl").write_text(lines(make()))
