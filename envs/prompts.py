"""Prompts as data: texts with weights and fields, prompt files, shipped sets, and the held-out split.

Formats and sets: docs/prompts.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from flowrl.checks import counted, shown, told_apart
from flowrl.errors import ConfigError, UnknownNameError, did_you_mean

SETS = Path(__file__).resolve().parent / "prompt_sets"
MAX_BYTES = 4_000_000
MAX_CHARACTERS = 10_000

Scalar = str | int | float | bool
Things = tuple[Mapping[str, Any], ...]
"""Things that a line of GenEval asks for: `({"class": "bench", "count": 2, "color": "red"}, ...)`, read-only."""
THINGS = ("include", "exclude")
"""Fields that hold such."""
PICTURE = "image"
"""Field that names the file of a picture, for pipelines that take one with each prompt."""
SURROGATES = ("\ud800", "\udfff")


class Prompt(str):
    """A prompt: the text itself, with a weight and with fields that a reward can read.

    It is a string wherever one is expected, with the string's own equality, hash and representation: prompts of the
    same text are the same context, whatever their weights and fields.

    Args:
        text: The prompt itself.
        fields: Further facts about it, by name: `{"count": 3, "object": "apple"}`. Read-only. Texts, numbers, true or
            false; `include` and `exclude` can be lists of things as in the metadata of GenEval (Ghosh et al. 2023).
        weight: Frequency in training's draws, relative to the others.

    Raises:
        ConfigError: The weight is not a finite positive number, or a field is no scalar.
    """

    fields: Mapping[str, Any]
    weight: float

    def __new__(cls, text: str, fields: Mapping[str, Any] | None = None, weight: float = 1.0) -> Prompt:
        """Make a new string, with its weight and fields."""
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight <= sys.float_info.max:
            raise ConfigError(f"the weight must be a finite number above 0, not {weight!r}")
        known = dict(fields or {})
        for name, value in known.items():
            if name in THINGS and isinstance(value, list | tuple):
                known[name] = _things(name, value)
            elif not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
                raise ConfigError(f"the field '{name}' must be a text, a finite number, true or false, not {value!r}")
        prompt = super().__new__(cls, text)
        prompt.fields = MappingProxyType(known)
        prompt.weight = float(weight)
        return prompt

    def __deepcopy__(self, memo: Any) -> Prompt:
        return self  # nothing in it can change


def _things(field: str, value: Sequence[Any]) -> Things:
    """Check a list of things as GenEval writes them, and make it read-only.

    Raises:
        ConfigError: It is none.
    """
    for thing in value:
        known = isinstance(thing, Mapping) and isinstance(thing.get("class"), str) and bool(thing["class"].strip())
        counted = known and type(thing.get("count", 1)) is int and thing.get("count", 1) >= 1
        coloured = known and isinstance(thing.get("color", ""), str)
        if not (counted and coloured and _is_position(thing.get("position"), len(value))):
            raise ConfigError(
                f"the field '{field}' must list things as GenEval does, such as "
                '[{"class": "bench", "count": 2, "color": "red", "position": ["left of", 0]}] (class a text, count a '
                f"whole number above 0, position a relation and the number of another thing), not {thing!r}"
            )
    return tuple(MappingProxyType({k: tuple(v) if isinstance(v, list) else v for k, v in t.items()}) for t in value)


def _is_position(position: Any, n: int) -> bool:
    if position is None:
        return True
    if not isinstance(position, list | tuple) or len(position) != 2:
        return False
    return isinstance(position[0], str) and type(position[1]) is int and 0 <= position[1] < n


@dataclass(frozen=True)
class PromptSet:
    """Prompts that training draws from, and those that it never sees."""

    train: tuple[Any, ...]
    held_out: tuple[Any, ...] = ()


def prompts_from(prompts: str | Path | Sequence[Any], held_out_share: float = 0.0) -> PromptSet:
    """Read the prompts of a file, a shipped set, or a list, split into those for training and those held out.

    Args:
        prompts: A `.txt` or `.jsonl` file, the name of a shipped set, or contexts themselves; strings among these
            become `Prompt`s.
        held_out_share: About which share to hold out where the prompts do not say so themselves. A hash of the text
            decides about each prompt alone: the same ones are held out everywhere, in any order, whatever is added. A
            text in the field `group` is hashed in place of it: a group is trained on as a whole, or not at all.

    Raises:
        UnknownNameError: No such file or set; names the closest.
        ConfigError: A file that cannot be read (names the line), or a share without meaning.
    """
    if not 0 <= held_out_share < 1:
        raise ConfigError(f"held_out_share must be in [0, 1), not {held_out_share}.")
    if not isinstance(prompts, str | Path):
        return _split([Prompt(_repaired(p)) if type(p) is str else p for p in prompts], held_out_share)
    path = _located(prompts)
    entries = _read(path)
    if not any(split for _, split in entries):
        return _split([prompt for prompt, _ in entries], held_out_share)
    if held_out_share:
        raise ConfigError(f"'{path}' says itself which prompts are held out: leave held_out_share at 0.")
    held_out = tuple(prompt for prompt, split in entries if split == "held_out")
    return PromptSet(tuple(prompt for prompt, split in entries if split != "held_out"), held_out)


def shares_of(contexts: Sequence[Any]) -> np.ndarray | None:
    """Compute the share of each context in training's draws, (n,) float64 with sum 1; None when all are equal."""
    weights = np.array([c.weight if isinstance(c, Prompt) else 1.0 for c in contexts])
    if (weights == weights[0]).all():
        return None
    weights /= weights.max()  # sums of very large ones would overflow
    return weights / weights.sum()


def are_none(contexts: Sequence[Any]) -> bool:
    """Tell whether contexts are those of an unconditional flow, `[None]`; arrays are compared with nothing."""
    return len(contexts) == 1 and contexts[0] is None


def picture_of(context: Any) -> str | None:
    """Give the file of a prompt's picture, as its field says; None where it has none."""
    place = context.fields.get(PICTURE) if isinstance(context, Prompt) else None
    return place if isinstance(place, str) and place else None


def with_picture(context: Any) -> dict[str, str]:
    """Name the picture of a context, as a part of what is written of it; nothing where it has none."""
    place = picture_of(context)
    return {} if place is None else {PICTURE: place}


def wanted(contexts: Any, n: int) -> Any:
    """Give contexts (B,), or their indices, as samples are asked for: `n` of a string or of the first, or those given.

    Raises:
        ConfigError: A number of samples that is none, or beside several contexts.
    """
    if contexts is None:
        return torch.zeros(counted("n", n, 0), dtype=torch.long)
    if isinstance(contexts, str):
        return [contexts] * counted("n", n)
    if n != 1:
        raise ConfigError(f"n = {n} goes with one prompt or none: repeat contexts of which there should be several.")
    return contexts


def positions_of(wanted: Sequence[Any], contexts: Sequence[Any], takes_new: bool = True) -> tuple[list[int], list[Any]]:
    """Find the wanted contexts among others, by text and picture; without a picture, the first of that text.

    `takes_new`: the flow has a condition, so that there can be others.

    Returns:
        The position of each, and those that are missing, once each: these stand behind the others.

    Raises:
        ConfigError: What is wanted is no list of contexts, or some are missing where there can be no others.
    """
    if not isinstance(wanted, Iterable):
        raise ConfigError(f"Contexts are a list of them, or a tensor of their indices (B,), not {shown(wanted)}.")
    found: dict[tuple[Any, str | None], int] = {}
    missing: list[Any] = []

    def add(context: Any, position: int) -> None:
        for picture in (None, picture_of(context)):
            found.setdefault((told_apart(context), picture), position)

    for i, context in enumerate(contexts):
        add(context, i)
    for context in wanted:
        if (told_apart(context), picture_of(context)) not in found:
            add(context, len(contexts) + len(missing))
            missing.append(context)
    if missing and not takes_new:
        raise ConfigError(f"This flow is unconditional and takes no contexts, as {shown(missing[0])}: sample(n=...).")
    return [found[told_apart(context), picture_of(context)] for context in wanted], missing


def fingerprint(contexts: Sequence[Any]) -> str | None:
    """Hash prompts with their weights and fields, in order; None where contexts are no prompts."""
    if not all(isinstance(context, Prompt) for context in contexts):
        return None
    entries = [[context, context.weight, sorted(context.fields.items())] for context in contexts]
    return hashlib.sha256(json.dumps(entries, default=dict).encode()).hexdigest()


def _repaired(text: str) -> str:
    """Decode text of a command line that was read in another encoding (the locale "C") as the UTF-8 that it was.

    Raises:
        ConfigError: It was none.
    """
    if not any(SURROGATES[0] <= character <= SURROGATES[1] for character in text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ConfigError(
            f"The prompt {text!r} is not UTF-8. Set a locale of UTF-8 (LC_ALL=C.UTF-8), or give the prompts as a file."
        ) from error


def shipped_sets() -> list[str]:
    """List the prompt sets that ship with flowrl."""
    return sorted(path.stem for path in SETS.glob("*.jsonl"))


def _split(prompts: list[Any], held_out_share: float) -> PromptSet:
    if held_out_share == 0:
        return PromptSet(tuple(prompts))
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigError(f"held_out_share splits prompts (str), and {prompt!r} is none.")
    held_out = tuple(prompt for prompt in prompts if _position(prompt) < held_out_share)
    train = tuple(prompt for prompt in prompts if _position(prompt) >= held_out_share)
    if not (train and held_out):
        raise ConfigError(
            f"held_out_share = {held_out_share:g} of {len(prompts)} prompts holds out {len(held_out)} and leaves "
            f"{len(train)} to train on: a hash of each text decides. Take another share, or say which are held out "
            'with "split" in a .jsonl file.'
        )
    return PromptSet(train, held_out)


def _position(prompt: str) -> float:
    """Map a prompt, or its group, to [0, 1) by the SHA-256 of its text: the same on every machine."""
    group = prompt.fields.get("group", prompt) if isinstance(prompt, Prompt) else prompt
    return int.from_bytes(hashlib.sha256(str(group).encode()).digest()[:6], "big") / 2**48


def _located(name: str | Path) -> Path:
    """Find the file of a shipped set, or a file of the user's."""
    known = shipped_sets()
    if str(name) in known:
        return SETS / f"{name}.jsonl"
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"Cannot read the prompt file '{name}': {error}") from error
    if path.suffix.lower() not in _PARSERS and not os.path.exists(path):
        raise UnknownNameError(
            f"There is no prompt file and no prompt set '{name}'.{did_you_mean(str(name), known)} Shipped sets: "
            f"{', '.join(known)}. A file ends in .txt (one prompt a line) or .jsonl (one JSON object a line)."
        )
    return path


def _read(path: Path) -> list[tuple[Prompt, str | None]]:
    """Read the prompts of a file with their split, in order."""
    if path.suffix.lower() not in _PARSERS:
        raise ConfigError(
            f"A prompt file ends in .txt (one prompt a line) or .jsonl (one JSON object a line); '{path}' does not."
        )
    parse = _PARSERS[path.suffix.lower()]
    entries: list[tuple[Prompt, str | None]] = []
    first: dict[tuple[str, str | None], int] = {}
    for number, line in _lines(path):
        try:
            entry = parse(_decoded(line))
            if entry is None:
                continue
            prompt = _with_picture_from(path.parent, entry[0])
            key = prompt, picture_of(prompt)
            if key in first:
                raise ConfigError(f"the prompt {str(prompt)!r} is in line {first[key]} already")
        except ConfigError as error:
            raise ConfigError(f"'{path}', line {number}: {error}.") from error
        first[key] = number
        entries.append((prompt, entry[1]))
    if not entries:
        raise ConfigError(f"The prompt file '{path}' holds no prompt.")
    return entries


def _with_picture_from(folder: Path, prompt: Prompt) -> Prompt:
    """Make the path of a prompt's picture absolute: a relative one counts from `folder`. Addresses stay as they are."""
    place = picture_of(prompt)
    if place is None or "://" in place:
        return prompt
    return Prompt(prompt, {**prompt.fields, PICTURE: os.path.abspath(folder / place)}, prompt.weight)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is no file")  # a pipe can be silent for ever
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        where = "" if path.is_absolute() else f" (from the folder '{Path.cwd()}')"
        raise ConfigError(f"Cannot read the prompt file '{path}'{where}: {reason}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"The prompt file '{path}' is larger than {MAX_BYTES / 1e6:g} MB. All prompts are encoded and kept in "
            "memory before training: take fewer."
        )
    return enumerate(re.split(rb"\r\n|\n|\r", data.removeprefix(b"\xef\xbb\xbf")), start=1)


def _decoded(line: bytes) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{len(text)} characters; a line may have {MAX_CHARACTERS}")
    return text


def _text_line(line: str) -> tuple[Prompt, str | None] | None:
    return None if not line or line.startswith("#") else (Prompt(line), None)


def _json_line(line: str) -> tuple[Prompt, str | None] | None:
    if not line:
        return None
    expected = 'expected a JSON object such as {"prompt": "a red car", "weight": 2}'
    try:
        entry = json.loads(line, parse_constant=_no_number, object_pairs_hook=_once_each)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{expected}; this is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{expected}, not {line[:60]!r}")
    text = entry.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f'{expected}: "prompt" must be a text that is not empty, not {text!r}')
    if any(SURROGATES[0] <= character <= SURROGATES[1] for character in text):
        raise ConfigError('"prompt" holds half of a surrogate pair: no text encoder can read it')
    split = entry.pop("split", None)
    if split not in (None, "train", "held_out"):
        raise ConfigError(f'"split" must be "train" or "held_out", not {split!r}')
    return Prompt(text.strip(), weight=entry.pop("weight", 1.0), fields=entry), split


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"the field '{name}' is there twice")
        found[name] = value
    return found


_PARSERS = {".txt": _text_line, ".jsonl": _json_line}
