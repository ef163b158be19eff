"""Steering: reward at inference time, without training, which a trained flow must beat at equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from flowrl.checks import check_types, take_python_values
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.functional.flow import x1_hat
from flowrl.functional.sde import SDE, SDEKind
from flowrl.training.policy import FlowPolicy
from flowrl.types import Field, RewardOutput, Role


@dataclass(frozen=True)
class Steering:
    """Choice of samples by their reward while, or after, they are drawn.

    - "best_of_n": of `n` samples of a context the one of the highest reward. The KL divergence to the flow is
      `log n - (n - 1) / n` for a continuous reward.
    - "smc": sequential Monte Carlo. `n` particles per context follow the SDE and are weighted, step by step, with
      `exp([r(x1_hat_k) - r(x1_hat_{k-1})] / temperature)`, the reward being that of the one-step estimate; they are
      resampled when their effective number falls below a share of n; one is drawn in the end. The target is
      `q e^{r / temperature}` (Wu et al. 2023, arXiv 2306.17775; Singhal et al. 2025, arXiv 2501.06848).
    """

    method: Literal["best_of_n", "smc"] = "best_of_n"
    n: int = 8
    temperature: float = 1.0
    sde: SDEKind = "flow"
    noise_level: float = 0.7
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        take_python_values(self)
        check_types(type(self), vars(self), "Steering: ")
        if self.method not in ("best_of_n", "smc"):
            raise ConfigError(f"Unknown steering '{self.method}'. Known: best_of_n, smc.")
        if self.n < 1 or self.temperature <= 0 or not 0 <= self.ess_threshold <= 1:
            raise ConfigError(
                "Steering needs n of at least 1, a positive temperature, and ess_threshold from 0 to 1; not "
                f"n = {self.n}, temperature = {self.temperature}, ess_threshold = {self.ess_threshold}."
            )
        SDE(self.sde, self.noise_level)  # raises for settings without meaning


def rewarded(
    policy: FlowPolicy, env: GenerationEnv, x_1: torch.Tensor, context_ids: torch.Tensor
) -> tuple[torch.Tensor, RewardOutput]:
    """Decode latents (B, *latent_shape) and reward them: samples, and the environment's output."""
    samples = policy.decode(x_1)
    return samples, env.evaluate(samples, context_ids).detached()


def steer(
    policy: FlowPolicy,
    env: GenerationEnv,
    steering: Steering,
    context_ids: torch.Tensor,
    generator: torch.Generator,
    role: Role = "reference",
    **sampling: Any,
) -> torch.Tensor:
    """Draw latents (B, *latent_shape), one for each of the context indices (B,).

    Args:
        policy: The flow to steer.
        env: The environment that rewards.
        steering: Method and settings.
        context_ids: (B,) int64.
        generator: Source of all randomness, on the policy's device.
        role: Role of the network that draws.
        **sampling: `steps`, `guidance_scale`, and for best-of-n `solver`.
    """
    repeated = context_ids.repeat_interleave(steering.n)
    if steering.method == "smc":
        return _smc(policy, env, steering, repeated, generator, role, **sampling)
    x_1 = policy.sample_latents(repeated, role=role, generator=generator, **sampling)
    best = rewarded(policy, env, x_1, repeated)[1].reward.view(-1, steering.n).argmax(dim=1)
    return x_1.unflatten(0, (-1, steering.n))[torch.arange(len(context_ids), device=x_1.device), best]


@torch.no_grad()
def _smc(
    policy: FlowPolicy,
    env: GenerationEnv,
    steering: Steering,
    context_ids: torch.Tensor,
    generator: torch.Generator,
    role: Role,
    steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
) -> torch.Tensor:
    if solver not in (None, "euler"):
        raise ConfigError(f"Sequential Monte Carlo takes Euler steps of the SDE, not '{solver}'.")
    n = steering.n
    times = policy.model.times(steps or policy.steps).to(context_ids.device)
    sde = SDE(steering.sde, steering.noise_level)
    field: Field = policy.field(policy.condition(context_ids), len(context_ids), role, guidance_scale)
    x = policy.noise(len(context_ids), generator)
    log_weight = torch.zeros(len(context_ids) // n, n, device=x.device)
    reached = torch.zeros_like(log_weight)  # reward of the estimate that the weights stand for
    first_of_group = n * torch.arange(len(log_weight), device=x.device)
    for k in range(len(times) - 1):
        t = times[k].expand(len(x))
        v = field(x, t)
        estimate = x1_hat(v, x, t)
        reward = rewarded(policy, env, estimate, context_ids)[1].reward.view(-1, n)
        log_weight += (reward - reached) / steering.temperature
        if k == len(times) - 2:  # the last step has no noise: it ends in the estimate
            break
        rows = (first_of_group[:, None] + _resampled(log_weight, steering.ess_threshold, generator)).flatten()
        reached = reward.flatten()[rows].view(-1, n)
        step = sde.step(v[rows], x[rows], t, times[k + 1].expand(len(x)))
        x = step.sample(torch.randn(x.shape, generator=generator, device=x.device))
    drawn = torch.multinomial(log_weight.softmax(dim=1), 1, generator=generator)[:, 0]
    return estimate[first_of_group + drawn]


def _resampled(log_weight: torch.Tensor, threshold: float, generator: torch.Generator) -> torch.Tensor:
    """Resample: which particle each goes on from, (groups, n); weights of resampled groups become one, in place.

    Systematic resampling, in the groups whose effective number of particles is below `threshold` n.
    """
    groups, n = log_weight.shape
    weight = log_weight.softmax(dim=1)
    needed = 1 / weight.square().sum(1) < threshold * n  # (groups,)
    offsets = torch.rand(groups, 1, generator=generator, device=log_weight.device)
    positions = (offsets + torch.arange(n, device=log_weight.device)) / n
    drawn = torch.searchsorted(weight.cumsum(1), positions).clamp_max(n - 1)
    log_weight.masked_fill_(needed[:, None], 0.0)
    return torch.where(needed[:, None], drawn, torch.arange(n, device=log_weight.device))
