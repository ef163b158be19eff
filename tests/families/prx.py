"""PRX, with a T5 in the place of its T5Gemma."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import small_pipelines
import torch
from diffusers import PRXPipeline, PRXTransformer2DModel
from diffusers.pipelines.prx import pipeline_prx
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from families import parts
from families.case import PROMPTS, Case
from flowrl.models.pipeline import PipelineFlow, PipelineOptions

TOKENS = 16
if not hasattr(pipeline_prx, "ftfy"):  # where it is not installed: prompts here need no cleaning
    pipeline_prx.ftfy = SimpleNamespace(fix_text=str)  # type: ignore[attr-defined]


def build(folder: Path) -> Path:
    torch.manual_seed(12)
    transformer = PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=parts.DIM,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return parts.save(
        PRXPipeline,
        folder,
        transformer,
        scheduler=parts.euler(),
        vae=parts.autoencoder(),
        text_encoder=small_pipelines.t5_encoder(parts.DIM),
        tokenizer=small_pipelines.t5_tokenizer(),
        default_sample_size=512,
    )


def call(flow: PipelineFlow, x_0: torch.Tensor, scale: float, steps: int, output: str = "latent") -> torch.Tensor:
    """Prompt by prompt: with guidance the pipeline gives its network two times, however many prompts there are."""
    _, height, width = flow.sample_shape
    options = {"num_inference_steps": steps, "height": height, "width": width, "output_type": output}
    options |= {"guidance_scale": scale, "tokenizer_max_length": TOKENS, "use_resolution_binning": False}
    return torch.cat([flow.pipeline(p, latents=x[None], **options).images for p, x in zip(PROMPTS, x_0)])


def images(*given: Any) -> torch.Tensor:
    return call(*given, "pt")


def load_adapter(flow: PipelineFlow, folder: Path) -> None:
    """Load by peft alone: the loader of the pipeline looks for a UNet, and the network has none."""
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    targets = sorted({name.removeprefix("transformer.").rpartition(".lora_")[0] for name in state})
    rank = next(value.shape[0] for name, value in state.items() if ".lora_A." in name)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), flow.network)
    named = {name.removeprefix("transformer."): value for name, value in state.items()}
    assert not set_peft_model_state_dict(flow.network, named).unexpected_keys


CASES = [
    Case(
        "prx",
        build,
        call,
        sizes=(16, (16, 24)),
        scale=4.0,
        options=PipelineOptions(sequence_length=TOKENS),
        images=images,
        load_adapter=load_adapter,
    )
]
