"""The seam between flowrl and any flow model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from flowrl.errors import ConfigError
from flowrl.functional.guidance import linear
from flowrl.functional.solvers import time_grid
from flowrl.types import Condition, Contexts


class VelocityModel(nn.Module):
    """A flow model: a trainable velocity network and the frozen parts around it.

    Time runs from 0 (noise) to 1 (data). Subclasses convert other conventions in `forward` and nowhere else.

    Attributes:
        network: The network that is fine-tuned, copied and saved. Frozen parts (text encoders, autoencoder) must not be
            registered as submodules: they are shared by all copies.
        latent_shape: Shape of one `x_t`, the space the flow works in.
        sample_shape: Shape of one decoded sample, the space the reward sees.
        sample_rate: Values per second of samples that are sounds (channels, values) in [-1, 1]; 0 for anything else.
        lora_targets: Names (or a regular expression) of the modules that LoRA adapts, as peft takes them;
            None adapts every linear layer.
        distilled_guidance: The guidance scale is part of the condition; see `with_guidance`.
        casts_inputs: `forward` brings inputs into the type of the network's weights, which can then compute in it
            throughout, without autocast.
        init_lora: The LoRA that lies in the network's weights since the start; see `started_from`.
        init_lora_hash: Its SHA-256; empty where there is none.
        files: Hashes of the files that its weights were read from, by name; none where they are of no folder here.
    """

    network: nn.Module
    latent_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    sample_rate: int = 0
    lora_targets: list[str] | str | None = None
    distilled_guidance: bool = False
    casts_inputs: bool = False
    init_lora: Mapping[str, Any] = MappingProxyType({})
    init_lora_hash: str = ""
    files: Mapping[str, str] = MappingProxyType({})

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity (B, *latent_shape), float32, at `x_t` (B, *latent_shape) and `t` (B,)."""
        return self.network(x_t, t, *cond)

    def encode(self, contexts: Contexts) -> Condition:
        """Encode contexts: first dimension `len(contexts)`. Called once per run for all contexts."""
        return ()

    def null_condition(self) -> Condition:
        """Give the condition of one empty context, for classifier-free guidance."""
        raise ConfigError(f"{type(self).__name__} has no empty context; leave guidance_scale at 1.")

    def null_like(self, null: Condition, cond: Condition) -> Condition:
        """Give the empty context's condition (one row) for every sample of `cond`: what guidance leads away from.

        An override takes those parts from `cond` that guidance keeps, such as a picture beside the prompt.

        Raises:
            ConfigError: It has not one row of the shape of each part of `cond`.
        """
        rows, given = [(1, *part.shape[1:]) for part in cond], [tuple(part.shape) for part in null]
        if rows != given:
            raise ConfigError(
                f"{type(self).__name__}.null_condition must give what `encode` gives for one context, of shapes "
                f"{rows}, not {given}."
            )
        return tuple(row.expand(len(part), *row.shape[1:]) for row, part in zip(null, cond))

    def with_guidance(self, cond: Condition, scale: float) -> Condition:
        """Put a guidance scale into a condition, where guidance is distilled into the network."""
        return cond

    def guide(self, v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
        """Guide velocities (B, ...) by those of the empty context: classifier-free guidance (Ho and Salimans 2022)."""
        return linear(v, v_null, scale)

    def rows_at_once(self) -> int:
        """Give how many rows a pass that draws or measures takes at once on the CPU, where more are slower; 0: all."""
        return 0

    def arrived(self, x_1: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Give latents (B, *latent_shape) at the end of an ODE, with what the condition says of them in its place."""
        return x_1

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, *latent_shape) to samples (B, *sample_shape)."""
        return x_1

    def times(self, steps: int) -> torch.Tensor:
        """Give the sampling times (steps + 1,) from 0 to 1."""
        return time_grid(steps)

    def with_network(self, network: nn.Module) -> VelocityModel:
        """Give the same model around another network; everything else is shared, nothing is copied."""
        clone = copy.copy(self)
        clone._modules = dict(self._modules)
        clone.network = network
        return clone

    def move_frozen(self, device: torch.device) -> None:
        """Move all that is not `network` to `device`: the flow's other submodules, its own buffers and parameters.

        Parts that are no submodules are moved by an override.
        """
        for name, module in self.named_children():
            if name != "network":
                module.to(device)
        self._apply(lambda tensor: tensor.to(device), recurse=False)

    def release_encoders(self) -> None:
        """Give back the memory of what `encode` alone needs; `encode` gets it again."""

    def offload(self) -> None:
        """Move what `decode` alone needs to the host; `decode` gets it back."""

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            ConfigError: The network cannot.
        """
        enable = getattr(self.network, "enable_gradient_checkpointing", None)
        if enable is None:
            raise ConfigError(f"A {type(self.network).__name__} has no gradient checkpointing: leave it off.")
        enable()

    def export(self, folder: Path, lora_state: dict[str, torch.Tensor] | None) -> None:
        """Write the network (or its LoRA weights) into `folder` as other libraries load it; optional."""


def in_one_type(cond: Condition) -> Condition:
    """Bring all embeddings of a condition into the type of the first, which the network computes in.

    Masks stay, and so does what is one number per prompt, such as a guidance scale.
    """
    first = cond[0].dtype
    return tuple(part.to(first) if part.is_floating_point() and part.dim() > 1 else part for part in cond)
