"""Metrics and pictures of a run to Weights & Biases: the same as to TensorBoard. The package is optional."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from stable_baselines3.common.logger import KVWriter, filter_excluded_keys

from flowrl.errors import ConfigError

ID_FILE = "wandb-id.txt"
"""File of a run folder: which run of Weights & Biases a resumed run goes on with."""
ID = re.compile(r"[a-z0-9]{1,64}")


def imported() -> Any:
    """Import the package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            'Weights & Biases is not installed: pip install "flowrl-torch[wandb]", or leave out --wandb.'
        ) from error


class WandbWriter(KVWriter):
    """Writer of rows and pictures to a run of Weights & Biases, which has the run folder's name.

    Args:
        project: NAME or TEAM/NAME.
        folder: The run folder.
        config: What is shown as the run's settings.

    Raises:
        ConfigError: The package is missing, or does not start.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._wandb = imported()
        team, _, name = project.rpartition("/")
        known = folder / ID_FILE
        before = known.read_text("utf-8").strip() if known.exists() else ""
        try:
            self._run = self._wandb.init(
                project=name,
                entity=team or None,
                name=folder.resolve().name,
                id=before if ID.fullmatch(before) else None,
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except self._wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not start: {error} Log in with `wandb login`, set WANDB_MODE=offline to keep "
                "the log in the run folder, or leave out --wandb."
            ) from error
        known.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, key_values: Mapping[str, Any], key_excluded: Mapping[str, Any], step: int = 0) -> None:
        """Write a row.

        Raises:
            OSError: It cannot be written now.
        """
        self._log(filter_excluded_keys(dict(key_values), dict(key_excluded), "tensorboard"), step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture.

        Raises:
            OSError: It cannot be written now.
        """
        with Image.open(path) as image:
            self._log({name: self._wandb.Image(np.asarray(image.convert("RGB")))}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        try:
            self._run.log(values, step=step)
        except self._wandb.Error as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """End the run of Weights & Biases; waits until what was written has been sent."""
        self._run.finish()
