"""Imports that the process of a dry run puts off until something of them is used.

To look up one network of diffusers imports peft with bitsandbytes, torch's compiler and much of scipy, which takes
longer than the dry run itself. Within `imports_put_off` other modules get a stand-in of these; what they take from it
is the real thing from its first use on. For a process that predicts and ends: training has the real modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

PUT_OFF = (
    "bitsandbytes",
    "peft",
    "scipy",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
)
REAL_PARTS = ("torch._dynamo.config",)
"""Settings: small modules of their own."""
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")
"""Of torch's compiler, which has nothing to compile in a dry run."""


@contextmanager
def imports_put_off() -> Iterator[None]:
    """Give stand-ins of `PUT_OFF` to whatever imports them meanwhile, but for what is imported already."""
    finder = _Finder([root for root in PUT_OFF if root not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for root in [*finder.roots]:
            finder.release(root)


class _Late:
    """A function, class or table of a module that is not imported yet."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        module = _imported(self._module)
        with suppress(AttributeError):
            return getattr(module, self._name)
        return _imported(f"{self._module}.{self._name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        there = sys.modules.get(self._module)
        if there is None or isinstance(there, _StandIn):
            return False  # nothing can be of a class that nobody has imported
        return isinstance(instance, self._real())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __eq__(self, other: object) -> bool:
        return bool(self._real() == other)

    def __hash__(self) -> int:
        return hash(self._real())

    def __bool__(self) -> bool:
        return bool(self._real())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __contains__(self, item: Any) -> bool:
        return item in self._real()

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __or__(self, other: Any) -> Any:
        return self._real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real()


class _StandIn(ModuleType):
    """A module that is not imported yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if sys.modules.get(self.__name__) is not self:
            return getattr(_imported(self.__name__), name)
        if self.__name__ == "torch._dynamo" and name in DECORATORS:
            return _left_as_it_is
        return _Late(self.__name__, name)


class _Finder:
    """Finder that gives stand-ins of modules that are there; by `importlib`'s protocol also their loader."""

    def __init__(self, roots: list[str]) -> None:
        self.roots = roots

    def root_of(self, name: str) -> str | None:
        """Find which of the roots a module belongs to, if it is stood in for."""
        if name in REAL_PARTS:
            return None
        return next((root for root in self.roots if f"{name}.".startswith(f"{root}.")), None)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module as `importlib` does; None for what is not stood in for, or not there."""
        if self.root_of(name) is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing."""

    def release(self, root: str) -> None:
        """Let the next import of a root be that of the real one."""
        self.roots.remove(root)
        if not isinstance(sys.modules.get(root), _StandIn):
            return
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{root}.")]:
            module, (parent, _, last) = sys.modules.pop(name), name.rpartition(".")
            if vars(sys.modules.get(parent, object)).get(last) is module:
                delattr(sys.modules[parent], last)


def _imported(name: str) -> ModuleType:
    """Import the real module, also where stand-ins are given."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        if (root := finder.root_of(name)) is not None:
            finder.release(root)
    with _disable_current_modes():  # tensors that a module makes for itself are real ones
        return importlib.import_module(name)


def _left_as_it_is(marked: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Give a function or class back, or what does: a decorator of a compiler that this process does not use."""
    return marked if callable(marked) else _left_as_it_is
