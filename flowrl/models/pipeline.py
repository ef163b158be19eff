"""Flow pipelines of diffusers as velocity models: what a declaration of a family says, and what all of them share.

diffusers runs time backwards (sigma = 1 - t) and most networks predict noise - data = -v. Both are converted here, as a
family's declaration says, and nowhere else.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from flowrl.errors import ConfigError
from flowrl.models.init_lora import LORA_WEIGHTS, with_start
from flowrl.models.latent_scale import to_autoencoder
from flowrl.models.packing import latent_sides
from flowrl.models.pipeline_options import DEFAULTS, PipelineOptions, Shapes
from flowrl.models.schedules import TIMESTEPS, times_of
from flowrl.models.text_encoders import Part, PromptedFlow
from flowrl.types import Condition, has_values

__all__ = ["ATTENTION", "DEFAULTS", "Part", "PipelineFlow", "PipelineOptions", "Shapes"]

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

TOKENS_AT_ONCE = 1024
"""Tokens of one thread of the CPU in a pass that draws or measures: activations of more leave its caches."""

DECODED_AT_ONCE = 8
"""Images of one thread of the CPU that are decoded at once, for the same reason."""


class PipelineFlow(PromptedFlow):
    """A flow pipeline, of which one network is fine-tuned; subclasses declare families (docs/how-to/pipeline.md).

    Args:
        pipeline: A loaded diffusers pipeline.
        shapes: Shapes of its latents and samples.
        options: Options of the pipeline.
        max_sequence_length: Tokens of a prompt; as in the pipeline's own call when None.
        load_encoders: Loads a pipeline that holds text encoders and tokenizers only. Without it they cannot be had
            again, so they are moved to the host instead of being released.
    """

    PIPELINE: ClassVar[str]
    """Class name of the pipeline in diffusers."""
    TRANSFORMER: ClassVar[str]
    """Class name of the network that is trained."""
    NETWORK: ClassVar[str] = "transformer"
    """Name of the part that is trained."""
    MORE_NETWORKS: ClassVar[tuple[str, ...]] = ()
    """Names of further parts that are trained with it, where a pipeline has them."""
    ALWAYS_THERE: ClassVar[tuple[str, ...]] = ()
    """Names of parts that the pipeline is not assembled without, not even to encode prompts."""
    TRANSFORMERS_AS: ClassVar[str] = "transformers"
    """Library that diffusers writes down for parts of transformers whose module has the name of one of its own."""
    LEAST_DIFFUSERS: ClassVar[tuple[int, ...]] = ()
    """Version of diffusers that the class is declared for, where an earlier one computes something else."""
    DIFFUSERS_AS: ClassVar[str] = "diffusers"
    """Name that diffusers writes down for parts that stand beside the pipeline in its own package."""
    WITHOUT_T5: ClassVar[str | None] = None
    """Part that `t5=False` leaves out; None where the pipeline cannot do without."""
    MAX_SHIFT: ClassVar[float] = 1.15
    """The pipeline's own default of `max_shift` in a schedule that depends on the resolution."""
    TIME_SCALE: ClassVar[float] = 1000.0
    """What the network is given as the time of noise; that of data is 0."""
    TIME_REVERSED: ClassVar[bool] = False
    """Whether the network's time runs the other way, with the noise at 0."""
    INVERTED_LEVELS: ClassVar[bool] = False
    """Whether the pipeline's scheduler counts data instead of noise: `invert_sigmas`."""
    NO_NOISE_AGAIN: ClassVar[str] = ""
    """Why pipelines are refused whose scheduler adds noise after every step (`stochastic_sampling`); else empty."""
    PREDICTS_VELOCITY: ClassVar[bool] = False
    """Whether the network predicts data - noise, the velocity; else noise - data."""
    NO_GUIDANCE: ClassVar[str] = ""
    """Why the pipeline's own guidance cannot be had, and any scale but 1 is refused; empty where it can."""
    FRAME_RATE: ClassVar[float] = 0
    """Frames per second at which the pipeline's videos are meant to be seen; 0 of images."""
    DRAWN: ClassVar[str] = "images"
    """Name of what the pipeline's own call gives."""
    UNGUIDED: ClassVar[float] = 1.0
    """The guidance scale of the pipeline's own call that leaves guidance out."""
    OWN_CALL: str = ""
    """How the pipeline's own call draws another sample of the same seed, for model cards; empty where it does not."""
    casts_inputs = True
    told_of_guidance = False

    def __init__(
        self,
        pipeline: Any,
        shapes: Shapes,
        options: PipelineOptions = DEFAULTS,
        max_sequence_length: int | None = None,
        load_encoders: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.max_sequence_length = max_sequence_length or self.SEQUENCE_LENGTH
        self.pipeline = pipeline
        self.network = self.trained_part(pipeline)
        scheduler = getattr(pipeline, "scheduler", None)
        self.timesteps = TIMESTEPS if scheduler is None else int(scheduler.config.get("num_train_timesteps", TIMESTEPS))
        self.latent_shape, self.sample_shape = shapes.latent, shapes.sample
        self.decode_batch = options.decode_batch
        self.embedded_guidance = options.embedded_guidance
        self.takes_guidance = self.embeds_guidance(getattr(self.network, "config", {}))
        self.ignores_guidance = self.without_guidance(getattr(pipeline, "config", {}))
        embedded = self.takes_guidance and options.embedded_guidance is None
        self.distilled_guidance = bool(self.NO_GUIDANCE) or self.ignores_guidance or embedded
        if options.embedded_guidance is not None and not self.takes_guidance:
            raise ConfigError(
                f"The network of this {self.PIPELINE} takes no guidance scale: leave embedded_guidance out, and set "
                "guidance_scale."
            )
        self.load_encoders = load_encoders
        self.device = torch.device("cpu")
        vae = getattr(pipeline, "vae", None)
        if vae is not None:
            self.sample_rate = self.values_per_second(vae.config)
            vae.requires_grad_(False)  # gradients of a reward flow through it, none are its own
        if options.vae_tiling and vae is not None:
            if not hasattr(vae, "enable_tiling"):
                raise ConfigError(f"The autoencoder of this pipeline ({type(vae).__name__}) has no tiling.")
            vae.enable_tiling()

    @classmethod
    def trained_part(cls, pipeline: Any) -> nn.Module:
        """Give the network that is trained."""
        network: nn.Module = getattr(pipeline, cls.NETWORK)
        return network

    @classmethod
    def networks_of(cls, network: nn.Module) -> dict[str, Any]:
        """Give the pipeline's own parts, by their names, of the network that is trained or of a copy of it."""
        return {cls.NETWORK: network}

    # what the configuration says

    @classmethod
    def form(cls, index: Mapping[str, Any]) -> type[PipelineFlow]:
        """Give the class for a pipeline with this `model_index.json`: another where it has a form of its own."""
        return cls

    @classmethod
    def shapes(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], options: PipelineOptions) -> Shapes:
        """Compute shapes from the configurations of the transformer and of the autoencoder."""
        scale = cls.reduction(vae)
        if options.frames is not None:
            raise ConfigError(f"A {cls.PIPELINE} draws images, which have no frames: leave frames out.")
        height, width = latent_sides(
            options.resolution,
            cls.default_sides(transformer),
            scale,
            cls.patch(transformer),
            cls.most_patches(transformer),
        )
        return Shapes((cls.channels(transformer), height, width), (3, height * scale, width * scale))

    @classmethod
    def reduction(cls, vae: Mapping[str, Any]) -> int:
        """Compute the pixels per latent along each side, from the autoencoder's configuration."""
        channels = vae.get("block_out_channels") or vae["encoder_block_out_channels"]  # the latter: AutoencoderTiny
        return int(2 ** (len(channels) - 1))

    @classmethod
    def values_per_second(cls, vae: Mapping[str, Any]) -> int:
        """Give the sample rate of a pipeline that draws sounds; 0 of others."""
        return 0

    @classmethod
    @abstractmethod
    def default_sides(cls, transformer: Mapping[str, Any]) -> tuple[int, int]:
        """Give height and width of the latents when no resolution is asked for."""

    @classmethod
    def patch(cls, transformer: Mapping[str, Any]) -> int:
        """Give the latents per patch along each side: heights and widths are multiples of it."""
        return 2

    @classmethod
    def most_patches(cls, transformer: Mapping[str, Any]) -> int | None:
        """Give the largest number of patches along a side; None without limit."""
        return None

    @classmethod
    def channels(cls, transformer: Mapping[str, Any]) -> int:
        """Give the channels of the latents."""
        return int(transformer["in_channels"])

    @classmethod
    def embeds_guidance(cls, transformer: Mapping[str, Any]) -> bool:
        """Tell whether the guidance scale is an input of the network."""
        return False

    @classmethod
    def without_guidance(cls, pipeline: Mapping[str, Any]) -> bool:
        """Tell whether a pipeline's configuration says that it is distilled to do without guidance."""
        return False

    # the network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity of the latents."""
        inputs = self.inputs(x_t.to(cond[0].dtype), self.network_time(t), cond)
        predicted = self.outputs(self.predict(inputs).float())
        return predicted if self.PREDICTS_VELOCITY else -predicted

    def predict(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Call the network."""
        predicted: torch.Tensor = self.network(**inputs, return_dict=False)[0]
        return predicted

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """Give what the network takes as its time, at `t` (B,)."""
        noise, ratio = 1 - t, self.timesteps / TIMESTEPS
        if self.TIME_REVERSED:
            return self.TIME_SCALE * (1 - noise * ratio)
        return noise * (self.TIME_SCALE * ratio)  # rounded once: some networks know 10,000 turns of the time

    @abstractmethod
    def inputs(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[str, Any]:
        """Give the network's arguments by name: latents `x` (B, *latent_shape), its own `time` (B,), a condition."""

    def outputs(self, predicted: torch.Tensor) -> torch.Tensor:
        """Bring what the network gives into the shape of latents (B, *latent_shape)."""
        return predicted

    def with_guidance(self, cond: Condition, scale: float) -> Condition:
        """Put another guidance scale into a condition, whose last part it is.

        Raises:
            ConfigError: A scale other than 1 where there is no guidance.
        """
        if self.NO_GUIDANCE:
            if scale != 1:
                raise ConfigError(f"guidance_scale must be 1 for {self.PIPELINE}, not {scale:g}: {self.NO_GUIDANCE}.")
            return cond
        if self.ignores_guidance:
            if scale != 1 and not self.told_of_guidance:
                self.told_of_guidance = True
                warnings.warn(
                    f"guidance_scale={scale:g} does nothing: this {self.PIPELINE} is distilled to do without guidance.",
                    stacklevel=2,
                )
            return cond
        if self.distilled_guidance:
            return (*cond[:-1], torch.full_like(cond[-1], scale))
        if scale < self.UNGUIDED and not self.told_of_guidance:
            self.told_of_guidance = True
            warnings.warn(
                f"guidance_scale={scale:g} leads away from the prompts, which do nothing at 0: without guidance it is "
                "1, also where diffusers' own call takes 0 for none.",
                stacklevel=2,
            )
        return cond

    def guidance_of(self, n: int) -> torch.Tensor:
        """Give the guidance scales (n,) that a guidance-distilled network is given at first."""
        return torch.full((n,), 1.0 if self.embedded_guidance is None else self.embedded_guidance, device=self.device)

    @property
    @abstractmethod
    def sequence_length(self) -> int:
        """Number of tokens of one image in the transformer; a schedule may be shifted by it."""

    def rows_at_once(self) -> int:
        """Give as many rows as have `TOKENS_AT_ONCE` tokens for each thread; all where a family does not count them."""
        tokens = int(self.sequence_length or 0)
        return max(1, TOKENS_AT_ONCE // tokens) * torch.get_num_threads() if tokens else 0

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to images (B, 3, H, W), float32 in [0, 1]."""
        vae: Any = self.pipeline.vae
        vae.to(self.device)
        latents, at_once = self.to_autoencoder(x_1).to(vae.dtype), self.decode_batch
        if latents.device.type == "cpu" and latents.ndim == 4 and has_values(latents):  # else predicted, for GPUs too
            latents = latents.contiguous(memory_format=torch.channels_last)
            at_once = min(at_once, DECODED_AT_ONCE * torch.get_num_threads())
        decode: Callable[..., Any] = vae.decode
        images = [self.shown(decode(chunk, return_dict=False)[0]).contiguous() for chunk in latents.split(at_once)]
        return (torch.cat(images).reshape(len(x_1), *self.sample_shape).float() / 2 + 0.5).clamp(0, 1)

    def shown(self, decoded: torch.Tensor) -> torch.Tensor:
        """Bring what the autoencoder gives, in [-1, 1], to three channels."""
        return decoded

    def to_autoencoder(self, x_1: torch.Tensor) -> torch.Tensor:
        """Bring latents to the scale and shape of the autoencoder's."""
        return to_autoencoder(x_1, self.pipeline.vae.config)

    def call_settings(self, scale: float) -> dict[str, Any]:
        """Give the arguments of the pipeline's own call that draws samples of this size with this guidance, by name."""
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        *frames, _, height, width = self.sample_shape
        is_free = not self.distilled_guidance
        own = self.UNGUIDED if scale == 1 else scale
        given = {
            "guidance_scale": self.embedded_guidance if is_free and "true_cfg_scale" in takes else own,
            "distilled_guidance_scale": None if is_free else scale,
            "true_cfg_scale": scale if is_free else None,
            "negative_prompt": "" if is_free and scale != 1 else None,
            "height": height,
            "width": width,
            "num_frames": frames[0] if frames else None,
            "max_sequence_length": self.max_sequence_length,
            "use_resolution_binning": False,
            "enable_prompt_rewrite": False,
        }
        return {name: value for name, value in given.items() if name in takes and value is not None}

    def with_encoders(self, network: torch.nn.Module) -> Any:
        """Assemble the whole pipeline around a network, text encoders included, to be saved."""
        self._place_encoders()
        parts = {**self.pipeline.components, **self.networks_of(network)}
        known = inspect.signature(type(self.pipeline).__init__).parameters
        settings = {name: value for name, value in self.pipeline.config.items() if name in known and name not in parts}
        return type(self.pipeline)(**parts, **settings)

    def offload(self) -> None:
        """Move the autoencoder to the host until samples are decoded again."""
        self.pipeline.vae.to("cpu")

    def times(self, steps: int) -> torch.Tensor:
        """Give the times of the pipeline's own schedule."""
        config = self.pipeline.scheduler.config
        mu = self.shift(steps, config) if config.get("use_dynamic_shifting") else None
        return times_of(copy.deepcopy(self.pipeline.scheduler), steps, self.sigmas(steps, config), mu)

    def shift(self, steps: int, config: Mapping[str, Any]) -> float:
        """Compute the shift `mu` of a schedule that depends on the resolution."""
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", self.MAX_SHIFT)
        return float(low + (high - low) * (self.sequence_length - least) / (most - least))

    def sigmas(self, steps: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Give the noise levels that the pipeline's call hands to its scheduler; None leaves them to the scheduler."""
        return None

    def move_frozen(self, device: torch.device) -> None:
        """Compute on `device` from now on; text encoders and autoencoder follow when they are used."""
        self.device = device

    def export(self, folder: Path, lora_state: dict[str, torch.Tensor] | None) -> None:
        """Write LoRA weights for `pipe.load_lora_weights(folder)`, or a `transformer` folder of a full fine-tune.

        Of a class without `load_lora_weights`, the network's own `load_lora_adapter(folder, use_safetensors=True)`
        reads them.
        """
        if lora_state is None:
            for name, network in self.networks_of(self.network).items():
                network.save_pretrained(folder / name, safe_serialization=True)
            return
        whole = with_start(lora_state, self.init_lora) if self.init_lora else lora_state
        if saves_adapters(self.pipeline):
            type(self.pipeline).save_lora_weights(folder, transformer_lora_layers=whole)
        else:
            named = {f"{self.NETWORK}.{name}": value.contiguous() for name, value in whole.items()}
            save_file(named, folder / LORA_WEIGHTS, metadata={"format": "pt"})


def saves_adapters(pipeline: Any) -> bool:
    """Tell whether a pipeline writes adapters of a transformer: some have inherited a writer for a UNet."""
    write = getattr(pipeline, "save_lora_weights", None)
    return write is not None and "transformer_lora_layers" in inspect.signature(write).parameters
