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
        unless: And this one has not this value.
    """

    text: str
    setting: str = ""
    unless: tuple[str, Any] = ("", None)


CHANGES: Mapping[str, tuple[Change, ...]] = {
    "crd": (Change("errors, and so beta, are of sums over dimensions, and were of their means"),),
    "flow_grpo": (
        Change("target_lambda goes by the slope of the advantages, and went by their spread", "target_lambda"),
    ),
    "tilt": (
        Change(
            "a critic learns from own and reference samples by their shares of the mixture, and did by halves",
            unless=("control_variate", "one"),
        ),
    ),
    "ram": (
        Change("target_lambda goes by the slope of rewards that are not centred", "target_lambda", ("centred", True)),
    ),
}
"""By algorithm, the oldest first; checkpoints say how many there were."""


def tell_changes(config: Mapping[str, Any], folder: Path, to_train: bool = True) -> None:
    """Warn of what changed after the `config.json` of a checkpoint was written, with its settings."""
    algorithm, settings, known = config["algorithm"], config["settings"], config.get("formulas")
    for change in (
        CHANGES.get(algorithm, ())[known if isinstance(known, int) and known > 0 else 0 :] if to_train else ()
    ):
        name, value = change.unless
        if (not change.setting or settings.get(change.setting)) and (not name or settings.get(name) != value):
            warnings.warn(
                f"'{folder}' was perhaps written before a change of {algorithm}: {change.text}. Then it does not go on "
                "as it began: train on with the flowrl that wrote it, or start anew (--config).",
                stacklevel=3,
            )
