"""Self-consistent tilting: samples of the reference and of the policy itself, weighed as at the optimum."""

from dataclasses import dataclass

import torch

import flowrl
from flowrl.functional.flow import drawn, expand
from flowrl.functional.losses import residual_weighted_loss, squared_errors


@dataclass(frozen=True)
class TiltConfig(flowrl.FlowConfig):
    """Settings of self-consistent tilting."""

    strength: float = 1.0
    """lambda: the optimum is q_ref e^(lambda r) / Z."""
    group_size: int = 8
    """Samples of the same context per iteration."""
    own: int = 4
    """How many of a group the policy itself draws; the others come from the pool."""
    pool: int = 1024
    """Samples of the reference that are kept of each context."""
    critic_learning_rate: float = 2e-3
    """Learning rate of the critic."""


class Critic(torch.nn.Module):
    """Expected weight of a noisy state; exactly one at first."""

    def __init__(self, dim, n_contexts, width=64):
        super().__init__()
        self.context = torch.nn.Embedding(n_contexts, width)
        self.state, self.out = torch.nn.Linear(dim + 1, width), torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, x, t, context_ids):
        hidden = self.state(torch.cat([x.flatten(1), t[:, None]], 1)) + self.context(context_ids)
        return 1 + self.out(torch.nn.functional.silu(hidden)).squeeze(1)


class Tilt(flowrl.FlowAlgorithm):
    """Reward-weighted regression on a mixture of reference and policy, whose fixed point is the tilt."""

    Config = TiltConfig

    @classmethod
    def copies_for(cls, config):
        return super().copies_for(config) | {"behaviour"}

    def _setup_model(self):
        super()._setup_model()
        n, m, shape = len(self.env.core.contexts), self.config.pool, self.policy.model.latent_shape
        self.pool = self.keep("pool", torch.zeros(n, m, *shape))
        self.pool_reward = self.keep("pool_reward", torch.full((n, m), torch.nan))
        critic = Critic(torch.Size(shape).numel(), n)
        self.critic = self.add_network("critic", critic, self.config.critic_learning_rate)

    def contexts(self):
        ids = super().contexts()
        for c in ids.unique().tolist():
            if self.pool_reward[c].isnan().any():
                self._fill_pool(c)
        return ids

    def _fill_pool(self, c):
        m, ranks = self.config.pool, self.ranks
        own = torch.full((m // ranks.world_size,), c, device=self.device)
        x_1 = ranks.all_gather(self.policy.sample_latents(own, role="reference", generator=self.generator), m)
        output, kept = self.reward(self.policy.decode(x_1), own.new_full((m,), c))
        stand_in = torch.arange(m, device=self.device) % len(kept)
        self.pool[c], self.pool_reward[c] = x_1[kept[stand_in]], output.reward[stand_in]

    def draw(self, context_ids):
        c, n, size, generator = self.config, len(context_ids), self.config.pool, self.generator
        row = drawn(lambda m: torch.randint(size, (m,), generator=generator, device=self.device), n, generator)
        x_1, own_ids = self.pool[context_ids, row], context_ids.view(-1, c.group_size)[:, : c.own].flatten()
        own = self.policy.sample_latents(own_ids, role="behaviour", generator=generator)
        x_1.unflatten(0, (-1, c.group_size))[:, : c.own] = own.unflatten(0, (-1, c.own))
        return x_1, {"from_pool": torch.arange(n, device=self.device) % c.group_size >= c.own}

    def weigh(self, rollout):
        pi, top = self.config.own / self.config.group_size, rollout.reward.max()
        e = (self.config.strength * (self.pool_reward - top)).exp()
        least = e.amin(1, keepdim=True)
        z = least[:, 0] + (e - least).mean(1)  # exact where all agree
        rho = (self.config.strength * (rollout.reward - top)).exp() / z[rollout.context_ids]
        return rho / (1 + pi * (rho - 1))

    def loss(self, batch):
        pair, w = self.pair(batch), batch.weight
        v_ref, v_old = self.velocity(pair, "reference"), self.velocity(pair, "behaviour")
        base = torch.where(expand(batch.extra["from_pool"], v_ref), v_ref, v_old)
        errors = squared_errors(self.velocity(pair), pair.u, base)
        value = self.critic(pair.x_t, pair.t, batch.context_ids)
        self.critic.improve((value - w).square().mean())
        loss = residual_weighted_loss(errors, w, value.detach().clamp_min(0))
        return loss.mean(), {"weight": w.mean()}
