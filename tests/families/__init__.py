"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists those of every module."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from conftest import COMPLETE

from families.case import Case


def _modules() -> list[ModuleType]:
    """Import those whose classes the installed diffusers has: all, unless it is an older one."""
    found = []
    for place in iter_modules(__path__):
        try:
            found.append(import_module(f"families.{place.name}"))
        except ImportError:
            if COMPLETE:
                raise
    return found


CASES: dict[str, Case] = {case.name: case for module in _modules() for case in getattr(module, "CASES", ())}
