"""DRaFT-K (Clark et al. 2024, arXiv 2309.17400): the reward's gradient through the last steps of the sampler."""

from dataclasses import dataclass

import flowrl


@dataclass(frozen=True)
class DRaFTConfig(flowrl.FlowConfig):
    """Settings of DRaFT."""

    grad_steps: int = 1
    """K: steps of the sampler that gradients flow through."""


class DRaFT(flowrl.FlowAlgorithm):
    """Direct reward fine-tuning."""

    Config = DRaFTConfig
    learns_from = "contexts"

    def loss(self, batch):
        ids, steps = batch.context_ids, self.config.grad_steps
        x_1 = self.policy.sample_latents(ids, role="current", generator=self.generator, grad_steps=steps)
        return -self.reward_of(x_1, ids).mean(), {}
