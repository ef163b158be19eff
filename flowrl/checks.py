"""Values from files (TOML, JSON) against the types of a dataclass's fields."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

from flowrl.errors import ConfigError

LARGEST_INT = 2**63 - 1
"""Larger ones fit into no tensor."""
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def python_value(value: Any) -> Any:
    """Convert scalars of numpy and torch to Python numbers, also within a list or tuple; anything else stays."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(python_value(part) for part in value)
    return value


def take_python_values(config: Any) -> None:
    """Replace scalars of numpy and torch among the fields of a dataclass, which may be frozen, by Python numbers."""
    for field in fields(config):
        object.__setattr__(config, field.name, python_value(getattr(config, field.name)))


def told_apart(context: Any) -> Any:
    """Give a hashable value that tells contexts apart: arrays by all their digits, which `repr` does not show."""
    if isinstance(context, torch.Tensor | np.ndarray):
        values = np.asarray(context.detach().cpu() if isinstance(context, torch.Tensor) else context)
        return type(context).__name__, values.dtype.str, values.shape, repr(values.tolist())
    if type(context) in (list, tuple):
        return type(context).__name__, tuple(map(told_apart, context))
    return repr(context)


def in_all(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the names that are in all of several mappings, such as components of batches, in the order of the first."""
    return [name for name in parts[0] if all(name in part for part in parts)]


def check_types(cls: type, values: Mapping[str, Any], what: str = "") -> None:
    """Check values against the fields of a dataclass, as far as a file can hold them: objects are no numbers, and may
    be anything else.

    Args:
        cls: A dataclass.
        values: By the name of the field; unknown names are passed over.
        what: Prefix of the name in the message.

    Raises:
        ConfigError: One does not, or is NaN, or larger than numbers are here.
    """
    hints = _hints(cls)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            expected = _words(hints[name])
            raise ConfigError(f"{what}{name} must be {expected}, not {shown(value)}.")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a plain value is of an annotated type; an object may be of any but numbers and None."""
    if kind is Any:
        return True
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if not isinstance(value, PLAIN):
        return kind not in (bool, int, float, type(None))
    if origin is Literal:
        return value in parts
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and abs(value) <= LARGEST_INT
    if kind is float and isinstance(value, int):
        return abs(value) <= LARGEST_INT
    if kind is float:
        return isinstance(value, float) and not math.isnan(value)
    if origin is tuple or kind is tuple:
        return isinstance(value, list | tuple) and all(fits(part, (parts or (Any,))[0]) for part in value)
    return isinstance(value, kind) if kind in (str, dict, list, type(None)) else True


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # names that a third party imports for type checkers only
        return {}


def _words(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, parts))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if get_origin(kind) is tuple:
        return "a list"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """Shorten a value of a file for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number too long to be written"


def described(value: Any) -> str:
    """Describe a value for a message: a tensor by type and shape, a tuple by its parts, others by their type."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple) and value:
        return f"a tuple of {', '.join(map(described, value))}"
    return "nothing (None)" if value is None else f"a {type(value).__name__}"


def is_whole(value: Any, least: int = 0, most: int = LARGEST_INT) -> bool:
    """Tell whether a value is an int (and no bool) in this range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def counted(name: str, value: Any, least: int = 1) -> int:
    """Give a number of things as an int; 1e5 is one, too.

    Raises:
        ConfigError: It is no whole number, or less than `least`.
    """
    number = python_value(value)
    if not is_finite(number) or number < least or number != int(number):
        raise ConfigError(f"{name} must be a whole number, {least} or more, not {shown(value)}.")
    return int(number)


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number (and no bool) that a float can hold."""
    return fits(value, float) and isinstance(value, int | float) and math.isfinite(value)


def check_has_values() -> None:
    """Check that torch makes tensors with values by default.

    Raises:
        ConfigError: It does not; says what to call.
    """
    if torch.get_default_device().type == "meta":
        raise ConfigError(
            "torch's default device is 'meta', whose tensors hold no values: call torch.set_default_device('cpu') "
            "before, or work outside of `with torch.device('meta')`."
        )


def of_one_kind(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Tell whether stored numbers can stand for those of a tensor: of its type, or floats of another size."""
    return stored.dtype == own.dtype or (stored.is_floating_point() and own.is_floating_point())
