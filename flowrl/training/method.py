"""Method: what an algorithm replaces and what it calls, to say in a few lines how it learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from flowrl.config import FlowConfig
from flowrl.distributed.ranks import Ranks, SharedGenerator
from flowrl.envs.base import GenerationVecEnv, draw_contexts
from flowrl.errors import ConfigError, RewardError
from flowrl.functional.flow import even_times, interpolate, sample_time
from flowrl.functional.losses import squared_error
from flowrl.training.buffer import RolloutBuffer
from flowrl.training.construction import configured, without_gradient
from flowrl.training.networks import ExtraState, TrainedNetwork
from flowrl.training.policy import FlowPolicy
from flowrl.training.records import RolloutRecord, velocities
from flowrl.training.replay import Minibatches
from flowrl.training.reward_calls import RewardCalls
from flowrl.types import Batch, Pair, RewardOutput, Role, Rows

DRIFT_SHARE = 0.02
"""Of the updates' network evaluations, what a measured drift may cost."""


class Method(ABC):
    """The part of a `FlowAlgorithm` that its author sees: `contexts -> draw -> reward -> weigh -> update -> refresh`.

    Attributes:
        policy: The flow in its roles.
        buffer: Samples of the iteration.
        generator: Source of all randomness of training.
        ranks: The processes that train together.
        iteration: Iterations so far.
        given_hash: Hash of the samples of a file that it learns from; empty without such a file.
    """

    Config: ClassVar[type[FlowConfig]] = FlowConfig
    name: ClassVar[str] = ""
    kind: ClassVar[str] = "endpoint"
    """Kind of algorithm, by which environments recommend settings (docs/how-to/algorithm.md)."""
    learns_from: Literal["samples", "steps", "contexts", "data"] = "samples"
    """What `loss` is given: samples; recorded steps of their paths; contexts, for which it draws itself, with
    gradients; or samples of a data set, so that nothing is drawn."""
    needs_gradient: ClassVar[bool] = False
    """Whether it learns from the reward's gradient by the samples: an environment without one is refused at once."""
    unpredictable: ClassVar[str] = ""
    """Work whose memory a dry run cannot try, since it depends on the values of tensors."""
    tilt_setting: ClassVar[tuple[str, int] | None] = None
    """The setting that lambda of the tilt is proportional to (1) or inverse to (-1), for `target_lambda`."""
    replayable: ClassVar[bool] = False
    """Whether CUDA graphs may hold `loss` (for small networks): it does the same on the device in every call, takes no
    number off it, and reads nothing on the host that changes in training. A class says so for itself alone."""
    draws_ahead: ClassVar[bool] = True
    """Whether `draw` needs nothing of the samples before it, neither their rewards nor their places in the buffer, so
    that they may be rewarded at the same time. A class that replaces `draw` says so for itself alone."""
    config: Any
    policy: FlowPolicy
    env: GenerationVecEnv
    buffer: RolloutBuffer
    generator: torch.Generator
    ranks: Ranks
    device: torch.device
    iteration: int
    given_hash: str = ""
    shares: torch.Tensor | None
    reward_calls: RewardCalls
    record: RolloutRecord
    extra_state: ExtraState
    replay: Minibatches

    @classmethod
    def copies_for(cls, config: Any) -> set[Role]:
        """Name the copies of the network that these settings need; a subclass adds its own."""
        copies: set[Role] = {"reference"}
        if config.refresh_every > 1:
            copies.add("behaviour")
        if config.ema_decay > 0:
            copies.add("ema")
        return copies

    @classmethod
    def configure(
        cls,
        config: FlowConfig | None = None,
        recommended: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> FlowConfig:
        """Make the config of a run: the given one, or the defaults with an environment's recommendations."""
        return configured(cls, config, recommended or {}, settings or {})

    def contexts(self) -> torch.Tensor:
        """Draw context indices (n_samples,) of an iteration, over all ranks: each repeated `group_size` times."""
        n = len(self.env.core.contexts)
        return draw_contexts(n, self.config.n_samples, self.config.group_size, self.generator, self.shares)

    def draw(self, context_ids: torch.Tensor) -> tuple[torch.Tensor, Rows]:
        """Draw latents `x_1` (B, *latent_shape) of the behaviour policy for context indices (B,).

        Returns:
            The latents, and whatever else belongs to each of them, name -> (B, ...): `loss` gets it as `batch.extra`.
        """
        return self.policy.sample_latents(context_ids, role=self.behaviour_role, generator=self.generator), {}

    def reward(self, samples: torch.Tensor, context_ids: torch.Tensor) -> tuple[RewardOutput, torch.Tensor]:
        """Reward decoded samples (B, *sample_shape): see `RewardCalls`."""
        return self.reward_calls(samples, context_ids)

    def rows_of(self, output: RewardOutput) -> Rows:
        """Give rows that belong to each sample, name -> (B,), from what the reward gave beside its number."""
        return {}

    def weigh(self, rollout: Batch) -> torch.Tensor:
        """Make weights (B,) of all samples of an iteration from their rewards: not negative.

        With several ranks `rollout.x_1`, and rows that are more than a number per sample, are those of this rank; the
        rest of `rollout` is of all: what needs the samples themselves is a row that `draw` gives.
        """
        return torch.ones_like(rollout.reward)

    def advantage(self, rollout: Batch) -> torch.Tensor:
        """Make advantages (B,) of both signs from the rewards, in place of `weigh`; of neither, weights are one."""
        return rollout.reward

    def order(self) -> torch.Tensor:
        """Give the entries that one pass goes over, in the order of its minibatches: samples, or steps of samples."""
        n = self.buffer.size * self.buffer.parts
        return torch.randperm(n, generator=self.generator, device=self.device)

    def read(self, rows: Rows, sample: torch.Tensor, part: torch.Tensor) -> Rows:
        """Read what a minibatch gets of parts (B,) of samples (B,), "x_1" among it; for configs with `parts`."""
        return {name: stored.index_select(0, sample) for name, stored in rows.items()}

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the scalar loss of a minibatch, and scalar metrics as tensors (never `.item()` here)."""

    def may_refresh(self, figures: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether an iteration whose updates gave these figures ends with a refresh, where one is due."""
        return True

    def refresh(self) -> None:
        """Refresh the behaviour policy, after every `refresh_every` iterations."""
        self.policy.networks.update_copy("behaviour", self.refresh_decay())

    def refresh_decay(self) -> float:
        """Give the share of the behaviour policy that a refresh keeps; 0 makes it a copy of the current one."""
        return 0.0

    def tilt_of(self, reward_std: torch.Tensor) -> torch.Tensor | None:
        """Compute lambda of the tilt `q_ref e^(lambda r) / Z` that is aimed at; None where no such optimum is stated.

        Args:
            reward_std: Standard deviation of the rewards, within groups where there are any; a scalar tensor.
        """
        return None

    def cautions(self, logged: Mapping[str, Any]) -> dict[str, str]:
        """Say what a user should be told of the figures of an iteration, by kind; each kind is told once."""
        return {}

    def pair(self, batch: Batch, x_0: torch.Tensor | None = None, t: torch.Tensor | None = None) -> Pair:
        """Pair the samples of a minibatch with fresh noise, at fresh times; or with given ones."""
        x_0 = self.policy.noise(len(batch.x_1), self.generator) if x_0 is None else x_0
        t = sample_time(len(x_0), self.config.time_sampling, self.generator) if t is None else t
        return Pair(x_0, t, *interpolate(x_0, batch.x_1, t), self.policy.condition(batch.context_ids))

    def velocity(self, pair: Pair, role: Role = "current") -> torch.Tensor:
        """Compute the velocity (B, *latent_shape) of a role at the points of a pair.

        Where roles have the same weights it is the same, to the last bit: adapters are not merged here.
        """
        return self.policy.velocity(pair.x_t, pair.t, pair.cond, role, exact=True)

    def error(self, pair: Pair, role: Role = "current") -> torch.Tensor:
        """Compute the flow-matching error `|v - u|^2` (B,) of a role, mean over dimensions."""
        return squared_error(self.velocity(pair, role), pair.u)

    def reward_of(self, x_1: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Reward latents (B,) with the gradient by them; zero gradient for samples that "drop" leaves out.

        Raises:
            ConfigError: The reward has no gradient; names it.
        """
        samples, own = self.policy.decode(x_1), self.name or type(self).__name__
        try:
            output, kept = self.reward_calls(samples, context_ids, grad=True)
        except RewardError as error:
            if "requires grad" not in str(error):  # as torch says of a tensor that is to become an array
                raise
            raise ConfigError(without_gradient(own, self.env.core)) from error
        if not output.reward.requires_grad:
            raise ConfigError(without_gradient(own, self.env.core))
        if self.learns_from == "contexts":
            self.record.dropped += len(x_1) - len(kept)
            self.record.add(samples.detach()[kept], context_ids[kept], output.detached())
        return output.reward.detach().mean().repeat(len(x_1)).index_copy(0, kept, output.reward)

    def add_network(self, name: str, module: torch.nn.Module, learning_rate: float) -> TrainedNetwork:
        """Register a further network with an optimizer of its own: saved, resumed, and averaged over ranks like all."""
        self.extra_state.networks[name] = TrainedNetwork(module.to(self.device), learning_rate, self.ranks)
        return self.extra_state.networks[name]

    def keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Register a tensor that a checkpoint must keep (running statistics); change it in place. On the device."""
        self.extra_state.tensors[name] = tensor.to(self.device)
        return self.extra_state.tensors[name]

    @property
    def has_weights(self) -> bool:
        """Whether samples get weights; otherwise they get advantages, or nothing."""
        return type(self).weigh is not Method.weigh

    @property
    def compares(self) -> bool:
        """Whether rewards are made into weights or advantages at all."""
        return self.has_weights or type(self).advantage is not Method.advantage

    @property
    def draws(self) -> int:
        """How many samples an iteration draws for each of its contexts."""
        return self.config.n_epochs if self.learns_from == "contexts" else 1

    @property
    def behaviour_role(self) -> Role:
        """The copy that draws the samples."""
        return "behaviour" if "behaviour" in self.policy.roles else "current"

    @torch.no_grad()
    def drift(self) -> dict[str, torch.Tensor]:
        """Estimate what the loss of methods without `v_ref` does not give: scalars, means over dimensions.

        "drift" is `E|v - v_ref|^2`; of methods that learn from the policy's own samples, "own_loss" is their
        `E|v - u|^2`, "reference_loss" their `E|v_ref - u|^2`.

        On so few samples that it costs at most a fiftieth of an iteration's updates (a gradient step is 3 evaluations
        a sample, this 2), at even times; with randomness of its own, of which training knows nothing.
        """
        config, buffer, ranks = self.config, self.buffer, self.ranks
        n = int(DRIFT_SHARE * 3 / 2 * config.entries_per_epoch() * config.n_epochs)
        n = max(4, n - n % 4)  # four ranks share it as one takes it
        n = min(-(-n // ranks.world_size) * ranks.world_size, buffer.size)
        generator = SharedGenerator(self.device, ranks)
        generator.manual_seed(self.iteration)
        order = torch.randperm(buffer.size, generator=generator, device=self.device)[:n] * buffer.parts
        totals = torch.zeros(3, device=self.device)
        for batch in buffer.batches(order, config.batch_size):
            t = even_times(len(batch.x_1), config.time_sampling, generator)
            v, v_ref, u = velocities(self.policy, batch.x_1, self.policy.noise(len(t), generator), batch.context_ids, t)
            pairs = ((v, v_ref), (v, u), (v_ref, u))
            totals += torch.stack([squared_error(a, b).sum() for a, b in pairs]) * ranks.world_size / n
        is_own = self.learns_from != "data" and self.behaviour_role != "reference"
        return dict(zip(("drift", "own_loss", "reference_loss")[: 3 if is_own else 1], totals))
