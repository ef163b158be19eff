"""The way from contexts to rewarded samples: draw latents, decode them, reward them. Whatever draws samples goes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.training.reward_calls import stand_ins
from flowrl.types import RewardOutput

Draw = Callable[[torch.Tensor], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""Context indices (B,) to latents (B, *latent_shape) and further rows (B, ...) by name."""
Decode = Callable[[torch.Tensor], torch.Tensor]
Reward = Callable[[torch.Tensor, torch.Tensor], tuple[RewardOutput, torch.Tensor]]
"""Samples and context indices to rewards, and the indices (M,) of the samples that they are of, as `RewardCalls`."""


class Rollout(NamedTuple):
    """Samples with all that belongs to them: a row each.

    Attributes:
        context_ids: Indices of their contexts (B,).
        x_1: Latents (B, *latent_shape).
        rows: What else was drawn with them, (B, ...) by name.
        samples: Decoded samples (B, *sample_shape).
        output: Their rewards.
        dropped: Number of them that the reward failed for; others stand in for these, see `stand_ins`.
    """

    context_ids: torch.Tensor
    x_1: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    samples: torch.Tensor
    output: RewardOutput
    dropped: int = 0


class Drawn(NamedTuple):
    """Samples that are drawn and decoded, and have no rewards yet: the attributes as in `Rollout`."""

    context_ids: torch.Tensor
    x_1: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    samples: torch.Tensor


def roll_out(context_ids: torch.Tensor, draw: Draw, decode: Decode, reward: Reward) -> Rollout:
    """Draw, decode and reward one sample of each context (B,)."""
    return _rewarded(_drawn(context_ids, draw, decode), reward)


def roll_outs(
    chunks: Iterable[torch.Tensor], draw: Draw, decode: Decode, reward: Reward, overlap: bool = False
) -> Iterator[Rollout]:
    """Roll out one chunk of contexts after the other.

    With `overlap` a chunk is rewarded in a thread while the next is drawn. Rewards are asked in the same order, one
    chunk at a time; an error is raised where the chunk is due, and no other chunk is being rewarded then.
    """
    if not overlap:
        for context_ids in chunks:
            yield roll_out(context_ids, draw, decode, reward)
        return
    waiting: Future[Rollout] | None = None
    with ThreadPoolExecutor(1, "rewards") as thread:
        for context_ids in chunks:
            drawn = _drawn(context_ids, draw, decode)
            if waiting is not None:
                yield waiting.result()
            waiting = thread.submit(_rewarded, drawn, reward)
        if waiting is not None:
            yield waiting.result()


def _drawn(context_ids: torch.Tensor, draw: Draw, decode: Decode) -> Drawn:
    x_1, rows = draw(context_ids)
    return Drawn(context_ids, x_1, rows, decode(x_1))


def _rewarded(drawn: Drawn, reward: Reward) -> Rollout:
    context_ids, x_1, rows, samples = drawn
    output, kept = reward(samples, context_ids)
    dropped = len(context_ids) - len(kept)
    if not dropped:
        return Rollout(context_ids, x_1, rows, samples, output)
    index = stand_ins(context_ids, kept)
    rows = {name: row[index] for name, row in rows.items()}
    return Rollout(context_ids[index], x_1[index], rows, samples[index], output.at(kept, index), dropped)


def judged_by(env: GenerationEnv) -> Reward:
    """Make the reward of an evaluation from an environment: nothing of training's own state, no sample left out."""

    def reward(samples: torch.Tensor, context_ids: torch.Tensor) -> tuple[RewardOutput, torch.Tensor]:
        return env.evaluate(samples, context_ids).detached(), torch.arange(len(context_ids), device=context_ids.device)

    return reward
