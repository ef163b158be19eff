"""Kandinsky 5.0 that begins a video with a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.errors import ConfigError
from flowrl.models.families.kandinsky5_video import Kandinsky5VideoFlow
from flowrl.models.first_frame import FirstFrameFlow
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.types import Condition

FIRST, AFTER = 4, 5
"""Latent frames that are brought to the level of those after them, and how many of these at most."""


class Kandinsky5ImageToVideoFlow(FirstFrameFlow, Kandinsky5VideoFlow):
    """A `Kandinsky5I2VPipeline`: the picture that comes with a prompt is the video's first frame.

    As the pipeline does, mean and deviation of the first latent frames come nearer to those after them once all are
    drawn: here as they are decoded, so that it is no part of the flow.
    """

    PIPELINE = "Kandinsky5I2VPipeline"
    OWN_CALL = (
        f"{Kandinsky5VideoFlow.OWN_CALL} It draws the picture's latents from the autoencoder's posterior; a run takes "
        "the mode."
    )

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        found = super().shapes(transformer, vae, options)
        if found.latent[1] <= FIRST:
            raise ConfigError(
                f"frames must be at least {FIRST * cls.frame_reduction(vae) + 1} for this pipeline, which brings the "
                f"first {FIRST} latent frames to the level of those after them; not {found.sample[0]}."
            )
        return found

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments; where the network has room for a mask, it says which frame is given."""
        inputs, config = super().inputs(x, time, cond), self.network.config
        if config.visual_cond:  # type: ignore[union-attr]
            inputs["hidden_states"][:, :1, ..., -1] = 1
        return inputs

    def encode_text(self, prompts: list[str]) -> Condition:
        """Encode prompts as Kandinsky does."""
        return Kandinsky5VideoFlow.encode_prompts(self, prompts)

    def text_parts(self) -> list[Part]:
        """Give the shapes of embeddings, pooled embedding and number of tokens."""
        return Kandinsky5VideoFlow.condition_parts(self)

    def from_autoencoder(self, modes: torch.Tensor) -> torch.Tensor:
        """Bring latents of the autoencoder to the scale of the flow's, without its shift, as the pipeline does."""
        scaled: torch.Tensor = modes * self.pipeline.vae.config.scaling_factor
        return scaled

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents (B, C, T', H', W') to the scale of the autoencoder's, the first frames to a level."""
        return super().to_autoencoder(levelled(x_1))


def levelled(x: torch.Tensor) -> torch.Tensor:
    """Bring mean and deviation of the first latent frames (B, C, T', H', W') nearer to those of frames after them."""
    first, after, dims = x[:, :, :FIRST], x[:, :, FIRST : FIRST + AFTER], (1, 2, 3, 4)
    (mean, std), (aim, spread) = ((y.mean(dims, True), y.std(dims, keepdim=True)) for y in (first, after))
    aim, spread = aim.clamp(mean - 0.05, mean + 0.1), spread.clamp(std - 0.1, std + 0.25)
    return torch.cat([(first - mean) / std * spread + aim, x[:, :, FIRST:]], dim=2)
