"""Names of algorithms and environments, and how a name on the command line becomes a class.

A name is either registered ("orw_w2") or points into any importable module
("mypkg.algos:MyAlgo", "mypkg.envs:my-env"), so that third parties need no fork.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from flowrl.errors import ConfigError, FlowRLError, UnknownNameError


@dataclass(frozen=True)
class EnvSpec:
    """A registered environment.

    Attributes:
        name: What `--env` takes; Gymnasium's id is `flowrl/NAME-vVERSION`.
        factory: `factory(config) -> GenerationEnv`.
        config: A frozen dataclass instance; its fields are the `--env.X` settings.
        recommended: `recommended(config) -> {setting: value}`: algorithm settings that suit this environment,
            used for every setting that the user does not give. A key is a setting's name, or
            `"ALGO.setting"` for one algorithm only.
        total_timesteps: How many samples `flowrl.run` trains on unless told otherwise.
        summary: One line for the list of environments.
    """

    name: str
    factory: Callable[[Any], Any]
    config: Any
    recommended: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    total_timesteps: int = 20_000
    version: int = 0
    summary: str = ""

    @property
    def gymnasium_id(self) -> str:
        """The id for `gymnasium.make`."""
        return f"flowrl/{self.name}-v{self.version}"

    def configured(self, settings: Mapping[str, Any]) -> Any:
        """The config with these settings; nothing is made or loaded.

        Raises:
            UnknownNameError: An unknown setting; names the closest.
        """
        known = [f.name for f in fields(self.config)]
        for key in settings:
            if key not in known:
                raise UnknownNameError.of(f"setting of environment '{self.name}'", key, known)
        return replace(self.config, **settings)


ALGORITHMS: dict[str, type] = {}
ENVIRONMENTS: dict[str, EnvSpec] = {}


def register_algorithm(name: str) -> Callable[[type], type]:
    """Class decorator: `@register_algorithm("my_algo")` makes the class known as `--algo my_algo`."""

    def register(cls: type) -> type:
        if ALGORITHMS.get(name, cls).__qualname__ != cls.__qualname__:
            raise ConfigError(f"An algorithm '{name}' is registered already: {ALGORITHMS[name].__qualname__}.")
        ALGORITHMS[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return register


def algorithm_class(name: str) -> type:
    """Class of a registered name or of `module:Class`.

    Raises:
        UnknownNameError: No such name; the message names the closest.
    """
    if ":" in name:
        module, attribute = _import(name)
        cls = getattr(module, attribute, None)
        if not isinstance(cls, type):
            raise UnknownNameError.of(f"class in module '{module.__name__}'", attribute, _classes(module))
        return cls
    if name not in ALGORITHMS:
        raise UnknownNameError.of("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def environment_spec(name: str) -> EnvSpec:
    """Spec of a registered name, of `module:name` (the module registers it), or of a Gymnasium id.

    Raises:
        UnknownNameError: No such name; the message names the closest.
    """
    if ":" in name:
        _, name = _import(name)
    if name.startswith("flowrl/"):
        name = name.removeprefix("flowrl/").rpartition("-v")[0]
    if name not in ENVIRONMENTS:
        raise UnknownNameError.of("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]


def _import(name: str) -> tuple[Any, str]:
    module_name, _, attribute = name.partition(":")
    try:
        return importlib.import_module(module_name), attribute
    except ModuleNotFoundError as error:
        raise UnknownNameError(
            f"Cannot import '{module_name}' of '{name}': {error}. "
            "The part before ':' must be a module that Python can import from here."
        ) from error
    except FlowRLError:
        raise
    except Exception as error:
        raise UnknownNameError(
            f"Importing '{module_name}' of '{name}' failed: {type(error).__name__}: {error}"
        ) from error


def _classes(module: Any) -> list[str]:
    return [key for key, value in vars(module).items() if isinstance(value, type)]
