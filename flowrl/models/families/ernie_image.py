"""ERNIE-Image."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.models.families.tokens import PatchesFlow
from flowrl.models.packing import padded
from flowrl.models.pipeline import Part
from flowrl.models.schedules import TIMESTEPS
from flowrl.types import Condition

LORA_TARGETS = ["self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0"]


class ErnieImageFlow(PatchesFlow):
    """An `ErnieImagePipeline`. Prompts are taken as they are: its own call has another model rewrite them first."""

    PIPELINE = "ErnieImagePipeline"
    TRANSFORMER = "ErnieImageTransformer2DModel"
    TIME_SCALE = float(TIMESTEPS)
    lora_targets = LORA_TARGETS

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {"hidden_states": x, "timestep": time, "text_bth": cond[0], "text_lens": cond[1]}

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Give what is of the shape of latents already."""
        return predicted

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), padded, and their lengths (B,)."""
        return padded(self.pipeline.encode_prompt(prompts, self.device), self.max_sequence_length)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of its length."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.text_in_dim)), Part((), torch.long)]

    @property
    def norm_epsilon(self) -> float:
        """What the pipeline adds to the autoencoder's variance, whatever that one's configuration says."""
        return 1e-5
