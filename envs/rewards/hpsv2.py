"""Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H/14 fine-tuned on human preferences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.envs.rewards.clip import DualEncoder
from flowrl.envs.rewards.pretrained import ImagePreprocessing, from_pretrained, load_state, published_file, read_state
from flowrl.errors import ConfigError, ModelLoadError
from flowrl.models.imports import importing
from flowrl.types import RewardOutput

REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register_reward("hpsv2")
class HPSv2Reward(ModelReward):
    """Human Preference Score v2: text-image cosine similarity, about 0.3.

    As the authors' code it gives the cosine, without the model's factor of 100, and fills images that are not square
    up with black. The published weights are a checkpoint of open_clip, here put into transformers' CLIPModel, whose
    arithmetic is the same: the authors' package brings a copy of open_clip, and open_clip needs torchvision, while
    transformers is there already. Only weights are read of the file. Licences: HPSv2 code and weights (xswu/HPSv2)
    Apache-2.0; config and processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT.

    Args:
        version: "v2.1" or "v2.0".
        file: File of the weights (.pt or safetensors); None gets the published one from the hub.
        clip: Folder or hub name of the CLIP model's config and processor.

    Raises:
        ConfigError: Unknown version.
        ModelLoadError: Weights cannot be had, or do not fit.
    """

    scale = 0.03

    def __init__(self, version: str = "v2.1", file: str | None = None, clip: str = CLIP) -> None:
        with importing():
            from transformers import AutoProcessor, CLIPConfig, CLIPModel

        if version not in FILES:
            raise ConfigError(f"The reward option hpsv2.version must be {' or '.join(FILES)}, not '{version}'.")
        config = from_pretrained(CLIPConfig, clip, "hpsv2.clip")
        processor = from_pretrained(AutoProcessor, clip, "hpsv2.clip")
        file = file or published_file(REPOSITORY, FILES[version], "hpsv2.file")
        content = read_state(file)
        network = CLIPModel(config)
        load_state(network, state_of_open_clip(content.get("state_dict", content), file), file)
        self.modules = (network.float().eval().requires_grad_(False),)
        size = config.vision_config.image_size
        self.encoder = DualEncoder(network, processor, ImagePreprocessing(size, pad=True))
        self.description = f"Human Preference Score {version}"

    def reward(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with values in [-1, 1]."""
        return RewardOutput(self.encoder.cosine(images, prompts))


WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def state_of_open_clip(state: Mapping[str, Any], file: str) -> dict[str, torch.Tensor]:
    """Rename weights of open_clip's CLIP as transformers' CLIPModel names them.

    Raises:
        ModelLoadError: A weight that open_clip's CLIP does not have; names the file.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in WHOLE:
            renamed[WHOLE[name]] = tensor
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T
        elif (block := BLOCK.fullmatch(name)) and (block[3] in IN_BLOCKS or block[3] == "attn.in_proj"):
            prefix = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            if block[3] == "attn.in_proj":
                for key, part in zip("qkv", tensor.chunk(3)):
                    renamed[f"{prefix}.self_attn.{key}_proj.{block[4]}"] = part
            else:
                renamed[f"{prefix}.{IN_BLOCKS[block[3]]}.{block[4]}"] = tensor
        else:
            raise ModelLoadError(f"'{file}' holds no weights of open_clip's CLIP: '{name}' is none of them.")
    return renamed
