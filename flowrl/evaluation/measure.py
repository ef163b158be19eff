"""The one evaluation API: reward, diversity and drift of a trained flow beside its reference, at the same noise."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowrl.checks import counted, in_all, shown
from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv, check_reward, draw_contexts
from flowrl.envs.prompts import are_none, prompts_from, shares_of
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.errors import ConfigError, RewardError, raised_by
from flowrl.evaluation.results import EvaluationResult, SampleStatistics
from flowrl.evaluation.side_effects import compare, held_out, looks
from flowrl.evaluation.statistics import clusters, per_prompt, statistics, w2_floor
from flowrl.evaluation.steering import Steering, steer
from flowrl.evaluation.win_rates import comparisons, outcomes
from flowrl.functional import metrics
from flowrl.functional.flow import sample_time
from flowrl.functional.losses import squared_error
from flowrl.functional.solver_steps import Solver
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.construction import as_generation_env
from flowrl.training.policy import FlowPolicy
from flowrl.training.records import velocities
from flowrl.training.rollout import judged_by, roll_out
from flowrl.types import Role

Sampler = Callable[[torch.Tensor, torch.Tensor, Role], torch.Tensor]
DRIFT_POINTS = 64
"""Noised samples that the drift of an evaluation is the mean of, at least."""


@dataclass(frozen=True)
class Subject:
    """A flow under evaluation: its policy, its environment, and the processes that hold it."""

    policy: FlowPolicy
    env: GenerationEnv
    ranks: Ranks

    @classmethod
    def of(cls, model: FlowAlgorithm | FlowPolicy, env: Any) -> Subject:
        """Take an algorithm with its own environment, or a policy with the one it is given.

        Raises:
            ConfigError: One is missing, or not what it should be.
        """
        if isinstance(model, FlowAlgorithm):
            if env is not None:
                raise ConfigError(
                    "An algorithm is evaluated on its own environment: evaluate(model, n_samples=1024); for another "
                    "one evaluate its policy, evaluate(model.policy, env)."
                )
            return cls(model.policy, model.env.core, model.ranks)
        if not isinstance(model, FlowPolicy) or env is None:
            raise ConfigError("evaluate takes an algorithm, or a policy and its environment: evaluate(policy, env).")
        return cls(model, as_generation_env(env), Ranks())

    def conditioned_on(self, contexts: list[Any]) -> Subject:
        """Give a view of it with these contexts in place of its own; networks are shared, it is left as it is."""
        if not contexts:
            raise ConfigError("There are no prompts to evaluate on: the list is empty.")
        env = copy.copy(self.env)
        env.contexts, env.shares = contexts, shares_of(contexts)
        return Subject(self.policy.conditioned_on(contexts), env, self.ranks)


@dataclass(frozen=True)
class Drawn:
    """Samples of one flow with their rewards, of all ranks; the samples in the CPU's memory, the rest on the device."""

    x_1: torch.Tensor
    samples: torch.Tensor
    reward: torch.Tensor
    components: dict[str, torch.Tensor]
    evaluations_per_sample: float


def evaluate(
    model: FlowAlgorithm | FlowPolicy,
    env: str | GenerationEnv | None = None,
    n_samples: int = 1024,
    *,
    prompts: str | Path | Sequence[Any] = "train",
    seed: int = 0,
    batch_size: int | None = None,
    samples_per_context: int = 8,
    role: Role | None = None,
    n_kept: int | None = None,
    steering: Steering | None = None,
    eval_rewards: Mapping[str, RewardFunction] | None = None,
    steps: int | None = None,
    solver: Solver | None = None,
    guidance_scale: float | None = None,
    progress: bool = False,
) -> EvaluationResult:
    """Sample a trained flow and its reference at the same noise and contexts, and reward both.

    Training's own random state is left alone. With `steering` the trained flow's samples are chosen by their reward
    while or after they are drawn, from noise of their own, at `evaluations_per_sample` as many network evaluations.

    Args:
        model: A trained (or loaded) algorithm; or a policy, with its environment as `env`.
        env: Environment of a policy, or its name.
        n_samples: Samples of each flow.
        prompts: Prompts to condition on: "train", the contexts that training draws; "held_out", those it never draws; a
            prompt file or a shipped set (all of it); or prompts themselves. Weights count as in training.
        seed: Seed of noise and contexts.
        batch_size: Samples drawn at once; as many as a rollout draws when None, and 256 at most.
        samples_per_context: Samples of each drawn context, for diversity and for rewards that compare them.
        role: Copy to evaluate; None takes the moving average where there is one.
        n_kept: Samples to keep in the result; None keeps 64 images or 1024 points.
        steering: Choose the trained flow's samples by their reward; the reference's are left as they are.
        eval_rewards: Rewards that training did not see, by name, for both; `warnings` says which of them fell while the
            trained reward rose.
        steps: Steps of the sampler; the policy's own when None, as are the next two.
        solver: Its solver.
        guidance_scale: Its guidance.
        progress: Show a bar with the time left, on a terminal only.

    Raises:
        ConfigError: There are no such prompts, or the flow takes none.
    """
    if isinstance(env, int):
        raise ConfigError(f"The number of samples is given by name: evaluate(model, n_samples={env}).")
    n_samples, n_kept = counted("n_samples", n_samples), None if n_kept is None else counted("n_kept", n_kept)
    samples_per_context, seed = counted("samples_per_context", samples_per_context), counted("seed", seed, 0)
    _check_kinds(steering, eval_rewards)
    asked = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale}
    sampling: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    subject, is_trained_on = Subject.of(model, env), isinstance(prompts, str) and prompts == "train"
    if not is_trained_on:
        subject = subject.conditioned_on(_chosen(subject.env, prompts))
    policy, core = subject.policy, subject.env
    batch_size = policy.most_drawn if batch_size is None else counted("batch_size", batch_size)
    if "reference" not in policy.networks.available:
        raise ConfigError("This policy keeps no reference to compare with.")
    check_eval_samples(n_samples, (core, *(eval_rewards or {}).values()), samples_per_context)
    generator = torch.Generator(policy.device)
    generator.manual_seed(seed)
    shares = None if core.shares is None else torch.from_numpy(core.shares).float().to(policy.device)
    ids = draw_contexts(len(core.contexts), n_samples, samples_per_context, generator, shares)
    noise = policy.noise(n_samples, generator)
    role = role or policy.sampling_role
    n_kept = n_kept or (64 if core.shows_images else 1024)

    def plain(c: torch.Tensor, x_0: torch.Tensor, which: Role) -> torch.Tensor:
        return policy.sample_latents(c, role=which, x_0=x_0, **sampling)

    def steered(c: torch.Tensor, x_0: torch.Tensor, which: Role) -> torch.Tensor:
        assert steering is not None
        return steer(policy, core, steering, c, generator, which, **sampling)

    chunk = batch_size if steering is None else max(1, batch_size // steering.held_at_once)
    eval_rewards, group = eval_rewards or {}, 1
    if any(getattr(judge, "groupwise", False) for judge in (core, *eval_rewards.values())):
        # samples that are compared are rewarded together, by one rank
        least, group = 1 if steering else subject.ranks.world_size, samples_per_context
        batch_size, chunk = (max(least, n // group) * group for n in (batch_size, chunk))
    with policy.uncounted():
        before = _drawn(subject, ids, noise, "reference", batch_size, plain, group, progress)
        if steering is None:
            after = _drawn(subject, ids, noise, role, chunk, plain, group, progress)
            drift, ratio, share = _drift(policy, after.x_1, ids, role, batch_size, generator)
        else:  # from one generator
            after = _drawn(replace(subject, ranks=Ranks()), ids, noise, role, chunk, steered, group, progress)
            drift = ratio = share = math.nan
    trained, reference = (statistics(core, d.samples, ids, d.reward, d.components, seed) for d in (after, before))
    sides = [_side(core, eval_rewards, d.samples, ids, batch_size) for d in (before, after)]
    diversity = reference.diversity, trained.diversity
    w2 = reference.w2_to_optimum, trained.w2_to_optimum
    rewards = before.reward, after.reward
    errors = [_judged(core, d.samples, ids, batch_size, seed) for d in (before, after)]
    comparing = comparisons(
        {"reward": (core.groupwise, getattr(core, "reward_function", None))}
        | {f"held-out {name}": (getattr(r, "groupwise", False), r) for name, r in eval_rewards.items()}
    )
    values = {"reward": before.reward} | sides[0], {"reward": after.reward} | sides[1]
    contexts = [core.contexts[i] for i in ids.tolist()]
    won = outcomes(comparing, values, (before.samples, after.samples), contexts, batch_size, policy.device)
    prompts_of = clusters(core, ids.cpu())
    side = compare(rewards, (sides[0], sides[1]), diversity, ratio, share, w2, (errors[0], errors[1]))
    trained, reference = replace(trained, side=side.after), replace(reference, side=side.before)
    return EvaluationResult(
        **{name: getattr(trained, name) for name in SampleStatistics.__dataclass_fields__},
        drift=drift,
        velocity_ratio=ratio,
        win_rates={name: value.mean().item() for name, value in won.items()},
        win_rate_cis={name: metrics.share_interval(value, prompts_of) for name, value in won.items()},
        warnings=side.warnings,
        ess=_ess(model) if is_trained_on else math.nan,
        n_samples=n_samples,
        trained_samples=getattr(model, "num_timesteps", None),
        prompts=str(prompts) if isinstance(prompts, str | Path) else "given",
        n_prompts=0 if are_none(core.contexts) else len(core.contexts),
        sampling={key: value for key, value in sampling.items() if value != getattr(policy, key, None)},
        evaluations_per_sample=after.evaluations_per_sample,
        per_prompt=per_prompt(core, ids, before.reward, after.reward),
        reference=reference,
        w2_floor=w2_floor(core, n_samples, seed),
        samples=after.samples[:n_kept].cpu(),
        reference_samples=before.samples[:n_kept].cpu(),
        sample_contexts=[core.contexts[i] for i in ids[:n_kept].tolist()],
    )


def _check_kinds(steering: Any, eval_rewards: Any) -> None:
    """Check that neither a name of a steering nor names of rewards stand for what is meant.

    Raises:
        ConfigError: They do; says what makes them.
    """
    if not isinstance(steering, Steering | None):
        raise ConfigError(
            'steering takes a flowrl.evaluation.steering.Steering, such as Steering("best_of_n", n=8), not '
            f"{shown(steering)}."
        )
    if not isinstance(eval_rewards, Mapping | None):
        raise ConfigError(
            f"eval_rewards takes functions by their names, {{'dark': darkness}}, not {shown(eval_rewards)}; those of "
            "registered names are made by flowrl.envs.rewards.mixture.make_rewards(['compress'], [])."
        )


def check_eval_samples(n_samples: int, judges: Iterable[Any], samples_per_context: int = 8) -> None:
    """Check that rewards that compare samples of a prompt have any to compare: no prompt is drawn once.

    Raises:
        ConfigError: One is; gives the next number of samples that will do.
    """
    if n_samples % samples_per_context == 1 and any(getattr(judge, "groupwise", False) for judge in judges):
        raise ConfigError(
            f"A reward compares samples of the same prompt, of which an evaluation draws {samples_per_context}: with "
            f"{n_samples} samples the last is a single one. Take {n_samples - 1 or 2} or {n_samples + 1} "
            "(--eval-samples)."
        )


def _ess(model: FlowAlgorithm | FlowPolicy) -> float:
    """Give the effective share of the samples of the last iteration, where there are weights."""
    figures = model.rollout_figures if isinstance(model, FlowAlgorithm) else {}
    return float(figures.get("rollout/ess", math.nan))


def _chosen(env: GenerationEnv, prompts: str | Path | Sequence[Any]) -> list[Any]:
    if isinstance(prompts, str) and prompts == "held_out":
        if not env.held_out:
            raise ConfigError(
                f"'{env.name}' holds no prompts out. Train with --env.held-out-share 0.2 or with a prompt file that "
                "says which to hold out (docs/prompts.md); or evaluate with --prompts FILE."
            )
        return env.held_out
    if are_none(env.contexts):
        raise ConfigError(f"The flow of '{env.name}' is unconditional: it takes no prompts.")
    chosen = prompts_from(prompts)
    return [*chosen.train, *chosen.held_out]


def _drawn(
    subject: Subject,
    context_ids: torch.Tensor,
    noise: torch.Tensor,
    role: Role,
    batch_size: int,
    sampler: Sampler,
    group: int,
    progress: bool,
) -> Drawn:
    """Draw and reward samples of a role, on all ranks."""
    policy, parts, rewards, components = subject.policy, [], [], []
    spent, n_drawn = policy.evaluations, 0
    chunks = list(zip(context_ids.split(batch_size), noise.split(batch_size)))
    is_quiet = None if progress and sys.stderr else True  # a process may have no stderr
    for c, x_0 in tqdm(chunks, f"batches of {role}", leave=False, disable=is_quiet):
        ranks = subject.ranks if len(c) >= subject.ranks.world_size * group else Ranks()

        def gather(rows: torch.Tensor, n: int = len(c), ranks: Ranks = ranks) -> torch.Tensor:
            return ranks.all_gather(rows, n, group)

        own, own_noise = ranks.shard(c, group), ranks.shard(x_0, group)

        def draw(ids: torch.Tensor, x_0: torch.Tensor = own_noise) -> tuple[torch.Tensor, Any]:
            return sampler(ids, x_0, role), {}

        done = roll_out(own, draw, policy.decode, judged_by(subject.env))
        n_drawn += len(own)
        parts.append((gather(done.x_1), gather(done.samples).cpu()))  # all of them are too much for a GPU
        rewards.append(gather(done.output.reward))
        components.append({key: gather(value) for key, value in ranks.in_all(done.output.components).items()})
    together = {key: torch.cat([part[key] for part in components]) for key in in_all(components)}
    x_1, samples = (torch.cat(rows) for rows in zip(*parts))
    return Drawn(x_1, samples, torch.cat(rewards), together, (policy.evaluations - spent) / n_drawn)


def _drift(
    policy: FlowPolicy,
    x_1: torch.Tensor,
    context_ids: torch.Tensor,
    role: Role,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, float, float]:
    """Measure `E|v - v_ref|^2` (mean over dimensions), `E|v| / E|v_ref|`, and the first in units of `E|v_ref|^2`.

    Samples are noised once, or as often as makes `DRIFT_POINTS`: a ratio of very few velocities says nothing.
    """
    order = torch.arange(len(x_1), device=x_1.device).repeat(-(-DRIFT_POINTS // len(x_1)))
    t, x_0 = sample_time(len(order), "uniform", generator), policy.noise(len(order), generator)  # for any batch_size
    totals = torch.zeros(4, device=x_1.device)
    for rows, noise, times in zip(*(part.split(batch_size) for part in (order, x_0, t))):
        v, v_ref, _ = velocities(policy, x_1[rows], noise, context_ids[rows], times, role)
        lengths = [u.flatten(1).norm(dim=1).sum() for u in (v, v_ref)]
        square_ref = squared_error(v_ref, torch.zeros_like(v_ref)).sum()
        totals += torch.stack([squared_error(v, v_ref).sum(), *lengths, square_ref])
    drift, length, length_ref, square = totals.tolist()
    share = drift / square if square else math.nan
    return drift / len(order), length / length_ref if length_ref else math.nan, share


def _side(
    env: GenerationEnv,
    eval_rewards: Mapping[str, RewardFunction],
    samples: torch.Tensor,
    context_ids: torch.Tensor,
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """Compute held-out rewards and looks (n_samples,) by name; in batches, as networks and large images need."""
    parts: list[dict[str, torch.Tensor]] = []
    for batch, indices in zip(samples.split(batch_size), context_ids.split(batch_size)):
        asked, batch = [env.contexts[i] for i in indices.tolist()], batch.to(context_ids.device)
        parts.append((looks(batch) if env.flow.is_image else {}) | held_out(eval_rewards, batch, asked))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _judged(
    env: GenerationEnv, samples: torch.Tensor, context_ids: torch.Tensor, batch_size: int, seed: int
) -> dict[str, torch.Tensor]:
    """Compute errors by the environment's own judges: (n_samples,) by name, and (1,) those of all samples together."""
    contexts, device = [env.contexts[i] for i in context_ids.tolist()], context_ids.device
    with raised_by(f"The method errors of '{env.name}'", RewardError):
        parts = [
            {
                name: check_reward(value, batch, contexts[i : i + batch_size], f"{env.name}, {name}")
                for name, value in env.errors(batch.to(device, copy=True), contexts[i : i + batch_size]).items()
            }
            for i, batch in zip(range(0, len(samples), batch_size), samples.split(batch_size))
        ]
        each = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with raised_by(f"The method errors_of_all of '{env.name}', which gives a number for each name,", RewardError):
        together = env.errors_of_all(samples.clone(), contexts, seed)
        return each | {name: torch.tensor([float(value)]) for name, value in together.items()}
