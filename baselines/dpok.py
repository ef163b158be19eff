"""DPOK (Fan et al., NeurIPS 2023, arXiv 2305.16381) on the SDE sampler of a flow.

Repeat: draw samples step by step with noise, and follow the policy gradient of the steps, with a KL penalty per step
from the reference; the advantage is the reward, less the estimate of a critic that sees the state of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from flowrl.config import FlowConfig
from flowrl.functional.losses import Standardisation, standardise
from flowrl.registry import register_algorithm
from flowrl.training.reward_calls import counts
from flowrl.training.transitions import TransitionAlgorithm, TransitionConfig
from flowrl.types import Batch


@dataclass(frozen=True)
class DPOKConfig(TransitionConfig):
    """Settings of DPOK."""

    reward_weight: float = 1.0
    """Strength lambda of the reward."""
    beta: float = 0.01
    """Strength of the KL divergence of every step from the reference's."""
    standardise: Standardisation = "batch"
    """Rewards in units of their standard deviation, in the iteration ("batch") or per context ("group"), or raw."""
    critic: bool = True
    """Learn the expected reward of each state, and subtract it."""
    critic_width: int = 128
    """Width of the critic, a perceptron with two hidden layers."""
    critic_learning_rate: float = 1e-3
    """Learning rate of the critic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward_weight", "critic_width", "critic_learning_rate"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        self.require(self.beta >= 0, f"beta must not be negative, not {self.beta}.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        of_critic = ("critic_width", "critic_learning_rate")
        return super().idle() | ({} if self.critic else dict.fromkeys(of_critic, "without critic"))


class Critic(nn.Module):
    """Expected reward of a state: `(x_k (B, ...), t (B,), context_ids (B,)) -> (B,)`; zero at first."""

    def __init__(self, dim: int, n_contexts: int, width: int) -> None:
        super().__init__()
        self.context = nn.Embedding(n_contexts, width)
        self.state = nn.Linear(dim + 1, width)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Estimate the expected reward (B,)."""
        state = self.state(torch.cat([x.flatten(1), t[:, None]], dim=1))
        return self.head(state + self.context(context_ids)).squeeze(1)


@register_algorithm("dpok")
class DPOK(TransitionAlgorithm):
    """Diffusion policy optimisation with KL regularisation."""

    tilt_setting = ("beta", -1)
    Config: ClassVar[type[FlowConfig]] = DPOKConfig
    config: DPOKConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        config, dim = self.config, torch.Size(self.policy.model.latent_shape).numel()
        critic = Critic(dim, len(self.env.core.contexts), config.critic_width)
        self.critic = self.add_network("critic", critic, config.critic_learning_rate)

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Standardise rewards (B,); the critic's estimate is subtracted in the loss."""
        n = len(self.env.core.contexts)
        return standardise(rollout.reward, self.config.standardise, rollout.context_ids, n)

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute `lambda = reward_weight / beta` of raw rewards, `reward_weight / (beta std)` of standardised ones.

        That is of the law of whole paths: gradient and penalty are both sums over steps, means over dimensions.
        """
        config = self.config
        if config.beta == 0:
            return None
        unit = torch.ones_like(reward_std) if config.standardise == "none" else reward_std + 1e-4
        return config.reward_weight / (config.beta * unit)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute `lambda max(-A rho, -A clip(rho)) + beta KL(p_theta || p_ref)`, per step of the sampler."""
        config = self.config
        steps, advantage = self.recorded(batch), batch.advantage
        step = self.step(steps, batch.context_ids)
        ratio = self.ratio(batch, steps, step)
        kl = step.kl(self.step(steps, batch.context_ids, "reference"))
        metrics = {"kl": kl.mean()}
        if config.critic:
            state = steps.x_k, self.policy.times()[steps.k], batch.context_ids
            value, metrics["critic_error"] = self.critic.regress(advantage, counts(batch), *state)
            advantage = (advantage - value) * counts(batch)  # no advantage is to carry nothing
        advantage = advantage.clamp(-config.max_advantage, config.max_advantage)
        objective, figures = self.surrogate(batch, steps, step, ratio, advantage)
        return (config.reward_weight * objective + config.beta * kl).mean(), {**metrics, **figures}
