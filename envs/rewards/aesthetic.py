"""Aesthetic rewards: the LAION predictor, and colourfulness where its weights cannot be had."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.pretrained import ImagePreprocessing, load_model, load_state, published_file, read_state
from flowrl.envs.rewards.ranges import UNIT
from flowrl.models.imports import importing
from flowrl.types import RewardOutput

CLIP = "openai/clip-vit-large-patch14"
OTHERWISE = ", or take --env.reward colourfulness"
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")


def colourfulness(images: torch.Tensor) -> torch.Tensor:
    """Compute colourfulness M^(3) of Hasler and Süsstrunk (2003), eq. 2: (B, 3, H, W) in [0, 1] -> (B,).

    On the paper's scale (pixel values 0 to 255): 0 is grey, 33 moderately, 59 quite, 109 extremely colourful.
    """
    red, green, blue = (255 * images.float()).flatten(2).unbind(1)  # (B, HW) each
    rg, yb = red - green, (red + green) / 2 - blue
    spread = _root(rg.var(1, correction=0) + yb.var(1, correction=0))
    distance = _root(rg.mean(1).square() + yb.mean(1).square())
    return spread + 0.3 * distance


def _root(square: torch.Tensor) -> torch.Tensor:
    """Take the square root (B,), with gradient 0 where it is 0: infinite there, a grey image would spoil a batch."""
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


@register_reward("colourfulness")
class ColourfulnessReward:
    """Hasler-Süsstrunk colourfulness, divided by 100."""

    description = "colourfulness (Hasler and Süsstrunk 2003) / 100"
    scale = 0.3
    takes = UNIT

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1]."""
        return RewardOutput(colourfulness(images) / 100)


class AestheticHead(nn.Module):
    """Head of the LAION aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE).

    Five linear layers without activations, on normalised CLIP ViT-L/14 image embeddings (B, width) -> (B,).
    The published weights are Apache-2.0; they do not ship with flowrl.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(n_in, n_out))
            if i < 3:
                layers.append(nn.Dropout((0.2, 0.2, 0.1)[i]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Rate embeddings, about 1 to 10."""
        return self.layers(embedding).squeeze(1)

    @classmethod
    def load(cls, file: str | Path) -> AestheticHead:
        """Load a head with the weights of a file: safetensors, or the published .pth (read as weights only).

        Raises:
            ModelLoadError: The file is missing or does not fit.
        """
        head = cls()
        load_state(head, read_state(file), file)
        return head.eval().requires_grad_(False)


@register_reward("aesthetic")
class AestheticReward(ModelReward):
    """LAION aesthetic score of images: CLIP ViT-L/14 embedding, normalised, through the published head.

    Args:
        head: File of the head's weights (safetensors or .pth); None gets the published ones from the hub.
        clip: Folder or hub name of the CLIP model.

    Raises:
        ModelLoadError: Weights cannot be had.
    """

    description = "LAION aesthetic predictor (CLIP ViT-L/14 and its published head)"
    scale = 0.5

    def __init__(self, head: str | None = None, clip: str = CLIP) -> None:
        with importing():
            from transformers import CLIPVisionModelWithProjection

        self.head = AestheticHead.load(head or published_file(*HEAD, "aesthetic.head", OTHERWISE))
        self.clip = load_model(CLIPVisionModelWithProjection, clip, "aesthetic.clip", OTHERWISE)
        self.modules = (self.head, self.clip)
        self.preprocessing = ImagePreprocessing.of_clip(self.clip.config.image_size)

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1]."""
        embedding = self.clip(pixel_values=self.preprocessing(images)).image_embeds
        return RewardOutput(self.head(nn.functional.normalize(embedding, dim=1)))
