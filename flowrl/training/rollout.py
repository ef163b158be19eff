"""The way from contexts to rewarded samples: draw latents, decode them, reward them. Whatever draws samples goes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.training.reward_calls import stand_ins
from flowrl.types import RewardOutput

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm

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


def filling(model: FlowAlgorithm, chunks: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Draw and reward samples of chunks of contexts into the buffer: their own contexts, and they if there are any."""
    if model.learns_from == "contexts":
        for context_ids in chunks:
            nothing = torch.zeros(len(context_ids), 0, device=model.device)
            model.buffer.add(nothing, context_ids, nothing.sum(1))
            yield context_ids, None
        return

    def draw(context_ids: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        drawn = model.draw(context_ids)
        model.checks.draw(drawn, len(context_ids), model.policy.model.latent_shape)
        return drawn

    for done, context_ids in zip(roll_outs(chunks, draw, model.policy.decode, model.reward, overlaps(model)), chunks):
        own = model.rows_of(done.output)
        model.checks.rows_of(own, len(done.context_ids), done.rows)
        rows = {**done.rows, **own}
        if model.config.on_reward_error == "drop":
            model.record.dropped += done.dropped
            rows["stray"] = done.context_ids != context_ids  # stands in for another context: see `_weigh`
        model.buffer.add(done.x_1, done.context_ids, done.output.reward, rows)
        model.record.add(done.samples, done.context_ids, done.output)
        yield done.context_ids, done.samples


def overlaps(model: FlowAlgorithm) -> bool:
    """Tell whether samples are rewarded in a thread while the next are drawn.

    Only where `draw` needs nothing of the rewards before, of one process, with several chunks an iteration, without
    CUDA graphs: while one is captured no thread may use the device. "auto" does it on CUDA for rewards that compute on
    the host.
    """
    config = model.config
    drawer = next(cls for cls in type(model).__mro__ if "draw" in vars(cls))
    several = 0 < config.rollout_batch_size < config.n_samples
    if config.overlap_rewards == "off" or not several or not vars(drawer).get("draws_ahead", False):
        return False
    if model.ranks.world_size > 1 or model.policy.graphs.is_on:  # a thread's own work would end in what is captured
        return False
    return config.overlap_rewards == "on" or (model.device.type == "cuda" and model.env.core.rewards_on_host)


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
