"""Flow matching on the straight path: x_t = (1 - t) x_0 + t x_1, with t = 0 noise and t = 1 data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

TimeSampling = Literal["uniform", "logit_normal"]


def expand(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape (B,) to (B, 1, ..., 1), to broadcast over the dimensions of `like` (B, ...)."""
    return t.reshape(-1, *([1] * (like.dim() - 1)))


def interpolate(x_0: torch.Tensor, x_1: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the point `x_t` on the path and its velocity `u = x_1 - x_0`; all (B, ...), t (B,)."""
    u = x_1 - x_0
    return torch.addcmul(x_0, expand(t, x_0), u), u


def x1_hat(v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Estimate the sample in one step: x + (1 - t) v."""
    return x_t + (1 - expand(t, x_t)) * v


def x0_hat(v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Estimate the noise in one step: x - t v."""
    return x_t - expand(t, x_t) * v


def score(v: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Compute the score of the marginal p_t, the gradient of its log: (t v - x) / (1 - t); infinite at t = 1."""
    t = expand(t, x_t)
    return (t * v - x_t) / (1 - t)


def drawn(draw: Callable[[int], torch.Tensor], n: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `n` random rows by `draw(n)`; from a generator that ranks share, this rank's rows of what all draw.

    Such a generator has a method `shard(draw, n)`.
    """
    shard = getattr(generator, "shard", None)
    return draw(n) if shard is None else shard(draw, n)


def sample_time(n: int, kind: TimeSampling, generator: torch.Generator) -> torch.Tensor:
    """Draw `n` flow times in (0, 1), float32, on the generator's device.

    "uniform", or "logit_normal": the sigmoid of a standard normal, as Stable Diffusion 3 is trained
    (Esser et al. 2024, eq. 19).
    """
    if kind == "uniform":
        return drawn(lambda rows: torch.rand(rows, generator=generator, device=generator.device), n, generator)
    # before ranks take their rows: the last bit of a sigmoid depends on how many there are, on some CPUs
    return drawn(lambda rows: torch.randn(rows, generator=generator, device=generator.device).sigmoid(), n, generator)


def even_times(n: int, kind: TimeSampling, generator: torch.Generator) -> torch.Tensor:
    """Draw `n` flow times of `sample_time`'s law (n,), one in each of as many parts of equal probability."""

    def draw(rows: int) -> torch.Tensor:
        device = generator.device
        u = (torch.arange(rows, device=device) + torch.rand(rows, generator=generator, device=device)) / rows
        return time_quantile(u, kind)

    return drawn(draw, n, generator)


def time_quantile(u: torch.Tensor, kind: TimeSampling) -> torch.Tensor:
    """Compute the flow times (B,) below which a share `u` (B,) of `sample_time`'s draws lies."""
    u = u.clamp_max(1 - 2**-24)
    return u if kind == "uniform" else torch.special.ndtri(u.clamp_min(2**-24)).sigmoid()


def normal(n: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw standard normal noise (n, *shape), float32, on the generator's device."""
    return drawn(lambda rows: torch.randn(rows, *shape, generator=generator, device=generator.device), n, generator)
