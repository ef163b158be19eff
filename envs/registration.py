"""Environments by name: `register_env`, `make`, `make_vec`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch

from flowrl.checks import check_has_values, python_value
from flowrl.envs.base import GenerationEnv, GenerationVecEnv
from flowrl.envs.function_env import FunctionEnv
from flowrl.envs.prompts import PromptSet, are_none, prompts_from, shipped_sets
from flowrl.envs.vector import GenerationVectorEnv
from flowrl.errors import ConfigError
from flowrl.models.loading import EMBEDDED, SMALL, FlowSource, source_of
from flowrl.models.prior import Encoder, checked_module, generator_source, latent_shape_of
from flowrl.registry import ENVIRONMENTS, EnvSpec, check_registered_name, environment_spec

NAMES_OF_FLOWS = ("auto", "sd3", "exact")
"""Names of flows in settings that are no files, beside the shipped ones."""


def register(spec: EnvSpec) -> None:
    """Make an environment known to flowrl and to Gymnasium (as `flowrl/NAME-v0`)."""
    check_registered_name("environment", spec.name)
    ENVIRONMENTS[spec.name] = spec
    if spec.gymnasium_id not in gymnasium.registry:
        gymnasium.register(
            spec.gymnasium_id,
            entry_point="flowrl.envs.registration:make",
            vector_entry_point="flowrl.envs.registration:make_vector",
            kwargs={"name": spec.name},
            disable_env_checker=True,
        )


def make(name: str, *, render_mode: str | None = None, **settings: Any) -> GenerationEnv:
    """Make the environment of a registered name, with its settings.

    Args:
        name: "sd3-count", "mypkg.envs:my-env", or a Gymnasium id.
        render_mode: As in Gymnasium.
        **settings: Fields of the environment's config, e.g. `flow="mini-sd3"`.

    Raises:
        UnknownNameError: Unknown name or setting; names the closest.
        ConfigError: Tensors would hold no values.
    """
    check_has_values()
    spec = environment_spec(name)
    settings = anchored(settings)
    settings = {key: python_value(value) for key, value in settings.items()}
    config = spec.configured(settings)
    env = spec.factory(config)
    if render_mode is not None and render_mode not in env.metadata["render_modes"]:
        raise ConfigError(f"'{spec.name}' renders {env.metadata['render_modes']}, not '{render_mode}'.")
    env.render_mode = render_mode
    env.recommended = spec.recommended(config)
    env.origin = (spec.name, settings)
    return env


PLACES = ("flow", "prompt_file", "classifiers", "data_dir")
"""Settings that name files or folders."""
OPTIONS_OF_PLACES = ("model", "head", "clip", "file", "processor", "tokenizer")
"""Options of rewards that do."""


def anchored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write relative files and folders that are there as absolute ones: a run can then go on from any other folder."""
    found = dict(settings)
    for key in PLACES:
        if isinstance(found.get(key), str | Path):
            found[key] = _anchored(found[key])
    if isinstance(options := found.get("reward_options"), tuple | list):
        found["reward_options"] = tuple(_anchored_option(option) for option in options)
    return found


def _anchored_option(option: Any) -> Any:
    name, equals, value = str(option).partition("=")
    named = equals and name.rpartition(".")[2] in OPTIONS_OF_PLACES
    return f"{name}={_anchored(value)}" if named else option


def _anchored(place: str | Path) -> str | Path:
    """Make an existing relative path absolute; names of what is shipped, and other texts, stay as they are."""
    name = str(place)
    if not name or name in (*EMBEDDED, *NAMES_OF_FLOWS, *shipped_sets()):
        return place
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):  # no path can be like this: what reads it says so
        return place
    return type(place)(os.path.abspath(path)) if there else place


def make_vec(name: str, num_envs: int, **settings: Any) -> GenerationVecEnv:
    """Make `num_envs` copies of an environment as one batched stable-baselines3 VecEnv."""
    return GenerationVecEnv(make(name, **settings), num_envs)


def make_vector(name: str, num_envs: int, *, render_mode: str | None = None, **settings: Any) -> GenerationVectorEnv:
    """Make `num_envs` copies as a vector environment of Gymnasium, for `gymnasium.make_vec`."""
    return GenerationVectorEnv(make(name, render_mode=render_mode, **settings), num_envs)


@dataclass(frozen=True)
class CustomConfig:
    """Settings of an environment registered with `register_env`."""

    flow: str | None = None
    """Flow to fine-tune: a name, a folder, a hub name; the registered one when not given."""
    prompt_file: str = ""
    """Prompts from a file (.txt or .jsonl) or a shipped set (animals, colours, counts, spatial, words); the registered
    ones when not given."""
    held_out_share: float = 0.0
    """Share of the prompts to keep out of training, for evaluation; a file may say itself which."""


class CustomEnv(FunctionEnv):
    """A flow and any function of samples and contexts as the reward."""

    def __init__(
        self,
        flow: FlowSource,
        contexts: Sequence[Any],
        reward: Callable,
        name: str,
        low: float,
        high: float,
        held_out: Sequence[Any] = (),
        render: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__(flow, contexts, low=low, high=high, name=name, held_out=held_out)
        self.renderer = render
        self.reward_function = reward
        self.groupwise = getattr(reward, "groupwise", False)


def register_env(
    name: str,
    *,
    flow: Any = None,
    prompts: str | Path | Sequence[Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    bounds: tuple[float, float] = (-10.0, 10.0),
    recommended: Mapping[str, Any] | None = None,
    total_timesteps: int = 20_000,
    generator: Any = None,
    latent: int | tuple[int, ...] | None = None,
    encode: Encoder | None = None,
    render: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorate a reward function: it becomes an environment, for `--env NAME` and `gymnasium.make`.

    The function takes samples (B, *sample_shape) and a list of B contexts and returns (B,), or a
    `RewardOutput` with named components.

    Args:
        name: The environment's name.
        flow: A flow's name ("sd3", "mini-sd3", "gaussians"), a folder, a hub name, or a factory that returns a
            `VelocityModel` or any `torch.nn.Module` mapping `(x_t, t)` to a velocity.
        prompts: Contexts to draw from; or a prompt file or the name of a shipped set (docs/prompts.md), read when the
            environment is made; None for an unconditional flow.
        sample_shape: Needed for a factory that returns a plain module without that attribute.
        bounds: Least and greatest value of the action space; images always have (0, 1), and samples of a generator
            are images where their shape is (1 or 3, H, W) and these are the bounds.
        recommended: Algorithm settings that suit this environment.
        total_timesteps: Default length of a run, in samples.
        generator: In place of a flow, any generator of samples from standard normal latents: a `torch.nn.Module`, or a
            function that returns one, called when the environment is made. It stays as it is; the flow is that of its
            latents (`flowrl.PriorFlow`).
        latent: Dimension of the generator's latents, or their shape.
        encode: What describes contexts to a generator's flow, `B contexts -> (B, n)`; one-hot vectors when not given.
        render: Picture of samples that are no images, for grids: `samples (B, *sample_shape) -> (B, 1 or 3, H, W)` in
            [0, 1]; a scatter plot of the first two coordinates when not given.

    Raises:
        ConfigError: Both a flow and a generator are given, or neither, or they are not what they should be; or the name
            is that of an environment which ships with flowrl.
    """
    check_registered_name("environment", name)
    if name in ENVIRONMENTS and not isinstance(ENVIRONMENTS[name].config, CustomConfig):
        raise ConfigError(
            f"An environment '{name}' is there already: {ENVIRONMENTS[name].summary.rstrip('.')}. Give yours another "
            "name: runs and checkpoints find their environment by it."
        )
    _check_generator(name, flow, generator, latent, encode)
    if not isinstance(recommended, Mapping | None):
        raise ConfigError(f"recommended= of '{name}' must be settings by name, {{name: value}}, not {recommended!r}.")
    if not isinstance(prompts, str | Path | None):
        if not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts= of '{name}' must be a list of them, a file or a set, not {prompts!r}.")
        prompts = list(prompts)  # an iterator would be empty when the environment is made again

    def decorate(reward: Callable) -> Callable:
        if not callable(reward):
            raise ConfigError(
                f"register_env('{name}') decorates a reward function of samples and contexts, not {reward!r}."
            )

        def factory(config: CustomConfig) -> GenerationEnv:
            from flowrl.envs.text_to_image import TextToImageEnv

            chosen = prompts_from(config.prompt_file or ([None] if prompts is None else prompts), config.held_out_share)
            if generator is None or config.flow:
                source = source_of(config.flow or flow, sample_shape=sample_shape)
            else:
                source = _of_generator(generator, latent, chosen, encode, bounds)
            if source.is_image:
                return TextToImageEnv(source, chosen.train, reward, name=name, held_out=chosen.held_out)
            return CustomEnv(source, chosen.train, reward, name, *bounds, chosen.held_out, render)

        doc = (
            (reward.__doc__ or "").strip() or f"reward {getattr(reward, '__qualname__', type(reward).__qualname__)}"
        ).splitlines()[0]
        register(
            EnvSpec(
                name=name,
                differentiable=None,
                factory=factory,
                config=CustomConfig(),
                recommended=_recommended(flow, recommended, generator is not None),
                total_timesteps=total_timesteps,
                summary=doc,
            )
        )
        return reward

    return decorate


def _check_generator(name: str, flow: Any, generator: Any, latent: Any, encode: Any) -> None:
    """Check that an environment has a flow or a generator with its latents, before anything is made."""
    if flow is not None and generator is not None:
        raise ConfigError(f"'{name}' has both flow= and generator=: give the one whose samples are to be rewarded.")
    if flow is None and generator is None:
        raise ConfigError(f"'{name}' needs flow=, or generator= with latent=, the dimension of its latents.")
    if generator is None:
        if latent is not None or encode is not None:
            raise ConfigError(f"latent= and encode= of '{name}' go with generator=; a flow says these things itself.")
        return
    if latent is None:
        raise ConfigError(f"'{name}' needs latent=, the dimension or shape of one z that the generator takes.")
    latent_shape_of(latent)
    if not callable(generator):
        checked_module(generator)
    if encode is not None and not callable(encode):
        raise ConfigError(f"encode= of '{name}' must be a function of a list of contexts, not {encode!r}.")


def _of_generator(generator: Any, latent: Any, chosen: PromptSet, encode: Encoder | None, bounds: Any) -> FlowSource:
    if chosen.held_out and encode is None:
        raise ConfigError(
            "Prompts can only be held out where encode= describes them: one-hot vectors say nothing of new ones. Give "
            "encode=, or hold none out."
        )
    contexts = [] if are_none(chosen.train) else list(chosen.train)
    return generator_source(generator, latent, contexts, encode, bounds)


LATENTS: Mapping[str, Any] = {
    "solver": "midpoint",  # the reference within a thousandth; with as much work Euler's would shrink it by 8 %
    "rollout_steps": 8,
    "learning_rate": 1e-3,
    **{f"{kind}.solver": "euler" for kind in ("gradient", "steps", "steps-free")},  # what noisy samplers take
    **{f"{kind}.rollout_steps": 32 for kind in ("gradient", "steps", "steps-free")},
}
"""Settings for the flow of a generator's latents, a small network."""


def _recommended(
    flow: Any, own: Mapping[str, Any] | None, of_generator: bool
) -> Callable[[CustomConfig], Mapping[str, Any]]:
    def settings(config: CustomConfig) -> Mapping[str, Any]:
        from flowrl.envs.text_to_image import recommended_for

        chosen = config.flow or flow
        if chosen is None and of_generator:
            return {**LATENTS, **(own or {})}
        base = recommended_for(chosen) if isinstance(chosen, str) and chosen not in SMALL else {}
        return {**base, **(own or {})}

    return settings
