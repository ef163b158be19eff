"""Settings that fit a run into the free memory of a device: chosen by the memory plan, before weights are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.utils import get_device

from flowrl.config import FITTED, FlowConfig
from flowrl.distributed.ranks import Ranks
from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError, OutOfMemoryError
from flowrl.models.base import VelocityModel
from flowrl.registry import ENVIRONMENTS
from flowrl.training.construction import check_run
from flowrl.training.memory_plan import (
    MemoryPlan,
    has_working_copies,
    predict_memory,
    ways_to_save,
)
from flowrl.types import Switch

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm

SHARE = 0.85
"""Of the free memory, what tensors may take: the plan is right within 15 %, and knows no networks of a reward."""
LOWERED_BY = {
    "drawing samples": ("rollout_batch_size",),
    "decoding samples": ("decode_batch", "rollout_batch_size"),
    "training": ("gradient_checkpointing", "batch_size"),
}
"""Phases of a plan that take place on the device, and what lowers their memory, in this order."""
NOTHING = 0.05
"""Share of the free memory that working copies may take without a plan being made for them."""
GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """Settings of a run, and what they were chosen by.

    Attributes:
        config: The algorithm's settings, with nothing left to choose where a choice was made.
        env: The environment, with the number of samples that are decoded at once.
        lines: What was decided and why, in words; none where there was nothing to decide.
        plan: The memory that is predicted, where that was asked.
    """

    config: FlowConfig
    env: GenerationEnv
    lines: tuple[str, ...] = ()
    plan: MemoryPlan | None = None


def free_memory(device: torch.device | str) -> int | None:
    """Give the bytes that tensors can still take on a CUDA device; None for other devices, where nothing is chosen."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def has_choice(config: FlowConfig) -> bool:
    """Tell whether settings leave anything to the memory that is free."""
    return bool(config.fit_memory) or (config.working_copies == "auto" and has_working_copies(config))


def fitted(
    cls: type[FlowAlgorithm],
    config: FlowConfig,
    env: GenerationEnv,
    device: torch.device | str,
    ranks: Ranks,
    n_ranks: int | None = None,
) -> Fit:
    """Choose by the memory that is free on a device now, the least of all ranks; elsewhere settings stay as they are.

    `n_ranks`: processes that will share the work, where they are not those of `ranks`.

    Raises:
        OutOfMemoryError: Nothing that may be chosen fits.
    """
    device = ranks.device or get_device(device)
    free = free_memory(device) if has_choice(config) else None
    if free is None or ranks.is_sharded:
        why = "with sharded weights (FSDP)" if ranks.is_sharded else f"on {device.type}"
        said = f"memory: settings as they are; {why} none are chosen by the memory that is free (--algo.fit-memory)"
        return Fit(config, env, (said,) if config.fit_memory else ())
    if ranks.world_size > 1:  # before anything is decided: every rank must decide the same
        everyones = ranks.all_gather(torch.tensor([free], device=ranks.device), ranks.world_size)
        free = int(everyones.min())
    if not config.fit_memory and _copies_at_most(env) <= NOTHING * free:
        return Fit(config, env)
    return fit(cls, config, env, free, n_ranks or ranks.world_size, str(device))


def _copies_at_most(env: GenerationEnv) -> int:
    """Bound the bytes of working copies: the network in float32, of the three roles that have weights of their own."""
    return 3 * 4 * sum(parameter.numel() for parameter in env.flow.skeleton().network.parameters())


def fit(
    cls: type[FlowAlgorithm],
    config: FlowConfig,
    env: GenerationEnv,
    free: int,
    n_ranks: int = 1,
    device: str = "the device",
) -> Fit:
    """Choose working copies and the settings in `fit_memory` for so many free bytes on each device.

    Values begin with those of the config, gradient checkpointing with none. As long as a phase of the plan needs more
    than its share of the free memory, what lowers that phase is lowered; where nothing is left to lower, working copies
    are left out, and all begins again.

    Raises:
        OutOfMemoryError: Nothing fits; says what was tried, by how much it is too much, and what to lower.
    """
    search = _Search(cls, config, env, n_ranks, int(SHARE * free))
    budget = f"{free / GIB:.1f} GiB free on {device}, of which {100 * SHARE:.0f} % are to be filled at most"
    choices: tuple[Switch, ...] = ("on", "off") if config.working_copies == "auto" else (config.working_copies,)
    found: _Tried | None = None
    for copies in choices:
        try:
            found = search.lowered(copies, to_the_end=copies == choices[-1])
        except Exception as error:  # if it is no matter of the plan, it comes again where the flow is loaded
            return _unplanned(config, env, f"{type(error).__name__}: {error}")
        if found.plan.missing:
            return _unplanned(config, env, found.plan.missing)
        if not found.excess or not found.plan.parts["copies to compute with"]:
            break
    assert found is not None
    if found.excess and search.wanted:
        raise _nothing_fits(found, search, budget)
    phases = found.plan.phases
    needs = ", ".join(f"{phase} {phases[phase] / GIB:.1f}" for phase in LOWERED_BY if phase in phases)
    lines = (
        f"memory: {budget}; predicted, GiB: {needs}",
        f"chosen by that: {found.described(search)}",
        *(["warning: that is more than that share; it was given, and is tried"] if found.excess else []),
    )
    return Fit(replace(found.config, fit_memory=()), search.recorded(found), lines, found.plan)


def _unplanned(config: FlowConfig, env: GenerationEnv, why: str) -> Fit:
    """Leave all settings as they are where memory cannot be predicted."""
    first = why.splitlines()[0][:200]
    copies: Switch = "on" if config.working_copies == "auto" else config.working_copies
    said = f"memory: settings as they are, working copies {copies}; what they need could not be predicted ({first})"
    return Fit(replace(config, fit_memory=(), working_copies=copies), env, (said,))


@dataclass(frozen=True)
class _Tried:
    """Settings that were tried, with their plan and the bytes by which phases exceed what they may take."""

    config: FlowConfig
    decode_batch: int | None
    plan: MemoryPlan
    excess: dict[str, int]

    def described(self, search: _Search) -> str:
        """Say in words what was chosen."""
        config, wanted = self.config, search.wanted
        copies = self.plan.parts["copies to compute with"]
        size = f" ({copies / GIB:.1f} GiB)" if copies else ""
        said = {
            "gradient_checkpointing": f"{'' if config.gradient_checkpointing else 'no '}gradient checkpointing",
            "batch_size": f"minibatches of {config.batch_size}, {config.accumulation} of them a gradient step",
            "rollout_batch_size": f"{config.rollout_batch_size or config.n_samples} samples drawn at once",
            "decode_batch": f"{self.decode_batch} decoded at once",
        }
        parts = [said[name] for name in said if name in wanted]
        return ", ".join([*parts, f"working copies {config.working_copies}{size}"])


class _Search:
    """The way from the largest settings to those that fit.

    Args:
        cls: The algorithm.
        config: Its settings.
        env: The environment.
        n_ranks: Processes that share every batch.
        budget: Bytes that a phase may take on one device.
    """

    def __init__(
        self, cls: type[FlowAlgorithm], config: FlowConfig, env: GenerationEnv, n_ranks: int, budget: int
    ) -> None:
        self.cls, self.config, self.env, self.n_ranks, self.budget = cls, config, env, n_ranks, budget
        self.wanted = {name for name in config.fit_memory if name != "decode_batch" or _chooses_decoding(env)}
        self.n_plans = 0

    def lowered(self, copies: Switch, to_the_end: bool) -> _Tried:
        """Lower settings until the plan fits, or nothing is left to lower: the last that was tried.

        `to_the_end`: when nothing is left to lower of a phase that does not fit, go on with the others.
        """
        config = replace(self.config, working_copies=copies)
        if "gradient_checkpointing" in self.wanted:
            config = replace(config, gradient_checkpointing=False)
        decode = self._most_decoded() if "decode_batch" in self.wanted else None
        ways = self._ways(config, decode)
        while True:
            tried = self._tried(config, decode)
            if sum(tried.plan.parts.values()) > self.budget and not to_the_end:
                return tried  # weights alone are too much
            changes: dict[str, Any] = {}
            for phase in tried.excess:
                step = next((s for name in LOWERED_BY[phase] if (s := next(ways[name], None))), None)
                if step is None and not to_the_end:
                    return tried
                changes |= step or {}
            if not changes or tried.plan.missing:
                return tried
            decode = changes.pop("decode_batch", decode)
            config = replace(config, **changes)

    def _ways(self, config: FlowConfig, decode: int | None) -> dict[str, Iterator[dict[str, Any]]]:
        """Give the further values of each setting, from the largest to the smallest that has a meaning."""
        chunk = config.rollout_batch_size or config.n_samples
        effective = config.batch_size * config.accumulation
        values: dict[str, list[dict[str, Any]]] = {
            "gradient_checkpointing": [{"gradient_checkpointing": True}],
            "batch_size": [{"batch_size": n, "accumulation": effective // n} for n in _halves(config.batch_size)],
            "rollout_batch_size": [{"rollout_batch_size": n} for n in _halves(chunk)],
            "decode_batch": [{"decode_batch": n} for n in _halves(decode or 1)],
        }
        return {name: self._meaningful(config, steps if name in self.wanted else []) for name, steps in values.items()}

    def _meaningful(self, config: FlowConfig, steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Go over the steps that the algorithm, the network and the ranks can take."""
        return (step for step in steps if self._has_meaning(config, step))

    def _has_meaning(self, config: FlowConfig, step: dict[str, Any]) -> bool:
        """Tell whether settings are of the same training, and the algorithm, the network and the ranks take them."""
        changes = {name: value for name, value in step.items() if name != "decode_batch"}
        try:
            changed = replace(config, **changes)
            if changed.batch_size * changed.accumulation != config.batch_size * config.accumulation:
                return False
            check_run(self.env, changed, self.n_ranks)
            if changes.get("gradient_checkpointing"):
                self.env.flow.skeleton().checkpoint_gradients()
        except ConfigError:
            return False
        return changed.updates_per_iteration() == config.updates_per_iteration()

    def _tried(self, config: FlowConfig, decode: int | None) -> _Tried:
        env = self.env if decode is None else decoding(self.env, decode)
        plan = predict_memory(self.cls, config.of_one_rank(self.n_ranks), env)
        self.n_plans += 1
        over = {phase: plan.phases.get(phase, 0) - self.budget for phase in LOWERED_BY}
        return _Tried(config, decode, plan, {phase: excess for phase, excess in over.items() if excess > 0})

    def _most_decoded(self) -> int:
        """Compute how many samples, or frames, are decoded at once if all that are drawn together may be."""
        shape = self.env.flow.sample_shape
        frames = shape[0] if self.env.flow.frame_rate and len(shape) == 4 else 1
        chunk = -(-(self.config.rollout_batch_size or self.config.n_samples) // self.n_ranks)
        most: Any = self.env.flow.skeleton().decode_batch
        return min(chunk * frames, int(most))

    def recorded(self, found: _Tried) -> GenerationEnv:
        """Give the environment that decodes so many at once, and says so in its settings."""
        return self.env if found.decode_batch is None else decoding(self.env, found.decode_batch)


def _halves(n: int) -> list[int]:
    """Halve a number down to 1: what comes after it, whole numbers that divide it."""
    found = []
    while n > 1:
        n = n // 2 if n % 2 == 0 else 1
        found.append(n)
    return found


def _chooses_decoding(env: GenerationEnv) -> bool:
    """Tell whether a number to decode at once can be chosen, and kept: it is a setting that was not given."""
    if env.origin is None or env.origin[0] not in ENVIRONMENTS:
        return False
    known = {field.name for field in fields(ENVIRONMENTS[env.origin[0]].config)}
    return "decode_batch" in known - env.origin[1].keys() and hasattr(env.flow.skeleton(), "decode_batch")


def decoding(env: GenerationEnv, n: int) -> GenerationEnv:
    """Give the same environment, whose flow decodes `n` samples at once and whose settings say so."""

    def limited(load: Callable[..., VelocityModel]) -> Callable[..., VelocityModel]:
        def loaded(*dtypes: torch.dtype) -> VelocityModel:
            model: Any = load(*dtypes)
            model.decode_batch = n
            return model

        return loaded

    assert env.origin is not None
    limited_env = copy.copy(env)
    limited_env.flow = replace(env.flow, load=limited(env.flow.load), imitation=limited(env.flow.imitation))
    limited_env.origin = (env.origin[0], {**env.origin[1], "decode_batch": n})
    return limited_env


def _nothing_fits(tried: _Tried, search: _Search, budget: str) -> OutOfMemoryError:
    excess = ", ".join(
        f"{phase} needs {tried.plan.phases[phase] / GIB:.2f} GiB, {more / GIB:.2f} too much"
        for phase, more in tried.excess.items()
    )
    given = [name for name in FITTED if name not in search.wanted]
    ways = "\n".join(f"  {way}" for way in ways_to_save(tried.config))
    return OutOfMemoryError(
        f"No settings were found that fit into memory: {budget}. {search.n_plans} were tried, the last of them with "
        f"{tried.described(search)}: {excess}."
        f"{' Left as given: ' + ', '.join(given) + '.' if given else ''} Lower what the run needs, in this order, or "
        f"take settings as they are with --algo.fit-memory (and no names behind it):\n{ways}"
    )
