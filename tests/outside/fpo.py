"""Flow policy optimisation (McAllister et al. 2025, arXiv 2507.21053): ratios of flow-matching errors at kept draws."""

from dataclasses import dataclass

import torch

import flowrl
from flowrl.functional.advantages import group_advantage
from flowrl.functional.flow import sample_time
from flowrl.functional.losses import clipped_objective


@dataclass(frozen=True)
class FPOConfig(flowrl.FlowConfig):
    """Settings of FPO."""

    draws: int = 4
    """Draws of noise and time that are kept of each sample."""
    clip_range: float = 0.05
    """Ratios beyond 1 +- this get no gradient."""


class FPO(flowrl.FlowAlgorithm):
    """PPO whose log-likelihood is the flow-matching error."""

    Config = FPOConfig

    def draw(self, context_ids):
        x_1, rows = super().draw(context_ids)
        n, k = len(x_1), self.config.draws
        x_0 = torch.stack([self.policy.noise(n, self.generator) for _ in range(k)], 1)
        t = torch.stack([sample_time(n, "uniform", self.generator) for _ in range(k)], 1)
        with torch.no_grad():
            old = self._errors(flowrl.Batch.of(x_1, context_ids), x_0, t)
        return x_1, {**rows, "x_0": x_0, "t": t, "old": old}

    def advantage(self, rollout):
        return group_advantage(rollout.reward, rollout.group)

    def loss(self, batch):
        x_0, t, old = (batch.extra[name] for name in ("x_0", "t", "old"))
        ratio = (old - self._errors(batch, x_0, t)).mean(1).exp()
        return clipped_objective(ratio, batch.advantage, self.config.clip_range).mean(), {"ratio": ratio.mean()}

    def _errors(self, batch, x_0, t):
        return torch.stack([self.error(self.pair(batch, x_0[:, i], t[:, i])) for i in range(t.shape[1])], 1)
