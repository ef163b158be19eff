"""Latents as a pipeline's transformer takes them: sides, patches as tokens, positions, fixed lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from flowrl.errors import ConfigError


def latent_sides(
    size: int | tuple[int, int] | None, default: tuple[int, int], scale: int, patch: int, most: int | None = None
) -> tuple[int, int]:
    """Compute height and width of the latents for images of `size` pixels; `default` without a size.

    Args:
        size: Height and width in pixels; one number for both.
        default: Height and width of the latents without a size.
        scale: Pixels per latent, along each side.
        patch: Latents per patch, along each side.
        most: Largest number of patches along a side that the transformer has positions for; None without limit.

    Raises:
        ConfigError: The transformer cannot cut such images into patches, or has no positions for so many.
    """
    if size is None:
        return default
    sides = (size, size) if isinstance(size, int) else size
    step = scale * patch
    shown = str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}"
    if most is not None and max(sides) > most * step:
        raise ConfigError(
            f"resolution must be at most {most * step} pixels for this pipeline, whose transformer has positions for "
            f"{most} x {most} patches; not {shown}."
        )
    if any(side <= 0 or side % step for side in sides):
        near = [max(1, round(side / step)) * step for side in sides]
        example = str(near[0]) if near[0] == near[1] else f"{near[0]}x{near[1]}"
        raise ConfigError(
            f"resolution must be a multiple of {step} pixels for this pipeline, not {shown}; e.g. {example}."
        )
    return sides[0] // scale, sides[1] // scale


def pack(x: torch.Tensor) -> torch.Tensor:
    """Pack latents (B, C, H, W) into tokens (B, H W / 4, 4 C), one per 2 x 2 patch."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Unpack tokens (B, height width, 4 C) into latents (B, C, 2 height, 2 width)."""
    n, _, c = tokens.shape
    patches = tokens.view(n, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, c // 4, 2 * height, 2 * width)


def positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Give the position of each token (height width, 3): 0, row, column."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def of_length(x: torch.Tensor, length: int) -> torch.Tensor:
    """Bring the second dimension of `x` (B, tokens, ...) to a length: zeros at the end, or its end cut off."""
    missing = length - x.shape[1]
    return x[:, :length] if missing <= 0 else F.pad(x, (*(0,) * (2 * (x.ndim - 2)), 0, missing))


def padded(prompts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring encoded prompts (tokens, dim) of their own lengths to one (B, length, dim), and give their lengths (B,)."""
    lengths = torch.tensor([min(len(prompt), length) for prompt in prompts], device=prompts[0].device)
    return torch.cat([of_length(prompt[None], length) for prompt in prompts]), lengths


def with_mask(prompts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring encoded prompts (1, tokens, dim) to one (B, length, dim), and tell which tokens there are (B, length)."""
    there = [torch.ones_like(prompt[..., 0], dtype=torch.bool) for prompt in prompts]
    embeds, mask = (torch.cat([of_length(one, length) for one in part]) for part in (prompts, there))
    return embeds, mask
