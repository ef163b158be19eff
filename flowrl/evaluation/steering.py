"""Steering: reward at inference time, without training, which a trained flow must beat at equal cost."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from flowrl.checks import check_types, take_python_values
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError, RewardError
from flowrl.functional.flow import x1_hat
from flowrl.functional.sde import SDE, GaussianStep, SDEKind
from flowrl.functional.solver_steps import Solver
from flowrl.functional.solvers import ode_sample
from flowrl.training.construction import without_gradient
from flowrl.training.policy import FlowPolicy
from flowrl.training.rollout import judged_by, roll_out
from flowrl.types import Field, RewardOutput, Role

Method = Literal["best_of_n", "smc", "rbf", "d_flow"]
METHODS = get_args(Method)
ACTS: dict[Method, tuple[str, ...]] = {
    "best_of_n": (),
    "smc": ("temperature", "sde", "noise_level", "ess_threshold"),
    "rbf": ("sde", "noise_level"),
    "d_flow": ("temperature", "step_size"),
}
"""Settings beside n that act on each method."""


@dataclass(frozen=True)
class Steering:
    """Choice of samples by their reward while, or after, they are drawn.

    - "best_of_n": of `n` samples of a context the one of the highest reward. The KL divergence to the flow is
      `log n - (n - 1) / n` for a continuous reward.
    - "smc": sequential Monte Carlo. `n` particles per context follow the SDE and are weighted, step by step, with
      `exp([r(x1_hat_k) - r(x1_hat_{k-1})] / temperature)`, the reward being that of the one-step estimate; they are
      resampled when their effective number falls below a share of n; one is drawn in the end. The target is
      `q e^{r / temperature}` (Wu et al. 2023, arXiv 2306.17775; Singhal et al. 2025, arXiv 2501.06848).
    - "rbf": rollover budget forcing (Kim et al. 2025, arXiv 2503.19385). A sample follows the SDE; at each step states
      are proposed until one's one-step estimate beats the best reward so far, and the sample goes on from there. What
      is left of the `n` proposals of a step rolls over to the next; where none beats it, the best of them is taken. The
      last noisy step spends all that is left and takes its best.
    - "d_flow": D-Flow (Ben-Hamu et al. 2024, arXiv 2402.14017). The noise that a sample starts from is moved by `n`
      steps of Adam, of a size that falls from `step_size` to 0, through the whole ODE, towards the largest
      `r(x_1) / temperature + (D - 1) log |x_0| - |x_0|^2 / 2`: the reward, and the log-density of the norm of noise in
      D dimensions.
    """

    method: Method = "best_of_n"
    n: int = 8
    temperature: float = 1.0
    sde: SDEKind = "flow"
    noise_level: float = 0.7
    ess_threshold: float = 0.5
    step_size: float = 0.1

    def __post_init__(self) -> None:
        take_python_values(self)
        check_types(type(self), vars(self), "Steering: ")
        if self.method not in METHODS:
            raise ConfigError(f"Unknown steering '{self.method}'. Known: {', '.join(METHODS)}.")
        if self.n < 1 or self.temperature <= 0 or not 0 <= self.ess_threshold <= 1 or self.step_size <= 0:
            raise ConfigError(
                "Steering needs n of at least 1, a positive temperature and step_size, and ess_threshold from 0 to 1; "
                f"not n = {self.n}, temperature = {self.temperature}, step_size = {self.step_size}, ess_threshold = "
                f"{self.ess_threshold}."
            )
        SDE(self.sde, self.noise_level)  # raises for settings without meaning
        for f in fields(self)[2:]:
            if f.name not in ACTS[self.method] and getattr(self, f.name) != f.default:
                raise ConfigError(f"{f.name} does nothing for steering '{self.method}': leave it out.")

    @property
    def held_at_once(self) -> int:
        """How many latents are there at once for each sample."""
        return self.n if self.method in ("best_of_n", "smc") else 1


def rewarded(
    policy: FlowPolicy, env: GenerationEnv, x_1: torch.Tensor, context_ids: torch.Tensor
) -> tuple[torch.Tensor, RewardOutput]:
    """Decode latents (B, *latent_shape) and reward them: samples, and the environment's output."""
    done = roll_out(context_ids, lambda _: (x_1, {}), policy.decode, judged_by(env))
    return done.samples, done.output


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
        **sampling: `steps`, `guidance_scale`, and for best-of-n and D-Flow `solver`.

    Raises:
        ConfigError: D-Flow on a reward without a gradient; a solver where steps are those of the SDE.
    """
    if steering.method == "rbf":
        return _rbf(policy, env, steering, context_ids, generator, role, **sampling)
    if steering.method == "d_flow":
        return _d_flow(policy, env, steering, context_ids, generator, role, **sampling)
    repeated = context_ids.repeat_interleave(steering.n)
    if steering.method == "smc":
        return _smc(policy, env, steering, repeated, generator, role, **sampling)
    x_1 = policy.sample_latents(repeated, role=role, generator=generator, **sampling)
    best = rewarded(policy, env, x_1, repeated)[1].reward.view(-1, steering.n).argmax(dim=1)
    return x_1.unflatten(0, (-1, steering.n))[torch.arange(len(context_ids), device=x_1.device), best]


def _check_solver(steering: Steering, solver: str | None) -> None:
    """Check that nothing but Euler steps is asked for.

    Raises:
        ConfigError: It is.
    """
    if solver not in (None, "euler"):
        raise ConfigError(f"Steering '{steering.method}' takes Euler steps of the SDE, not '{solver}'.")


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
    _check_solver(steering, solver)
    n = steering.n
    times = policy.times(steps).to(context_ids.device)
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


@torch.no_grad()
def _rbf(
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
    _check_solver(steering, solver)
    if env.groupwise:
        raise ConfigError(
            f"The reward of '{env.name}' compares samples of the same context, and rbf asks for each by itself: take "
            "best_of_n or smc."
        )
    times = policy.times(steps).to(context_ids.device)
    sde, last = SDE(steering.sde, steering.noise_level), len(times) - 2
    cond = policy.condition(context_ids)

    def estimated(x: torch.Tensor, k: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give velocities, one-step estimates and their rewards at states x of these rows, at time k."""
        t = times[k].expand(len(x))
        v = policy.field(tuple(part[rows] for part in cond), len(x), role, guidance_scale)(x, t)
        estimate = x1_hat(v, x, t)
        return v, estimate, rewarded(policy, env, estimate, context_ids[rows])[1].reward

    x = policy.noise(len(context_ids), generator)
    v, estimate, best = estimated(x, 0, torch.arange(len(x), device=x.device))
    left = torch.zeros_like(context_ids)
    for k in range(last):
        left += steering.n
        step = sde.step(v, x, times[k].expand(len(x)), times[k + 1].expand(len(x)))
        found = torch.full_like(best, -torch.inf)  # best reward of the proposals of this step
        x, v = x.clone(), v.clone()
        rows = torch.arange(len(x), device=x.device)
        while len(rows):
            noise = torch.randn(len(rows), *x.shape[1:], generator=generator, device=x.device)
            proposed = GaussianStep(step.mean[rows], step.std[rows]).sample(noise)
            v_new, estimate_new, reward = estimated(proposed, k + 1, rows)
            left[rows] -= 1
            better = reward > found[rows]
            taken = rows[better]
            x[taken], v[taken], estimate[taken] = proposed[better], v_new[better], estimate_new[better]
            found[taken] = reward[better]
            goes_on = left[rows] > 0
            rows = rows[goes_on if k + 1 == last else goes_on & (found[rows] <= best[rows])]
        best = torch.maximum(best, found)
    return estimate


def _d_flow(
    policy: FlowPolicy,
    env: GenerationEnv,
    steering: Steering,
    context_ids: torch.Tensor,
    generator: torch.Generator,
    role: Role,
    steps: int | None = None,
    guidance_scale: float | None = None,
    solver: Solver | None = None,
) -> torch.Tensor:
    solver, times = solver or policy.solver, policy.times(steps)
    cond = policy.condition(context_ids)
    field = policy.field(cond, len(context_ids), role, guidance_scale)

    def end(x: torch.Tensor) -> torch.Tensor:
        """Solve the ODE; the graph of each evaluation is made again in the backward pass."""
        x_1 = ode_sample(lambda x, t: checkpoint(field, x, t, use_reentrant=False), x, times, solver)
        return policy.model.arrived(x_1, cond)

    x_0 = policy.noise(len(context_ids), generator).requires_grad_()
    optimizer = torch.optim.Adam([x_0], lr=steering.step_size)
    spent = policy.networks.spent
    for i in range(steering.n):
        before = spent[0]
        with torch.enable_grad():
            reward = differentiable(policy, env, end(x_0), context_ids)
            norm = x_0.flatten(1).norm(dim=1).clamp_min(1e-9)
            prior = (x_0[0].numel() - 1) * norm.log() - norm.square() / 2
            (x_0.grad,) = torch.autograd.grad(-(reward / steering.temperature + prior).sum(), x_0)
        spent[0] -= (spent[0] - before) // 3  # a forward pass for a graph made again is counted with a backward pass
        optimizer.param_groups[0]["lr"] = steering.step_size * (1 - i / steering.n)  # so that it comes to rest
        optimizer.step()
    with torch.no_grad():
        return end(x_0.detach())


def differentiable(
    policy: FlowPolicy, env: GenerationEnv, x_1: torch.Tensor, context_ids: torch.Tensor
) -> torch.Tensor:
    """Reward latents (B, *latent_shape) with the gradient by them: (B,).

    Raises:
        ConfigError: The reward has none.
    """
    try:
        reward = env.evaluate(policy.decode(x_1), context_ids).reward
    except RewardError as error:
        if "requires grad" not in str(error):  # as torch says of a tensor that is to become an array
            raise
        raise ConfigError(without_gradient("d_flow", env)) from error
    if not reward.requires_grad:
        raise ConfigError(without_gradient("d_flow", env))
    return reward
