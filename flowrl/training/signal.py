"""Training that learns nothing: what carries no signal, and what to change, said once each."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch

from flowrl.functional.losses import group_mean
from flowrl.types import Batch

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm

PATIENCE = 5
"""Iterations in a row without signal, where the next could have one, until there is a warning."""


class Signal:
    """Looks for iterations whose rewards tell training nothing.

    A reward that is constant for a while (no sample meets it yet) is none of its business; it speaks at once only
    where no later iteration can be different.
    """

    def __init__(self) -> None:
        self.silent = 0  # iterations in a row
        self.told: set[str] = set()
        self.began = 0, 0  # gradient steps, and those of them whose gradient was zero, before this run

    def look(self, model: FlowAlgorithm, rollout: Batch, coefficient: torch.Tensor) -> None:
        """Take in the rewards of an iteration, and the weights or advantages that were made of them."""
        word = "weights" if model.has_weights else "advantages"
        if not model.compares or len(coefficient) < 2:
            return
        # one transfer to the host an iteration; what explains a silence is measured in a silence
        n, reward = len(coefficient), rollout.reward
        low, high, worst, best = torch.stack((*coefficient.to(reward).aminmax(), *reward.aminmax())).tolist()
        largest, of_rewards = max(-low, high), best - worst
        alike = of_rewards == 0 and not model.extra_state.tensors  # even where some are chosen, as by RAFT
        self.silent = self.silent + 1 if alike or high - low <= 1e-6 * largest < math.inf else 0
        if not self.silent:
            return
        of_context = (reward - group_mean(reward, rollout.context_ids, len(model.env.core.contexts))).abs()
        within = float(of_context.max())
        equal = f"the {word} of all {n} samples are {'zero' if largest == 0 else 'equal'}"
        settings = {getattr(model.config, name, None) for name in ("weight_normalisation", "standardise")} - {None}
        by_group = not settings or "group" in settings
        alone = len(rollout.context_ids.unique()) == n or (model.config.group_size == 1 and largest == 0)
        single = by_group and alone
        if of_rewards == 0:
            if self.silent >= PATIENCE:
                self.tell(
                    model,
                    "constant",
                    f"Nothing was learnt from the rewards of the last {self.silent} iterations: in each, all samples "
                    "had the same reward. Take a reward that tells samples of this flow apart, more samples "
                    "(n_samples), or easier prompts.",
                )
        elif single and not model.extra_state.tensors:  # running statistics can compare with earlier iterations
            self.tell(
                model,
                "single",
                f"Nothing is learnt from the reward: {equal}, since each is compared with itself alone (group_size = "
                f"{model.config.group_size}, {len(model.env.core.contexts)} prompts). Draw several samples of a prompt "
                "(--algo.group-size 8), or compare over the whole batch where the algorithm can.",
            )
        elif not model.extra_state.tensors and (not by_group or (within > 0 and self.has_spread_in_groups(rollout))):
            self.tell(
                model,
                "flat",
                f"Nothing is learnt from the reward: {equal}, though rewards differ by up to {of_rewards:.3g}. A "
                "setting flattens them (a tau too small, a clip of the advantages too narrow, a share that keeps all).",
            )
        elif self.silent >= PATIENCE:
            self.tell(
                model,
                "groups",
                f"Nothing was learnt from the rewards of the last {self.silent} iterations: samples of the same prompt "
                "had the same reward, so that comparing them says nothing. Take a reward that depends on the sample, "
                "or larger groups (--algo.group-size).",
            )

    @staticmethod
    def has_spread_in_groups(rollout: Batch) -> bool:
        """Tell whether rewards differ within a group of samples that were drawn together."""
        difference = rollout.reward - group_mean(rollout.reward, rollout.group, len(rollout.reward))
        return bool((difference != 0).any())

    def tell(self, model: FlowAlgorithm, kind: str, text: str) -> None:
        """Warn once of a kind, on the main rank."""
        if kind not in self.told and model.ranks.is_main:
            warnings.warn(text, stacklevel=4)
        self.told.add(kind)


def check_learnt(model: FlowAlgorithm) -> None:
    """Warn at the end of a run whose gradients were all zero."""
    steps, zero = (now - then for now, then in zip((model._n_updates, model.bad_updates.zeros), model.signal.began))
    if steps > 0 and zero == steps and model.ranks.is_main:
        warnings.warn(
            f"Nothing was learnt: the gradients of all {steps} gradient steps were zero, and the flow is as it was. "
            "Look at the rewards (rollout/reward_std in the metrics) and at how they are compared (group_size, "
            "standardisation, clipping).",
            stacklevel=3,
        )


def check_rate(model: FlowAlgorithm, rate: float) -> None:
    """Warn of a learning rate that is 0 after warm-up."""
    if rate == 0 and model._n_updates >= model.config.warmup_updates and model._current_progress_remaining > 0:
        model.signal.tell(
            model,
            "rate",
            "Nothing is learnt: the learning rate is 0 after warm-up. Set lr_schedule to give a positive one.",
        )
