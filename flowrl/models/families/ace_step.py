"""ACE-Step 1.5: music."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import torch

from flowrl.models.audio import AudioFlow
from flowrl.models.one_by_one import OneByOneFlow
from flowrl.models.packing import padded
from flowrl.models.pipeline import Part
from flowrl.models.text_encoders import check_length
from flowrl.types import Condition

LYRICS, TIMBRE_SECONDS, SHIFT, PEAK = 32, 30, 3.0, 10 ** (-1 / 20)
"""Room for tokens of empty lyrics and of timbre; silence that gives the latter; the call's own shift; its peak."""


class AceStepFlow(OneByOneFlow, AudioFlow):
    """An `AceStepPipeline` from text to music without words, and without guidance."""

    PIPELINE = "AceStepPipeline"
    TRANSFORMER = "AceStepTransformer1DModel"
    ENCODERS = ("text_encoder", "condition_encoder")
    DIFFUSERS_AS = "ace_step"
    SEQUENCE_LENGTH, FRAMES = 256, 1500

    NO_GUIDANCE = (
        "its guidance adds momentum from step to step, so that no velocity at a point is guided; its turbo weights "
        "need none"
    )

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["audio_acoustic_hidden_dim"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments, for latents (B, C, T')."""
        time = time.to(x.dtype)  # of the weights, as the network does not convert it
        given = {"timestep": time, "timestep_r": time, "encoder_hidden_states": cond[0], "context_latents": cond[2]}
        return {"hidden_states": x.transpose(1, 2), "lengths": cond[1], **given}

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give none: prompts are not cut."""
        return []

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), numbers of tokens (B,), silence and a mask (B, T', 2 C)."""
        encoded, pipe, frames = [], self.pipeline, self.latent_shape[1]
        encoder = pipe.condition_encoder
        timbre = encoder.silence_latent[:, : ceil(TIMBRE_SECONDS * pipe.latents_per_second)]
        for prompt in prompts:
            given = pipe.encode_prompt(prompt, "", self.device, audio_duration=self.seconds, max_text_length=10**5)
            check_length(f"The prompt {prompt[:100]!r} in its template", given[0].shape[1], self.max_sequence_length)
            encoded.append(encoder(*given, timbre, torch.zeros(1, dtype=torch.int64, device=self.device))[0][0])
        silence, _ = pipe.prepare_src_latents(self.device, encoder.dtype, len(prompts), latent_length=frames)
        context = torch.cat([silence, torch.ones_like(silence)], dim=-1)
        return (*padded(encoded, self.max_sequence_length + LYRICS), context)

    def imitate_prompts(self, prompts: list[str]) -> Condition:
        """Make meaningless embeddings: those of the text encoder alone cost anything to speak of."""
        tokens = torch.zeros(len(prompts), self.max_sequence_length, dtype=torch.int64, device=self.device)
        self.pipeline.text_encoder(tokens)
        return self._imitated_parts(len(prompts))

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings, number of tokens, and what stands beside the latents."""
        config: Any = self.network.config
        channels, frames = self.latent_shape
        embeds = Part((self.max_sequence_length + LYRICS, config.encoder_hidden_size or config.hidden_size))
        return [embeds, Part((), torch.int64), Part((frames, config.in_channels - channels))]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space times equally before the shift of the pipeline's own call."""
        levels = torch.linspace(1, 0, steps + 1)[:-1].numpy()
        shifted: np.ndarray = SHIFT * levels / (1 + (SHIFT - 1) * levels)
        return shifted

    def at_level(self, sounds: torch.Tensor) -> torch.Tensor:
        """Bring the peak of each sound to -1 dB of the full scale."""
        return sounds * (PEAK / sounds.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6))

    def call_settings(self, scale: float) -> dict[str, Any]:
        """Give the arguments of the pipeline's own call that draws sounds of this length."""
        return {"guidance_scale": 1.0, "audio_duration": self.seconds, "max_text_length": self.max_sequence_length}
