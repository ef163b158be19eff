"""What the tests of a family of pipelines are told of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowrl.models.pipeline import DEFAULTS, PipelineFlow, PipelineOptions

PROMPTS = ["three red stars on blue", "white circles", "two green squares on black"]


@dataclass(frozen=True)
class Case:
    """A class of pipelines in one of its forms.

    Attributes:
        name: Name of the case.
        build: Builds a small random pipeline from configurations, by diffusers alone, and saves it into a folder.
        call: The pipeline's own call for `PROMPTS` from latents `x_0` (3, *latent_shape), with a guidance scale and a
            number of steps; gives latents of that shape.
        sizes: Two resolutions in pixels, or other sizes; both are tried.
        scale: The guidance scale to try beside 1; 1 where there is no guidance.
        options: Further fields of `PipelineOptions`.
        images: Like `call`, but gives decoded samples in [0, 1]; None where decoding is tried elsewhere.
        rounds: The network computes in lower precision in itself, so that differences of it say nothing.
        why_unpredictable: What of its own network a dry run cannot try, as the prediction says; empty where it can.
        own_noise: Why the pipeline's call draws no noise of the small sizes here by itself; empty where it does.
        drops_template: The pipeline drops as many tokens as its template has by its own tokenizer, not by the one here.
        has_lora: The pipeline has `load_lora_weights`; else the network's own `load_lora_adapter` is used.
        most_bytes: Size of all weights at most.
        load_adapter: Loads an exported adapter, where that takes more than the one call.
        context: Makes a context of a prompt: adds what the pipeline takes beside it.
        around: Makes a context in which the pipeline's own call takes pictures of the small sizes here.
        shown: Brings what the pipeline's own call draws into flowrl's samples.
        same_network: A network of the same class is trained by every algorithm in another case; here by one.
        sized_by: The field of `PipelineOptions` that `sizes` are of.
    """

    name: str
    build: Callable[[Path], Any]
    call: Callable[[PipelineFlow, torch.Tensor, float, int], torch.Tensor]
    sizes: tuple[int | tuple[int, int], int | tuple[int, int]] = (16, 32)
    scale: float = 4.5
    options: PipelineOptions = DEFAULTS
    images: Callable[[PipelineFlow, torch.Tensor, float, int], torch.Tensor] | None = None
    rounds: bool = False
    why_unpredictable: str = ""
    own_noise: str = ""
    drops_template: bool = False
    has_lora: bool = True
    most_bytes: float = 4e6
    load_adapter: Callable[[PipelineFlow, Path], None] | None = None
    context: Callable[[str], str] = str
    around: Callable[[PipelineFlow], AbstractContextManager[Any]] = nullcontext
    shown: Callable[[torch.Tensor], torch.Tensor] = torch.as_tensor
    same_network: bool = False
    sized_by: str = "resolution"

    @property
    def contexts(self) -> list[str]:
        """`PROMPTS` as contexts."""
        return [self.context(prompt) for prompt in PROMPTS]
