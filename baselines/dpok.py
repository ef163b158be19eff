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
from flowrl.training.optimizers import step_unless
from flowrl.training.transitions import TransitionAlgorithm, TransitionConfig, clip_fraction, clipped_objective
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


class Critic(nn.Module):
    """Expected reward of a state: `(x_k (B, ...), t (B,), contexts (B,)) -> (B,)`; zero at first."""

    def __init__(self, dim: int, n_contexts: int, width: int) -> None:
        super().__init__()
        self.context = nn.Embedding(n_contexts, width)
        self.state = nn.Linear(dim + 1, width)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """Estimate (B,)."""
        state = self.state(torch.cat([x.flatten(1), t[:, None]], dim=1))
        return self.head(state + self.context(contexts)).squeeze(1)


@register_algorithm("dpok")
class DPOK(TransitionAlgorithm):
    """Diffusion policy optimisation with KL regularisation."""

    Config: ClassVar[type[FlowConfig]] = DPOKConfig
    config: DPOKConfig

    def _setup_model(self) -> None:
        super()._setup_model()
        core, shape = self.env.core, self.policy.model.latent_shape
        self.critic = Critic(torch.Size(shape).numel(), len(core.contexts), self.config.critic_width).to(self.device)
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=self.config.critic_learning_rate, fused=True
        )

    def extra_state(self) -> dict[str, torch.Tensor]:
        """The critic and its optimizer."""
        moments = self.critic_optimizer.state_dict()["state"]
        state = {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        return state | {f"moments.{i}.{key}": value for i, entry in moments.items() for key, value in entry.items()}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back the critic and its optimizer."""
        self.critic.load_state_dict(
            {name.removeprefix("critic."): t for name, t in tensors.items() if name.startswith("critic.")}
        )
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("moments."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        state = self.critic_optimizer.state_dict()
        self.critic_optimizer.load_state_dict({**state, "state": moments})

    def score(self, rollout: Batch) -> torch.Tensor:
        """Standardised rewards (B,)."""
        n = len(self.env.core.contexts)
        return standardise(rollout.reward, self.config.standardise, rollout.contexts, n)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`lambda max(-A rho, -A clip(rho)) + beta KL(p_theta || p_ref)`, per step of the sampler."""
        config = self.config
        steps, step = self.recorded(batch)
        ratio = self.ratio(batch, steps, step)
        kl = step.kl(self.reference_step(batch))
        advantage, metrics = batch.weight, {"kl": kl.mean(), "clip_fraction": clip_fraction(ratio, config.clip_range)}
        if config.critic:
            value = self.critic(steps.x_k, self.policy.times()[steps.k], batch.contexts)
            error = (batch.weight - value).square().mean()
            self._improve_critic(error)
            advantage, metrics["critic_error"] = batch.weight - value.detach(), error
        advantage = advantage.clamp(-config.max_advantage, config.max_advantage)
        objective = clipped_objective(ratio, advantage, config.clip_range)
        return (config.reward_weight * objective + config.beta * kl).mean(), metrics

    def _improve_critic(self, error: torch.Tensor) -> None:
        self.critic_optimizer.zero_grad()
        error.backward()
        self.ranks.average_gradients(self.critic.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), torch.inf)
        step_unless((~norm.isfinite()).float(), self.critic_optimizer)
