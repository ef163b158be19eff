"""The one evaluation API: reward, diversity and drift of a trained flow beside its reference, at the same noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv, draw_contexts
from flowrl.envs.prompts import prompts_from, shares_of
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.errors import ConfigError
from flowrl.evaluation.side_effects import compare, held_out, looks
from flowrl.evaluation.steering import Steering, steer
from flowrl.functional import metrics
from flowrl.functional.flow import interpolate, sample_time
from flowrl.functional.losses import effective_sample_size, squared_error
from flowrl.types import Batch, Role

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


@dataclass(frozen=True)
class SampleStatistics:
    """What a set of samples is like.

    Attributes:
        reward_mean: Mean reward.
        reward_ci: 95 % confidence interval of the mean.
        reward_std: Standard deviation over samples.
        components: Mean of each component of the reward.
        diversity: Mean Euclidean distance of two samples of the same context (flattened).
        w2_to_optimum: Exact W2 to equally many exact samples of the environment's optimum; NaN without an oracle.
        side: Means of what was measured beside the reward: held-out rewards, and looks of images.
    """

    reward_mean: float
    reward_ci: tuple[float, float]
    reward_std: float
    components: dict[str, float]
    diversity: float
    w2_to_optimum: float = math.nan
    side: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult(SampleStatistics):
    """Statistics of the trained flow, and how they compare with the reference.

    Attributes:
        drift: `E|v - v_ref|^2` over flow time, mean over dimensions.
        velocity_ratio: `E|v| / E|v_ref|` over flow time, norms over all dimensions.
        warnings: What fell while the reward rose: signs of a reward that is exploited.
        ess: Effective share of the samples under the algorithm's own weights, in (0, 1]; NaN for prompts that training
            does not draw, which an algorithm may have no weights for.
        n_samples: Samples of each flow.
        prompts: What they were conditioned on: "train", "held_out", a file or set, or "given".
        n_prompts: How many prompts these are; 0 for an unconditional flow.
        evaluations_per_sample: Network evaluations that a sample of the trained flow cost.
        per_prompt: Of each prompt that was drawn: how many samples, and the mean reward of the reference and of the
            trained flow; empty for an unconditional flow.
        reference: The same statistics of the reference, at the same noise and contexts.
        w2_floor: W2 of two independent sets of exact samples of that size: what `w2_to_optimum` can reach.
        samples: A few samples of the trained flow (for grids), decoded, on the CPU.
        reference_samples: The reference's samples at the same noise.
        sample_contexts: Their contexts.
    """

    drift: float = math.nan
    velocity_ratio: float = math.nan
    warnings: tuple[str, ...] = ()
    ess: float = math.nan
    n_samples: int = 0
    prompts: str = "train"
    n_prompts: int = 0
    evaluations_per_sample: float = math.nan
    per_prompt: list[dict[str, Any]] = field(default_factory=list, repr=False)
    reference: SampleStatistics | None = None
    w2_floor: float = math.nan
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    reference_samples: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    sample_contexts: list[Any] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, for JSON."""
        numbers = asdict(self)
        for key in ("samples", "reference_samples", "sample_contexts"):
            del numbers[key]
        return numbers

    def table(self) -> str:
        """A small table: reference, trained, change."""
        before = self.reference
        if before is None:
            raise ConfigError("This result holds no reference to compare with.")
        rows = [("reward", before.reward_mean, self.reward_mean)]
        rows += [(name, before.components[name], value) for name, value in self.components.items()]
        rows += [("diversity", before.diversity, self.diversity)]
        rows += [(name, before.side[name], value) for name, value in self.side.items()]
        if not math.isnan(self.w2_to_optimum):
            rows += [("W2 to optimum", before.w2_to_optimum, self.w2_to_optimum)]
        width = max(16, *(len(name) + 1 for name, _, _ in rows))
        lines = [f"{'':{width}s}{'reference':>12s}{'trained':>12s}{'change':>12s}"]
        lines += [f"{name:{width}s}{a:12.4g}{b:12.4g}{b - a:+12.4g}" for name, a, b in rows]
        low, high = self.reward_ci
        lines.append(f"reward of trained, 95 % interval: {low:.4g} to {high:.4g} ({self.n_samples} samples)")
        lines.append(f"drift E|v - v_ref|^2: {self.drift:.4g}    effective sample share: {self.ess:.3f}")
        if self.n_prompts:
            lines.append(f"prompts: {self.prompts} ({self.n_prompts})")
        if not math.isnan(self.w2_floor):
            lines.append(f"W2 floor (exact samples against each other): {self.w2_floor:.4g}")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def evaluate(
    model: FlowAlgorithm,
    n_samples: int = 1024,
    *,
    prompts: str | Path | Sequence[Any] = "train",
    seed: int = 0,
    batch_size: int = 256,
    samples_per_context: int = 8,
    role: Role | None = None,
    n_kept: int | None = None,
    steering: Steering | None = None,
    eval_rewards: Mapping[str, RewardFunction] | None = None,
    **sampling: Any,
) -> EvaluationResult:
    """Sample the trained flow and its reference at the same noise and contexts, and score both.

    Training's own random state is left alone. With `steering` the trained flow's samples are chosen by their reward
    while or after they are drawn, from noise of their own, at `evaluations_per_sample` as many network evaluations.

    Args:
        model: A trained (or loaded) algorithm.
        n_samples: Samples of each flow.
        prompts: What to condition on: "train", the contexts that training draws; "held_out", those it never draws; a
            prompt file or a shipped set (all of it); or prompts themselves. Weights count as in training.
        seed: Seed of noise and contexts.
        batch_size: Samples drawn at once.
        samples_per_context: Samples of each drawn context, for diversity and for rewards that compare them.
        role: Which copy to evaluate; None takes the moving average where there is one.
        n_kept: Samples to keep in the result; None keeps 64 images or 1024 points.
        steering: Choose the trained flow's samples by their reward; the reference's are left as they are.
        eval_rewards: Rewards that training did not see, by name, to score both with; `warnings` says which of them fell
            while the trained reward rose.
        **sampling: `steps`, `solver`, `guidance_scale` of the sampler.

    Raises:
        ConfigError: There are no such prompts, or the flow takes none.
    """
    is_trained_on = isinstance(prompts, str) and prompts == "train"
    if not is_trained_on:
        model = _conditioned_on(model, _chosen(model.env.core, prompts))
    policy, env = model.policy, model.env.core
    if "reference" not in (*policy.roles, *policy.networks) and policy.lora is None:
        raise ConfigError("This algorithm keeps no reference to compare with.")
    spent = policy.evaluations
    generator = torch.Generator(model.device)
    generator.manual_seed(seed)
    shares = None if env.shares is None else torch.from_numpy(env.shares).float().to(model.device)
    contexts = draw_contexts(len(env.contexts), n_samples, samples_per_context, generator, shares)
    noise = policy.noise(n_samples, generator)
    role = role or policy.sampling_role
    n_kept = n_kept or (64 if env.flow.is_image else 1024)

    def plain(c: torch.Tensor, x_0: torch.Tensor, which: Role) -> torch.Tensor:
        return policy.sample_latents(c, role=which, x_0=x_0, **sampling)

    def trained_sampler(c: torch.Tensor, x_0: torch.Tensor, which: Role) -> torch.Tensor:
        if steering is None:
            return plain(c, x_0, which)
        return steer(model, steering, c, generator, which, **sampling)

    chunk = batch_size if steering is None else max(1, batch_size // steering.n)
    eval_rewards, group = eval_rewards or {}, 1
    if any(getattr(judge, "groupwise", False) for judge in (env, *eval_rewards.values())):
        # samples that are compared are scored together
        batch_size, chunk = (max(1, n // samples_per_context) * samples_per_context for n in (batch_size, chunk))
        group = samples_per_context
    ranks = Ranks() if steering else model.ranks  # steering draws from one generator
    before, _ = _sample_and_score(model, contexts, noise, "reference", batch_size, plain, model.ranks, group)
    after, cost = _sample_and_score(model, contexts, noise, role, chunk, trained_sampler, ranks, group)
    x_1, samples, reward, components = after
    trained = _statistics(env, samples, contexts, reward, components, seed)
    ess = _ess(model, x_1, contexts, reward) if is_trained_on else math.nan
    drift, ratio = (math.nan,) * 2 if steering else _drift(model, x_1, contexts, role, batch_size, generator)
    policy.evaluations = spent
    reference = _statistics(env, before[1], contexts, before[2], before[3], seed)
    sides = (_side(env, eval_rewards, s, contexts, batch_size) for s in (before[1], samples))
    side = compare((before[2], reward), (next(sides), next(sides)), (reference.diversity, trained.diversity), ratio)
    trained, reference = replace(trained, side=side.after), replace(reference, side=side.before)
    return EvaluationResult(
        **{name: getattr(trained, name) for name in SampleStatistics.__dataclass_fields__},
        drift=drift,
        velocity_ratio=ratio,
        warnings=side.warnings,
        ess=ess,
        n_samples=n_samples,
        prompts=str(prompts) if isinstance(prompts, str | Path) else "given",
        n_prompts=0 if env.contexts == [None] else len(env.contexts),
        evaluations_per_sample=cost,
        per_prompt=_per_prompt(env, contexts, before[2], reward),
        reference=reference,
        w2_floor=_w2_floor(env, n_samples, seed),
        samples=samples[:n_kept].cpu(),
        reference_samples=before[1][:n_kept].cpu(),
        sample_contexts=[env.contexts[i] for i in contexts[:n_kept].tolist()],
    )


def _chosen(env: GenerationEnv, prompts: str | Path | Sequence[Any]) -> list[Any]:
    if isinstance(prompts, str) and prompts == "held_out":
        if not env.held_out:
            raise ConfigError(
                f"'{env.name}' holds no prompts out. Train with --env.held-out-share 0.2 or with a prompt file that "
                "says which to hold out (docs/prompts.md); or evaluate with --prompts FILE."
            )
        return env.held_out
    if env.contexts == [None]:
        raise ConfigError(f"The flow of '{env.name}' is unconditional: it takes no prompts.")
    chosen = prompts_from(prompts)
    return [*chosen.train, *chosen.held_out]


def _conditioned_on(model: FlowAlgorithm, contexts: list[Any]) -> FlowAlgorithm:
    """A view of the model with these contexts in place of its own; networks are shared, the model itself is left."""
    if not contexts:
        raise ConfigError("There are no prompts to evaluate on: the list is empty.")
    view = copy.copy(model)
    view.policy, view.env = copy.copy(model.policy), copy.copy(model.env)
    view.env.core = copy.copy(model.env.core)
    view.env.core.contexts, view.env.core.shares = contexts, shares_of(contexts)
    view.policy.contexts, view.policy._condition = contexts, model.policy.encode(contexts)
    return view


def _sample_and_score(
    model: FlowAlgorithm,
    contexts: torch.Tensor,
    noise: torch.Tensor,
    role: Role,
    batch_size: int,
    sampler: Callable[[torch.Tensor, torch.Tensor, Role], torch.Tensor],
    ranks: Ranks,
    group: int,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], float]:
    """Latents, samples, rewards and components, of all ranks; and network evaluations per sample."""
    latents, decoded, rewards, parts = [], [], [], []
    spent, n_drawn = model.policy.evaluations, 0
    for c, x_0 in zip(contexts.split(batch_size), noise.split(batch_size)):
        sharing = ranks if len(c) >= ranks.world_size * group else Ranks()
        own = sharing.shard(c, group)
        x_1 = sampler(own, sharing.shard(x_0, group), role)
        samples = model.policy.decode(x_1)
        output = model.env.core.evaluate(samples, own)
        n_drawn += len(own)
        latents.append(sharing.all_gather(x_1, len(c), group))
        decoded.append(sharing.all_gather(samples, len(c), group))
        rewards.append(sharing.all_gather(output.reward, len(c), group))
        parts.append({key: sharing.all_gather(value, len(c), group) for key, value in output.components.items()})
    components = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    cost = (model.policy.evaluations - spent) / n_drawn
    return (torch.cat(latents), torch.cat(decoded), torch.cat(rewards), components), cost


def _statistics(
    env: Any,
    samples: torch.Tensor,
    contexts: torch.Tensor,
    reward: torch.Tensor,
    components: dict[str, torch.Tensor],
    seed: int,
) -> SampleStatistics:
    n_pairs = min(len(samples), 2048)
    return SampleStatistics(
        reward_mean=reward.mean().item(),
        reward_ci=metrics.mean_interval(reward),
        reward_std=reward.std(correction=0).item(),
        components={key: value.mean().item() for key, value in components.items()},
        diversity=metrics.diversity(samples[:n_pairs], contexts[:n_pairs]).item(),
        w2_to_optimum=math.nan if env.oracle is None else _w2_to_optimum(env, samples, seed),
    )


def _per_prompt(
    env: GenerationEnv, contexts: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> list[dict[str, Any]]:
    if env.contexts == [None]:
        return []
    drawn, index = contexts.unique(return_inverse=True)
    n = torch.bincount(index)
    means = [torch.zeros_like(n, dtype=r.dtype).index_add_(0, index, r) / n for r in (before, after)]
    rows = zip(drawn.tolist(), n.tolist(), means[0].tolist(), means[1].tolist())
    return [{"prompt": str(env.contexts[i]), "n": k, "reference": a, "trained": b} for i, k, a, b in rows]


def _side(
    env: GenerationEnv,
    eval_rewards: Mapping[str, RewardFunction],
    samples: torch.Tensor,
    contexts: torch.Tensor,
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """Held-out rewards and looks (n_samples,) by name; in batches, as networks and large images need."""
    parts: list[dict[str, torch.Tensor]] = []
    for batch, indices in zip(samples.split(batch_size), contexts.split(batch_size)):
        asked = [env.contexts[i] for i in indices.tolist()]
        parts.append((looks(batch) if env.flow.is_image else {}) | held_out(eval_rewards, batch, asked))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


ESS_SAMPLES = 256
"""Samples weighed for the effective share; an algorithm's weights can be costly (likelihoods)."""
W2_POINTS = 2048
"""Exact transport is cubic in the number of points; more than this is not used."""


def _exact(env: Any, n: int, seed: int) -> torch.Tensor:
    return env.oracle.sample(n, torch.Generator().manual_seed(seed))


def _w2_to_optimum(env: Any, samples: torch.Tensor, seed: int) -> float:
    points = samples[:W2_POINTS].cpu()
    return metrics.wasserstein2(points, _exact(env, len(points), seed + 1))


def _w2_floor(env: Any, n_samples: int, seed: int) -> float:
    if env.oracle is None:
        return math.nan
    n = min(n_samples, W2_POINTS)
    return metrics.wasserstein2(_exact(env, n, seed + 1), _exact(env, n, seed + 2))


def _ess(model: FlowAlgorithm, x_1: torch.Tensor, contexts: torch.Tensor, reward: torch.Tensor) -> float:
    few = slice(ESS_SAMPLES)
    objective = model.objective(x_1[few], contexts[few], reward[few])
    weight = model.score(Batch(x_1[few], contexts[few], objective, torch.ones_like(objective)))
    return (effective_sample_size(weight) / len(weight)).item() if bool((weight > 0).all()) else math.nan


@torch.no_grad()
def _drift(
    model: FlowAlgorithm,
    x_1: torch.Tensor,
    contexts: torch.Tensor,
    role: Role,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """`E|v - v_ref|^2` (mean over dimensions), and `E|v| / E|v_ref|`."""
    policy = model.policy
    totals = torch.zeros(3, device=x_1.device)
    for x, c in zip(x_1.split(batch_size), contexts.split(batch_size)):
        t = sample_time(len(x), "uniform", generator)
        x_t, _ = interpolate(policy.noise(len(x), generator), x, t)
        cond = policy.condition(c)
        v, v_ref = (policy.velocity(x_t, t, cond, r) for r in (role, "reference"))
        totals += torch.stack([squared_error(v, v_ref).sum(), *(u.flatten(1).norm(dim=1).sum() for u in (v, v_ref))])
    drift, length, length_ref = totals.tolist()
    return drift / len(x_1), length / length_ref if length_ref else math.nan
