"""HiDream-I1."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from flowrl.errors import ConfigError
from flowrl.models.families.hidream_experts import keep_gradients, latents_of
from flowrl.models.families.patches import PatchedFlow
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.types import Condition

LORA_TARGETS = [f"attn1.to_{part}" for name in ("q", "k", "v", "out") for part in (name, f"{name}_t")]


class HiDreamFlow(PatchedFlow):
    """A `HiDreamImagePipeline`. Resolutions are taken as they are: its own call scales them to one area first.

    Unless it trains, the transformer computes its routed experts without gradients; here they have them. When it
    trains, it gives patches instead of latents.
    """

    PIPELINE = "HiDreamImagePipeline"
    TRANSFORMER = "HiDreamImageTransformer2DModel"
    LATENTS = 128
    ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    SEQUENCE_LENGTH = 128
    OWN_CALL = "Its own call brings every size to the area that its transformer was made for."
    PREDICTS_VELOCITY = True
    lora_targets = LORA_TARGETS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_gradients(self.network)

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes, of as many patches as the transformer has room for."""
        shapes, most = super().shapes(transformer, vae, options), prod(transformer["max_resolution"])
        if prod(shapes.latent[1:]) > most:
            raise ConfigError(f"resolution: this pipeline draws at most {most * cls.reduction(vae) ** 2} pixels.")
        return shapes

    @property
    def layers(self) -> list[int]:
        """Layers of Llama that the transformer takes embeddings of."""
        return sorted(set(self.network.config["llama_layers"]))  # type: ignore[index]

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments."""
        return {
            "hidden_states": x,
            "timesteps": time,
            "encoder_hidden_states_t5": cond[0],
            "encoder_hidden_states_llama3": dict(zip(self.layers, cond[1].unbind(1))),
            "pooled_embeds": cond[2],
        }

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring patches (B, C, patches, side^2) into the shape of latents."""
        if not self.network.training or self.network.config["force_inference_output"]:  # type: ignore[index]
            return predicted
        return latents_of(predicted, self.latent_shape, self.patch(self.network.config))  # type: ignore[arg-type]

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: T5 (B, tokens, dim), layers of Llama (B, layers, tokens, dim), pooled CLIP (B, dim)."""
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        t5, _, llama, _, pooled, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **given)
        return t5, llama[self.layers].transpose(0, 1), pooled

    @property
    def _clip_tokens(self) -> int:
        return self.max_sequence_length

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the embeddings."""
        config: Any = self.network.config
        length, (t5, llama) = self.max_sequence_length, config.caption_channels
        return [Part((length, t5)), Part((len(self.layers), length, llama)), Part((config.text_emb_dim,))]

    def shift(self, steps: int, config: Mapping[str, Any]) -> float:
        """Compute the shift of the largest image: the pipeline takes that at any resolution, and no setting of it."""
        return super().shift(steps, {})

    @property
    def sequence_length(self) -> int:
        """Number of patches of the largest image."""
        config: Any = self.network.config
        return prod(config.max_resolution) // int(config.patch_size) ** 2
