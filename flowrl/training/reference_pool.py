"""ReferencePool: samples of the reference and their rewards, drawn once for each context and kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.errors import ConfigError
from flowrl.functional.flow import drawn
from flowrl.training.rollout import roll_out

if TYPE_CHECKING:
    from flowrl.training.noising import Noising


class ReferencePool:
    """Reference samples of as many contexts as there is room for; the oldest make room for others.

    Every rank holds all of it, and checkpoints keep it.

    Args:
        model: The algorithm; its policy draws, its reward is asked once for each sample.
        capacity: Samples of all contexts together.
        least: Samples of one context, at least.

    Attributes:
        size: Samples of each context.
        x_1: Samples (slots, size, *latent_shape).
        reward: Their rewards (slots, size).

    Raises:
        ConfigError: It has no room for the contexts of one iteration, or rewards of different calls do not compare.
    """

    def __init__(self, model: Noising, capacity: int, least: int) -> None:
        n = len(model.env.core.contexts)
        if model.env.core.groupwise or model.env.core.extra_state():
            raise ConfigError(
                f"{model.name} keeps reference samples with their rewards and compares others with them, so a reward "
                "has to say the same of a sample at any time and beside any others: no winrate and no part of a "
                "mixture with 'group' or 'running'; 'fixed' does it."
            )
        self.size = max(least, capacity // n)
        slots = min(n, max(1, capacity // self.size))
        together = min(n, model.config.n_samples // model.config.group_size)
        if slots < together:
            raise ConfigError(
                f"pool = {capacity} has room for {least} reference samples of {slots} contexts, but an iteration has "
                f"{together}: raise pool to {together * least}, or group_size, or lower pool_group."
            )
        if self.size % model.ranks.world_size:
            raise ConfigError(
                f"{model.ranks.world_size} processes cannot share {self.size} reference samples of a context evenly: "
                "take another pool."
            )
        dtype = torch.float16 if model.config.half_buffer else torch.float32
        shape = model.policy.model.latent_shape
        self.x_1 = model.keep("pool", torch.zeros(slots, self.size, *shape, dtype=dtype))
        self.reward = model.keep("pool_reward", torch.zeros(slots, self.size))
        self.slot = model.keep("pool_slot", torch.full((n,), -1))  # of each context; -1 for none
        self.context = model.keep("pool_context", torch.full((slots,), -1))  # in each slot
        self.filled = model.keep("pool_filled", torch.zeros(1, dtype=torch.long))  # slots so far, with those refilled

    def hold(self, model: Noising, context_ids: torch.Tensor) -> None:
        """Draw and reward samples of those contexts (B,) that it holds none of.

        Raises:
            RewardError: The reward failed for too many of them.
        """
        wanted = context_ids.unique()
        missing = wanted[self.slot[wanted] < 0].tolist()
        if not missing:
            return
        stay = set(wanted.tolist())
        place, dropped = int(self.filled), 0
        for context in missing:
            while int(self.context[place % len(self.context)]) in stay:
                place += 1
            slot = place % len(self.context)
            dropped += self._fill(model, slot, context)
            place += 1
        self.filled.fill_(place)
        model.n_dropped += model.reward_calls.check_dropped(dropped, len(missing) * self.size, model.ranks)

    def _fill(self, model: Noising, slot: int, context: int) -> int:
        """Draw the samples of a context into a slot; how many the reward failed for, on this rank."""
        old = int(self.context[slot])
        if old >= 0:
            self.slot[old] = -1
        done = dropped = 0
        for ids in torch.full((self.size,), context, device=model.device).split(model.env.num_envs):
            x_1, reward, failed = _rewarded(model, model.ranks.shard(ids))
            chunk = slice(done, done + len(ids))
            self.x_1[slot, chunk].copy_(model.ranks.all_gather(x_1, len(ids)))
            self.reward[slot, chunk].copy_(model.ranks.all_gather(reward, len(ids)))
            done, dropped = done + len(ids), dropped + failed
        self.slot[context], self.context[slot] = slot, context
        return dropped

    def draw(self, context_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one of the samples of each context (B,): latents (B, *latent_shape), float32, and rewards (B,)."""
        device = self.slot.device
        row = drawn(
            lambda n: torch.randint(self.size, (n,), generator=generator, device=device), len(context_ids), generator
        )
        slot = self.slot[context_ids]
        return self.x_1[slot, row].float(), self.reward[slot, row]

    def spread(self) -> torch.Tensor:
        """Compute the standard deviation of rewards within contexts, pooled over those it holds; a scalar tensor."""
        held = (self.context >= 0)[:, None]
        centred = (self.reward - self.reward.mean(1, keepdim=True)) * held
        return (centred.square().sum() / (held.sum() * self.size).clamp_min(1)).sqrt()


def _rewarded(model: Noising, context_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Draw samples of the reference (B, *latent_shape) and their rewards (B,).

    Others stand in for those that the reward failed for, which are counted.
    """

    def draw(ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return model.drawn_from(model.policy.noise(len(ids), model.generator), ids, "reference"), {}

    done = roll_out(context_ids, draw, model.policy.decode, model.reward)
    return done.x_1, done.output.reward, done.dropped
