"""CogView4."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any, ClassVar

import numpy as np
import torch

from flowrl.models.families.masked_attention import MaskedAttention
from flowrl.models.families.patches import PatchedFlow
from flowrl.models.packing import with_mask
from flowrl.models.pipeline import Part
from flowrl.types import Condition


class CogView4Flow(PatchedFlow):
    """A `CogView4Pipeline`. The network is given the time before the schedule's shift, which a noise level gives back.

    Each prompt is encoded as in a call of its own: in a call of several, the pipeline pads all to the longest, by
    tokens that the transformer sees.
    """

    PIPELINE = "CogView4Pipeline"
    TRANSFORMER = "CogView4Transformer2DModel"
    LEAST_DIFFUSERS = (0, 42)
    SEQUENCE_LENGTH = 1024
    MULTIPLE: ClassVar[int] = 16
    """A prompt's tokens are padded to a multiple of this, by tokens that the transformer sees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        network: Any = self.network
        for block in network.transformer_blocks:
            block.attn1.set_processor(MaskedAttention())

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """Give the time of the noise level before its shift."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        factor = 1.0 if scheduler is None else self._shift_factor(scheduler.config)
        exact = t.double()  # rounded once: a time of 1000 has few digits to lose
        return (self.TIME_SCALE * (1 - exact) / (1 - exact + factor * exact)).to(t.dtype)

    def _shift_factor(self, config: Mapping[str, Any]) -> float:
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        mu = self.shift(0, config)
        return mu if config.get("time_shift_type") == "linear" else exp(mu)

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments: sizes in pixels are those of an image that was not cropped."""
        embeds, mask = cond
        size = embeds.new_tensor(self.sample_shape[1:]).expand(len(x), 2)
        return {
            "hidden_states": x,
            "timestep": time,
            "encoder_hidden_states": embeds,
            "attention_mask": mask,
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }

    @property
    def tokens(self) -> int:
        """Tokens of an encoded prompt."""
        return -(-self.max_sequence_length // self.MULTIPLE) * self.MULTIPLE

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: GLM's embeddings (B, tokens, dim), and which of them there are (B, tokens)."""
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        embeds = [self.pipeline.encode_prompt([prompt], None, False, **given)[0] for prompt in prompts]
        return with_mask(embeds, self.tokens)

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings and mask."""
        config: Any = self.network.config
        return [Part((self.tokens, config.text_embed_dim)), Part((self.tokens,), torch.bool)]

    def shift(self, steps: int, config: Mapping[str, Any]) -> float:
        """Compute the shift, which grows with the root of the number of patches."""
        ratio = self.sequence_length / config.get("base_image_seq_len", 256)
        return float(ratio**0.5 * config.get("max_shift", 0.75) + config.get("base_shift", 0.25))

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Space whole timesteps equally, down to 1, before the shift."""
        return (np.linspace(self.timesteps, 1, steps).astype(int) / self.timesteps).astype(np.float32)
