"""GLM-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.families.cogview4 import CogView4Flow
from flowrl.models.latent_scale import to_autoencoder
from flowrl.models.packing import with_mask
from flowrl.models.pipeline import Part
from flowrl.models.text_encoders import check_length, seeded
from flowrl.types import Condition


class GlmImageFlow(CogView4Flow):
    """A `GlmImagePipeline`, whose language model draws tokens of an image that the flow paints.

    They are drawn once for each prompt, by the pipeline's own sampling from a seed that the prompt gives, and are a
    part of its condition: samples of a prompt share their layout. The text encoder is given what a prompt quotes.
    """

    PIPELINE = "GlmImagePipeline"
    TRANSFORMER = "GlmImageTransformer2DModel"
    ENCODERS = ("text_encoder", "vision_language_encoder")
    TRANSFORMERS_AS = "glm_image"
    SEQUENCE_LENGTH = 2048
    LATENTS = 128
    MULTIPLE = 1
    OWN_CALL = "Its own call draws the image's tokens anew, so that a seed gives another picture."

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the latents per image token along each side."""
        return 2 * int(transformer["patch_size"])

    @property
    def sequence_length(self) -> int:
        """Number of patches of one image: four for each of its tokens."""
        return 4 * super().sequence_length

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """Give the time of the noise level before its shift, less one."""
        return super().network_time(t) - 1

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        given = super().inputs(x, time, cond[:2])
        del given["original_size"]
        return {**given, "prior_token_id": cond[2], "prior_token_drop": cond[3][:, None].expand_as(cond[2])}

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give none: prompts are not cut."""
        return []

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: quoted text (B, tokens, dim), a mask of it, image tokens (B, patches), not left out (B,)."""
        embeds, there = self._quoted(prompts)
        return embeds, there, torch.cat([self._drawn(prompt) for prompt in prompts]), torch.zeros_like(there[:, 0])

    def encode_null(self) -> Condition:
        """Encode the empty prompt, without image tokens."""
        tokens = torch.zeros(1, self.sequence_length, dtype=torch.int64, device=self.device)
        embeds, there = self._quoted([""])
        return embeds, there, tokens, torch.ones_like(there[:, 0])

    def _quoted(self, prompts: list[str]) -> Condition:
        """Encode what each prompt quotes, of which nothing is cut."""
        embeds = [self.pipeline.encode_prompt([prompt], False, device=self.device)[0] for prompt in prompts]
        for prompt, one in zip(prompts, embeds):
            check_length(f"What the prompt {prompt[:100]!r} quotes", one.shape[1], self.tokens)
        return with_mask(embeds, self.tokens)

    def _drawn(self, prompt: str) -> torch.Tensor:
        """Draw image tokens (1, patches); the pipeline seeds the generator of everything for that."""
        _, height, width = self.sample_shape
        with seeded(prompt, self.device) as by:
            tokens, *_ = self.pipeline.generate_prior_tokens([prompt], height, width, device=self.device, generator=by)
        return tokens

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings, mask, image tokens, and whether those are left out."""
        tokens = Part((self.sequence_length,), torch.int64, 0)
        return [*super().condition_parts(), tokens, Part((), torch.bool, 0)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space whole timesteps equally before the shift."""
        levels = np.linspace(self.timesteps, 1.0, steps + 1)[:-1].astype(np.int64)
        return levels.astype(np.float32) / self.timesteps

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the autoencoder's mean and deviation, whatever its scale."""
        return to_autoencoder(x_1, {**self.pipeline.vae.config, "scaling_factor": None})
