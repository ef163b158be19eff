"""Wan 2.1 and 2.2: one network, two networks by time, or a time per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowrl.models.by_time import ByTime
from flowrl.models.pipeline import Part
from flowrl.models.schedules import TIMESTEPS
from flowrl.models.video import VideoFlow
from flowrl.types import Condition

SECOND_LORA = "transformer_2_lora.safetensors"


class WanFlow(VideoFlow):
    """A `WanPipeline`. With `boundary_ratio` it has two networks, one for each side of a noise level; both are trained.

    Sampling follows the scheduler's noise levels by Euler steps. A pipeline as published has UniPC, whose steps are of
    higher order: the levels are the same, the latents of its own call are not.
    """

    PIPELINE = "WanPipeline"
    TRANSFORMER = "WanTransformer3DModel"
    MORE_NETWORKS = ("transformer_2",)
    FRAMES, SIDES, FRAME_RATE = 81, (480, 832), 16

    @classmethod
    def trained_part(cls, pipeline: Any) -> nn.Module:
        """Give the transformer, or both of them."""
        second, ratio = getattr(pipeline, "transformer_2", None), pipeline.config.get("boundary_ratio")
        if second is None or ratio is None:
            return super().trained_part(pipeline)
        scheduler = getattr(pipeline, "scheduler", None)
        steps = TIMESTEPS if scheduler is None else scheduler.config.get("num_train_timesteps", TIMESTEPS)
        return ByTime(pipeline.transformer, second, ratio * steps)

    @classmethod
    def networks_of(cls, network: nn.Module) -> dict[str, Any]:
        """Give the pipeline's transformers."""
        return network.parts() if isinstance(network, ByTime) else {cls.NETWORK: network}

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the pixels per latent along each side."""
        return int(vae["scale_factor_spatial"])

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Give the frames per latent."""
        return int(vae["scale_factor_temporal"])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; with `expand_timesteps` a time for each token."""
        if self.pipeline.config.get("expand_timesteps"):
            time = time[:, None].expand(-1, self.sequence_length)
        return {"hidden_states": x, "timestep": time, "encoder_hidden_states": cond[0]}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), zeros after the end."""
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return (embeds,)

    def condition_parts(self) -> list[Part]:
        """Give the shape of the context."""
        config: Any = self.network.config
        return [Part((self.max_sequence_length, config.text_dim))]

    def export(self, folder: Path, lora_state: dict[str, torch.Tensor] | None) -> None:
        """Write LoRA weights for `pipe.load_lora_weights(folder)`, those of a second network into a file of their own.

        It is read by `pipe.load_lora_weights(folder, weight_name="transformer_2_lora.safetensors",
        load_into_transformer_2=True)`.
        """
        if lora_state is None or not isinstance(self.network, ByTime):
            return super().export(folder, lora_state)
        first, second = (
            {key.removeprefix(f"{name}."): value for key, value in lora_state.items() if key.startswith(f"{name}.")}
            for name in self.network.parts()
        )
        super().export(folder, first)
        type(self.pipeline).save_lora_weights(folder, second, weight_name=SECOND_LORA)
