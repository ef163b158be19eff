"""Qwen-Image 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowrl.models.one_by_one import OneByOneFlow
from flowrl.models.packing import padded
from flowrl.models.pipeline import ATTENTION, Part
from flowrl.models.text_encoders import check_length
from flowrl.models.video import as_tokens
from flowrl.types import Condition


class QwenImage21Flow(OneByOneFlow):
    """A `QwenImage21Pipeline`, without pictures; `guidance_scale` is its `true_cfg_scale`.

    The network sees the prompt, then every place of the latents as a token, each after what stands before it; places
    of the latents begin where the prompt ends, which is why prompts are not padded. What is transparent is white.
    """

    PIPELINE = "QwenImage21Pipeline"
    TRANSFORMER = "QwenImage21Transformer2DModel"
    TIME_SCALE = 1.0
    OWN_CALL = ""
    lora_targets = ATTENTION

    def __init__(self, pipeline: Any, *given: Any, **named: Any) -> None:
        super().__init__(pipeline, *given, **named)
        levels = getattr(pipeline, "config", {}).get("sample_sigmas")
        self.levels = levels if isinstance(levels, list) else []
        if self.levels:
            self.OWN_CALL = (
                f"Its own call takes the {len(self.levels)} noise levels of its configuration, whatever "
                "num_inference_steps says; a run of another number of steps spaces them equally."
            )

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae["scale_factor_spatial"])

    @classmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give the size of the pipeline's own call."""
        return 64, 64

    @property
    def sequence_length(self) -> int:
        """Number of latents of one image."""
        return self.latent_shape[1] * self.latent_shape[2]

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        given = {"encoder_hidden_states": cond[0], "lengths": cond[1]}
        return {"hidden_states": as_tokens(x), "timestep": time, "img_shapes": [[(1, *self.latent_shape[1:])]], **given}

    def predict_one(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network, with a mark for each 2 x 2 latents behind the words; what it gives for these goes."""
        embeds = inputs["encoder_hidden_states"]
        words = embeds.shape[1]
        marks = torch.arange(words + self.sequence_length // 4, device=embeds.device) >= words
        return super().predict_one({**inputs, "img_mask": marks[None]})[:, words:]

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring tokens into the shape of latents."""
        return predicted.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Give none: prompts are not cut."""
        return []

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts in the template: embeddings (B, tokens, dim), numbers of tokens (B,)."""
        encoded = [self.pipeline.encode_prompt([prompt], device=self.device)[0][0] for prompt in prompts]
        for prompt, embeds in zip(prompts, encoded):
            check_length(f"The prompt {prompt[:100]!r} in its template", len(embeds), self.max_sequence_length)
        return padded(encoded, self.max_sequence_length)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings and number of tokens."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.context_in_dim)), Part((), torch.int64)]

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Give the pipeline's own noise levels where it has as many; else equal ones down to 1 / steps."""
        return np.array(self.levels) if len(self.levels) == steps else np.linspace(1.0, 1 / steps, steps)

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the autoencoder's scale, as one frame."""
        return super().to_autoencoder(x_1)[:, :, None]

    def shown(self, decoded: torch.Tensor) -> torch.Tensor:
        """Put decoded images (B, 4, 1, H, W), the last channel of which says how opaque they are, on white."""
        opaque = decoded[:, 3:] / 2 + 0.5
        return decoded[:, :3] * opaque + (1 - opaque) if decoded.shape[1] == 4 else decoded
