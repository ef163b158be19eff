"""Sizes of samples as they are written: `--env.resolution 768x1344`, or `--env.height` and `--env.width`."""

from __future__ import annotations

import re

from flowrl.errors import ConfigError

SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def sides(resolution: int | str | None, height: int | None, width: int | None) -> int | tuple[int, int] | None:
    """Read height and width in pixels: one number for both, a pair, or None where nothing is said.

    Raises:
        ConfigError: It is no size, is said twice, or one side is missing.
    """
    if resolution is None and height is None and width is None:
        return None
    if resolution is not None and (height is not None or width is not None):
        raise ConfigError("--env.resolution and --env.height, --env.width say the same: give one or the others.")
    if resolution is None:
        if height is None or width is None:
            raise ConfigError("--env.height and --env.width go together; --env.resolution is for both sides at once.")
        found: int | tuple[int, int] = (height, width)
    else:
        match = SIZE.fullmatch(str(resolution).strip())
        if match is None:
            raise ConfigError(
                f"resolution is a number of pixels, or HEIGHTxWIDTH, e.g. 768x1344, not {str(resolution)!r}."
            )
        found = int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))
    if min(found if isinstance(found, tuple) else (found,)) < 1:
        raise ConfigError(f"Height and width must be positive, not {found if isinstance(found, int) else list(found)}.")
    return found
