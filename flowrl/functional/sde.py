"""Noisy samplers with the law of the ODE's samples, whose steps are Gaussian policies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from flowrl.errors import ConfigError
from flowrl.functional.flow import expand, normal, x0_hat, x1_hat
from flowrl.functional.solver_steps import euler_step
from flowrl.types import Field

SDEKind = Literal["flow", "constant", "cps"]


class GaussianStep(NamedTuple):
    """Law of the next state of an SDE sampler; drawing, log-probability and divergence come from the same numbers.

    Attributes:
        mean: (B, ...), float32.
        std: (B,), float32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """Draw the next state from standard normal `noise` (B, ...)."""
        return self.mean + expand(self.std, noise) * noise

    def mean_log_prob(self, x_next: torch.Tensor) -> torch.Tensor:
        """Compute the logarithm of the density of `x_next`, *mean* over dimensions: (B,).

        The mean, as the field's public code has it: clip ranges of the order of 1e-4 belong to it.
        """
        squares = ((x_next - self.mean).square().flatten(1)).mean(1)
        return -0.5 * squares / self.std.square() - self.std.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, other: GaussianStep) -> torch.Tensor:
        """Compute the KL divergence to a step with the same std, *mean* over dimensions: (B,)."""
        return 0.5 * (self.mean - other.mean).square().flatten(1).mean(1) / self.std.square()


@dataclass(frozen=True)
class SDE:
    """A noisy sampler whose samples have the law of the ODE's ("cps": nearly).

    dX = [v + g^2 s / 2] dt + g dW has the ODE's marginals for every g(t) (s is the score). Kinds:
    - "flow": `g = a sqrt((1 - t) / t)` (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470); `a = sqrt(2)` is the
      memoryless drift `2 v - x / t` (Adjoint Matching, Domingo-Enrich et al. 2025).
    - "constant": `g = a` (DanceGRPO, Xue et al. 2025).
    - "cps": coefficient-preserving sampling (Wang and Yu 2025, arXiv 2509.05952): each state has the noise that its
      time says, a share `sin(a pi / 2)` of it fresh, the rest expected noise. That varies less than noise does, so
      samples are somewhat too close together, however small the steps.
    """

    kind: SDEKind = "flow"
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in ("flow", "constant", "cps"):
            raise ConfigError(f"Unknown sde '{self.kind}'. Known: flow, constant, cps.")
        if self.noise_level <= 0 or (self.kind == "cps" and self.noise_level > 1):
            raise ConfigError(f"noise_level must be positive (at most 1 for cps), not {self.noise_level}.")

    def diffusion(self, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """Compute `g` (B,) of a step from `t` to `t_next`; at t = 0 that of "flow" is taken as `a / sqrt(t_next)`."""
        if self.kind == "constant":
            return torch.full_like(t, self.noise_level)
        start = t == 0
        square = torch.where(start, 1 / t_next, (1 - t) / torch.where(start, 1, t))
        return self.noise_level * square.sqrt()

    def std(self, t: torch.Tensor, t_next: torch.Tensor) -> torch.Tensor:
        """Compute the standard deviation (B,) of the noise of a step from `t` to `t_next`."""
        if self.kind == "cps":
            return (1 - t_next) * math.sin(self.noise_level * math.pi / 2)
        return self.diffusion(t, t_next) * (t_next - t).sqrt()

    def step(self, v: torch.Tensor, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor) -> GaussianStep:
        """Take a step from `x` (B, ...) with velocity `v` (B, ...), from times `t` to `t_next` (B,); in float32."""
        v, x, t, t_next = v.float(), x.float(), t.float(), t_next.float()
        std = self.std(t, t_next)
        if self.kind == "cps":
            kept = expand((1 - t_next) * math.cos(self.noise_level * math.pi / 2), x)
            return GaussianStep(expand(t_next, x) * x1_hat(v, x, t) + kept * x0_hat(v, x, t), std)
        towards_score = expand(0.5 * std.square() / (1 - t), x)  # h g^2 / 2 times the score (t v - x) / (1 - t)
        mean = x + expand(t_next - t, x) * v + towards_score * (expand(t, x) * v - x)
        return GaussianStep(mean, std)


def sde_sample(
    v: Field,
    x_0: torch.Tensor,
    times: torch.Tensor,
    sde: SDE,
    generator: torch.Generator,
    window: range | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample with noise in the steps of `window`, by Euler steps of the ODE in all others.

    Args:
        v: Velocity field, `(x (B, ...), t (B,)) -> (B, ...)`.
        x_0: (B, ...), float32.
        times: (K + 1,) increasing, on the device of `x_0`.
        sde: The noise.
        generator: Source of the noise.
        window: Consecutive steps among the first K - 1; None takes them all. The last step is never noisy: the
            sample would keep its noise.

    Returns:
        Samples (B, ...); the states (B, W + 1, ...) before, between and after the W noisy steps; and the mean
        log-probability (B, W) of each of those steps.

    Raises:
        ConfigError: The window is empty or leaves the sampler.
    """
    n_steps = len(times) - 1
    window = range(n_steps - 1) if window is None else window
    if len(window) == 0 or window[0] < 0 or window[-1] >= n_steps - 1:
        raise ConfigError(
            f"Noisy steps {window.start} to {window.stop - 1} do not fit: a sampler of {n_steps} steps can be noisy "
            f"in steps 0 to {n_steps - 2}."
        )
    x, states, log_probs = x_0, [], []
    for k in range(n_steps):
        t, t_next = times[k].expand(len(x)), times[k + 1].expand(len(x))
        if k not in window:
            x = euler_step(v, x, t, times[k + 1] - times[k])
            continue
        step = sde.step(v(x, t), x, t, t_next)
        states.append(x)
        x = step.sample(normal(len(x), tuple(x.shape[1:]), generator))
        log_probs.append(step.mean_log_prob(x))
        if k == window[-1]:
            states.append(x)
    return x, torch.stack(states, dim=1), torch.stack(log_probs, dim=1)
