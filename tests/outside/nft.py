"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), without its adaptive division."""

from dataclasses import dataclass

import flowrl
from flowrl.functional.advantages import group_advantage
from flowrl.functional.losses import squared_error


@dataclass(frozen=True)
class NFTConfig(flowrl.FlowConfig):
    """Settings of DiffusionNFT."""

    beta: float = 1.0
    """How far the positive and the negative policy lie from the old one."""
    decay: float = 0.5
    """Share of the old policy that a refresh keeps."""


class NFT(flowrl.FlowAlgorithm):
    """Fine-tuning by contrast of a positive and a negative policy."""

    Config = NFTConfig

    @classmethod
    def copies_for(cls, config):
        return super().copies_for(config) | {"behaviour"}

    def advantage(self, rollout):
        return group_advantage(rollout.reward, rollout.group)

    def refresh_decay(self):
        return self.config.decay

    def loss(self, batch):
        pair, beta = self.pair(batch), self.config.beta
        v, v_old = self.velocity(pair), self.velocity(pair, "behaviour")
        share = (0.5 + batch.advantage / 10).clamp(0, 1)
        good = squared_error(v_old + beta * (v - v_old), pair.u)
        bad = squared_error(v_old - beta * (v - v_old), pair.u)
        move = squared_error(v, v_old).detach().mean()
        return ((share * good + (1 - share) * bad) / beta).mean(), {"move": move}
