"""Results that a script has made before and does not make again."""

from __future__ import annotations

import argparse
import json
from typing import Any

GRID = {"alphas", "methods", "out", "seeds", "tasks"}
"""Options that say which results are made; all others say how."""


def kept_results(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read `results.json` of the folder `args.out`, which is made, and keep the other options that they are made with.

    Exits where there are results that were made with others: one table would hold both.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path, file = args.out / "results.json", args.out / "options.json"
    usual = {name: parser.get_default(name) for name in vars(args) if name not in GRID}
    asked = json.loads(json.dumps({name: getattr(args, name) for name in usual}))
    results = json.loads(path.read_text()) if path.exists() else []
    made = json.loads(file.read_text()) if file.exists() else usual
    if results and (odd := [name for name in usual if made.get(name) != asked[name]]):
        said = ", ".join(f"--{name.replace('_', '-')} {made.get(name)!r}, not {asked[name]!r}" for name in odd)
        raise SystemExit(f"{path} holds results with other options ({said}): take another --out.")
    if asked != usual or file.exists():
        file.write_text(json.dumps(asked) + "\n")
    return results
