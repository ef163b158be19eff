"""Names of algorithms and environments, and their look-up.

A name is either registered ("orw_w2") or points into any importable module
("mypkg.algos:MyAlgo", "mypkg.envs:my-env"), so that third parties need no fork.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from flowrl.checks import check_types, python_value
from flowrl.errors import ConfigError, FlowRLError, UnknownNameError
from flowrl.shipped import SHIPPED, Shipped


@dataclass(frozen=True)
class EnvSpec:
    """A registered environment.

    Attributes:
        name: Name for `--env`; Gymnasium's id is `flowrl/NAME-vVERSION`.
        factory: `factory(config) -> GenerationEnv`.
        config: A frozen dataclass instance; its fields are the `--env.X` settings.
        recommended: `recommended(config) -> {setting: value}`: algorithm settings that suit this environment,
            used for every setting that the user does not give. A key is a setting's name, or `"KIND.setting"` for
            algorithms of one kind (docs/how-to/algorithm.md), so that a new one starts with them; shipped environments
            name no algorithm, but `"ALGO.setting"` works too.
        total_timesteps: Default number of samples of a `flowrl.run`.
        summary: One line for the list of environments.
        differentiable: Whether its own reward has a gradient by the samples, as methods that learn from it need; None
            where that is not known.
    """

    name: str
    factory: Callable[[Any], Any]
    config: Any
    recommended: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    total_timesteps: int = 20_000
    version: int = 0
    summary: str = ""
    differentiable: bool | None = False

    @property
    def gymnasium_id(self) -> str:
        """The id for `gymnasium.make`."""
        return f"flowrl/{self.name}-v{self.version}"

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """Make the config with these settings; nothing is made or loaded from it.

        Raises:
            UnknownNameError: An unknown setting; names the closest.
        """
        known = [f.name for f in fields(self.config)]
        for key in settings:
            if key not in known:
                raise UnknownNameError.of(f"setting of environment '{self.name}'", key, known)
        settings = {key: python_value(value) for key, value in settings.items()}
        check_types(type(self.config), settings, f"The setting of environment '{self.name}' ")
        return replace(self.config, **settings)


class Algorithms(MutableMapping[str, type]):
    """Registered algorithms by name; one that ships is imported when its class is first asked for.

    Args:
        shipped: Those that ship, by name.
    """

    def __init__(self, shipped: Mapping[str, Shipped]) -> None:
        self._known: dict[str, type | Shipped] = dict(shipped)

    def __getitem__(self, name: str) -> type:
        known = self._known[name]
        if isinstance(known, type):
            return known
        return getattr(importlib.import_module(known.module), known.name)

    def __setitem__(self, name: str, cls: type) -> None:
        self._known[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self._known)

    def class_name(self, name: str) -> str:
        """Give the name of a class; nothing is imported."""
        known = self._known[name]
        return known.__qualname__ if isinstance(known, type) else known.name

    def summary(self, name: str) -> str:
        """Give the first line of a class's docstring; nothing is imported."""
        known = self._known[name]
        return (known.__doc__ or "").strip().partition("\n")[0] if isinstance(known, type) else known.summary


ALGORITHMS = Algorithms(SHIPPED)
ENVIRONMENTS: dict[str, EnvSpec] = {}


def algorithms_with(setting: str) -> list[str]:
    """Name the registered algorithms that have a setting."""
    return [name for name, cls in ALGORITHMS.items() if setting in {f.name for f in fields(cls.Config)}]  # type: ignore[attr-defined]


def check_registered_name(kind: str, name: str) -> None:
    """Check that a name can be an option's value, the name of a folder, and part of a Gymnasium id.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(name, str):
        raise ConfigError(
            f"The decorator of an {kind} takes its name first, @flowrl.register_...('my-name'), not {name!r}."
        )
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise ConfigError(f"The name of an {kind} has letters, digits, '-', '_' and '.' only, not {name!r}.")


def register_algorithm(name: str) -> Callable[[type], type]:
    """Decorate a class: `@register_algorithm("my_algo")` makes it known as `--algo my_algo`."""

    check_registered_name("algorithm", name)

    def register(cls: type) -> type:
        if not isinstance(cls, type):
            raise ConfigError(
                f"register_algorithm('{name}') decorates a class derived from flowrl.FlowAlgorithm, not {cls!r}."
            )
        if missing := ", ".join(sorted(getattr(cls, "__abstractmethods__", ()))):
            raise ConfigError(f"{cls.__name__} has no {missing}: every algorithm writes it (docs/how-to/algorithm.md).")
        if name in ALGORITHMS and (other := ALGORITHMS.class_name(name)) != cls.__qualname__:
            raise ConfigError(f"An algorithm '{name}' is registered already: {other}.")
        ALGORITHMS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return register


def algorithm_class(name: str) -> type:
    """Look up the class of a registered name or of `module:Class`.

    Raises:
        UnknownNameError: No such name; the message names the closest.
        ConfigError: The class lacks a method.
    """
    if ":" in name:
        module, attribute = _import(name)
        cls = getattr(module, attribute, None)
        if not isinstance(cls, type):
            raise UnknownNameError.of(f"class in module '{module.__name__}'", attribute, _classes(module))
    elif name not in ALGORITHMS:
        raise UnknownNameError.of("algorithm", name, ALGORITHMS)
    else:
        cls = ALGORITHMS[name]
    missing = getattr(cls, "__abstractmethods__", None)
    if missing and hasattr(cls, "Config"):  # other classes are told by whoever wants an algorithm
        raise ConfigError(f"'{name}' lacks the method {', '.join(sorted(missing))}, which an algorithm must write.")
    return cls


def environment_spec(name: str) -> EnvSpec:
    """Look up the spec of a registered name, of `module:name` (the module registers it), or of a Gymnasium id.

    Raises:
        UnknownNameError: No such name; the message names the closest, or says that the module has not registered it.
    """
    if ":" in name:
        whole = name
        module, name = _import(name)
        if name not in ENVIRONMENTS and hasattr(module, name):
            raise UnknownNameError(
                f"'{whole}' is there, and is no registered environment: put @flowrl.register_env('{name}', ...) above "
                "it (docs/environments.md)."
            )
    if name.startswith("flowrl/"):
        name, _, version = name.removeprefix("flowrl/").rpartition("-v")
        name = name if version.isdecimal() else f"{name}-v{version}"
    if name not in ENVIRONMENTS:
        raise UnknownNameError.of("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]


_NAMED_BY: ContextVar[tuple[str, str] | None] = ContextVar("_NAMED_BY", default=None)


@contextmanager
def named_by_a_file(file: str, remedy: str) -> Iterator[None]:
    """Make a context in which names come from a file, which may be somebody else's: nothing new is imported.

    Args:
        file: Name of the file, for the message of the error.
        remedy: Way for a user to have a module imported, for that message.
    """
    token = _NAMED_BY.set((file, remedy))
    try:
        yield
    finally:
        _NAMED_BY.reset(token)


def naming_file() -> str | None:
    """Give the file that names come from, in such a context; None where they are the user's own."""
    named_by = _NAMED_BY.get()
    return None if named_by is None else named_by[0]


def import_module(name: str) -> Any:
    """Import the module of a `module:name`.

    Raises:
        ImportError: There is none, or it fails.
        ConfigError: A file names it, and the user has not.
    """
    named_by = _NAMED_BY.get()
    if named_by is not None and name not in sys.modules:
        file, remedy = named_by
        raise ConfigError(
            f"{file} names the module '{name[:100]}', which is not imported here. Code named by a file is never "
            f"imported: {remedy}."
        )
    return importlib.import_module(name)


def own_module(name: str, of: str = "") -> Any:
    """Import a module of the user's.

    Raises:
        UnknownNameError: It cannot be imported.
    """
    of = f" of '{of}'" if of else ""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UnknownNameError(
            f"Cannot import '{name}'{of}: {error}. It must be a module that Python can import from here."
        ) from error
    except FlowRLError:
        raise
    except Exception as error:
        raise UnknownNameError(f"Importing '{name}'{of} failed: {type(error).__name__}: {error}") from error


def _import(name: str) -> tuple[Any, str]:
    module, _, attribute = name.partition(":")
    return own_module(module, name), attribute


def _classes(module: Any) -> list[str]:
    return [key for key, value in vars(module).items() if isinstance(value, type)]
