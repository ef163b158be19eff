"""Environments whose reward is a function of samples and contexts, or a mixture of such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.rewards.mixture import MixtureReward
from flowrl.types import Contexts, RewardOutput


class FunctionEnv(GenerationEnv):
    """An environment that asks its attribute `reward_function`; of a mixture it keeps the running statistics."""

    reward_function: Callable[..., Any]

    def asked(self, function: Callable[..., Any], samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Ask a function for the rewards of samples (B, *sample_shape)."""
        output = function(samples, contexts)
        return output if isinstance(output, RewardOutput) else RewardOutput(output)

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward samples (B, *sample_shape) by the function."""
        return self.asked(self.reward_function, samples, contexts)

    def observe(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward samples of training, after a mixture's running statistics have taken them in."""
        if isinstance(self.reward_function, MixtureReward):
            return self.asked(self.reward_function.observe, samples, contexts)
        return self.reward(samples, contexts)  # which a subclass may replace

    def gather_with(self, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Feed a mixture's running statistics with the values of every process."""
        if isinstance(self.reward_function, MixtureReward):
            self.reward_function.all_gather = all_gather

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Give the running statistics of a mixture."""
        return self.reward_function.extra_state() if isinstance(self.reward_function, MixtureReward) else {}
