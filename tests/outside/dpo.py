"""Flow-DPO (Liu et al. 2025, arXiv 2501.13918) on pairs drawn online: the best and the worst of each group."""

from dataclasses import dataclass

import torch

import flowrl
from flowrl.functional.advantages import best_and_worst
from flowrl.functional.flow import sample_time


@dataclass(frozen=True)
class DPOConfig(flowrl.FlowConfig):
    """Settings of Flow-DPO."""

    beta: float = 10.0
    """Strength of the preference."""
    group_size: int = 8
    """Samples of the same context, of which the best and the worst make a pair."""

    def entries_per_epoch(self):
        return 2 * self.n_samples // self.group_size


class DPO(flowrl.FlowAlgorithm):
    """Direct preference optimisation."""

    Config = DPOConfig

    def order(self):
        rollout = self.buffer.all()
        pairs = best_and_worst(rollout.reward, rollout.group)  # (P, 2)
        return pairs[torch.randperm(len(pairs), generator=self.generator, device=self.device)].flatten()

    def loss(self, batch):
        n = len(batch.x_1) // 2
        x_0, t = self.policy.noise(n, self.generator), sample_time(n, "uniform", self.generator)
        pair = self.pair(batch, x_0.repeat_interleave(2, 0), t.repeat_interleave(2))
        gain = self.error(pair) - self.error(pair, "reference")
        margin = gain[0::2] - gain[1::2]  # best less worst
        loss = -torch.nn.functional.logsigmoid(-self.config.beta / 2 * margin)
        return loss.mean(), {"accuracy": (margin < 0).float().mean()}
