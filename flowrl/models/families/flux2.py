"""FLUX.2 and FLUX.2 Klein."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from flowrl.models.families.tokens import LATENTS, TokensFlow
from flowrl.models.packing import positions, unpack
from flowrl.models.pipeline import Part
from flowrl.types import Condition

LORA_TARGETS = (
    r".*attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_qkv_mlp_proj)"
    r"|.*single_transformer_blocks\.\d+\.attn\.to_out"
)
MOST_TOKENS = 4300
"""Of longer sequences the shift does not depend on the steps."""


class Flux2Flow(TokensFlow):
    """A `Flux2Pipeline`. A latent is a 2 x 2 patch of the autoencoder's, normalised by statistics that it holds.

    The guidance scale is an input of the transformer, part of the condition.
    """

    PIPELINE = "Flux2Pipeline"
    TRANSFORMER = "Flux2Transformer2DModel"
    lora_targets = LORA_TARGETS

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call."""
        return LATENTS // 2, LATENTS // 2

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per patch along each side."""
        return 2 * super().reduction(vae)

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give 1: latents are patches already."""
        return 1

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of a patch."""
        return int(transformer["in_channels"])

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Tell whether the guidance scale is an input of the transformer."""
        return bool(transformer.get("guidance_embeds", True))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.latent_shape[1], self.latent_shape[2]

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; positions are frame, row, column and place in the prompt."""
        places = torch.arange(cond[0].shape[1], device=x.device)
        return {
            "hidden_states": x.flatten(2).mT,
            "timestep": time,
            "guidance": cond[-1] if self.takes_guidance else None,
            "encoder_hidden_states": cond[0],
            "txt_ids": F.pad(places[:, None], (3, 0)),
            "img_ids": F.pad(positions(*self.grid, x.device), (0, 1)),
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the transformer's tokens into the shape of latents."""
        return predicted.mT.unflatten(2, self.grid)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim) from several layers, guidance scales (B,)."""
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, self.guidance_of(len(prompts))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of the guidance scale."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.joint_attention_dim)), Part((), torch.float32)]

    def shift(self, steps: int, config: Mapping[str, Any]) -> float:
        """Compute the shift: between a line in the tokens for 10 steps and one for 200."""
        tokens = self.sequence_length
        many = 0.00016927 * tokens + 0.45666666
        few = 8.73809524e-05 * tokens + 1.89833333
        return many if tokens > MOST_TOKENS else few + (many - few) * (steps - 10) / 190

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring patches to the autoencoder's mean and deviation, and apart."""
        norm = self.pipeline.vae.bn
        deviation = (norm.running_var.float() + self.pipeline.vae.config.batch_norm_eps).sqrt()
        return unpack((x_1.flatten(2).mT * deviation + norm.running_mean.float()), *self.grid)


class Flux2KleinFlow(Flux2Flow):
    """A `Flux2KleinPipeline`: guidance is classifier-free, and left out of a pipeline that says `is_distilled`."""

    PIPELINE = "Flux2KleinPipeline"

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Say no: the pipeline gives the transformer no scale."""
        return False

    @classmethod
    def without_guidance(cls, pipeline: Mapping[str, Any]) -> bool:
        """Tell whether the pipeline is distilled."""
        return bool(pipeline.get("is_distilled"))
