"""GenerationEnv: a generation task as a single-step Gymnasium environment, and its batched form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from flowrl.checks import LARGEST_INT, counted, is_finite, is_whole, python_value, shown
from flowrl.envs.prompts import shares_of
from flowrl.errors import ConfigError, FlowRLError, RewardError, raised_by, reason_of
from flowrl.models.loading import FlowSource
from flowrl.types import Contexts, RewardOutput

Indices = TypeVar("Indices", torch.Tensor, Sequence[int])


class GenerationEnv(gymnasium.Env[np.int64, np.ndarray]):
    """A generation task: the observation is a context, the action a sample; every episode is one step.

    The observation is the index of a context (`Discrete`; 1 when unconditional), the action is the sample
    `x_1` in the space that the reward sees (`Box`). Subclasses write `reward`.

    Args:
        flow: Source of the flow that generates samples.
        contexts: Conditions of samples: prompts, labels, or `[None]`. A `Prompt` is drawn in proportion to
            its weight.
        low: Lower bound of a sample's values.
        high: Upper bound.
        name: Name in messages and run folders.
        held_out: Contexts that are never drawn, for `evaluate(model, prompts="held_out")`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (Gymnasium's own convention)
    groupwise: bool = False
    """Whether `reward` compares samples of the same context, and so needs several of each in a call."""
    renderer: Callable[[torch.Tensor], torch.Tensor] | None = None
    """`samples (B, *sample_shape) -> (B, 1 or 3, H, W)` in [0, 1], a picture of each for grids; None where samples are
    images themselves, or are drawn by `plot`."""
    sound_rate: int = 0
    """Values per second of what `sounds` gives; 0 where samples are nothing to be heard."""

    def __init__(
        self,
        flow: FlowSource,
        contexts: Sequence[Any],
        *,
        low: float,
        high: float,
        name: str,
        render_mode: str | None = None,
        held_out: Sequence[Any] = (),
    ) -> None:
        if isinstance(contexts, str) or not isinstance(contexts, Iterable):
            raise ConfigError(f"The contexts of '{name}' must be a list of them, not {shown(contexts)}.")
        contexts = list(contexts)
        if len(contexts) == 0:
            if held_out:
                raise ConfigError(f"All {len(held_out)} prompts of '{name}' are held out: none is left to train on.")
            raise ConfigError(f"Environment '{name}' needs at least one context; use [None] for none.")
        if np.any(np.asarray(low) > np.asarray(high)):
            raise ConfigError(f"The values of samples of '{name}' lie from low to high, not from {low} to {high}.")
        self.flow = flow
        self.contexts = contexts
        self.held_out = list(held_out)
        self.shares = shares_of(self.contexts)  # (n,) share of each context in the draws, None when all are equal
        self.name = name
        self.render_mode = render_mode
        self.sample_shape, self.sound_rate = flow.sample_shape, flow.sample_rate
        self.observation_space = spaces.Discrete(len(self.contexts))
        self.action_space = spaces.Box(low, high, self.sample_shape, np.float32)
        self.oracle: Any = None
        self.recommended: Mapping[str, Any] = {}  # algorithm settings, set by `make`
        self.origin: tuple[str, dict[str, Any]] | None = None  # registered name and settings, set by `make`
        self._context = 0
        self._last = np.zeros(self.sample_shape, dtype=np.float32)

    @property
    def reward_weights(self) -> Mapping[str, float]:
        """Weights of the components, by name, of a reward that is their weighted sum; empty for any other.

        They are the attribute `weights` of the environment's `reward_function`, where that is numbers by name.
        """
        weights = getattr(getattr(self, "reward_function", None), "weights", {})
        is_such = isinstance(weights, Mapping) and all(is_finite(python_value(value)) for value in weights.values())
        return weights if is_such else {}

    @property
    def rewards_on_host(self) -> bool:
        """Whether the reward computes on the host, wherever samples are: its attribute `on_host`."""
        return bool(getattr(getattr(self, "reward_function", None), "on_host", False))

    @abstractmethod
    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward samples (B, *sample_shape) on any device, with one context per sample."""

    def observe(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward samples of training: running statistics take them in."""
        return self.reward(samples, contexts)

    def errors(self, samples: torch.Tensor, contexts: Contexts) -> Mapping[str, torch.Tensor]:
        """Compute errors (B,) of samples that the reward does not see, by name; the less, the better.

        Evaluations call it, training never does: it may cost more than the reward, and needs no gradient.
        """
        return {}

    def errors_of_all(self, samples: torch.Tensor, contexts: Contexts, seed: int) -> Mapping[str, float]:
        """Compute errors of a set of samples as a whole, by name, such as its distance to data; the less, the better.

        Evaluations call it, on the host or not, with a seed for whatever it draws.
        """
        return {}

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Collect the tensors that a checkpoint must keep: those that `observe` changes."""
        return {}

    def load_extra_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `extra_state` gave; by default in place."""
        for name, tensor in self.extra_state().items():
            tensor.copy_(tensors[name])

    def gather_with(self, all_gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take `all_gather`, which maps values (B,) of this process to those of all that train together.

        For rewards with running statistics, which `observe` must feed with the values of every process.
        """

    def describe(self) -> list[str]:
        """Write lines for the head of a run: flow and reward, and how to choose others."""
        return [f"flow: {self.flow.description}"]

    def evaluate(self, samples: torch.Tensor, contexts: torch.Tensor, *, observe: bool = False) -> RewardOutput:
        """Score a batch: the environment's core, on torch tensors where they are.

        Args:
            samples: (B, *sample_shape).
            contexts: (B,) int64, indices into `self.contexts`.
            observe: Whether these are samples of training, which running statistics of rewards take in.

        Returns:
            Reward and components as (B,) float32 on the samples' device.

        Raises:
            RewardError: The reward raised, or is not one finite float per sample; names the reward, the
                sample and its context.
            ConfigError: The environment is `groupwise`, and a context has a single sample; or there are not as many
                contexts as samples, or no such contexts.
        """
        if tuple(samples.shape[1:]) != self.sample_shape:
            raise RewardError(
                f"Environment '{self.name}' scores samples of shape (B, {', '.join(map(str, self.sample_shape))}), "
                f"not {tuple(samples.shape)}."
            )
        contexts = torch.as_tensor(contexts)
        if contexts.shape != samples.shape[:1]:
            raise ConfigError(
                f"'{self.name}' takes one context for each sample: {len(samples)} samples came with contexts of shape "
                f"{tuple(contexts.shape)}."
            )
        asked = self.asked_for(contexts.tolist())
        own = samples.clone()  # rewards may change what they are given; training and pictures go on with the samples
        try:
            output = self.observe(own, asked) if observe else self.reward(own, asked)
        except FlowRLError:
            raise
        except Exception as error:
            raise RewardError(
                f"The reward of '{self.name}' raised {reason_of(error)} It was called with samples "
                f"of shape {tuple(samples.shape)} and {len(asked)} contexts, the first {next(iter(asked), None)!r}."
            ) from error
        if not isinstance(output, RewardOutput):  # the numbers alone, as functions may give them
            output = RewardOutput(output)
        reward = check_reward(output.reward, samples, asked, self.name)
        if not isinstance(output.components, Mapping):
            raise RewardError(
                f"The components of the reward '{self.name}' must be numbers (B,) by name, {{name: values}}, not "
                f"{shown(output.components)}."
            )
        components = {
            key: check_reward(value, samples, asked, f"{self.name}, component {key}")
            for key, value in output.components.items()
        }
        return RewardOutput(reward, components, output.info)

    def asked_in(self, options: Mapping[str, Any] | None) -> int | None:
        """Take the index of a context from the options of `reset`; None where there is none.

        Raises:
            ConfigError: It is no index, or there is no such context.
        """
        asked = python_value((options or {}).get("context"))
        if asked is None:
            return None
        if not is_whole(asked, -LARGEST_INT):
            raise ConfigError(f"reset takes the index of a context, options={{'context': 0}}, not {shown(asked)}.")
        return int(in_range([asked], len(self.contexts))[0])

    def asked_for(self, indices: Sequence[int]) -> list[Any]:
        """Look contexts up by their indices.

        Raises:
            ConfigError: There is no such context.
        """
        return [self.contexts[i] for i in in_range(indices, len(self.contexts))]

    def sounds(self, samples: torch.Tensor, contexts: Contexts) -> torch.Tensor:
        """Make what samples (B, *sample_shape) sound like: (B, channels, N) in [-1, 1], if there is a `sound_rate`."""
        return samples

    @property
    def shows_images(self) -> bool:
        """Whether `pictures` are to be shown of samples, in place of what `plot` draws."""
        return self.flow.is_media or self.renderer is not None

    def pictures(self, samples: torch.Tensor) -> torch.Tensor:
        """Draw samples (B, *sample_shape) as images (B, 1 or 3, H, W) in [0, 1], if `shows_images`.

        Raises:
            ConfigError: The renderer raised, or gave something else.
        """
        if self.renderer is None:
            return samples
        with raised_by(f"The renderer of '{self.name}'"):
            drawn = torch.as_tensor(self.renderer(samples)).float()
        if drawn.dim() != 4 or len(drawn) != len(samples) or drawn.shape[1] not in (1, 3):
            raise ConfigError(
                f"The renderer of '{self.name}' gave shape {tuple(drawn.shape)} for {len(samples)} samples; it must "
                f"give images ({len(samples)}, 1 or 3, H, W) with values in [0, 1]."
            )
        return drawn

    def plot(self, axes: Any, samples: torch.Tensor) -> None:
        """Draw samples (B, *sample_shape) that are no images into matplotlib axes: their first two coordinates."""
        axes.plot(*plotted(samples).T, ".", markersize=2, alpha=0.6)
        axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")

    def draw(self, rng: np.random.Generator, size: int | None = None) -> Any:
        """Draw indices of contexts, independently by their shares: an array (size,), or one number."""
        if self.shares is None:
            return rng.integers(len(self.contexts), size=size)
        return rng.choice(len(self.contexts), size=size, p=self.shares)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.int64, dict]:
        """Draw a context; `options={"context": i}` asks for one."""
        super().reset(seed=seed)
        asked = self.asked_in(options)
        self._context = int(self.draw(self.np_random)) if asked is None else asked
        return np.int64(self._context), {"context": self.asked_for([self._context])[0]}

    def step(self, action: np.ndarray) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Score the action as a sample of the current context; always terminates."""
        self._last = np.array(action, dtype=np.float32)  # a copy: `render` shows it later
        output = self.evaluate(torch.from_numpy(self._last)[None], torch.tensor([self._context]))
        info: dict[str, Any] = {key: value.item() for key, value in output.components.items()}
        info["context"] = self.contexts[self._context]
        return np.int64(self._context), output.reward.item(), True, False, info

    def render(self) -> np.ndarray | None:
        """Draw the last sample as (H, W, 3) uint8 when `render_mode` is "rgb_array": by its renderer, or by default as
        a dot at its first two coordinates within the bounds of the action space.
        """
        if self.render_mode != "rgb_array":
            return None
        if self.renderer is not None:
            image = self.pictures(torch.from_numpy(self._last)[None])[0].expand(3, -1, -1)
            return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        size, picture = 96, np.full((96, 96, 3), 255, dtype=np.uint8)
        low, high = float(self.action_space.low.min()), float(self.action_space.high.max())  # type: ignore[attr-defined]
        share = (np.resize(self._last.reshape(-1), 2) - low) / (high - low)
        x, y = (share.clip(0, 1) * (size - 3)).astype(int)
        picture[size - 3 - y : size - y, x : x + 3] = 0
        return picture


def in_range(indices: Indices, n: int) -> Indices:
    """Check that indices, in a sequence or a tensor, are of `n` contexts; -1 is not the last here.

    Raises:
        ConfigError: One is not.
    """
    odd = [i for i in torch.as_tensor(indices).flatten().tolist() if not 0 <= i < n]
    if odd:
        raise ConfigError(f"There is no context {odd[0]}: they are numbered from 0 to {n - 1}.")
    return indices


def plotted(samples: torch.Tensor) -> np.ndarray:
    """Take the first two coordinates (B, 2) of samples, to be plotted; one-dimensional ones are on the diagonal."""
    flat = samples.flatten(1).float().cpu().numpy()
    return np.stack([flat[:, 0], flat[:, min(1, flat.shape[1] - 1)]], axis=1)


def draw_contexts(
    n_contexts: int,
    n_samples: int,
    group_size: int,
    generator: torch.Generator,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw context indices (n_samples,) on the generator's device, each repeated `group_size` times.

    Without `shares` contexts are shuffled; none comes again before all have come. With `shares` (n_contexts,), positive
    float32 with sum 1 on that device, G groups are drawn by systematic sampling (Madow 1949) in random order, from a
    random start: context i gets `G shares[i]` groups, rounded up or down at random so that this is its mean, and every
    group by itself follows `shares`.
    """
    n_groups = -(-n_samples // group_size)
    device = generator.device
    if n_contexts == 1:
        return torch.zeros(n_samples, dtype=torch.long, device=device)
    if shares is None:
        rounds = [
            torch.randperm(n_contexts, generator=generator, device=device) for _ in range(-(-n_groups // n_contexts))
        ]
        drawn = torch.cat(rounds)[:n_groups]
    else:
        order = torch.randperm(n_contexts, generator=generator, device=device)
        edges = shares[order].cumsum(0)
        start = torch.rand(1, generator=generator, device=device)
        points = (start + torch.arange(n_groups, device=device) / n_groups) % 1 * edges[-1]
        drawn = order[torch.searchsorted(edges, points, right=True).clamp_max(n_contexts - 1)]
    return drawn.repeat_interleave(group_size)[:n_samples]


def check_reward(reward: Any, samples: torch.Tensor, contexts: Contexts, name: str) -> torch.Tensor:
    """Check a reward: a float32 tensor (B,) on the samples' device, or an error, never a made-up number.

    Raises:
        RewardError: Not convertible, wrong shape, NaN or infinite.
    """
    try:
        values = torch.as_tensor(reward)
        if values.is_complex():
            raise TypeError("complex numbers have no order")
        values = values.to(samples.device, torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        several = ""
        if isinstance(reward, Mapping | tuple):
            several = " Several by name are flowrl.RewardOutput(reward, {name: values})."
        raise RewardError(
            f"The reward '{name}' returned a {type(reward).__name__}, not one number per sample: {error} "
            f"(asked for {len(samples)} samples, the first of context {contexts[0]!r}).{several}"
        ) from error
    if values.shape != (len(samples),):
        raise RewardError(
            f"The reward '{name}' returned shape {tuple(values.shape)} for {len(samples)} samples; "
            f"it must return shape ({len(samples)},), one number per sample (the first of context {contexts[0]!r})."
        )
    finite = values.isfinite()
    if not bool(finite.all()):
        i = int((~finite).nonzero()[0])
        raise RewardError(
            f"The reward '{name}' is {values[i].item()} for sample {i} of {len(samples)} (context {contexts[i]!r}; "
            f"sample values {samples[i].min().item():.3g} to {samples[i].max().item():.3g}). Rewards must be "
            "finite in float32."
        )
    return values


class GenerationVecEnv(VecEnv):
    """`num_envs` copies of a `GenerationEnv` as one stable-baselines3 VecEnv, scored in one batch.

    Actions given as a torch tensor are scored where they are and rewards come back as a tensor; actions given
    as an array give arrays. Observations are arrays of context indices.
    """

    def __init__(self, env: GenerationEnv, num_envs: int) -> None:
        self.core, num_envs = env, counted("num_envs", num_envs)
        super().__init__(num_envs, env.observation_space, env.action_space)
        self._rng = np.random.default_rng()
        self._contexts = np.zeros(num_envs, dtype=np.int64)
        self._actions: Any = None

    def reset(self) -> np.ndarray:
        """Draw a context for every copy."""
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return self._draw()

    def step_async(self, actions: Any) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, Any, np.ndarray, list[dict[str, Any]]]:
        """Score the actions; every episode ends, the next contexts are drawn."""
        actions = self._actions
        is_tensor = isinstance(actions, torch.Tensor)
        samples = actions if is_tensor else torch.as_tensor(np.asarray(actions, dtype=np.float32))
        finished = self._contexts
        output = self.core.evaluate(samples, torch.from_numpy(finished)).detached()
        contexts = self._draw()
        infos = [
            {"context": self.core.contexts[i], "terminal_observation": i, "TimeLimit.truncated": False}
            for i in finished
        ]
        rewards = output.reward if is_tensor else output.reward.numpy()
        return contexts, rewards, np.ones(self.num_envs, dtype=bool), infos

    def close(self) -> None:
        """Close the environment."""
        self.core.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Get the environment's attribute, once per index."""
        return [getattr(self.core, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the (one) environment."""
        setattr(self.core, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the (one) environment once; the result is repeated per index."""
        result = getattr(self.core, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Tell that no copy is wrapped."""
        return [False] * len(list(self._get_indices(indices)))

    def _draw(self) -> np.ndarray:
        self._contexts = self.core.draw(self._rng, self.num_envs)
        return self._contexts.copy()
