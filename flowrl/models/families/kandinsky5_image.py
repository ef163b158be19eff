"""Kandinsky 5.0, of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.models.families.patches import PatchedFlow
from flowrl.models.packing import of_length
from flowrl.models.pipeline import Part
from flowrl.types import Condition

ATTENTIONS = ("self_attention", "cross_attention")
LORA_TARGETS = ["to_query", "to_key", "to_value", *(f"{attention}.out_layer" for attention in ATTENTIONS)]


class Kandinsky5ImageFlow(PatchedFlow):
    """A `Kandinsky5T2IPipeline`. Resolutions are taken as they are: its own call draws the nearest of seven.

    Its transformer has no mask of text, so that it is called sample by sample, each prompt at its own length, as in a
    call of its own: in a call of several, the pipeline shows it what pads all to the longest.
    """

    PIPELINE = "Kandinsky5T2IPipeline"
    TRANSFORMER = "Kandinsky5Transformer3DModel"
    ENCODERS = ("text_encoder", "text_encoder_2")
    LATENTS = 128
    lora_targets = LORA_TARGETS

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["in_visual_dim"])

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the side of a patch, which is of one frame."""
        return int(transformer["patch_size"][-1])

    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the transformer's arguments: latents of one frame, channels last."""
        patch = self.patch(self.network.config)  # type: ignore[arg-type]
        return {
            "hidden_states": x.permute(0, 2, 3, 1)[:, None],
            "timestep": time,
            "encoder_hidden_states": cond[0],
            "pooled_projections": cond[1],
            "lengths": cond[2],
            "visual_rope_pos": [
                torch.arange(n, device=x.device) for n in (1, x.shape[2] // patch, x.shape[3] // patch)
            ],
        }

    def predict(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network, once a sample."""
        lengths, places = inputs.pop("lengths").tolist(), inputs.pop("visual_rope_pos")
        predicted = []
        for row, length in enumerate(lengths):
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            own["encoder_hidden_states"] = own["encoder_hidden_states"][:, :length]
            positions = torch.arange(length, device=places[0].device)
            predicted.append(self.network(**own, visual_rope_pos=places, text_rope_pos=positions).sample)
        return torch.cat(predicted)

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring the frame into the shape of latents."""
        return predicted[:, 0].permute(0, 3, 1, 2)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts: Qwen's embeddings (B, tokens, dim), pooled CLIP (B, dim), numbers of tokens (B,)."""
        given = {"device": self.device, "max_sequence_length": self.max_sequence_length}
        encoded = [self.pipeline.encode_prompt([prompt], **given) for prompt in prompts]
        lengths = torch.tensor([len(qwen[0]) for qwen, *_ in encoded], device=self.device)
        embeds = torch.cat([of_length(qwen, self.max_sequence_length) for qwen, *_ in encoded])
        return embeds, torch.cat([pooled for _, pooled, _ in encoded]), lengths

    def condition_parts(self) -> list[Part]:
        """Give the shapes of embeddings, pooled embedding and number of tokens."""
        config: Any = self.network.config
        embeds = Part((self.max_sequence_length, config.in_text_dim))
        return [embeds, Part((config.in_text_dim2,)), Part((), torch.int64)]

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the scale of the autoencoder's, without its shift, as the pipeline does."""
        return x_1 / self.pipeline.vae.config.scaling_factor
