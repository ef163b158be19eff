"""Training of the smallest Stable Diffusion 3 transformers, in one process: used by mini_words and mini_spatial."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "mini_sd3"))

from pipeline import RepeatedTokenAttention
from transformer import flow_matching_loss


class Settings(Protocol):
    """What `fit_transformer` reads of a script's settings."""

    steps: int
    lr: float
    shift: float
    ema_decay: float


@torch.no_grad()
def encode_captions(pipe: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Context (n, tokens, width) and pooled embedding (n, width) of each, by the pipeline's own ``encode_prompt``."""
    context, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return context, pooled


def fit_transformer(
    pipe: StableDiffusion3Pipeline,
    config: Settings,
    captions: tuple[Tensor, Tensor],
    draw_batch: Callable[[], tuple[Tensor, Tensor]],
    report: Callable[[int, float], None],
) -> None:
    """Trains ``pipe.transformer`` by flow matching; it holds the averaged weights.

    The learning rate rises for 200 steps, and falls to zero over the last 40 %.

    Args:
        pipe: The pipeline.
        config: Settings.
        captions: What ``encode_captions`` gave.
        draw_batch: Gives latents (B, C, H, W) and the indices (B,) of their captions.
        report: Called every 500 steps and at the end, with the steps done and the mean loss.
    """
    trained, attention = copy.deepcopy(pipe.transformer).train().requires_grad_(True), RepeatedTokenAttention()
    trained.set_attn_processor(attention)
    weights = list(trained.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    recent: list[float] = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 200, (config.steps - step) / (0.4 * config.steps))
        data, asked = draw_batch()
        attention.draw_repeats(len(data))
        loss = flow_matching_loss(trained, data, captions[0][asked], captions[1][asked], config.shift)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(pipe.transformer.parameters()), [w.detach() for w in weights], 1 - decay)
        recent.append(loss.item())
        if (step + 1) % 500 == 0 or step + 1 == config.steps:
            report(step + 1, sum(recent) / len(recent))
            recent.clear()
