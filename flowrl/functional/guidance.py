"""Guidance of a velocity field by that of the empty context: plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from flowrl.functional.flow import expand
from flowrl.types import Field

Guidance = Literal["cfg", "cfg_zero"]
GUIDANCES = ("cfg", "cfg_zero")


Combine = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""How velocities `v`, those of the empty context and a scale make guided ones."""


def linear(v: torch.Tensor, v_null: torch.Tensor, scale: float) -> torch.Tensor:
    """Guide along the line through both velocities: `v_null + scale (v - v_null)` (Ho and Salimans 2022)."""
    return v_null + scale * (v - v_null)


def guided_velocity(
    v: torch.Tensor,
    v_null: torch.Tensor,
    scale: float,
    t: torch.Tensor,
    guidance: Guidance = "cfg",
    combine: Combine = linear,
) -> torch.Tensor:
    """Guide a velocity (B, ...) by that of the empty context at times `t` (B,): classifier-free guidance.

    - "cfg": as `combine` says.
    - "cfg_zero": CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): `v_null` is first multiplied by the
      `s = <v, v_null> / |v_null|^2` of each sample that brings it nearest to `v`, and the velocity at t = 0 is zero, so
      that the first step of Euler's is left out.
    """
    if guidance == "cfg":
        return combine(v, v_null, scale)
    inner, square = (v * v_null).flatten(1).sum(1), v_null.square().flatten(1).sum(1)
    nearest = expand(inner / square.clamp_min(torch.finfo(v.dtype).tiny), v) * v_null
    guided = combine(v, nearest, scale)
    return torch.where(expand(t == 0, v), torch.zeros_like(v), guided)


def guided_field(v_of_both: Field, scale: float, guidance: Guidance = "cfg", combine: Combine = linear) -> Field:
    """Make the field of guided velocities from a field that takes both halves, with context and without: (2 B, ...)."""

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        v, v_null = v_of_both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return guided_velocity(v, v_null, scale, t, guidance, combine)

    return guided
