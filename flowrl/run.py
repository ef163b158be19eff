"""Train: `python -m flowrl.run --algo orw_w2 --env sd3-aesthetic`."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import tyro
from stable_baselines3.common.logger import Logger

import flowrl
from flowrl import runfolder
from flowrl.algorithm import FlowAlgorithm
from flowrl.callbacks import KeepCheckpoints, PictureCallback, StopOnSignal
from flowrl.checkpoint import algorithm_name, checkpoint_folder, load_checkpoint
from flowrl.checks import check_types
from flowrl.config import FlowConfig
from flowrl.construction import check_device
from flowrl.envs.base import GenerationEnv
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.envs.rewards.mixture import make_rewards
from flowrl.errors import CheckpointError, ConfigError, FlowRLError, OutOfMemoryError, RankError
from flowrl.evaluation import evaluate
from flowrl.files import read_json
from flowrl.memory import is_out_of_memory, ways_to_save
from flowrl.ranks import is_launched, is_lost, join, place_in_job
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, EnvSpec, algorithm_class, environment_spec, named_by_a_file
from flowrl.report import save_before_after, write_report

PROGRAM = "python -m flowrl.run"
EXIT_ERROR, EXIT_STOPPED = 2, 3


@dataclass(frozen=True)
class RunConfig:
    """What to train, how long, and where the files go."""

    algo: str = ""
    """Algorithm: a name from the list below, or module:Class."""
    env: str = ""
    """Environment: a name from the list below, or module:name (the module registers it)."""
    total_timesteps: int | None = None
    """Samples to train on; the environment's own number when not given."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    deterministic: bool = False
    """Only operations that give the same numbers every time; slower on a GPU, where some have none."""
    out: Path = Path("runs")
    """Folder that run folders go into."""
    name: str = ""
    """Name of the run folder; made from environment, algorithm and seed when not given."""
    resume: Path | None = None
    """Run folder to go on with, exactly where it stopped."""
    dry_run: bool = False
    """Print the plan (samples, gradient steps, parameters, memory, files) and exit."""
    log_every: int = 1
    """Iterations between two rows of the metrics."""
    picture_every: int = 10
    """Iterations between two pictures of samples."""
    checkpoint_every: int = 10
    """Iterations between two checkpoints."""
    eval_samples: int = 512
    """Samples of the final evaluation, of the trained flow and of the reference each."""
    eval_rewards: tuple[str, ...] = ()
    """Rewards that training does not see, for the final evaluation: a warning when they fall while the trained one
    rises."""
    eval_reward_options: tuple[str, ...] = ()
    """Options of those rewards, each as REWARD.OPTION=VALUE."""
    progress: bool = True
    """Show a progress bar with the time left (on a terminal only)."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))  # a resumed run's come from a file
        for key in ("log_every", "picture_every", "checkpoint_every", "eval_samples"):
            FlowConfig.require(getattr(self, key) > 0, f"--{key.replace('_', '-')} must be positive.")


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit code (0 done, 2 an error the message explains, 3 stopped by a signal).

    Of several processes the main one prints and writes files.
    """
    args = sys.argv[1:] if args is None else args
    if not args:
        print(f"Train a flow on a reward.\n\nusage: {PROGRAM} --algo ALGORITHM --env ENVIRONMENT [options]")
        print(f"       {PROGRAM} --help                 all options\n")
        print(names())
        print(f"\nFor example: {PROGRAM} --algo orw_w2 --env sd3-aesthetic")
        return 0
    warnings.filterwarnings("ignore", message=".*rich is experimental.*")
    try:
        return _main(args)
    except FlowRLError as error:
        print(f"error{place_in_job()}: {error}", file=sys.stderr, flush=True)
        if is_launched():
            sys.stdout.flush()
            os._exit(EXIT_ERROR)  # a tidy end would wait for the other processes, or abort
        return EXIT_ERROR


def _main(args: list[str]) -> int:
    """Two passes: the first finds algorithm and environment, the second parses their own settings."""
    run, _ = tyro.cli(RunConfig, args=args, prog=PROGRAM, add_help=False, return_unknown_args=True)
    if run.resume is not None:
        return _resume(args, run.resume)
    wants_help = bool({"-h", "--help"} & set(args))
    if not wants_help and not (run.algo and run.env):
        missing = " and ".join(f"--{key}" for key in ("algo", "env") if not getattr(run, key))
        raise ConfigError(f"{missing} must be given.\n\n{names()}")
    algo = algorithm_class(run.algo) if run.algo else None
    spec = environment_spec(run.env) if run.env else None
    if algo is not None and not issubclass(algo, FlowAlgorithm):
        raise ConfigError(f"'{run.algo}' is no FlowAlgorithm: an algorithm derives from flowrl.FlowAlgorithm.")
    run, algo_config, env_config = _parse(args, algo, spec)
    assert algo is not None
    assert spec is not None
    assert algo_config is not None
    ranks = join(run.device)
    algo_config.check_ranks(ranks.count)
    with ranks.main_first():  # what a reward fetches from the hub
        env = _make_env(spec, env_config)
    if run.dry_run:
        check_device(run.device)
        if ranks.is_main:
            folder = run.out / _name(run, algo)
            print(runfolder.plan(folder, algo, algo_config, env, _timesteps(run, spec), ranks.count))
        return 0
    _set_deterministic(run)
    model = algo("FlowPolicy", env, config=algo_config, seed=run.seed, device=run.device)
    folder = Path(ranks.same(str(runfolder.create(run.out, _name(run, algo), env.name) if ranks.is_main else "")))
    return _train(model, folder, run, _timesteps(run, spec))


def _parse(
    args: list[str], algo: type[FlowAlgorithm] | None, spec: EnvSpec | None
) -> tuple[RunConfig, FlowConfig | None, Any]:
    """The second pass: a class with a group of options per chosen part, defaults as this environment recommends."""
    parts: list[Any] = [("run", tyro.conf.OmitArgPrefixes[RunConfig])]
    if spec is not None:
        parts.append(("env", type(spec.config), field(default=spec.config)))
    if algo is not None:
        default = algo.Config()
        if spec is not None:  # the recommendations depend on the environment's own settings
            reduced = dataclasses.make_dataclass("Reduced", parts, frozen=True)
            known: Any = tyro.cli(reduced, args=args, prog=PROGRAM, add_help=False, return_unknown_args=True)[0]
            default = algo.configure(recommended=spec.recommended(known.env))
        parts.append(("algo", algo.Config, field(default=default)))
    whole = dataclasses.make_dataclass("Run", parts, frozen=True)
    whole.__doc__ = f"Train a flow on a reward.\n\n{names()}"
    parsed: Any = tyro.cli(whole, args=args, prog=PROGRAM)
    return parsed.run, getattr(parsed, "algo", None), getattr(parsed, "env", None)


def _make_env(spec: EnvSpec, config: Any) -> GenerationEnv:
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(config)}
    return flowrl.make(spec.name, **{key: value for key, value in given.items() if value != defaults[key]})


def _set_deterministic(run: RunConfig) -> None:
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first call
        torch.use_deterministic_algorithms(True)


def _name(run: RunConfig, algo: type[FlowAlgorithm]) -> str:
    return run.name or f"{run.env.rpartition(':')[2]}-{algorithm_name(algo).rpartition(':')[2]}-seed{run.seed}"


def _timesteps(run: RunConfig, spec: EnvSpec) -> int:
    return spec.total_timesteps if run.total_timesteps is None else run.total_timesteps


def _resume(args: list[str], folder: Path) -> int:
    """Go on with a run: its own settings, unless they are given again."""
    checkpoint = checkpoint_folder(folder)
    stored = read_json(folder / "config.json").get("run")
    if not isinstance(stored, dict):
        raise CheckpointError(f"'{folder}' is no run folder: its config.json does not say how it was run.")
    kept: dict[str, Any] = {f.name: stored[f.name] for f in fields(RunConfig) if f.name in stored and f.name in KEPT}
    kept |= {key: tuple(value) for key, value in kept.items() if isinstance(value, list)}
    before = RunConfig(**kept)
    run = tyro.cli(RunConfig, args=args, prog=PROGRAM, default=before)
    cls: Any = algorithm_class(run.algo) if run.algo else FlowAlgorithm
    spec = environment_spec(run.env) if run.env else None
    total = run.total_timesteps
    if not isinstance(total, int):
        raise CheckpointError(f"The config.json of '{folder}' does not say how long to train: add --total-timesteps N.")
    _set_deterministic(run)
    model = load_checkpoint(cls, checkpoint, env=None if spec is None else spec.name, device=run.device)
    say = print if model.ranks.is_main else lambda text: None
    say(f"going on at {model.num_timesteps} of {total} samples, from {checkpoint}")
    if run.dry_run:
        say("\n".join([*model.env.core.describe(), f"files: {folder}", "dry run: nothing was written"]))
        return 0
    if model.num_timesteps >= total and _is_finished(folder, total):
        say(f"'{folder}' has been trained on {model.num_timesteps} of {total} samples: nothing left to do.")
        say("To train it longer, add --total-timesteps N.")
        return 0
    if run.eval_rewards == before.eval_rewards:  # not given again: the file names them
        with named_by_a_file(f"'{folder / 'config.json'}'", "name its rewards again with --eval-rewards"):
            make_rewards(run.eval_rewards, run.eval_reward_options)
    return _train(model, folder, run, total)


def _is_finished(folder: Path, total: int) -> bool:
    """Whether the final weights and their evaluation are there, of a run of this length."""
    final = folder / "final" / "state.json"
    if not (final.exists() and (folder / "evaluation.json").exists()):
        return False
    return read_json(final).get("num_timesteps", 0) >= total


KEPT = (
    "total_timesteps",
    "deterministic",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "eval_samples",
    "eval_rewards",
    "eval_reward_options",
    "progress",
)
"""What a resumed run takes over from before."""


def _write_config(folder: Path, model: FlowAlgorithm, run: RunConfig, total: int) -> None:
    kept = {**{key: getattr(run, key) for key in KEPT}, "total_timesteps": total}
    runfolder.write_config(folder, model, {"run": kept})


def _train(model: FlowAlgorithm, folder: Path, run: RunConfig, total: int) -> int:
    """Train and evaluate in a run folder that no other process writes into."""
    with runfolder.alone_in(folder) if model.ranks.is_main else nullcontext():
        if model.ranks.is_main:
            _write_config(folder, model, run, total)
        return _learn(model, folder, run, total)


def _learn(model: FlowAlgorithm, folder: Path, run: RunConfig, total: int) -> int:
    held_out = make_rewards(run.eval_rewards, run.eval_reward_options)  # what is missing is said before training
    is_main = model.ranks.is_main
    if is_main:
        print(runfolder.header(model, folder, total), flush=True)
        for outdated in ("evaluation.json", "report.html"):
            (folder / outdated).unlink(missing_ok=True)
    model.set_logger(runfolder.logger(folder, model.num_timesteps) if is_main else Logger(None, []))
    checkpoints = KeepCheckpoints(folder / "checkpoints", run.checkpoint_every)
    pictures = PictureCallback(folder / "samples", run.picture_every)
    with StopOnSignal() as stop:
        try:
            model.learn(
                max(0, total - model.num_timesteps),
                callback=[pictures, checkpoints, stop],
                log_interval=run.log_every,
                reset_num_timesteps=False,
                progress_bar=run.progress and sys.stdout.isatty(),
            )
        except Exception as error:
            explained = _explained(error, model)
            if explained is None:
                raise
            what = f"What was computed is in {folder}; {_resume_hint(folder)}"
            raise type(explained)(f"{explained}\n{what}") from error
    if model.ranks.any(stop.received is not None):
        checkpoints.write()
        if is_main:
            print(f"stopped at {model.num_timesteps} of {total} samples; {_resume_hint(folder)}", flush=True)
        model.ranks.leave()
        return EXIT_STOPPED
    try:
        return _finish(model, folder, run.eval_samples, held_out)
    except OSError as error:
        if isinstance(error, FlowRLError):
            raise
        raise runfolder.cannot_write(folder, error, _resume_hint(folder)) from error


def _explained(error: Exception, model: FlowAlgorithm) -> FlowRLError | None:
    """The error that says what a user can do about one in training; None where there is nothing to say."""
    if is_out_of_memory(error):
        ways = "\n".join(f"  {way}" for way in ways_to_save(model.config))
        return OutOfMemoryError(
            f"{model.device} has no memory left ({str(error).splitlines()[0]}). Lower what the run needs, in this "
            f"order; --dry-run predicts how much that is:\n{ways}"
        )
    if isinstance(error, FlowRLError):
        return error
    if is_lost(error):
        return RankError(
            "Another process of this job ended or cannot be reached any more; its own message says why "
            f"({str(error).splitlines()[0]})."
        )
    return None


def _finish(model: FlowAlgorithm, folder: Path, eval_samples: int, held_out: Mapping[str, RewardFunction]) -> int:
    """Final weights, evaluation, report."""
    model.save(folder / "final")
    if model.ranks.is_main:
        if model.policy.lora is None and not model.ranks.is_sharded:  # `flowrl.export` writes those
            model.policy.export(folder / "final")
        print("evaluating ...", flush=True)
    result = evaluate(model, eval_samples, eval_rewards=held_out)
    model.ranks.leave()
    if not model.ranks.is_main:
        return 0
    runfolder.write_evaluation(folder, result)
    save_before_after(result, model.env.core, folder / "before_after.png")
    report = write_report(folder, result)
    print(f"{result.table()}\n\nreport: {report}")
    return 0


def _resume_hint(folder: Path) -> str:
    try:
        checkpoint_folder(folder)
    except CheckpointError:
        return "there is no checkpoint yet, so it cannot be resumed."
    return f"go on with: {PROGRAM} --resume {folder}"


def names() -> str:
    """The lists of algorithms and environments, a line each."""
    lines = ["algorithms:"]
    for name, cls in ALGORITHMS.items():
        lines.append(f"  {name:20s} {(cls.__doc__ or '').strip().splitlines()[0]}")
    lines.append("environments:")
    for name, spec in ENVIRONMENTS.items():
        lines.append(f"  {name:20s} {spec.summary}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
