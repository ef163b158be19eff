"""A velocity U-Net for small pictures in pixel space: diffusers' `UNet2DModel`, unconditional or with classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from flowrl.checks import is_whole
from flowrl.errors import ConfigError, did_you_mean
from flowrl.models.base import VelocityModel
from flowrl.models.imports import importing
from flowrl.types import Condition, Contexts

GROUPS = 8
"""Groups of the network's group normalisations; widths are multiples of it."""
LARGEST = {"channels": 16, "size": 256, "patch": 16, "layers": 8}
WIDEST, DEEPEST, MOST_CLASSES = 1024, 6, 10_000


@dataclass(frozen=True)
class UNetShape:
    """Shape of a U-Net, as a folder's config.json says.

    Raises:
        ConfigError: Sizes without meaning, or beyond what a small model has.
    """

    channels: int
    """Channels of a picture."""
    size: int
    """Its height and width in pixels."""
    widths: tuple[int, ...]
    """Channels of each level; every level halves the resolution, but for the last."""
    patch: int = 1
    """Pixels along the side of a square that is one position of the network, as in a vision transformer."""
    layers: int = 1
    """Residual blocks of each level."""
    classes: tuple[str, ...] = ()
    """Names of the classes that the flow is conditioned on; none for an unconditional flow."""

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if not is_whole(getattr(self, name), 1, largest):
                raise ConfigError(f"{name} must be a whole number from 1 to {largest}, not {getattr(self, name)!r}.")
        widths = self.widths
        if not 1 <= len(widths) <= DEEPEST or not all(is_whole(w, 1, WIDEST) and w % GROUPS == 0 for w in widths):
            raise ConfigError(f"widths must be 1 to {DEEPEST} multiples of {GROUPS} up to {WIDEST}, not {widths}.")
        if self.size % (self.patch * 2 ** (len(widths) - 1)):
            raise ConfigError(
                f"A picture of size {self.size} in patches of {self.patch} cannot be halved {len(widths) - 1} times: "
                "give fewer widths."
            )
        if len(self.classes) > MOST_CLASSES or not all(isinstance(name, str) for name in self.classes):
            raise ConfigError(f"classes must be at most {MOST_CLASSES} names.")
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError("classes must differ from each other.")

    @staticmethod
    def of(config: Mapping[str, Any]) -> UNetShape:
        """Read the shape from a config.json; other keys are left out.

        Raises:
            ConfigError: A size is missing or makes no sense.
        """
        known: dict[str, Any] = {f.name: config[f.name] for f in fields(UNetShape) if f.name in config}
        missing = {"channels", "size", "widths"} - known.keys()
        lists = [name for name in ("widths", "classes") if not isinstance(known.get(name, []), list)]
        if missing or lists:
            raise ConfigError(f"{', '.join(sorted(missing) or lists)} must be {'given' if missing else 'a list'}.")
        known |= {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
        return UNetShape(**known)


class UNetFlow(VelocityModel):
    """A U-Net whose samples are pictures (channels, size, size) in [0, 1]; the flow itself works in [-1, 1].

    Contexts are names of classes; None stands for any class (the empty context of classifier-free guidance).

    Args:
        shape: Sizes of the pictures and of the network.
    """

    lora_targets = r".*(conv1|conv2|conv_shortcut|conv|time_emb_proj|to_q|to_k|to_v|to_out\.0)"

    def __init__(self, shape: UNetShape) -> None:
        with importing():
            from diffusers import UNet2DModel

        super().__init__()
        self.shape, self.device = shape, torch.device("cpu")
        self.latent_shape = self.sample_shape = (shape.channels, shape.size, shape.size)
        n, channels = len(shape.widths), shape.channels * shape.patch**2
        network: Any = UNet2DModel(
            sample_size=shape.size // shape.patch,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=shape.widths,
            layers_per_block=shape.layers,
            down_block_types=("DownBlock2D",) * n,
            up_block_types=("UpBlock2D",) * n,
            norm_num_groups=GROUPS,
            attention_head_dim=math.gcd(shape.widths[-1], 32),
            num_class_embeds=len(shape.classes) + 1 if shape.classes else None,  # the last one: any class
        )
        self.network = network

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity (B, channels, size, size)."""
        x = nn.functional.pixel_unshuffle(x_t, self.shape.patch)
        v = self.network(x, 1000 * t, class_labels=cond[0] if cond else None, return_dict=False)[0]
        return nn.functional.pixel_shuffle(v.float(), self.shape.patch)

    def encode(self, contexts: Contexts) -> Condition:
        """Encode classes by their indices (n,); an unconditional flow has an empty condition.

        Raises:
            ConfigError: There is no such class.
        """
        classes = self.shape.classes
        if not classes:
            return ()
        index: dict[str | None, int] = {name: i for i, name in enumerate(classes)} | {None: len(classes)}
        unknown = [str(c) for c in contexts if c not in index]
        if unknown:
            raise ConfigError(
                f"The flow has no class '{unknown[0]}', only {', '.join(classes)}.{did_you_mean(unknown[0], classes)}"
            )
        return (torch.tensor([index[c] for c in contexts], device=self.device),)

    def null_condition(self) -> Condition:
        """Encode None, which stands for any class."""
        return self.encode([None]) if self.shape.classes else super().null_condition()

    def move_frozen(self, device: torch.device) -> None:
        """Keep the classes on `device` from now on."""
        self.device = device

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode to pictures with values in [0, 1]."""
        return (x_1 / 2 + 0.5).clamp(0, 1)


def to_latents(pictures: torch.Tensor) -> torch.Tensor:
    """Encode pictures with values in [0, 1] as the flow takes them, the inverse of `decode`."""
    return 2 * pictures - 1
