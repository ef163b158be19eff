"""Records of an iteration for the log: its samples while they are drawn, its minibatches, the figures in the end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from flowrl.errors import ConfigError
from flowrl.functional import metrics
from flowrl.functional.flow import interpolate
from flowrl.functional.losses import effective_sample_size
from flowrl.training.policy import FlowPolicy
from flowrl.training.target import aimed
from flowrl.training.writers import dump
from flowrl.types import RewardOutput, Role

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm

REWARD = "reward/"
"""Before the names of the reward's components, which are anyone's, in logs: they replace no figure of flowrl's."""

MISFIT = 1.3
"""How many times the reference's loss a flow's loss of its own samples may be, before a caution; once is chance."""


class MinibatchFigures:
    """Figures of an iteration's minibatches: scalars by name, which a loss may give for some of them only."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[str, ...]], list[torch.Tensor]] = {}

    def add(self, figures: Mapping[str, torch.Tensor], n: int) -> None:
        """Take in those of a minibatch of `n`: a copy, as they may change in place, made by one operation for all."""
        device = figures["loss"].device
        values = torch.stack([value.to(device) for value in figures.values()])
        self._found.setdefault((n, tuple(figures)), []).append(values)

    def means(self) -> dict[str, torch.Tensor]:
        """Average each over the entries of the minibatches that gave it: scalars, float32, still on the device."""
        totals: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for (n, names), rows in self._found.items():
            for name, total in zip(names, (n * torch.stack(rows).float().sum(0)).unbind()):
                totals[name] = totals[name] + total if name in totals else total
                counts[name] = counts.get(name, 0) + n * len(rows)
        return {name: total / counts[name] for name, total in totals.items()}


class RolloutRecord:
    """Samples, rewards and components of an iteration on this rank, for its figures."""

    def __init__(self) -> None:
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rewards: list[torch.Tensor] = []
        self.components: dict[str, list[torch.Tensor]] = {}
        self.dropped = 0  # samples that the reward failed for

    def add(self, samples: torch.Tensor, context_ids: torch.Tensor, output: RewardOutput) -> None:
        """Take in a batch; a few of its samples are kept for the diversity."""
        self.rewards.append(output.reward)
        for key, value in output.components.items():
            self.components.setdefault(key, []).append(value)
        if len(context_ids) * len(self.shown) < metrics.n_compared(samples):
            self.shown.append((samples, context_ids))

    def check_dropped(self, model: FlowAlgorithm) -> int:
        """Count over all ranks the samples of an iteration that were left out.

        Raises:
            RewardError: Too many of all that it drew.
        """
        return model.reward_calls.check_dropped(self.dropped, model.config.n_samples * model.draws, model.ranks)

    def figures(self, model: FlowAlgorithm) -> dict[str, torch.Tensor]:
        """Compute scalars by name, still on the device; those of components are of this rank, or of all.

        Raises:
            ConfigError: A method on contexts has asked for no reward.
        """
        rollout = model.buffer.all()
        reward, components = rollout.reward, {key: torch.cat(values) for key, values in self.components.items()}
        if model.learns_from == "contexts":  # drawn for each update, not kept
            if not self.rewards:
                raise ConfigError(
                    f"{type(model).__name__}.loss learns from contexts and has asked for no reward: it must take that "
                    "of its samples from self.reward_of(x_1, context_ids), which keeps it for the log."
                )
            reward = model.ranks.gather_uneven(torch.cat(self.rewards))  # ranks may have left out other numbers of them
            components = {k: model.ranks.gather_uneven(v) for k, v in model.ranks.in_all(components).items()}
        figures = {"rollout/reward_mean": reward.mean(), "rollout/reward_std": reward.std(correction=0)}
        figures["rollout/reward_min"], figures["rollout/reward_max"] = reward.aminmax()
        target = aimed(model, rollout)
        if target is not None:
            figures["rollout/target_lambda"] = target
        if self.shown:
            figures["rollout/diversity"] = self._diversity(model)
        if model.has_weights:
            figures["rollout/ess"] = effective_sample_size(rollout.weight) / len(reward)
        if model.config.on_reward_error == "drop":
            figures["rollout/dropped"] = torch.tensor(float(model.n_dropped), device=reward.device)
        return figures | {f"{REWARD}{key}": values.mean() for key, values in components.items()}

    def _diversity(self, model: FlowAlgorithm) -> torch.Tensor:
        """Compute the diversity of some samples of each rank; a scalar. Images are not sent: pairs are within ranks."""
        n = metrics.n_compared(self.shown[0][0])
        samples, context_ids = (torch.cat(parts)[:n] for parts in zip(*self.shown))
        self.shown = []  # the network trains next
        total, n_pairs = model.ranks.all_reduce_(metrics.pair_distances(samples, context_ids))
        return total / n_pairs


@torch.no_grad()
def velocities(
    policy: FlowPolicy,
    x_1: torch.Tensor,
    x_0: torch.Tensor,
    context_ids: torch.Tensor,
    t: torch.Tensor,
    role: Role = "current",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute velocities (B, *latent_shape) between samples and noise, at times t (B,).

    Returns:
        v of a role, v_ref, and `u = x_1 - x_0`.
    """
    x_t, u = interpolate(x_0, x_1, t)
    cond = policy.condition(context_ids)
    return policy.velocity(x_t, t, cond, role), policy.velocity(x_t, t, cond, "reference"), u


def cautions(model: FlowAlgorithm) -> dict[str, str]:
    """Say what a user should be told of the figures of the last iteration, by kind."""
    logged = model.last_logged
    given = model.cautions(logged)
    model.checks.cautions(given)
    found = dict(given)
    own, reference = (logged.get(f"train/{name}", 0.0) for name in ("own_loss", "reference_loss"))
    misfit, model.misfit = model.misfit, own > MISFIT * reference
    if misfit and model.misfit:
        found["misfit"] = (
            "The flow fits its own samples worse than the reference does: for the second time their loss is "
            f"{own / reference:.2f} times as large (train/own_loss, train/reference_loss). Errors have grown from "
            "refresh to refresh, and rewards fall when they go on. Go back to an earlier checkpoint, with fewer "
            "iterations, a lower learning rate, or a stronger penalty on leaving the reference."
        )
    return found


def log_iteration(model: FlowAlgorithm, updates: dict[str, torch.Tensor], seconds: float) -> None:
    """Write the figures of an iteration to the logger, and warn of what an algorithm cautions against, once each.

    The drift and the losses of own samples are measured here, where the loss has not given them.
    """
    if not {"drift", "own_loss"} <= updates.keys() and model.learns_from != "contexts":
        with model.policy.uncounted():  # the log is not part of the method's cost
            updates = {**model.drift(), **updates}
    trained = {f"train/{key}": value for key, value in updates.items()}
    measured = model.ranks.in_all({**model.rollout_figures, **trained})
    values = model.ranks.mean_(torch.stack([value.float() for value in measured.values()])).tolist()
    record = model.logger.record
    for key, value in zip(measured, values):
        record(key, value)
    record("train/learning_rate", model.policy.optimizer.param_groups[0]["lr"])
    record("train/n_updates", model._n_updates)
    if model.bad_updates.total:
        record("train/bad_updates", model.bad_updates.total)
    record("time/iteration", model.iteration)
    record("time/samples_per_second", model.config.n_samples * model.draws / max(seconds, sys.float_info.epsilon))
    record("time/network_evaluations", model.policy.evaluations * model.ranks.world_size)
    record("time/total_timesteps", model.num_timesteps, exclude="tensorboard")
    model.last_logged = dict(model.logger.name_to_value)
    for kind, text in cautions(model).items():
        if kind not in model.warned and model.ranks.is_main:
            model.warned.add(kind)
            warnings.warn(text, stacklevel=3)
    dump(model.logger, model.num_timesteps)
