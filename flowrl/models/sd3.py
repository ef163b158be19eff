"""Stable Diffusion 3 pipelines of diffusers as velocity models.

diffusers runs time backwards (sigma = 1 - t, timestep = 1000 sigma) and predicts noise - data = -v. Both are
converted here and nowhere else.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flowrl.errors import ConfigError, ModelLoadError
from flowrl.models.base import VelocityModel
from flowrl.models.loading import FlowSource, read_json
from flowrl.types import Condition, Contexts

VOCABULARIES = ("vocab.json", "tokenizer.json", "spiece.model")
LORA_TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
]


class SD3Flow(VelocityModel):
    """A `StableDiffusion3Pipeline`; the transformer is what is fine-tuned.

    Args:
        pipeline: A loaded diffusers pipeline.
        latent_shape: Channels, height and width of one latent.
        sample_shape: (3, height, width) of one image with values in [0, 1].
        max_sequence_length: Tokens of the T5 context (all zero without T5), as in the pipeline's own call.
        decode_batch: Images decoded at once.
    """

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        pipeline: Any,
        latent_shape: tuple[int, ...],
        sample_shape: tuple[int, ...],
        max_sequence_length: int = 256,
        decode_batch: int = 64,
    ) -> None:
        super().__init__()
        self.max_sequence_length = max_sequence_length
        self.pipeline = pipeline
        self.network = pipeline.transformer
        self.latent_shape, self.sample_shape = latent_shape, sample_shape
        self.decode_batch = decode_batch

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Velocity of the latents."""
        prompt_embeds, pooled = cond
        noise_minus_data = self.network(
            hidden_states=x_t.to(prompt_embeds.dtype),
            timestep=1000 * (1 - t),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return -noise_minus_data.float()

    @torch.no_grad()
    def encode(self, contexts: Contexts) -> Condition:
        """Prompt embeddings and pooled embeddings of the pipeline's own text encoders."""
        for prompt in contexts:
            if not isinstance(prompt, str):
                raise ConfigError(f"A text-to-image flow takes prompts (str), not {prompt!r}.")
        chunks = [
            self.pipeline.encode_prompt(
                prompt=list(contexts[i : i + 64]),
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            for i in range(0, len(contexts), 64)
        ]
        return torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[2] for chunk in chunks])

    def null_condition(self) -> Condition:
        """Embeddings of the empty prompt, as the pipeline's own guidance uses it."""
        return self.encode([""])

    @torch.no_grad()
    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Latents -> images (B, 3, H, W), float32 in [0, 1]."""
        vae: Any = self.pipeline.vae
        latents = (x_1 / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        decode: Callable[..., Any] = vae.decode
        images = [decode(chunk, return_dict=False)[0] for chunk in latents.split(self.decode_batch)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    def times(self, steps: int) -> torch.Tensor:
        """The times of the pipeline's own schedule."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps)
        return 1 - scheduler.sigmas.float().cpu()

    def move_frozen(self, device: torch.device) -> None:
        """Move the text encoders and the autoencoder."""
        for part in _frozen_parts(self.pipeline):
            part.to(device)

    def export(self, folder: Path, lora_state: dict[str, torch.Tensor] | None) -> None:
        """LoRA weights for `pipe.load_lora_weights(folder)`, or a `transformer` folder of a full fine-tune."""
        if lora_state is None:
            network: Any = self.network
            network.save_pretrained(folder / "transformer", safe_serialization=True)
        else:
            type(self.pipeline).save_lora_weights(folder, transformer_lora_layers=lora_state)


def _frozen_parts(pipeline: Any) -> list[torch.nn.Module]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    return [part for name in names if (part := getattr(pipeline, name, None)) is not None]


def sd3_source(location: str, description: str, name: str, resolution: int | None = None) -> FlowSource:
    """Source of a Stable Diffusion 3 pipeline; reads two small configuration files, no weights.

    Args:
        location: Folder or hub name.
        description: One line for people.
        name: What to record as the flow's name.
        resolution: Height and width of the images; the pipeline's own when None.

    Raises:
        ModelLoadError: Files are missing, the hub cannot be reached, or the pipeline is of another kind.
    """
    fetch = _fetcher(location)
    index = read_json(fetch("model_index.json"), f"pipeline '{name}'")
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise ModelLoadError(
            f"'{name}' is a {index.get('_class_name')}; this adapter takes a StableDiffusion3Pipeline."
        )
    transformer = read_json(fetch("transformer/config.json"), f"pipeline '{name}'")
    vae = read_json(fetch("vae/config.json"), f"pipeline '{name}'")
    try:
        channels = vae.get("block_out_channels") or vae["encoder_block_out_channels"]  # the latter: AutoencoderTiny
        scale = 2 ** (len(channels) - 1)
        size = transformer["sample_size"] if resolution is None else resolution // scale
        latent_shape = (int(transformer["in_channels"]), int(size), int(size))
    except KeyError as error:
        raise ModelLoadError(f"The configuration of pipeline '{name}' lacks {error}.") from error
    sample_shape = (3, int(size) * scale, int(size) * scale)

    sampling = Path(location) / "sampling.json"  # optional: what the pipeline's call would need to be told
    length = read_json(sampling, f"pipeline '{name}'")["max_sequence_length"] if sampling.exists() else 256

    def load() -> VelocityModel:
        return SD3Flow(_load_pipeline(location, name), latent_shape, sample_shape, int(length))

    def skeleton() -> VelocityModel:
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            network = SD3Transformer2DModel.from_config(transformer)
        return SD3Flow(SimpleNamespace(transformer=network), latent_shape, sample_shape)

    return FlowSource(name, description, sample_shape, load, skeleton, is_image=True)


def _fetcher(location: str) -> Callable[[str], Path]:
    if Path(location).exists():
        return lambda file: Path(location) / file

    def download(file: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(location, file))
        except Exception as error:
            raise ModelLoadError(_hub_message(location, error)) from error

    return download


def _load_pipeline(location: str, name: str) -> Any:
    missing = _absent_components(location, name)
    try:
        with _quiet():
            from diffusers import StableDiffusion3Pipeline

            pipeline = StableDiffusion3Pipeline.from_pretrained(
                location, torch_dtype=torch.float32, use_safetensors=True, **missing
            )
    except Exception as error:
        if Path(location).exists():
            raise ModelLoadError(f"The pipeline folder '{name}' is damaged or incomplete: {error}") from error
        raise ModelLoadError(_hub_message(location, error)) from error
    for part in _frozen_parts(pipeline):
        part.requires_grad_(False).eval()
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and advice of the libraries that load a pipeline; errors still raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # older releases know no other
        for log, _ in levels:
            log.set_verbosity_error()
            log.disable_progress_bar()
        try:
            yield
        finally:
            for log, level in levels:
                log.set_verbosity(level)
                log.enable_progress_bar()


def _absent_components(location: str, name: str) -> dict[str, None]:
    """Components that a local pipeline says it does not have; those that it has must be there.

    Raises:
        ModelLoadError: A component's folder is missing or empty (transformers would make an empty tokenizer).
    """
    folder = Path(location)
    if not folder.exists():
        return {}
    index = read_json(folder / "model_index.json", f"pipeline '{name}'")
    absent: dict[str, None] = {}
    for key, value in index.items():
        if not isinstance(value, list):
            continue
        if value[0] is None:
            absent[key] = None
        elif key.startswith("tokenizer") and not any((folder / key / file).exists() for file in VOCABULARIES):
            raise ModelLoadError(f"The pipeline folder '{name}' is incomplete: '{key}' holds no vocabulary.")
    return {key: None for key in ("text_encoder_3", "tokenizer_3") if key in absent}


def _hub_message(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "Gated" in type(error).__name__ or "401" in reason or "403" in reason:
        remedy = f"Accept the licence at huggingface.co/{name} and set HF_TOKEN to a token of that account"
    elif "NotFound" in type(error).__name__ and "Entry" not in type(error).__name__:
        remedy = "Check the name"
    else:
        remedy = "Check the network, or download the pipeline elsewhere and give its folder as --env.flow FOLDER"
    return f"Cannot get '{name}' from the hub: {reason} {remedy}; or use --env.flow mini-sd3, which ships with flowrl."
