"""Self-consistent tilting: regression on samples of the reference and of the policy, weighted as at the optimum.

With `rho = e^(tau r) / Z`, `Z` the reference's mean of `e^(tau r)` in each context, a mixture of a share `1 - pi` of
reference samples and `pi` of the policy's own is weighted by `w = rho / (1 + pi (rho - 1))`. If the policy were the
tilt `q* = q_ref e^(tau r) / Z` already, these would be the importance weights of `q*` over the mixture: so `q*` is the
fixed point, and the only one, for any reward and without a likelihood. Weights never exceed `1 / pi`, and at the
optimum they are worth at least a share `pi` of the samples. With `pi -> 0` this is reward-weighted regression on the
reference alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch

from flowrl.config import FlowConfig
from flowrl.functional.losses import residual_weighted_loss, squared_errors, weighed
from flowrl.functional.tilting import mixture_weight, tilt_level, tilt_ratio
from flowrl.models.critic import StateCritic
from flowrl.registry import register_algorithm
from flowrl.training.noising import Noising, NoisingConfig
from flowrl.training.reference_pool import ReferencePool
from flowrl.training.reward_calls import counts
from flowrl.types import Batch, Pair, Role


@dataclass(frozen=True)
class TiltConfig(NoisingConfig):
    """Settings of self-consistent tilting."""

    tau: float = 1.0
    """Inverse temperature: the optimum is q_ref e^(tau r) / Z, for any reward."""
    reward_units: Literal["raw", "std"] = "raw"
    """Give tau in units of the reward ("raw"), or of the spread of the first reference samples' rewards within their
    contexts ("std"), which stays the unit for good."""
    own_share: float = 0.3
    """Share pi of the policy's own samples in the mixture with the reference's; weights are at most 1 / pi."""
    pool: int = 4096
    """Reference samples that are kept, of all contexts together: drawn and rewarded once."""
    pool_group: int = 16
    """Of one context, at least."""
    control_variate: Literal["critic", "one"] = "critic"
    """What is taken off the weights: their expectation given the noisy state, learnt by a critic, with which errors of
    the policy contract everywhere; or 1, their mean over the mixture."""
    critic_width: int = 128
    """Width of the critic, a perceptron with two hidden layers."""
    critic_learning_rate: float = 2e-3
    """Learning rate of the critic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "pool", "pool_group", "critic_width", "critic_learning_rate"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        self.require(0 < self.own_share < 1, f"own_share must be between 0 and 1, not {self.own_share}.")
        for name in ("reward_units", "control_variate"):
            known, value = get_args(get_type_hints(TiltConfig)[name]), getattr(self, name)
            self.require(value in known, f"{name} must be one of {', '.join(known)}, not '{value}'.")

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        of_critic, learns = ("critic_width", "critic_learning_rate"), self.control_variate == "critic"
        return super().idle() | ({} if learns else dict.fromkeys(of_critic, "unless control_variate is 'critic'"))


@register_algorithm("tilt")
class Tilt(Noising):
    """Self-consistent tilting."""

    Config: ClassVar[type[FlowConfig]] = TiltConfig
    kind = "mixture"
    tilt_setting = ("tau", 1)
    replayable = True
    config: TiltConfig

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep `v_old`, on which the errors of own samples are carried."""
        return super().copies_for(config) | {"behaviour"}

    def _setup_model(self) -> None:
        super()._setup_model()
        config = self.config
        self.pool = ReferencePool(self, config.pool, config.pool_group)
        self.unit = self.keep("unit", torch.full((), torch.nan))  # of tau, in the reward's own units
        if config.control_variate == "critic":
            dim = torch.Size(self.policy.model.latent_shape).numel()
            critic = StateCritic(dim, len(self.env.core.contexts), config.critic_width, start=1.0)
            self.critic = self.add_network("critic", critic, config.critic_learning_rate)

    def contexts(self) -> torch.Tensor:
        """Draw contexts, and reference samples of those that the pool holds none of."""
        context_ids = super().contexts()
        self.pool.hold(self, context_ids)
        if bool(self.unit.isnan()):
            self.unit.copy_(self.pool.spread() + 1e-4 if self.config.reward_units == "std" else torch.ones(()))
        return context_ids

    def weights_of(self, reward: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Compute the weights w (B,) of samples in the mixture, between 0 and 1 / pi."""
        tau, slot = self.config.tau / self.unit, self.pool.slot[context_ids]
        top, z = tilt_level(self.pool.reward, tau)
        return mixture_weight(tilt_ratio(reward, (top[slot], z[slot]), tau), self.config.own_share)

    def weigh(self, rollout: Batch) -> torch.Tensor:
        """Compute the weights (B,) of own samples."""
        return self.weights_of(rollout.reward, rollout.context_ids)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the residual loss of own samples and as many of the reference, in their shares of the mixture.

        Its gradient is that of `w (v - base) - (w - b) (u - base)`; the base is the velocity that drew the sample.
        """
        pi, ids, n = self.config.own_share, batch.context_ids, len(batch.x_1)
        x_1, reward = self.pool.draw(ids, self.generator)
        own, reference = self.pair(Batch.of(batch.x_1, ids)), self.pair(Batch.of(x_1, ids))
        base = torch.cat([self.velocity(own, "behaviour"), self.velocity(reference, "reference")])
        pair = joined(own, reference)
        w = torch.cat([batch.weight, self.weights_of(reward, ids)])
        counted = torch.cat([torch.ones_like(reward) * counts(batch), torch.ones_like(reward)])
        share = torch.cat([torch.full_like(reward, 2 * pi), torch.full_like(reward, 2 - 2 * pi)])
        b = self.expected_weight(pair, ids.repeat(2), w, share * counted)
        b = counted * b  # no weight carries nothing: no push away
        v = torch.cat([self.velocity(own), self.velocity(reference)])  # each as its base: where nothing pulls, v = base
        errors = squared_errors(v, pair.u, base)
        error = residual_weighted_loss(errors, w, b)
        error = weighed(error, self.time_weight(pair, base))
        loss = pi * error[:n].mean() + (1 - pi) * error[n:].mean()
        return loss, {"reference_drift": errors[1, n:].mean(), "reference_weight": w[n:].mean()}

    def expected_weight(
        self, pair: Pair, context_ids: torch.Tensor, w: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        """Estimate `E[w | x_t]` (B,), which may depend on anything but the sample's own reward; the critic learns.

        `share` (B,): how much samples count in it, as in the mixture; 0 for those that it is not to learn from.
        """
        if self.config.control_variate == "one":
            return torch.ones_like(w)
        return self.critic.regress(w, share, pair.x_t, pair.t, context_ids)[0].clamp_min(0)

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute the lambda of the tilt `q_ref e^(lambda r) / Z` that is aimed at: tau, in units of the reward."""
        first = reward_std if self.config.reward_units == "std" else torch.ones_like(reward_std)
        return self.config.tau / torch.where(self.unit.isnan(), first, self.unit)


def joined(first: Pair, second: Pair) -> Pair:
    """Concatenate two minibatches of pairs."""
    x_0, t, x_t, u = (torch.cat(parts) for parts in zip(first[:4], second[:4]))
    return Pair(x_0, t, x_t, u, tuple(torch.cat(parts) for parts in zip(first.cond, second.cond)))
