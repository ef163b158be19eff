"""ORW-CFM-W2 (Fan et al., ICLR 2025, arXiv 2502.06061), and its variants without penalty and with KL.

Repeat: draw `x_1 ~ v_old` by the ODE, score it, weight it by `w = exp(tau r)`, then for K gradient steps with
fresh `x_0, t` minimise `w |v - u|^2 + alpha |v - v_ref|^2`; then `v_old <- v`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from flowrl.config import FlowConfig
from flowrl.functional.losses import (
    Baseline,
    Normalisation,
    Standardisation,
    kl_time_weight,
    means,
    residual_baseline,
    residual_weighted_loss,
    reward_weighted_loss,
    reward_weights,
    squared_error,
    squared_errors,
    standardise,
    weighed,
)
from flowrl.models.critic import StateCritic
from flowrl.registry import register_algorithm
from flowrl.training.priority import Prioritised, PriorityConfig
from flowrl.training.reward_calls import counts, mean_that_counts
from flowrl.types import Batch, Role

CRITIC_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class ORWCFMW2Config(PriorityConfig):
    """Settings of ORW-CFM-W2."""

    tau: float = 0.5
    """Inverse temperature of the weights exp(tau r)."""
    alpha: float = 1.0
    """Strength of the Wasserstein-2 regulariser alpha |v - v_ref|^2."""
    weight_normalisation: Normalisation = "batch"
    """Weights have mean one in the iteration ("batch") or per context ("group"), or are raw ("none")."""
    standardise: Standardisation = "none"
    """Give tau in units of the rewards' standard deviation, in the iteration ("batch") or per context ("group")."""
    target: Literal["residual", "plain"] = "residual"
    """"residual" moves only where rewards differ; "plain", as published, also refits the sampler's own errors."""
    baseline: Baseline = "clipped"
    """What the residual target takes off the weights: their mean ("mean"), which tilts exactly but lets errors grow
    from refresh to refresh where w + alpha < 1; at most w + penalty ("clipped"): then errors never grow, but it tilts
    too little; or their expectation given the noisy state, which a critic learns where dimensions are few ("local"):
    neither."""
    min_ess: float = 0.02
    """Warn when the weights are worth less than this share of the samples (effective sample size)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha must not be negative, not {self.alpha}.")
        self.require(
            self.baseline in get_args(Baseline), f"baseline must be clipped, mean or local, not '{self.baseline}'."
        )
        self.require(
            self.coupling not in ("ot", "c2ot") or self.target == "plain",
            f"coupling '{self.coupling}' draws samples by their weight, which leaves the residual target nothing to "
            "weigh: use target 'plain' with it.",
        )

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason."""
        return super().idle() | ({} if self.target == "residual" else {"baseline": "unless target is 'residual'"})


@register_algorithm("orw_w2")
class ORWCFMW2(Prioritised):
    """Online reward-weighted conditional flow matching with Wasserstein-2 regularisation."""

    replayable = True
    kind = "endpoint.w2"
    Config: ClassVar[type[FlowConfig]] = ORWCFMW2Config
    config: ORWCFMW2Config

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Keep `v_old` for the residual target."""
        copies = super().copies_for(config)
        return copies | {"behaviour"} if config.target == "residual" else copies

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.config.baseline == "local":
            dim, n = torch.Size(self.policy.model.latent_shape).numel(), len(self.env.core.contexts)
            self.critic = self.add_network("critic", StateCritic(dim, n, start=1.0), CRITIC_LEARNING_RATE)

    def weigh(self, rollout: Batch) -> torch.Tensor:
        """Compute weights `w = exp(tau r)` (B,)."""
        n = len(self.env.core.contexts)
        reward = standardise(rollout.reward, self.config.standardise, rollout.context_ids, n)
        return reward_weights(reward, self.config.tau, self.config.weight_normalisation, rollout.context_ids, n)

    def cautions(self, logged: Mapping[str, Any]) -> dict[str, str]:
        """Tell of weights that lie on a few samples."""
        share, config, found = logged["rollout/ess"], self.config, super().cautions(logged)
        if not share < config.min_ess:  # also where no sample has a weight, which is told as such
            return found
        text = (
            f"The weights are worth {100 * share:.2g} % of the samples: a few of them decide what is learnt. Lower tau "
            f"(now {config.tau:g}), raise n_samples (now {config.n_samples})"
        )
        wide = ", or take rewards in units of their standard deviation (standardise 'batch' or 'group')"
        return {**found, "ess": text + (wide if config.standardise == "none" else "") + "."}

    def sizes(self, coefficient: torch.Tensor) -> torch.Tensor:
        """Compute `|w - mean w|` (B,), or w itself where the target is plain."""
        if self.config.target == "plain":
            return coefficient.abs()
        return (coefficient - self._mean_weight()).abs()

    def _mean_weight(self) -> torch.Tensor:
        return mean_that_counts(self.buffer)

    def penalty(self, t: torch.Tensor) -> torch.Tensor:
        """Compute the coefficient (B,) of `|v - v_ref|^2` at times t."""
        return torch.full_like(t, self.config.alpha)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute eq. 12 of the paper, or its residual form, on fresh noise and times."""
        batch, x_0 = self.couple(batch)
        pair = self.pair(batch, x_0)
        v, w, penalty, importance = self.velocity(pair), batch.weight, self.penalty(pair.t), self.importance(batch)
        v_ref = [self.velocity(pair, "reference")] if self.config.alpha > 0 else []
        if self.config.target == "residual":
            base = self.velocity(pair, self.behaviour_role)
            if self.config.baseline == "local":
                state = pair.x_t, pair.t, batch.context_ids
                baseline = self.critic.regress(w, importance * counts(batch), *state)[0].clamp_min(0)
            else:
                baseline = residual_baseline(w, self._mean_weight(), penalty, self.config.baseline)
            baseline = weighed(baseline, counts(batch))  # no weight is to carry nothing: not even a push away
            errors = squared_errors(v, pair.u, base, *v_ref)
            loss = residual_weighted_loss(errors, w, baseline, penalty)
        else:
            base, errors = v, squared_errors(v, pair.u, *v_ref)
            loss = reward_weighted_loss(errors, w, penalty)

        loss = weighed(loss, importance * self.time_weight(pair, base, importance))
        seen = errors.detach()
        figures = {"fit": w * seen[0]}
        if v_ref:
            figures |= {"drift": seen[-1], "own_loss": seen[0], "reference_loss": squared_error(v_ref[0], pair.u)}
        return loss.mean(), means(figures, importance)


@dataclass(frozen=True)
class ORWConfig(ORWCFMW2Config):
    """Settings of ORW-CFM."""

    alpha: float = 0.0
    """Zero: no regulariser. That is what this variant is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha == 0, "orw has no regulariser (alpha = 0); for alpha > 0 use orw_w2.")


@register_algorithm("orw")
class ORWCFM(ORWCFMW2):
    """Online reward-weighted conditional flow matching without regularisation; collapses in the end."""

    replayable = True
    Config: ClassVar[type[FlowConfig]] = ORWConfig
    kind = "endpoint-free"


@register_algorithm("orw_kl")
class ORWCFMKL(ORWCFMW2):
    """ORW-CFM whose penalty is the Kullback-Leibler divergence: the same, weighted by t / (1 - t)."""

    replayable = True
    kind = "endpoint-kl"

    def penalty(self, t: torch.Tensor) -> torch.Tensor:
        """Compute `alpha t / (1 - t)`, clipped near t = 1."""
        return self.config.alpha * kl_time_weight(t)
