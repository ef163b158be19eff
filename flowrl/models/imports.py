"""Imports from diffusers and transformers, with errors that name what failed first."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from flowrl.errors import ModelLoadError, in_a_line

FROZEN_BY_PYTHON = 1000
"""Fewer objects are frozen from the start (none in Python 3.11, 375 in 3.12); more are somebody's, and stay so."""


def looked_up(library: str, name: str) -> Any:
    """Look up a class of one of these libraries, which import it then.

    Raises:
        ModelLoadError: There is none, or an import within failed; names the first that did.
    """
    with importing():
        found = getattr(importlib.import_module(library), name, None)
    if found is None:
        raise ModelLoadError(
            f"{library} {version(library)}, as installed, has no class '{name[:100]}': update it, or mend that name."
        )
    return found


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Leave garbage for later: an import makes little of it, and so many objects that every look at them takes long."""
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        imported = len(sys.modules) != before  # else nothing is to do, and many frozen objects take long to count
        if was_on and imported and gc.get_freeze_count() < FROZEN_BY_PYTHON:
            gc.freeze()
            gc.unfreeze()  # all there is counts as old now, and is not looked at next
        if was_on:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Turn what the lazy imports of these libraries raise into one error.

    Raises:
        ModelLoadError: An import within failed; names the first that did.
    """
    try:
        with without_garbage_collection():
            yield
    except Exception as error:
        if (failed := first_failure(error)) is None:
            raise
        raise ModelLoadError(failed) from error


def first_failure(error: BaseException) -> str | None:
    """Say which import failed first, where an error of loading is none of the files; None where it is."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    if not any(isinstance(link, ImportError) or "Failed to import" in str(link) for link in chain):
        return None
    first = chain[-1]
    return (
        "A library cannot be imported here; what failed first was "
        f"{in_a_line(first)}. The files are not at fault. Mend that package: it is missing, or built for "
        "another version (a torchvision of another build than torch, say: install the one of this torch, or none)."
    )
