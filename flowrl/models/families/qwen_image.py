"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.functional.guidance import linear
from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import of_length, pack
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.types import Condition


class QwenImageFlow(TokensFlow):
    """A `QwenImagePipeline`; `guidance_scale` is its `true_cfg_scale`.

    Guided velocities have, token by token, the norm of the unguided ones. Prompts of all lengths are padded to one;
    the mask keeps the padding out of the attention.
    """

    PIPELINE = "QwenImagePipeline"
    TRANSFORMER = "QwenImageTransformer2DModel"
    lora_targets = ATTENTION

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per latent along each side."""
        return int(2 ** len(vae["temperal_downsample"]))

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        prompt_embeds, mask = cond
        return {
            "hidden_states": pack(x),
            "timestep": time,
            "encoder_hidden_states": prompt_embeds,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, *self.grid)]] * len(x),
        }

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), and which tokens are the prompt's (B, tokens)."""
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask  # no prompt is shorter than another
        return tuple(of_length(part, self.max_sequence_length) for part in (embeds, mask.bool()))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of its mask."""
        config: Any = self.network.config
        tokens = self.max_sequence_length
        return [Part((tokens, config.joint_attention_dim)), Part((tokens,), torch.bool)]

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide along the line through both velocities, and give each token the norm that it has without guidance."""
        guided = linear(v, v_null, scale)
        norm, guided_norm = (pack(x).norm(dim=-1, keepdim=True) for x in (v, guided))
        return self.outputs(pack(guided) * (norm / guided_norm))

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the autoencoder's scale; it takes one frame of a video."""
        return super().to_autoencoder(x_1)[:, :, None]
