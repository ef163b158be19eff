"""Rows of figures to logs: no table, file or console that cannot take one ends a run."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from stable_baselines3.common.logger import DISABLED, HumanOutputFormat, KVWriter, Logger


def printable(text: str, file: Any = None) -> str:
    """Escape the characters that a stream cannot take."""
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def distinct(names: list[str], most: int) -> list[str]:
    """Shorten names in the middle to so many characters, so that no two are the same."""
    cut: list[str] = []
    for name in names:
        plain = " ".join(name.split()) or "(no name)"
        half = (most - 3) // 2
        short = plain if len(plain) <= most else f"{plain[: most - 3 - half]}...{plain[-half:]}"
        number = 2
        while short in cut:
            mark = f"~{number}"
            short, number = f"{plain[: most - len(mark)]}{mark}", number + 1
        cut.append(short)
    return cut


class Table(HumanOutputFormat):
    """The table of stable-baselines3, for names of any length and in any script."""

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        """Write a table."""
        write_table(self, key_values, key_excluded, step)


def write_table(table: HumanOutputFormat, values: dict[str, Any], excluded: dict[str, Any], step: int) -> None:
    """Write a row as a table."""
    named: dict[str, list[str]] = {}
    for key in sorted(values):
        tag, slash, _ = key.partition("/")
        named.setdefault(tag + slash if tag else "", []).append(key)
    shown: dict[str, str] = {}
    for tag, keys in named.items():
        own = distinct([printable(key.removeprefix(tag), table.file) for key in keys], table.max_length - 3)
        shown |= {key: printable(tag, table.file) + name for key, name in zip(keys, own)}
    HumanOutputFormat.write(
        table,
        {shown[key]: printable(v, table.file) if isinstance(v, str) else v for key, v in values.items()},
        {shown[key]: excluded[key] for key in values},
        step,
    )


def dump(log: Logger, step: int) -> None:
    """Write what was recorded, as `Logger.dump` does; a writer that fails is said to, once, and the run goes on."""
    for writer in log.output_formats if log.level != DISABLED else ():
        if not isinstance(writer, KVWriter):
            continue
        try:
            if type(writer) is HumanOutputFormat:
                write_table(writer, log.name_to_value, log.name_to_excluded, step)
            else:
                writer.write(log.name_to_value, log.name_to_excluded, step)
        except Exception as error:
            if not getattr(writer, "has_failed", False):
                writer.has_failed = True  # type: ignore[attr-defined]
                warnings.warn(
                    f"{type(writer).__name__} cannot write: {type(error).__name__} {error}. Training goes on.",
                    stacklevel=2,
                )
    log.name_to_value.clear()
    log.name_to_count.clear()
    log.name_to_excluded.clear()
