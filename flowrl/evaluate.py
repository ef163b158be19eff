"""Evaluate a run: `python -m flowrl.evaluate runs/NAME`; or steer a flow that is not trained at all.

The module can also be called, `flowrl.evaluate(model)`: it then is the function `flowrl.evaluation.measure.evaluate`.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import tyro

from flowrl.config import FlowConfig
from flowrl.distributed.ranks import join
from flowrl.envs.base import GenerationEnv
from flowrl.envs.registration import make
from flowrl.envs.rewards.mixture import make_rewards
from flowrl.errors import CheckpointError, ConfigError
from flowrl.evaluation.measure import evaluate
from flowrl.evaluation.results import EvaluationResult
from flowrl.evaluation.steering import Steering
from flowrl.functional.solver_steps import Solver
from flowrl.pages.run_page import write_report
from flowrl.registry import environment_spec
from flowrl.runs.folder import environment_of, load_model, nearest, write_evaluation, writing_to
from flowrl.runs.media import save_sounds
from flowrl.runs.pictures import save_before_after
from flowrl.runs.program import AlgorithmOfRun, Device, OwnModules, run_program
from flowrl.storage.files import read_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import followed
from flowrl.training.policy import FlowPolicy
from flowrl.training.saving import algorithm_name

PROGRAM = "python -m flowrl.evaluate"


@dataclass(frozen=True)
class EvaluateConfig:
    """Reward, diversity and drift of a trained flow beside its reference, at the same noise."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder, or a checkpoint folder. Without one, --steer works on the untrained flow of --env."""
    n_samples: int = 1024
    """Samples of each flow."""
    prompts: str = "train"
    """Prompts to evaluate on: train, held_out (those that training never drew), a prompt file, or a shipped set."""
    seed: int = 0
    """Seed of noise and contexts."""
    steps: int | None = None
    """Solver steps; as in training when not given."""
    solver: Solver | None = None
    """ODE solver; as in training when not given."""
    guidance_scale: float | None = None
    """Classifier-free guidance; as in training when not given."""
    batch_size: int | None = None
    """Samples drawn at once; as many as a rollout of the run, 256 at most, when not given."""
    eval_rewards: tuple[str, ...] = ()
    """Rewards that training did not see, to score both flows with; warns when they fall while the trained one rises."""
    reward_options: tuple[str, ...] = ()
    """Options of those rewards, each as REWARD.OPTION=VALUE."""
    device: Device = "auto"
    modules: OwnModules = ()
    algo: AlgorithmOfRun = ""
    env: str = ""
    """Environment of a run trained on an environment that --modules does not bring: module:name; or, without a run, any
    environment."""
    steer: Literal["none", "best_of_n", "smc", "rbf", "d_flow"] = "none"
    """Choose samples by their reward: the best of n; sequential Monte Carlo with n particles (smc); up to n proposals
    for each step of the noisy sampler, until one is better (rbf); or n gradient steps on the noise (d_flow)."""
    steer_n: int = 8
    """Candidates or particles per sample, proposals per step (rbf), or gradient steps (d_flow)."""
    steer_temperature: float = 1.0
    """Temperature lambda of smc, whose samples follow q exp(r / lambda), and of d_flow, which weighs r / lambda against
    how likely the noise is."""
    steer_step_size: float = 0.1
    """Size of the gradient steps of d_flow."""

    def __post_init__(self) -> None:
        for key in ("n_samples", "steps", "batch_size"):
            value = getattr(self, key)
            FlowConfig.require(value is None or value > 0, f"--{key.replace('_', '-')} must be positive, not {value}.")
        for f in fields(self):
            idle = self.steer == "none" and f.name.startswith("steer_") and getattr(self, f.name) != f.default
            FlowConfig.require(not idle, f"--{f.name.replace('_', '-')} goes with --steer, which says how to steer.")
        FlowConfig.require(0 <= self.seed < 2**62, f"--seed must be in [0, 2^62), not {self.seed}.")
        scale = self.guidance_scale
        FlowConfig.require(scale is None or math.isfinite(scale), f"--guidance-scale must be finite, not {scale}.")


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code."""
    return run_program(PROGRAM, EvaluateConfig, _evaluate, args, divides=True)


def _evaluate(config: EvaluateConfig) -> int:
    config = config if config.run is None else replace(config, run=followed(config.run))
    model, env = _subject(config)
    folder = None if config.run is None else config.run.absolute()  # a reward may leave the current folder for another
    is_trained = isinstance(model, FlowAlgorithm)
    core = model.env.core if isinstance(model, FlowAlgorithm) else env
    assert core is not None
    name, ranks = algorithm_name(type(model)) if is_trained else "none", join(config.device)
    tell = print if ranks.is_main else lambda *lines, **_: None  # the main process alone prints and writes
    tell(f"algorithm: {name}", f"environment: {core.name}", *core.describe(), sep="\n")
    steering = None
    if config.steer != "none":
        steering = Steering(config.steer, config.steer_n, config.steer_temperature, step_size=config.steer_step_size)
        tell(f"steering: {config.steer} with n = {config.steer_n}; its samples stand under 'trained'")
    result = evaluate(
        model,
        env,
        n_samples=config.n_samples,
        prompts=os.path.abspath(config.prompts) if Path(config.prompts).is_file() else config.prompts,
        seed=config.seed,
        batch_size=config.batch_size,
        steering=steering,
        eval_rewards=make_rewards(config.eval_rewards, config.reward_options),
        steps=config.steps,
        solver=config.solver,
        guidance_scale=config.guidance_scale,
        progress=ranks.is_main,
    )
    ranks.leave()
    if not ranks.is_main:
        return 0
    print(result.table())
    if folder is None or steering is not None:
        print(f"network evaluations per sample: {result.evaluations_per_sample:g}")
    elif config.env and environment_spec(config.env).name != (own := environment_of(folder)) != "":
        print(f"\nnot written: the run is of '{own}', and its report stays of that")
    else:
        with writing_to(nearest(folder), lambda: "The figures are those above."):
            written = _write(folder, core, result)
        print(f"\nwritten: {', '.join(str(nearest(path)) for path in written)}")
    return 0


def _write(folder: Path, env: GenerationEnv, result: EvaluationResult) -> list[Path]:
    """Write figures, picture and report; those of other prompts or of another sampler into files of their own."""
    tag = _tag(folder, result)
    files = [write_evaluation(folder, result, tag), folder / f"before_after{tag}.png"]
    save_before_after(result, env, files[1])
    files += save_sounds(result, env, folder / f"sounds{tag}")
    if (folder / "metrics.csv").exists():
        files.append(write_report(folder, tag))
    return files


def _tag(folder: Path, result: EvaluationResult) -> str:
    """Choose the end of the files' names: with a number where an evaluation of another file of that name stands."""
    sampler = "".join(f"-{name.replace('_', '-')}-{value}" for name, value in result.sampling.items())
    if result.prompts == "train":
        return sampler
    tags = (f"-{Path(result.prompts).name.replace('.', '-')}{number}{sampler}" for number in _numbers())
    return next(tag for tag in tags if _may_write(folder / f"evaluation{tag}.json", result.prompts))


def _numbers() -> Iterator[str]:
    yield ""
    yield from (f"-{number}" for number in itertools.count(2))


def _may_write(path: Path, prompts: str) -> bool:
    """Tell whether there is no evaluation yet, one of the same prompts, or a damaged one."""
    try:
        return not path.exists() or read_json(path).get("prompts") in (prompts, os.path.relpath(prompts))
    except CheckpointError:
        return True


def _subject(config: EvaluateConfig) -> tuple[FlowAlgorithm | FlowPolicy, GenerationEnv | None]:
    """Load the trained algorithm of a run; without a run, the flow of an environment that no algorithm trains."""
    if config.run is not None:
        return load_model(config.run, config.algo, config.env, config.device), None
    if config.algo:
        raise ConfigError(f"--algo {config.algo} is the algorithm of a run: name its folder, or leave --algo out.")
    if not config.env or config.steer == "none":
        raise ConfigError(
            "Nothing to evaluate: name a run folder (flowrl.evaluate runs/NAME), or steer the untrained flow of an "
            "environment (flowrl.evaluate --steer best_of_n --env gaussians-linear)."
        )
    env = make(environment_spec(config.env).name)
    return FlowPolicy.of(env, device=config.device, seed=config.seed), env


class _CallableModule(ModuleType):
    """Importing this submodule would otherwise hide the function of the same name in `flowrl`."""

    __call__ = staticmethod(evaluate)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
