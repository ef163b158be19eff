"""Construction of an algorithm: its environment, its settings and its device, resolved and checked."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch

from flowrl.checks import check_has_values, is_whole, python_value, shown
from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv, GenerationVecEnv
from flowrl.envs.registration import make
from flowrl.errors import ConfigError, DeviceError, RewardError, UnknownNameError
from flowrl.models.compiling import default_compile, gathered_blocks
from flowrl.registry import ALGORITHMS, algorithms_with
from flowrl.training.optimizers import make_optimizer
from flowrl.training.replay import Minibatches
from flowrl.training.target import check_target
from flowrl.training.wrappers import unwrapped
from flowrl.types import Condition, has_values

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm
    from flowrl.training.method import Method
    from flowrl.training.policy import FlowPolicy


def as_generation_env(env: Any, settings: Mapping[str, Any] | None = None) -> GenerationEnv:
    """Find the environment behind a name, a (wrapped) Gymnasium environment, or a batched one."""
    if isinstance(env, str):
        return make(env, **(settings or {}))
    if settings:
        raise ConfigError("env_settings go with the name of an environment; this is an environment already.")
    core = unwrapped(env)
    if isinstance(core, GenerationVecEnv):
        return core.core
    if not isinstance(core, GenerationEnv):
        raise ConfigError(
            f"A flow algorithm trains on a GenerationEnv (or its name), not on a {type(core).__name__}; it makes "
            "batches itself, so give one environment, not several."
        )
    if not hasattr(core, "origin"):
        raise ConfigError(f"{type(core).__name__}.__init__ must call super().__init__(flow, contexts, ...).")
    return core


def configured(
    cls: type[Method], config: FlowConfig | None, recommended: Mapping[str, Any], settings: Mapping[str, Any]
) -> FlowConfig:
    """Make the config of a run: the given one, or the defaults with an environment's recommendations.

    Raises:
        UnknownNameError: An unknown setting; names the closest.
        ConfigError: Settings without meaning, or those of another algorithm.
    """
    check_config_class(cls)
    if config is not None and not isinstance(config, FlowConfig):
        raise ConfigError(
            f"config must be a {cls.Config.__name__}, not {shown(config)}; single settings go by their names, "
            f'{cls.__name__}("FlowPolicy", env, n_samples=256).'
        )
    known = check_known(cls, settings)
    if config is None:
        found = recommended_settings(cls, known, recommended)
        if cls.tilt_setting is None or cls.tilt_setting[0] in settings:
            found.pop("target_lambda", None)  # there is no coefficient for it, or that is given, and meant
        config = cls.Config(**{**found, **settings})
    elif settings:
        config = replace(config, **settings)
    config = without_given(config, settings)
    if type(config) is not cls.Config:
        raise ConfigError(f"{cls.__name__} takes a {cls.Config.__name__}, not a {type(config).__name__}.")
    return config


def check_known(cls: type[Method], given: Iterable[str]) -> list[str]:
    """Check the names of settings that are given; gives all that an algorithm has.

    Raises:
        UnknownNameError: An unknown one; names the algorithms that have it, or the closest.
    """
    known = [f.name for f in fields(cls.Config)]
    for key in given:
        if key not in known and (others := algorithms_with(key)):
            raise UnknownNameError(f"{cls.__name__} has no setting '{key}'; these have it: {', '.join(others)}.")
        if key not in known:
            raise UnknownNameError.of(f"setting of {cls.__name__}", key, known)
    return known


def check_idle(config: FlowConfig, given: Collection[str], recommended: Mapping[str, Any]) -> None:
    """Check that the settings that are given have something to do beside the others; those that are off have.

    So may be those that are as recommended: the head of a run prints them, and what it prints can be given.

    Raises:
        ConfigError: One has not; says why.
    """
    defaults = {f.name: f.default for f in fields(config)}
    usual = [(name.rpartition(".")[2], value) for name, value in recommended.items()]
    for name, reason in config.idle().items():
        value = getattr(config, name)
        if name in given and value and value != defaults[name] and (name, value) not in usual:
            raise ConfigError(f"{name} = {shown(value)} does nothing {reason}: leave it out, or change that.")


def policy_arguments(cls: type, base: type, given: Any) -> dict[str, Any]:
    """Give what a subclass of a policy takes besides the arguments of its base, which the algorithm gives.

    Raises:
        ConfigError: `policy_kwargs` is no dict of such arguments; says where networks and samplers are set.
    """
    parents = [parent for parent in cls.__mro__[: cls.__mro__.index(base)] if "__init__" in vars(parent)]
    own = {name for parent in parents for name in inspect.signature(parent).parameters}
    own -= {*inspect.signature(base).parameters, "args", "kwargs"}
    if not isinstance(given, dict) or not given.keys() <= own:
        takes = f"{cls.__name__} takes {', '.join(sorted(own)) or 'none'}"
        raise ConfigError(
            f"policy_kwargs must be a dict of arguments that a policy of your own takes ({takes}), not {shown(given)}. "
            "The network is that of the environment's flow (flow=); how it samples, adapters and precision are "
            "settings of the algorithm, such as rollout_steps=16 or lora_rank=8."
        )
    return given


def check_config_class(cls: type[Method]) -> None:
    """Check that the settings of an algorithm are a dataclass of their own.

    Raises:
        ConfigError: They are none, and would be no settings for the constructor and the command line.
    """
    kind = cls.Config
    decorated = "@dataclass(frozen=True), with a type for each setting (share: float = 0.5)"
    if not (isinstance(kind, type) and issubclass(kind, FlowConfig)):
        raise ConfigError(f"{cls.__name__}.Config must derive from flowrl.FlowConfig and be decorated by {decorated}.")
    if "__dataclass_fields__" not in vars(kind) and inspect.get_annotations(kind):
        raise ConfigError(f"{kind.__name__}, the settings of {cls.__name__}, must be decorated by {decorated}.")


def check_set_up(model: FlowAlgorithm) -> None:
    """Check that an algorithm's own `_setup_model` has called that of its base.

    Raises:
        ConfigError: It has not.
    """
    if not hasattr(model, "buffer"):
        name = type(model).__name__
        raise ConfigError(
            f"{name}._setup_model must call super()._setup_model(): it makes policy, buffer and optimizer."
        )


def without_given(config: FlowConfig, given: Collection[str]) -> FlowConfig:
    """Leave out of `fit_memory` what was given: it is taken as it is. `accumulation` goes with `batch_size`."""
    fixed = {*given, *(("batch_size",) if "accumulation" in given else ())}
    left = tuple(name for name in config.fit_memory if name not in fixed)
    return config if left == config.fit_memory else replace(config, fit_memory=left)


def recommended_settings(cls: type[Method], known: Collection[str], recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the recommendations that are for an algorithm, of its `known` settings.

    A key is a setting, `KIND.setting` for a kind of algorithm, or `NAME.setting` for one; the later win. A kind `a.b`
    is one of kind `a`, and what is for `a` is for it too.
    """
    found: dict[str, Any] = {}
    kinds = itertools.accumulate(f"{part}." for part in cls.kind.split("."))
    for prefix in ("", *kinds, f"{cls.name}."):
        keys = [key for key in recommended if key.startswith(prefix) and key.removeprefix(prefix) in known]
        found |= {key.removeprefix(prefix): recommended[key] for key in keys}
    return found


def without_gradient(algorithm: str, env: GenerationEnv) -> str:
    """Say that an algorithm needs a gradient that the reward of an environment has not."""
    return (
        f"'{algorithm}' needs the gradient of the reward by the samples, and the reward of '{env.name}' has none. "
        "Take an environment whose reward is differentiable (`python -m flowrl.run` lists which are), or an algorithm "
        f"that needs values only: {', '.join(by_values())}."
    )


def by_values() -> list[str]:
    """Name the algorithms that come with flowrl and need no gradient of the reward."""
    shipped = {name: cls for name, cls in ALGORITHMS.items() if cls.__module__.startswith("flowrl.")}
    return sorted(name for name, cls in shipped.items() if not getattr(cls, "needs_gradient", False))


def check_gradient(algo: FlowAlgorithm | type[FlowAlgorithm], env: GenerationEnv, device: torch.device | str) -> None:
    """Check that the reward has the gradient that an algorithm needs, on two samples of one colour.

    Raises:
        ConfigError: It has none; says what it would take.
    """
    if not algo.needs_gradient:
        return
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whatever it is made under
            samples = torch.full((2, *env.flow.sample_shape), 0.5, device=device, requires_grad=True)
            if not has_values(samples):  # a prediction of memory asks no reward
                return
            reward = env.evaluate(samples, torch.zeros(2, dtype=torch.long, device=device)).reward
    except RewardError as error:
        if "requires grad" in str(error):  # as torch says of a tensor that is to become an array
            raise ConfigError(without_gradient(algo.name, env)) from error
        return  # training asks again, on samples of its own
    if not reward.requires_grad:
        raise ConfigError(without_gradient(algo.name, env))


def sampling_config(env: GenerationEnv) -> FlowConfig:
    """Make the config of a policy that no algorithm trains: what the environment recommends to all."""
    known = [f.name for f in fields(FlowConfig)]
    return FlowConfig(**{name: value for name, value in env.recommended.items() if name in known})


def weight_dtypes(config: FlowConfig) -> tuple[torch.dtype, torch.dtype]:
    """Choose the types of the network's weights and of the frozen parts: weights that are trained stay in float32."""
    dtype = getattr(torch, config.precision)
    return (dtype if config.lora_rank else torch.float32), dtype


def check_run(env: GenerationEnv, config: FlowConfig, n_ranks: int, given: Collection[str] = ()) -> None:
    """Check settings, of which some were `given`, against the environment and the number of processes.

    Raises:
        ConfigError: They do not go together; names the setting.
    """
    config.check_itself()
    check_idle(config, given, env.recommended)
    config.check_ranks(n_ranks)
    if env.groupwise:
        check_groups(config.group_size, (config.rollout_batch_size or config.n_samples) // n_ranks)
    check_reward_errors(config.on_reward_error, config.reward_timeout, env, n_ranks)


def check_groups(group_size: int, chunk: int) -> None:
    """Check that samples rewarded at once are whole groups, for rewards that compare within groups.

    Raises:
        ConfigError: They are not.
    """
    if group_size < 2 or chunk % group_size != 0:
        raise ConfigError(
            "This reward compares samples of the same context: group_size must be 2 or more and divide "
            f"rollout_batch_size (or n_samples, where that is 0); not group_size = {group_size} with {chunk} samples "
            "scored at once."
        )


def on_device(condition: Condition, device: torch.device) -> Condition:
    """Move a condition to a device, wherever a flow of one's own makes it."""
    return tuple(part.to(device) for part in condition)


def check_noise(x_0: torch.Tensor, n: int, latent_shape: tuple[int, ...]) -> None:
    """Check that noise has a row for each of `n` contexts.

    Raises:
        ConfigError: It has not: other rows would be drawn for contexts that they are not of.
    """
    if x_0.shape != (n, *latent_shape):
        shape = (n, *latent_shape)
        raise ConfigError(f"x_0 must be noise of shape {shape}, a row for each context, not {tuple(x_0.shape)}.")


def checked_seed(seed: Any, device: torch.device | str) -> int | None:
    """Give the seed as a Python number, where the device is there, too.

    Raises:
        DeviceError: Unknown or absent.
        ConfigError: No generator takes the seed.
    """
    check_device(device)
    seed = python_value(seed)
    if seed is not None and not is_whole(seed, 0, 2**32 - 1):
        raise ConfigError(f"seed must be a whole number from 0 to {2**32 - 1}, not {shown(seed)}.")
    return seed


def fresh_seed() -> int:
    """Draw a seed where none is given, as torch's own generator has it: `torch.manual_seed` before decides it."""
    seed = torch.randint(2**31, (), device="cpu")
    return int(seed) if has_values(seed) else 0


def check_trainable(policy: FlowPolicy) -> None:
    """Check that gradients are not switched off.

    Raises:
        ConfigError: They are; says by what.
    """
    if not torch.is_grad_enabled():
        raise ConfigError(
            "learn takes gradients, which are switched off here: call it outside torch.no_grad() and "
            "torch.inference_mode(), and not after torch.set_grad_enabled(False)."
        )
    if any(parameter.is_inference() for parameter in policy.parameters_of("current").values()):
        raise ConfigError("An algorithm that is made under torch.inference_mode() cannot learn: make it outside.")


def check_device(device: torch.device | str) -> None:
    """Raise a clear error for a device that is not there, and for defaults of torch's that do not serve.

    Raises:
        DeviceError: Unknown or absent.
        ConfigError: Tensors would not be float32, or hold no values.
    """
    check_has_values()
    if torch.get_default_dtype() != torch.float32:
        raise ConfigError(
            f"flowrl computes in float32, or as its setting precision says; torch's default type is "
            f"{torch.get_default_dtype()}: call torch.set_default_dtype(torch.float32) before."
        )
    if str(device) == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu"] + [d for d in ("cuda", "mps") if getattr(torch, d).is_available()]
        raise DeviceError(
            f"Device '{device}' is not available here ({str(error).splitlines()[0]}). "
            f"Available: {', '.join(available)}."
        ) from error


def check_sharded(algo: str, unpredictable: str, optimizer: str) -> None:
    """Check that an algorithm can train with sharded weights (FSDP).

    Raises:
        ConfigError: It cannot.
    """
    if unpredictable:
        raise ConfigError(
            f"With FSDP every process must make the same forward passes, but the work of '{algo}' depends on the "
            f"samples ({unpredictable}): use DDP (docs/scaling.md)."
        )
    if optimizer != "adamw":
        raise ConfigError(f"FSDP divides the moments of optimizer adamw, not those of {optimizer}.")


def check_reward_errors(on_error: str, timeout: float, env: GenerationEnv, n_ranks: int) -> None:
    """Check that samples can be left out, and a reward that hangs left behind.

    Raises:
        ConfigError: The reward compares samples; or has running statistics, which those of other processes would miss,
            or which a question that was left behind could still change.
    """
    if timeout and env.extra_state():
        raise ConfigError("A reward with running statistics cannot be left behind: set reward_timeout to 0.")
    if on_error == "drop" and env.groupwise:
        raise ConfigError("on_reward_error 'drop' cannot tell which of the samples that are compared failed: 'retry'.")
    if on_error != "raise" and n_ranks > 1 and env.extra_state():
        raise ConfigError("Running statistics of a reward over several processes need on_reward_error 'raise'.")


def prepare_training(model: FlowAlgorithm) -> None:
    """Make the optimizer, compile what is to be compiled, and join the network with those of the other ranks."""
    config, policy, ranks = model.config, model.policy, model.ranks
    networks = policy.networks
    check_target(model)
    policy.optimizer = make_optimizer(config, policy.parameters_of("current").values())
    if config.compile == "auto":
        networks.compile(default_compile(networks.model.network, model.device))
    if ranks.is_sharded:
        check_sharded(model.name, model.unpredictable, config.optimizer)
    network = policy.model.network
    trained = ranks.prepare(network, policy.optimizer, networks.copies.values(), gathered_blocks(network))
    networks.train_through(trained, ranks.is_sharded)
    policy.graphs.generators = [policy.generator, model.generator]
    policy.graphs.is_on &= ranks.world_size == 1
    model.replay = Minibatches(policy)


def keep_freed_memory() -> None:
    """Make the C library keep what tensors free, instead of giving it back to the system and asking for it again.

    glibc keeps twice the largest block that it has mapped and freed so far. Without one larger than the activations of
    a small network, thousands of page faults an iteration cost up to a tenth of its time.
    """
    torch.empty(2**24, dtype=torch.uint8)
