"""Rewards of training samples from a reward that may fail: stop, ask again, or leave samples out; never invent one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from flowrl.checks import in_all
from flowrl.config import FlowConfig, OnRewardError
from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv
from flowrl.errors import RewardError
from flowrl.training.buffer import RolloutBuffer
from flowrl.types import Batch, RewardOutput

FIRST_PAUSE = 1.0
"""Seconds before a failed reward is asked again; twice as many each further time."""


class RewardCalls:
    """Calls of an environment's reward, with a choice of what happens when one fails.

    Args:
        env: The environment.
        on_error: "raise" passes errors on; "retry" asks again first, after pauses; "drop" finds the samples that the
            reward fails for, by halves, and leaves them out.
        retries: Number of times that "retry" asks again.
        timeout: Seconds after which a reward that gives no answer has failed; 0 waits for ever.
        max_dropped: Share of the samples drawn together that "drop" may leave out.

    Attributes:
        errors: Number of errors so far.
        last_error: The last of them.
    """

    def __init__(
        self,
        env: GenerationEnv,
        on_error: OnRewardError = "raise",
        retries: int = 3,
        timeout: float = 0.0,
        max_dropped: float = 0.1,
    ) -> None:
        self.env, self.on_error, self.retries, self.timeout = env, on_error, retries, timeout
        self.max_dropped, self.errors = max_dropped, 0
        self.last_error: RewardError | None = None

    @classmethod
    def of(cls, env: GenerationEnv, config: FlowConfig) -> RewardCalls:
        """Make them as the settings of a run say."""
        return cls(env, config.on_reward_error, config.reward_retries, config.reward_timeout, config.max_dropped)

    def __call__(
        self, samples: torch.Tensor, context_ids: torch.Tensor, *, grad: bool = False
    ) -> tuple[RewardOutput, torch.Tensor]:
        """Reward training samples (B, *sample_shape), and give the indices (M,) of those kept, in order.

        The reward and its components have a row for each of these; only "drop" leaves any out. `grad`: keep the graph.

        Raises:
            RewardError: The reward fails; with "drop" for every sample.
        """
        everything = torch.arange(len(samples), device=context_ids.device)
        if self.on_error != "drop":
            output = self._persistently(samples, context_ids)
            return (output if grad else output.detached()), everything
        parts = self._halves(samples, context_ids, everything)
        if not parts:
            raise RewardError(
                f"The reward failed for all {len(samples)} samples that were drawn together: none is left to stand in "
                f"for them. Draw more at once (--algo.rollout-batch-size). The last error: {self.last_error}"
            ) from self.last_error
        outputs, kept = zip(*parts)
        named = [output.components for output in outputs]
        components = {key: torch.cat([part[key] for part in named]) for key in in_all(named)}
        output = RewardOutput(torch.cat([output.reward for output in outputs]), components)
        return (output if grad else output.detached()), torch.cat(kept)

    def check_dropped(self, dropped: int, drawn: int, ranks: Ranks) -> int:
        """Add up over all ranks how many of so many samples, drawn by all of them, were left out.

        Raises:
            RewardError: Too many.
        """
        if self.on_error != "drop":
            return 0
        total = int(ranks.all_reduce_(torch.tensor(dropped, device=ranks.device)).item())
        if total > self.max_dropped * drawn:
            raise RewardError(
                f"The reward failed for {total} of {drawn} samples of an iteration, more than "
                f"max_dropped = {self.max_dropped:g} allows. The last error: {self.last_error}"
            )
        return total

    def _persistently(self, samples: torch.Tensor, context_ids: torch.Tensor) -> RewardOutput:
        for attempt in range(self.retries if self.on_error == "retry" else 0):
            try:
                return self._ask(samples, context_ids)
            except RewardError:
                time.sleep(FIRST_PAUSE * 2**attempt)
        return self._ask(samples, context_ids)

    def _halves(
        self, samples: torch.Tensor, context_ids: torch.Tensor, index: torch.Tensor
    ) -> list[tuple[RewardOutput, torch.Tensor]]:
        try:
            return [(self._ask(samples[index], context_ids[index]), index)]
        except RewardError:
            if len(index) == 1:
                return []
        middle = len(index) // 2
        return self._halves(samples, context_ids, index[:middle]) + self._halves(samples, context_ids, index[middle:])

    def _ask(self, samples: torch.Tensor, context_ids: torch.Tensor) -> RewardOutput:
        """Ask once; running statistics are put back where it fails and training may go on."""
        state = {} if self.on_error == "raise" else self.env.extra_state()
        before = {name: tensor.clone() for name, tensor in state.items()}
        try:
            return self._within_time(lambda: self.env.evaluate(samples, context_ids, observe=True), len(samples))
        except RewardError as error:
            self.errors, self.last_error = self.errors + 1, error
            if before:
                self.env.load_extra_state(before)
            raise

    def _within_time(self, ask: Callable[[], RewardOutput], n: int) -> RewardOutput:
        if not self.timeout:
            return ask()
        result: dict[str, Any] = {}

        def work() -> None:
            try:
                result["output"] = ask()
            except BaseException as error:
                result["error"] = error

        thread = threading.Thread(target=work, daemon=True, name="reward")
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():  # it cannot be stopped, only left behind
            raise RewardError(
                f"The reward of '{self.env.name}' gave no answer for {n} samples in {self.timeout:g} seconds "
                "(--algo.reward-timeout)."
            )
        if "error" in result:
            raise result["error"]
        return result["output"]


def stand_ins(context_ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Give for every sample (B,) its own index where it was kept, else that of a kept one, of its own context if any.

    Batches and groups thus keep their size: copies stand in for the samples left out, of several samples in turn.
    """
    index = torch.arange(len(context_ids), device=context_ids.device)
    lost = torch.ones(len(context_ids), dtype=torch.bool, device=context_ids.device)
    lost[kept] = False
    for place, i in enumerate(lost.nonzero()[:, 0].tolist()):
        same = kept[context_ids[kept] == context_ids[i]]
        pool = same if len(same) else kept
        index[i] = pool[place % len(pool)]
    return index


def without_strays(rollout: Batch, coefficient: torch.Tensor) -> torch.Tensor:
    """Set weights or advantages (B,) to zero for all of a group that holds a sample of another context.

    The group compares nothing. The row "stray" then marks all of it, for losses in which a weight of zero is a push.
    """
    if "stray" not in rollout.extra:
        return coefficient
    strays = torch.zeros_like(coefficient).index_add_(0, rollout.group, rollout.extra["stray"].float())
    rollout.extra["stray"].copy_(strays[rollout.group] > 0)
    return coefficient.masked_fill(rollout.extra["stray"], 0)


def counts(batch: Batch) -> torch.Tensor | float:
    """Give 0 for the samples (B,) of groups that compare nothing, and 1 for all others."""
    return 1 - batch.extra["stray"].float() if "stray" in batch.extra else 1.0


def mean_that_counts(buffer: RolloutBuffer) -> torch.Tensor:
    """Average the weights in a buffer over the samples that count."""
    weight, stray = buffer.coefficient[: buffer.size], buffer.numbers.get("stray")
    return weight.mean() if stray is None else weight.sum() / (~stray[: buffer.size]).sum().clamp_min(1)
