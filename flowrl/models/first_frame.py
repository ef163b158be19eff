"""Videos whose first latents are a picture's, in their place, which the network sees as data from the start."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from flowrl.errors import ConfigError
from flowrl.models.pictures import PicturesFlow
from flowrl.models.pipeline import Part, PipelineOptions, Shapes
from flowrl.models.video import VideoFlow
from flowrl.types import Condition

LEAST_LEFT = 1e-3
"""Time to the data that a velocity divides by at least."""


class FirstFrameFlow(PicturesFlow, VideoFlow):
    """A video pipeline whose call keeps the first latents at the picture's; the condition's last part is these.

    As a flow of the whole video: the first latents go from their noise to the picture's on a straight line, whatever
    the network gives for them, and the network is given the picture's in their place. So the other latents take the
    path of the pipeline's own call. `inputs` is given latents with the picture in them.
    """

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes."""
        found = super().shapes(transformer, vae, options)
        if found.latent[1] < 2:
            raise ConfigError(f"A {cls.PIPELINE} goes on from a picture: frames must be more than {found.sample[0]}.")
        return found

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity of the latents."""
        picture = cond[-1].to(x_t.dtype)
        v = super().forward(torch.cat([picture, x_t[:, :, 1:]], dim=2), t, cond)
        left = (1 - t).clamp(min=LEAST_LEFT).view(-1, 1, 1, 1, 1)
        return torch.cat([(picture - x_t[:, :, :1]) / left, v[:, :, 1:]], dim=2)

    def arrived(self, x_1: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Put the picture in its place: solvers that ask at t = 1 (heun, rk4) are given no velocity there, 0 / 0."""
        return torch.cat([cond[-1].to(x_1.dtype), x_1[:, :, 1:]], dim=2)

    def for_autoencoder(self, pictures: torch.Tensor) -> torch.Tensor:
        """Give each picture as a video of one frame."""
        return pictures[:, :, None]

    def token_times(self, time: torch.Tensor) -> torch.Tensor:
        """Give each token its time (B, tokens): the network's `time` (B,), and that of data, 0, in the first frame."""
        moves = torch.arange(self.sequence_length, device=time.device) >= self.sequence_length // self.latent_shape[1]
        return time[:, None] * moves

    @abstractmethod
    def encode_text(self, prompts: list[str]) -> Condition:
        """Encode prompts without their pictures."""

    @abstractmethod
    def text_parts(self) -> list[Part]:
        """Give the shapes of what `encode_text` makes of a prompt."""

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts, with the latents of their pictures (B, C, 1, H', W') behind."""
        return (*self.encode_text(prompts), self.encode_pictures(prompts))

    def encode_null(self) -> Condition:
        """Encode the empty prompt, with zeros where `null_like` puts the picture."""
        return self.zeros_behind(self.encode_text([""]))

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty prompt for every sample, with the sample's own picture."""
        return (*super().null_like(null, cond)[:-1], cond[-1])

    def condition_parts(self) -> list[Part]:
        """Give the shapes of the prompt's parts, and of the picture's latents."""
        channels, _, *sides = self.latent_shape
        return [*self.text_parts(), Part((channels, 1, *sides))]
