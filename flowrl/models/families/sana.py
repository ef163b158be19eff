"""Sana."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from flowrl.models.families.patches import InstructedFlow


class SanaFlow(InstructedFlow):
    """A `SanaPipeline`. Of its published scheduler, a DPM-Solver, the noise levels are taken; steps are Euler's."""

    PIPELINE = "SanaPipeline"
    TRANSFORMER = "SanaTransformer2DModel"
    CAPTION = "caption_channels"
    SEQUENCE_LENGTH = 300

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """Give the scheduler's time on the transformer's own scale, where that has one."""
        config: Any = self.network.config
        return super().network_time(t) * float(config.get("timestep_scale", 1))

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Leave out the variance, where a transformer predicts one."""
        return predicted[:, : self.latent_shape[0]]

    def instruction(self) -> dict[str, Any]:
        """Give the instruction that the pipeline's own call puts before prompts."""
        name = "complex_human_instruction"
        return {name: inspect.signature(type(self.pipeline).__call__).parameters[name].default}
