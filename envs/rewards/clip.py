"""Text-image similarity (Radford et al. 2021, CLIP; Hessel et al. 2021, CLIPScore)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.pretrained import ImagePreprocessing, from_pretrained, load_model
from flowrl.errors import ModelLoadError
from flowrl.models.imports import importing
from flowrl.models.long_prompts import warn_of_cut
from flowrl.types import RewardOutput

MODEL = "openai/clip-vit-large-patch14"
KEPT_PROMPTS = 10_000
"""Embeddings of prompts that are kept; the oldest go first."""


class DualEncoder:
    """A CLIP or SigLIP model: cosine similarity of images and prompts. Every distinct prompt is encoded once.

    Args:
        model: `CLIPModel`, `SiglipModel`, or another with `get_text_features` and `get_image_features`.
        processor: Its processor; only the text part is used.
        preprocessing: Images as the model takes them.
    """

    def __init__(self, model: Any, processor: Any, preprocessing: ImagePreprocessing) -> None:
        self.model, self.processor, self.preprocessing = model, processor, preprocessing
        self.length = int(model.config.text_config.max_position_embeddings)
        self._texts: dict[str, torch.Tensor] = {}
        self._warned = False  # of prompts that are cut: once

    def cosine(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Compute the cosine similarity (B,) of each image (B, 3, H, W) in [0, 1] to its own prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        tokenizer = getattr(self.processor, "tokenizer", None)
        if new and not self._warned and tokenizer is not None:
            self._warned = warn_of_cut(new, [("it", tokenizer, self.length)], "the reward's text encoder")
        for prompt in new:
            self._texts[prompt] = self._encode(prompt, images.device)
        texts = torch.stack([self._texts[prompt].to(images.device) for prompt in prompts])  # (B, D)
        while len(self._texts) > KEPT_PROMPTS:
            del self._texts[next(iter(self._texts))]
        embeddings = _features(self.model.get_image_features(pixel_values=self.preprocessing(images)))
        return (nn.functional.normalize(embeddings, dim=1) * texts).sum(1)

    def _encode(self, prompt: str, device: torch.device) -> torch.Tensor:
        # one by one, always as long: the last bits do not depend on what else is asked, so that resuming is exact
        tokens = self.processor(
            text=[prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return nn.functional.normalize(_features(self.model.get_text_features(**tokens.to(device))), dim=1)[0]


def _features(output: Any) -> torch.Tensor:
    """Get projected embeddings; transformers gives them within an output object since version 5."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@register_reward("clip")
class ClipReward(ModelReward):
    """Text-image cosine similarity of a CLIP or SigLIP model.

    Code: transformers, Apache-2.0. Weights: by default openai/clip-vit-large-patch14 (MIT, as OpenAI's repository).

    Args:
        model: Folder or hub name of a CLIP or SigLIP model with its processor.

    Raises:
        ModelLoadError: Weights cannot be had, are incomplete, or are of something else.
    """

    scale = 0.03

    def __init__(self, model: str = MODEL) -> None:
        with importing():
            from transformers import AutoModel, AutoProcessor

        network = load_model(AutoModel, model, "clip.model")
        if not (hasattr(network, "get_text_features") and hasattr(network, "get_image_features")):
            raise ModelLoadError(
                f"'{model}' is a {type(network).__name__}, which does not embed both texts and images: give a CLIP or "
                "SigLIP model as --env.reward-options clip.model=FOLDER."
            )
        processor = from_pretrained(AutoProcessor, model, "clip.model")
        preprocessing = ImagePreprocessing.of_processor(processor.image_processor, model)
        self.encoder = DualEncoder(network, processor, preprocessing)
        self.modules = (network,)
        self.description = f"text-image cosine similarity of {model}"

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with values in [-1, 1]."""
        return RewardOutput(self.encoder.cosine(images, prompts))
