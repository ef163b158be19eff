"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP and a small head, trained on rankings by people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flowrl.envs.rewards.aesthetic import AestheticHead
from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.pretrained import ImagePreprocessing, from_pretrained, load_state, published_file, read_state
from flowrl.errors import ModelLoadError
from flowrl.models.imports import importing
from flowrl.models.long_prompts import warn_of_cut
from flowrl.types import RewardOutput

REPOSITORY, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score on the authors' data
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of all attention heads, in the image and in the text encoder


@register_reward("imagereward")
class ImageRewardReward(ModelReward):
    """ImageReward: the authors' standardised score, mean 0 and standard deviation 1 on their data.

    The published weights are put into transformers' BLIP: the authors' package (image-reward 1.5) imports functions
    that transformers 5 no longer has. Only weights are read of the file. Licences: code and weights (THUDM/ImageReward)
    Apache-2.0; tokenizer of google-bert/bert-base-uncased, Apache-2.0.

    Args:
        file: File of the weights (.pt or safetensors); None gets the published one from the hub.
        tokenizer: Folder or hub name of the tokenizer.

    Raises:
        ModelLoadError: Weights cannot be had, or do not fit.
    """

    description = "ImageReward"

    def __init__(self, file: str | None = None, tokenizer: str = TOKENIZER) -> None:
        with importing():
            from transformers import AutoTokenizer

        self.tokenizer = from_pretrained(AutoTokenizer, tokenizer, "imagereward.tokenizer")
        self.network = ImageRewardNetwork.load(file or published_file(REPOSITORY, FILE, "imagereward.file"))
        self.modules = (self.network,)
        self._warned = False  # of prompts that are cut: once
        self.preprocessing = ImagePreprocessing.of_clip(self.network.image_size)

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1]."""
        if not self._warned:
            self._warned = warn_of_cut(prompts, [("it", self.tokenizer, MAX_TOKENS)], "the reward's text encoder")
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        raw = self.network(self.preprocessing(images), tokens["input_ids"], tokens["attention_mask"])
        return RewardOutput((raw - MEAN) / STD)


class ImageRewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder with attention to the image, and the head on the first token.

    Args:
        state: Weights under the names of this class; they give all sizes.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        with importing():
            from transformers import BlipTextConfig, BlipVisionConfig
            from transformers.models.blip.modeling_blip import BlipVisionModel
            from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        patches = state["image.embeddings.patch_embedding.weight"]  # (width, 3, patch, patch)
        places = state["image.embeddings.position_embedding"].shape[1] - 1
        words = state["text.embeddings.word_embeddings.weight"]  # (vocabulary, width)
        self.image_size = round(places**0.5) * patches.shape[2]
        image_width, text_width = patches.shape[0], words.shape[1]
        self.image = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=image_width,
                intermediate_size=state["image.encoder.layers.0.mlp.fc1.bias"].numel(),
                num_hidden_layers=_depth(state, "image.encoder.layers"),
                num_attention_heads=image_width // HEAD_WIDTH,
                image_size=self.image_size,
                patch_size=patches.shape[2],
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words.shape[0],
                hidden_size=text_width,
                encoder_hidden_size=image_width,
                intermediate_size=state["text.encoder.layer.0.intermediate.dense.bias"].numel(),
                num_hidden_layers=_depth(state, "text.encoder.layer"),
                num_attention_heads=text_width // HEAD_WIDTH,
                max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
            ),
            add_pooling_layer=False,
        )
        self.head = AestheticHead(text_width)

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the raw reward (B,) of pixels (B, 3, S, S) and tokens (B, L) with their mask (B, L)."""
        seen = self.image(pixel_values=pixels).last_hidden_state  # (B, 1 + patches, D)
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        return self.head(read[:, 0])

    @classmethod
    def load(cls, file: str) -> ImageRewardNetwork:
        """Load a frozen network with the weights of a file in the authors' format.

        Raises:
            ModelLoadError: The file is missing or does not fit.
        """
        state = state_of_authors(read_state(file))
        try:
            network = cls(state)
        except (KeyError, IndexError, ValueError) as error:
            raise ModelLoadError(
                f"'{file}' holds no weights of ImageReward: {type(error).__name__} {error}."
            ) from error
        load_state(network, state, file)
        return network.float().eval().requires_grad_(False)


RENAMED = (
    (r"^mlp\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "image."),
    (r"^image\.cls_token$", "image.embeddings.class_embedding"),
    (r"^image\.pos_embed$", "image.embeddings.position_embedding"),
    (r"^image\.patch_embed\.proj\.", "image.embeddings.patch_embedding."),
    (r"^image\.norm\.", "image.post_layernorm."),
    (r"^image\.blocks\.", "image.encoder.layers."),
    (r"^(image\.encoder.*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(image\.encoder.*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(image\.encoder.*)\.attn\.proj\.", r"\1.self_attn.projection."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def state_of_authors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights of the authors' network as `ImageRewardNetwork` names them."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _depth(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state]
    return 1 + max(int(found[1]) for found in numbers if found)
