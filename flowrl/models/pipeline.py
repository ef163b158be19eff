"""Text-to-image pipelines of diffusers as velocity models: the base of Stable Diffusion 3 and FLUX.

diffusers runs time backwards (sigma = 1 - t) and predicts noise - data = -v. Adapters convert both, here and in
the subclasses, and nowhere else.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel
from flowrl.models.long_prompts import silenced, warn_of_cut
from flowrl.models.schedules import TIMESTEPS, times_of
from flowrl.types import Condition, Contexts

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PROMPTS_AT_ONCE = 64
ATTENTION = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]
"""Projections of the attention of image and text, which LoRA adapts."""


@dataclass(frozen=True)
class PipelineOptions:
    """Use of a text-to-image pipeline.

    Attributes:
        resolution: Height and width of the images in pixels; the pipeline's own when None.
        decode_batch: Images that the autoencoder decodes at once.
        vae_tiling: Decode large images in tiles, for little memory.
        t5: Load the T5 text encoder where the pipeline can do without it (Stable Diffusion 3).
    """

    resolution: int | None = None
    decode_batch: int = 64
    vae_tiling: bool = False
    t5: bool = True


DEFAULTS = PipelineOptions()


@dataclass(frozen=True)
class Shapes:
    """Shapes of one latent and one image, as a pipeline's configuration says."""

    latent: tuple[int, int, int]
    sample: tuple[int, int, int]


class PipelineFlow(VelocityModel):
    """A text-to-image pipeline; its transformer is fine-tuned.

    Args:
        pipeline: A loaded diffusers pipeline.
        shapes: Shapes of its latents and images.
        options: Options of the pipeline.
        max_sequence_length: Tokens of the T5 context; as in the pipeline's own call when None.
        load_encoders: Loads a pipeline that holds text encoders and tokenizers only. Without it they cannot be had
            again, so they are moved to the host instead of being released.
    """

    PIPELINE: ClassVar[str]
    """Class name of the pipeline in diffusers."""
    TRANSFORMER: ClassVar[str]
    """Class name of its transformer."""
    NEEDS_T5: ClassVar[bool]
    """Whether it cannot do without T5."""
    SEQUENCE_LENGTH: ClassVar[int]
    """Tokens of the T5 context in the pipeline's own call."""
    MAX_SHIFT: ClassVar[float]
    """The pipeline's own default of `max_shift` in a schedule that depends on the resolution."""
    casts_inputs = True

    def __init__(
        self,
        pipeline: Any,
        shapes: Shapes,
        options: PipelineOptions = PipelineOptions(),
        max_sequence_length: int | None = None,
        load_encoders: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.max_sequence_length = max_sequence_length or self.SEQUENCE_LENGTH
        self.pipeline = pipeline
        self.network = pipeline.transformer
        scheduler = getattr(pipeline, "scheduler", None)
        self.timesteps = TIMESTEPS if scheduler is None else int(scheduler.config.get("num_train_timesteps", TIMESTEPS))
        self.latent_shape, self.sample_shape = shapes.latent, shapes.sample
        self.decode_batch = options.decode_batch
        self.load_encoders = load_encoders
        self.device = torch.device("cpu")
        vae = getattr(pipeline, "vae", None)
        if vae is not None:
            vae.requires_grad_(False)  # gradients of a reward flow through it, none are its own
        if options.vae_tiling and vae is not None:
            if not hasattr(vae, "enable_tiling"):
                raise ConfigError(f"The autoencoder of this pipeline ({type(vae).__name__}) has no tiling.")
            vae.enable_tiling()

    @classmethod
    @abstractmethod
    def shapes(cls, transformer: Mapping[str, Any], scale: int, resolution: int | None) -> Shapes:
        """Compute shapes from the transformer's configuration and the autoencoder's reduction of height and width."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts by the pipeline's own text encoders."""

    def imitate_prompts(self, prompts: list[str]) -> Condition:
        """Make meaningless embeddings, of the shapes and types that `encode_prompts` gives, at the same cost."""
        for encoder in self._encoders().values():
            length = self.max_sequence_length if "T5" in type(encoder).__name__ else self.pipeline.tokenizer_max_length
            encoder(torch.zeros(len(prompts), length, dtype=torch.long, device=self.device), output_hidden_states=True)
        types = [self.pipeline.vae.dtype if shape else torch.float32 for shape in self.condition_shapes()]
        return tuple(
            torch.zeros(len(prompts), *shape, dtype=dtype, device=self.device)
            for shape, dtype in zip(self.condition_shapes(), types)
        )

    @abstractmethod
    def condition_shapes(self) -> list[tuple[int, ...]]:
        """Give the shapes of the parts of one encoded prompt; single numbers are in float32."""

    @property
    @abstractmethod
    def sequence_length(self) -> int:
        """Number of tokens of one image in the transformer; a schedule may be shifted by it."""

    @torch.no_grad()
    def encode(self, contexts: Contexts) -> Condition:
        """Encode prompts by the pipeline's own text encoders."""
        for prompt in contexts:
            if not isinstance(prompt, str):
                raise ConfigError(f"A text-to-image flow takes prompts (str), not {prompt!r}.")
        self._place_encoders()
        warn_of_cut(contexts, self.tokenizers(), "the flow's text encoders")
        with silenced():  # each library warns of each prompt again
            chunks = [
                self.encode_prompts(list(contexts[i : i + PROMPTS_AT_ONCE]))
                for i in range(0, len(contexts), PROMPTS_AT_ONCE)
            ]
        return tuple(torch.cat(parts) for parts in zip(*chunks))

    def tokenizers(self) -> list[tuple[str, Any, int]]:
        """Name of each kind of text encoder, its tokenizer, and how many tokens of a prompt it is given."""
        found: dict[str, tuple[str, Any, int]] = {}
        for part, encoder in self._encoders().items():
            tokenizer = getattr(self.pipeline, part.replace("text_encoder", "tokenizer"), None)
            name = "T5" if "T5" in type(encoder).__name__ else "CLIP"
            if tokenizer is not None and name not in found:  # two encoders of one kind are given the same
                most = self.max_sequence_length if name == "T5" else self.pipeline.tokenizer_max_length
                found[name] = (name, tokenizer, most)
        return list(found.values())

    def null_condition(self) -> Condition:
        """Encode the empty prompt, as the pipeline's own guidance uses it."""
        return self.encode([""])

    def _place_encoders(self) -> None:
        """Put the text encoders on the device, loaded again where they had been released."""
        if self.load_encoders is not None and self.pipeline.text_encoder is None:
            loaded = self.load_encoders()
            for name in ENCODERS:
                if getattr(loaded, name, None) is not None:
                    setattr(self.pipeline, name, getattr(loaded, name))
        for encoder in self._encoders().values():
            encoder.to(self.device)

    def release_encoders(self) -> None:
        """Give back the memory of the text encoders; they come back when a new prompt is to be encoded."""
        for name, encoder in self._encoders().items():
            if self.load_encoders is None:
                encoder.to("cpu")
            else:
                setattr(self.pipeline, name, None)

    def _encoders(self) -> dict[str, torch.nn.Module]:
        return {name: part for name in ENCODERS if (part := getattr(self.pipeline, name, None)) is not None}

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to images (B, 3, H, W), float32 in [0, 1]."""
        vae: Any = self.pipeline.vae
        vae.to(self.device)
        scale, shift = (vae.config.get(key) for key in ("scaling_factor", "shift_factor"))  # older ones have no shift
        latents = (x_1 / (1 if scale is None else scale) + (shift or 0)).to(vae.dtype)
        decode: Callable[..., Any] = vae.decode
        images = [decode(chunk, return_dict=False)[0] for chunk in latents.split(self.decode_batch)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    def with_encoders(self, network: torch.nn.Module) -> Any:
        """Assemble the whole pipeline around a network, text encoders included, to be saved."""
        self._place_encoders()
        parts = {name: network if part is self.network else part for name, part in self.pipeline.components.items()}
        return type(self.pipeline)(**parts)

    def offload(self) -> None:
        """Move the autoencoder to the host until samples are decoded again."""
        self.pipeline.vae.to("cpu")

    def times(self, steps: int) -> torch.Tensor:
        """Give the times of the pipeline's own schedule."""
        config, mu = self.pipeline.scheduler.config, None
        if config.get("use_dynamic_shifting"):
            least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", self.MAX_SHIFT)
            mu = low + (high - low) * (self.sequence_length - least) / (most - least)
        return times_of(copy.deepcopy(self.pipeline.scheduler), steps, self.sigmas(steps, config), mu)

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Give the noise levels that the pipeline's call hands to its scheduler; None leaves them to the scheduler."""
        return None

    def move_frozen(self, device: torch.device) -> None:
        """Compute on `device` from now on; text encoders and autoencoder follow when they are used."""
        self.device = device

    def export(self, folder: Path, lora_state: dict[str, torch.Tensor] | None) -> None:
        """Write LoRA weights for `pipe.load_lora_weights(folder)`, or a `transformer` folder of a full fine-tune."""
        if lora_state is None:
            network: Any = self.network
            network.save_pretrained(folder / "transformer", safe_serialization=True)
        else:
            type(self.pipeline).save_lora_weights(folder, transformer_lora_layers=lora_state)


def square(size: int | None, default: int, scale: int, patch: int, most: int | None = None) -> int:
    """Compute the height (and width) of the latents for images of `size` pixels; `default` without a size.

    Args:
        size: Height and width in pixels.
        default: Height of the latents without a size.
        scale: Pixels per latent, along each side.
        patch: Latents per patch, along each side.
        most: Largest number of patches along a side that the transformer has positions for; None without limit.

    Raises:
        ConfigError: The transformer cannot cut such images into patches, or has no positions for so many.
    """
    if size is None:
        return default
    step = scale * patch
    if most is not None and size > most * step:
        raise ConfigError(
            f"resolution must be at most {most * step} pixels for this pipeline, whose transformer has positions for "
            f"{most} x {most} patches; not {size}."
        )
    if size <= 0 or size % step:
        near = max(1, round(size / step)) * step
        raise ConfigError(f"resolution must be a multiple of {step} pixels for this pipeline, not {size}; e.g. {near}.")
    return size // scale
