"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP fine-tuned on which of two pictures people chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.clip import DualEncoder
from flowrl.envs.rewards.pretrained import ImagePreprocessing, from_pretrained, load_model
from flowrl.errors import ConfigError
from flowrl.models.imports import importing
from flowrl.types import RewardOutput

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register_reward("pickscore")
class PickScoreReward(ModelReward):
    """PickScore: `exp(logit_scale) cos(text, image) / divisor`, about 20 with divisor 1.

    A difference of 1 (with divisor 1) is a preference at odds of e to 1: the model was trained on the softmax of this
    score over two pictures. Code: transformers, Apache-2.0. Weights: yuvalkirstain/PickScore_v1, whose model card names
    no licence; processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT.

    Args:
        model: Folder or hub name of the model.
        processor: Folder or hub name of its processor.
        divisor: The score is divided by it; 26 brings it to about 0 to 1, as some work does (Flow-GRPO).

    Raises:
        ConfigError: A divisor that is not positive.
        ModelLoadError: Weights cannot be had, or are incomplete.
    """

    description = "PickScore"

    def __init__(self, model: str = MODEL, processor: str = PROCESSOR, divisor: float = 1.0) -> None:
        with importing():
            from transformers import AutoProcessor, CLIPModel

        if not divisor > 0:
            raise ConfigError(f"The reward option pickscore.divisor must be positive, not {divisor}.")
        network = load_model(CLIPModel, model, "pickscore.model")
        loaded = from_pretrained(AutoProcessor, processor, "pickscore.processor")
        preprocessing = ImagePreprocessing.of_processor(loaded.image_processor, processor)
        self.encoder = DualEncoder(network, loaded, preprocessing)
        self.modules = (network,)
        self.factor = network.logit_scale.exp().item() / divisor
        self.scale = 1 / divisor

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1]."""
        return RewardOutput(self.factor * self.encoder.cosine(images, prompts))
