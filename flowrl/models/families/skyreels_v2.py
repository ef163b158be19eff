"""SkyReels V2, which draws all frames at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowrl.errors import ConfigError
from flowrl.models.families.wan import WanFlow
from flowrl.models.pipeline import PipelineOptions, Shapes
from flowrl.models.text_encoders import cleaned_by_ftfy
from flowrl.types import Condition


class SkyReelsV2Flow(WanFlow):
    """A `SkyReelsV2Pipeline`: a network like Wan's, with the latter's autoencoder and text encoder."""

    PIPELINE = "SkyReelsV2Pipeline"
    TRANSFORMER = "SkyReelsV2Transformer3DModel"
    FRAMES, SIDES, FRAME_RATE = 97, (544, 960), 24

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        if transformer["inject_sample_info"]:
            raise ConfigError(
                "This SkyReels was made for diffusion forcing (inject_sample_info), where every frame has a time of "
                f"its own and is told frames per second, which a {cls.PIPELINE} does not give it."
            )
        return super().shapes(transformer, vae, options)

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per latent along each side."""
        return int(2 ** len(vae["temperal_downsample"]))

    @classmethod
    def frame_reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the frames per latent."""
        return int(2 ** sum(vae["temperal_downsample"]))

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: embeddings (B, tokens, dim), zeros after the end."""
        with cleaned_by_ftfy(self.PIPELINE):
            return super().encode_prompts(prompts)
