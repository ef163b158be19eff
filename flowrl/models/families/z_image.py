"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.functional.guidance import linear
from flowrl.models.families.tokens import TokensFlow
from flowrl.models.packing import padded
from flowrl.models.pipeline import Part
from flowrl.types import Condition, has_values

LORA_TARGETS = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]


class ZImageFlow(TokensFlow):
    """A `ZImagePipeline`.

    `guidance_scale` counts as in its own call, whose guided velocity is `v + scale (v - v_null)` and whose scale
    without guidance is 0; here 1 leaves guidance out too, as everywhere. Of Z-Image-Turbo, which is distilled and wants
    none, the pipeline's files say nothing: leave it at 1. Norms are not capped and guidance lasts to the end, the
    call's own defaults.

    The transformer takes lists, as the positions of the image depend on its prompt's length: `forward` waits once for
    these lengths to reach the host.
    """

    PIPELINE = "ZImagePipeline"
    TRANSFORMER = "ZImageTransformer2DModel"
    TIME_REVERSED = True
    PREDICTS_VELOCITY = True
    UNGUIDED = 0.0
    lora_targets = LORA_TARGETS

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["in_channels"])

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int | None:
        """Give the number of positions along a side."""
        return int(min(transformer["axes_lens"][1:]))

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments: lists of latents of one frame, and of prompts without padding."""
        prompts, lengths = cond
        known = lengths.tolist() if has_values(lengths) else [prompts.shape[1]] * len(prompts)
        prompts_as_long = [prompt[:length] for prompt, length in zip(prompts, known)]
        return {"x": list(x[:, :, None]), "t": time, "cap_feats": prompts_as_long}

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity of the latents."""
        inputs = self.inputs(x_t.to(cond[0].dtype), self.network_time(t), cond)
        return torch.stack(self.network(**inputs, return_dict=False)[0]).squeeze(2).float()

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), padded, and their lengths (B,)."""
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return padded(embeds, self.max_sequence_length)

    def template_tokens(self) -> int:
        """Count the mark of the user's message."""
        return 3

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context and of its length."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.cap_feat_dim)), Part((), torch.long, self.max_sequence_length)]

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide along the line through both velocities, in the pipeline's own measure."""
        return linear(v, v_null, 1 + scale)
