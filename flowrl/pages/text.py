"""Numbers and tables as text, for pages in HTML and in Markdown alike."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flowrl.checks import is_finite

MISSING = "\u2013"


def number(value: Any) -> str:
    """Write a number with four digits; a dash for what is none, or not finite."""
    return f"{value:.4g}" if is_finite(value) else MISSING


def span(interval: Any) -> str:
    """Write an interval, "LOW to HIGH"; a dash where there is none, as of samples of one prompt of many."""
    ends = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    return f"{number(ends[0])} to {number(ends[1])}" if all(map(is_finite, ends)) else MISSING


def count(value: Any) -> str:
    """Write a whole number with separators; a dash likewise."""
    return f"{int(value):,}" if is_finite(value) else MISSING


def change(before: Any, after: Any) -> str:
    """Write the difference with its sign; nothing where one of the two is missing."""
    return f"{after - before:+.4g}" if before is not None and after is not None else ""


def duration(hours: float) -> str:
    """Write a time in seconds, minutes or hours."""
    if not math.isfinite(hours):
        return MISSING
    seconds = round(hours * 3600)
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{hours:.1f} h"


def setting(value: Any) -> str:
    """Write the value of a setting: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown; what would end a cell or begin a tag stands for itself."""
    lines = [_markdown_row(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *map(_markdown_row, rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    plain = (re.sub(r"[\\|<]", r"\\\g<0>", " ".join(cell.split())) for cell in cells)
    return "| " + " | ".join(plain) + " |"
