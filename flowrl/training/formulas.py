"""Changes of what an algorithm computes with the same settings: checkpoints of before are told when they train on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A change of an algorithm's formula.

    Attributes:
        text: What is otherwise now.
        setting: Only where this setting is given; empty for all runs.
        unless: And this one is not.
    """

    text: str
    setting: str = ""
    unless: str = ""


CHANGES: Mapping[str, tuple[Change, ...]] = {
    "crd": (Change("errors, and so beta, are of sums over dimensions, and were of their means"),),
    "flow_grpo": (
        Change("target_lambda goes by the slope of the advantages, and went by their spread", "target_lambda"),
    ),
    "tilt": (
        Change("a critic learns from own and reference samples by their shares of the mixture, and did by halves"),
    ),
    "ram": (Change("target_lambda goes by the slope of rewards that are not centred", "target_lambda", "centred"),),
}
"""By algorithm, the oldest first; checkpoints say how many there were."""


def tell_changes(config: Mapping[str, Any], folder: Path, to_train: bool = True) -> None:
    """Warn of what changed after the `config.json` of a checkpoint was written, with its settings."""
    name, settings, known = config["algorithm"], config["settings"], config.get("formulas")
    for change in CHANGES.get(name, ())[known if isinstance(known, int) and known > 0 else 0 :] if to_train else ():
        if (not change.setting or settings.get(change.setting)) and not settings.get(change.unless):
            warnings.warn(
                f"'{folder}' was perhaps written before a change of {name}: {change.text}. Then it does not go on as "
                "it began: train on with the flowrl that wrote it, or start anew (--config).",
                stacklevel=3,
            )
