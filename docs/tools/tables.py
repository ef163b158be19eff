"""Tables of the pages that are made from the code: settings, recommendations, lists of what is registered.

A table stands between `<!-- table: KIND ARGUMENTS -->` and `<!-- end of table -->`. After a change of settings:

    python docs/tools/tables.py          # writes the tables anew
    python docs/tools/tables.py --check  # says which pages are out of date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowrl import FlowConfig, algorithm_class
from flowrl.envs.registration import CustomConfig
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, EnvSpec, environment_spec
from flowrl.training.transitions import TransitionAlgorithm

DOCS = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(<!-- table: ([^>]*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Row = tuple[str, ...]


def settings(name: str, beyond: str = "") -> list[Row]:
    """Settings of an algorithm that every algorithm (or `beyond`) does not have, or has with another default."""
    base = stated(algorithm_class(beyond).Config if beyond else FlowConfig)  # type: ignore[attr-defined]
    own = stated(algorithm_class(name).Config)  # type: ignore[attr-defined]
    return [("setting", "default", "meaning"), *(row for key, row in own.items() if base.get(key) != row)]


def common() -> list[Row]:
    """Settings that every algorithm has."""
    return [("setting", "default", "meaning"), *stated(FlowConfig).values()]


def environment(name: str) -> list[Row]:
    """Settings of an environment."""
    return [("setting", "default", "meaning"), *stated(type(environment_spec(name).config)).values()]


def recommended(name: str, *given: str) -> list[Row]:
    """Settings of algorithms that an environment recommends, with settings of its own `given` as KEY=VALUE."""
    spec = environment_spec(name)
    found: dict[str, list[str]] = {}
    for key, value in spec.recommended(spec.configured(dict(text.split("=") for text in given))).items():
        kind, _, setting = key.rpartition(".")
        found.setdefault(kind, []).append(f"`{setting}` {shown(value)}")
    shipped = {name: cls for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl.")}
    of_kind = {kind: [n for n, cls in shipped.items() if f"{cls.kind}.".startswith(f"{kind}.")] for kind in found}  # type: ignore[attr-defined]
    rows = [
        (f"`{kind}`: " + ", ".join(of_kind[kind]) if kind else "all that have them", ", ".join(values))
        for kind, values in found.items()
    ]
    return [("kind of algorithm", "recommended settings"), *(rows or [("all", "none: their own defaults")])]


def environments(prefix: str = "") -> list[Row]:
    """Registered environments whose names begin with `prefix`."""
    rows = [
        (f"`{spec.name}`", cell(spec.summary), f"{spec.total_timesteps:,}")
        for spec in ENVIRONMENTS.values()
        if spec.name.startswith(prefix) and is_shipped(spec)
    ]
    return [("environment", "what", "samples of a run"), *rows]


def algorithms() -> list[Row]:
    """Registered algorithms, with links to their pages."""
    rows = [
        (
            f"[`{name}`](algorithms/{name}.md)",
            cell((cls.__doc__ or "").splitlines()[0]),
            "steps of the sampler" if issubclass(cls, TransitionAlgorithm) else "samples",
        )
        for name, cls in sorted(ALGORITHMS.items(), key=lambda item: issubclass(item[1], TransitionAlgorithm))
        if is_own(cls)
    ]
    return [("algorithm", "what", "learns from"), *rows]


def is_own(made: Any) -> bool:
    """Whether it comes with flowrl; tests and users register others."""
    return made.__module__.startswith("flowrl.")


def is_shipped(spec: EnvSpec) -> bool:
    """Whether an environment comes with flowrl."""
    return is_own(type(spec.config)) and not isinstance(spec.config, CustomConfig)


def stated(config: type) -> dict[str, Row]:
    """Name, default and docstring of each field of a dataclass, as cells of a table."""
    texts = docstrings(config)
    return {
        field.name: (f"`{field.name}`", shown(field.default), cell(texts[field.name]))
        for field in fields(config)
        if field.default is not MISSING
    }


def docstrings(config: type) -> dict[str, str]:
    """The text below each field, in the class or the nearest parent that states it."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for statement, text in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[statement.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[union-attr]
    return texts


def shown(value: Any) -> str:
    """A value as code; nothing for an empty one."""
    if value is None or value == "" or value == ():
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def cell(text: str) -> str:
    """Plain text in a cell of a table."""
    return re.sub(r"([|*])", r"\\\1", text)


def markdown(rows: Iterable[Row]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


KINDS = {
    "settings": settings,
    "settings of all": common,
    "environment": environment,
    "recommended": recommended,
    "environments": environments,
    "algorithms": algorithms,
}


def renewed(text: str) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        begin, what, end = match.groups()
        kind = max((kind for kind in KINDS if what.startswith(kind)), key=len)
        rows = KINDS[kind](*what.removeprefix(kind).replace(" beyond ", " ").split())
        return f"{begin}\n{markdown(rows)}\n{end}"

    return TABLE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is out of date")
    check = parser.parse_args().check
    outdated = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            outdated.append(page)
            if not check:
                page.write_text(renewed(text), encoding="utf-8")
    for page in outdated:
        print(f"{'out of date' if check else 'written'}: {page.relative_to(DOCS.parent)}")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
