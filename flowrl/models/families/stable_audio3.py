"""Stable Audio 3, not distilled: sounds and music."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from flowrl.errors import ConfigError
from flowrl.models.audio import AudioFlow
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.types import Condition

LORA_TARGETS = ["self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.to_out"]
LEAST, MOST = -6.2, 2.0
"""Logarithms of the ratio of signal to noise, where a sound begins and ends, in the pipeline's own call."""


class StableAudio3Flow(AudioFlow):
    """A `StableAudio3Pipeline` whose scheduler takes Euler's steps; a distilled one adds noise again, and is refused.

    Its network sees what pads a prompt, so that another `sequence_length` is another flow.
    """

    PIPELINE = "StableAudio3Pipeline"
    TRANSFORMER = "StableAudio3DiTModel"
    ENCODERS = ("text_encoder", "duration_embedder")
    DIFFUSERS_AS = "stable_audio_3"
    SEQUENCE_LENGTH, FRAMES = 256, 108
    NO_NOISE_AGAIN = "it is distilled to a few steps that jump to the data and add noise again: train its base model"
    lora_targets = LORA_TARGETS

    def __init__(self, pipeline: Any, *given: Any, **named: Any) -> None:
        super().__init__(pipeline, *given, **named)
        own = min(self.SEQUENCE_LENGTH, getattr(getattr(pipeline, "tokenizer", None), "model_max_length", math.inf))
        if self.max_sequence_length > self.SEQUENCE_LENGTH:
            raise ConfigError(f"sequence_length must be at most {self.SEQUENCE_LENGTH} for this pipeline.")
        if self.max_sequence_length != own:
            self.OWN_CALL = f"Its own call pads prompts to {own} tokens, which its network sees."

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        found, patch = super().shapes(transformer, vae, options), transformer["patch_size"]
        if found.latent[1] % patch:
            raise ConfigError(f"frames must be a multiple of {patch} for this pipeline, not {found.latent[1]}.")
        return found

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["io_channels"])

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the values of a sound per frame of latents."""
        return int(vae["patch_size"]) * math.prod(vae["encoder_strides"])

    @property
    def seconds(self) -> float:
        """Length of a sound, never a rounding above its values."""
        values, rate = self.sample_shape[1], self.sample_rate
        return values / rate if values / rate * rate <= values else math.nextafter(values / rate, 0)

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        names = "encoder_hidden_states", "encoder_attention_mask", "global_hidden_states"
        return {"hidden_states": x, "timestep": time, **dict(zip(names, cond))}

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Leave latents (B, C, T') as they are."""
        return predicted

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: context, the duration last (B, tokens + 1, dim), its mask, the duration alone (B, dim)."""
        pipe, n = self.pipeline, len(prompts)
        pipe.tokenizer.model_max_length = self.max_sequence_length
        embeds = pipe.encode_prompt(prompts, self.device, 1)
        seconds = pipe.encode_duration(self.seconds, self.device, 1, n)
        context, mask = pipe.prepare_cross_attention(*embeds, seconds)
        return context, mask.bool(), seconds

    def imitate_encoder(self, encoder: nn.Module, n: int) -> None:
        """Compute what the text encoder or the duration's does with `n` prompts."""
        if hasattr(encoder, "freqs"):
            encoder(torch.zeros(n, device=self.device))
        else:
            super().imitate_encoder(encoder, n)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the context, its mask, and the duration."""
        config: Any = self.network.config
        tokens = self.max_sequence_length + 1
        return [Part((tokens, config.cond_token_dim)), Part((tokens,), torch.bool), Part((config.global_cond_dim,))]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray:
        """Space the logarithm of the ratio of signal to noise equally; the first level counts as 1."""
        return torch.sigmoid(torch.linspace(1, 0, steps + 1) * (MOST - LEAST) - MOST)[:-1].numpy()

    def call_settings(self, scale: float) -> dict[str, Any]:
        """Give the arguments of the pipeline's own call that draws sounds of this length."""
        return {"guidance_scale": scale, "duration": self.seconds}
