"""Small random pipelines of each declared class, and what their own calls give; `CASES` lists those of every module."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from families.case import Case

MODULES = [import_module(f"families.{found.name}") for found in iter_modules(__path__)]
CASES: dict[str, Case] = {case.name: case for module in MODULES for case in getattr(module, "CASES", ())}
