"""Train: `python -m flowrl.run --algo orw_w2 --env sd3-aesthetic`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import tyro
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import get_device

from flowrl.distributed.ranks import is_lost, join
from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.envs.rewards.mixture import make_rewards, modules_of
from flowrl.errors import CheckpointError, ConfigError, FlowRLError, RankError, in_a_line, out_of_memory
from flowrl.evaluation.measure import check_eval_samples, evaluate
from flowrl.registry import EnvSpec, algorithm_class, environment_spec, named_by_a_file
from flowrl.runs.callbacks import HeldOutCallback, KeepCheckpoints, PictureCallback, StopOnSignal
from flowrl.runs.commandline import (
    KEPT,
    PROGRAM,
    RunConfig,
    first_pass,
    kept_options,
    make_env,
    names,
    require_names,
    second_pass,
)
from flowrl.runs.folder import (
    algorithm_of,
    alone_in,
    as_word,
    create_run_folder,
    environment_of,
    nearest,
    tell_edits,
    write_config,
    write_evaluation,
    writing_to,
)
from flowrl.runs.logs import logger, say, telling_warnings
from flowrl.runs.media import save_sounds
from flowrl.runs.pictures import save_before_after
from flowrl.runs.plan import dry_run, head_of
from flowrl.runs.program import EXIT_STOPPED, guarded
from flowrl.runs.wandb_writer import WandbWriter, imported
from flowrl.storage.files import clear_away, read_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.construction import check_device, check_gradient
from flowrl.training.loading import checkpoint_folder, load_checkpoint
from flowrl.training.memory_plan import ways_to_save
from flowrl.training.saving import algorithm_name


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code (0 done, 2 an error the message explains, 3 stopped by a signal).

    Of several processes the main one prints and writes files.
    """
    return guarded(_main, args, divides=True)


def _main(args: list[str]) -> int:
    """Parse in two passes: the first finds algorithm and environment, the second parses their own settings."""
    if not args:
        print(f"Train a flow on a reward.\n\nusage: {PROGRAM} --algo ALGORITHM --env ENVIRONMENT [options]")
        print(f"       {PROGRAM} --help                 all options\n")
        print(names())
        print(f"\nFor example: {PROGRAM} --algo orw_w2 --env sd3-aesthetic")
        return 0
    run, before = first_pass(args)
    if run.resume is not None:
        if before is not None:
            raise ConfigError("--config starts a run anew and --resume goes on with one: leave out one of the two.")
        return _resume(args, run.resume)
    if not {"-h", "--help"} & set(args):
        require_names(run)
    algo = algorithm_class(run.algo) if run.algo else None
    spec = environment_spec(run.env) if run.env else None
    if algo is not None and not issubclass(algo, FlowAlgorithm):
        raise ConfigError(f"'{run.algo}' is no FlowAlgorithm: an algorithm derives from flowrl.FlowAlgorithm.")
    run, algo_config, env_config = second_pass(args, algo, spec, before)
    assert algo is not None
    assert spec is not None
    assert algo_config is not None
    ranks = join(run.device)
    algo_config.check_ranks(ranks.world_size)
    from_file = nullcontext() if before is None else named_by_a_file("--config", "add --modules NAME if you trust it")
    with ranks.main_first():  # what a reward fetches from the hub
        with from_file:
            env = make_env(spec, env_config)
        held_out = _held_out(run, args, None if before is None else "--config")
    check_eval_samples(run.eval_samples, (env, *held_out.values()))
    if run.wandb:
        imported()  # or nothing is made
    if run.dry_run:
        check_device(run.device)
        check_gradient(algo, env, get_device(run.device))
        if ranks.is_main:
            folder = run.out / _name(run, algo)
            print(dry_run(folder, algo, algo_config, env, _timesteps(run, spec), ranks.world_size, run.device))
        return 0
    _set_deterministic(run)
    model = algo("FlowPolicy", env, config=algo_config, seed=run.seed, device=run.device)
    folder = Path(ranks.broadcast(str(create_run_folder(run.out, _name(run, algo)) if ranks.is_main else "")))
    return _train(model, folder, run, _timesteps(run, spec), held_out)


def _held_out(run: RunConfig, args: list[str], file: str | None) -> dict[str, RewardFunction]:
    """Make the rewards that training does not see; where they are not among `args`, a file names them."""
    if file is None or "--eval-rewards" in _options(args):
        return make_rewards(run.eval_rewards, run.eval_reward_options)
    with named_by_a_file(file, "name its rewards again with --eval-rewards, or their module with --modules"):
        return make_rewards(run.eval_rewards, run.eval_reward_options)


def _options(args: list[str]) -> set[str]:
    """Name the options among arguments."""
    return {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}


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
    if idle := {"--seed", "--name", "--out"} & _options(args):
        raise ConfigError(
            f"{', '.join(sorted(idle))} does nothing beside --resume: a run goes on in its own folder, with its own "
            f"random states. The same again from the start, with another seed: --config {as_word(folder)} --seed 1."
        )
    checkpoint = checkpoint_folder(folder)
    if others := sorted(name for name in _options(args) if name.startswith(("--algo.", "--env."))):
        raise ConfigError(
            f"{', '.join(others)}: a run goes on with the settings that it began with, so that its curves are of one "
            f"training. With others, in Python: cls.load('{folder}', learning_rate=1e-4).learn(N). "
            f"The same from the start with others: --config {as_word(folder)} {others[0]} ..."
        )
    stored = read_json(folder / "config.json").get("run")
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"'{folder}' is no run folder: its config.json does not say how it was run. A run goes on from its newest "
            f"checkpoint; to train on from a checkpoint, load it in Python: cls.load('{folder}').learn(N)."
        )
    before = kept_options(stored)
    run = tyro.cli(RunConfig, args=args, prog=PROGRAM, default=before)
    cls = algorithm_of(checkpoint, run.algo)
    spec = environment_spec(run.env) if run.env else None
    if spec is not None and spec.name != (own := environment_of(checkpoint) or spec.name):
        raise ConfigError(
            f"'{folder}' is a run on '{own}': it goes on with that, so that its curves are of one reward. To train its "
            f"flow on '{spec.name}', load it in Python: cls.load('{folder}', env='{spec.name}')."
        )
    total = run.total_timesteps
    if not isinstance(total, int):
        raise CheckpointError(f"The config.json of '{folder}' does not say how long to train: add --total-timesteps N.")
    _set_deterministic(run)
    model = load_checkpoint(cls, checkpoint, env=None if spec is None else spec.name, device=run.device)
    tell = say if model.ranks.is_main else lambda text: None
    if model.ranks.is_main:
        tell_edits(folder, model)
    tell(f"going on at {model.num_timesteps} of {total} samples, from {checkpoint}")
    if run.dry_run:
        tell("\n".join([*model.env.core.describe(), f"files: {folder}", "dry run: nothing was written"]))
        return 0
    if model.num_timesteps >= total and _is_finished(folder, total):
        tell(f"'{folder}' has been trained on {model.num_timesteps} of {total} samples: nothing left to do.")
        tell("To train it longer, add --total-timesteps N.")
        return 0
    held_out = _held_out(run, args, f"'{folder / 'config.json'}'")
    check_eval_samples(run.eval_samples, (model.env.core, *held_out.values()))
    return _train(model, folder, run, total, held_out)


def _is_finished(folder: Path, total: int) -> bool:
    """Tell whether the final weights, their evaluation and the report are there, of a run of this length."""
    final = folder / "final" / "state.json"
    if not all(file.exists() for file in (final, folder / "evaluation.json", folder / "report.html")):
        return False
    trained = read_json(final).get("num_timesteps", 0)
    return trained >= total and read_json(folder / "evaluation.json").get("trained_samples") in (None, trained)


def _write_config(folder: Path, model: FlowAlgorithm, run: RunConfig, total: int) -> None:
    kept = {**{key: getattr(run, key) for key in KEPT}, "total_timesteps": total}
    write_config(folder, model, {"run": kept})


Judges = Mapping[str, RewardFunction]


def _train(model: FlowAlgorithm, folder: Path, run: RunConfig, total: int, held_out: Judges) -> int:
    """Train and evaluate in a run folder that no other process writes into."""
    folder = folder.absolute()  # a reward may leave the current folder for another
    with alone_in(folder) if model.ranks.is_main else nullcontext():
        with _telling(folder, run):
            if model.ranks.is_main:
                clear_away(folder)
                _write_config(folder, model, run, total)
            _begin(model, folder, run, total)
        return _learn(model, folder, run, total, held_out)


def _telling(folder: Path, run: RunConfig) -> AbstractContextManager[None]:
    """Say how to go on where a run folder takes no files: full, read-only."""

    def hint() -> str:
        text = _resume_hint(folder, run)
        return f"{text[0].upper()}{text[1:]}"

    return writing_to(nearest(folder), hint)


def _learn(model: FlowAlgorithm, folder: Path, run: RunConfig, total: int, held_out: Judges) -> int:
    checkpoints = _checkpoints(folder / "checkpoints", run)
    pictures = PictureCallback(folder / "samples", run.picture_every)
    shown = [pictures, HeldOutCallback(held_out, run.picture_every or PictureCallback.USUAL)]
    with StopOnSignal() as stop, telling_warnings(folder if model.ranks.is_main else None), closing(model.logger):
        try:
            model.learn(
                max(0, total - model.num_timesteps),
                callback=[*shown, checkpoints, stop],
                log_interval=run.log_every,
                reset_num_timesteps=False,
                progress_bar=run.progress and sys.stdout.isatty(),
            )
        except Exception as error:
            checkpoints.wait()
            explained = _explained(error, model)
            if explained is None:
                raise
            what = f"What was computed is in {nearest(folder)}; {_resume_hint(folder, run)}"
            raise type(explained)(f"{explained}\n{what}") from error
    if model.ranks.any(stop.received is not None):
        kept = "" if checkpoints.write() else "this state is not kept; "
        if model.ranks.is_main:
            say(f"stopped at {model.num_timesteps} of {total} samples; {kept}{_resume_hint(folder, run)}")
        model.ranks.leave()
        return EXIT_STOPPED
    checkpoints.wait()
    with _telling(folder, run):
        return _finish(model, folder, run, held_out)


def _begin(model: FlowAlgorithm, folder: Path, run: RunConfig, total: int) -> None:
    """Say what begins, remove the results of a shorter run, and set the logger."""
    if not model.ranks.is_main:
        model.set_logger(Logger(None, []))
        return
    others = [WandbWriter(run.wandb, folder, read_json(folder / "config.json"))] if run.wandb else []
    say(head_of(model, nearest(folder), total))
    model.set_logger(logger(folder, model.num_timesteps, *others))
    for outdated in ("evaluation.json", "report.html", "before_after.png", "sounds/contexts.json"):
        (folder / outdated).unlink(missing_ok=True)


def _checkpoints(folder: Path, run: RunConfig) -> KeepCheckpoints:
    return KeepCheckpoints(
        folder,
        run.checkpoint_every,
        run.checkpoint_minutes,
        run.keep_checkpoints,
        run.keep_best,
        run.checkpoint_background,
    )


def _explained(error: Exception, model: FlowAlgorithm) -> FlowRLError | None:
    """Make the error that says what a user can do about one in training; None where there is nothing to say."""
    if isinstance(error, FlowRLError):
        return error
    ways = "\n".join(f"  {way}" for way in ways_to_save(model.config))
    lower = f"Lower what the run needs, in this order; --dry-run predicts how much that is:\n{ways}"
    if (explained := out_of_memory(error, lower)) is not None:
        return explained
    if is_lost(error):
        return RankError(
            "Another process of this job ended or cannot be reached any more; its own message says why "
            f"({in_a_line(error)})."
        )
    return None


def _finish(model: FlowAlgorithm, folder: Path, run: RunConfig, held_out: Judges) -> int:
    """Write the final weights, their evaluation and the report."""
    final = folder / "final"
    with _adding(f"The final weights are not kept; {_resume_hint(folder, run)}"):
        model.save(final)
        if model.ranks.is_main and model.policy.lora is None and not model.ranks.is_sharded:
            model.policy.networks.export(final, model.policy.sampling_role)  # `flowrl.export` writes the others
    if model.ranks.is_main:
        say("evaluating ...")
    with _adding(f"The final weights are in {nearest(final)}, not evaluated; {_resume_hint(folder, run)}"):
        shown = run.progress and model.ranks.is_main
        result = evaluate(model, n_samples=run.eval_samples, eval_rewards=held_out, progress=shown)
    model.ranks.leave()
    if not model.ranks.is_main:
        return 0
    say(result.table())
    write_evaluation(folder, result)
    try:
        save_before_after(result, model.env.core, folder / "before_after.png")
        save_sounds(result, model.env.core, folder / "sounds")
    except ConfigError as error:
        say(f"warning: {error} The report has no samples of before and after.")
    from flowrl.pages.run_page import write_report

    report = write_report(folder)
    say(f"\nreport: {nearest(report)}")
    return 0


@contextmanager
def _adding(what: str) -> Iterator[None]:
    """Say in an error of flowrl's own, and where memory ended, what it leaves behind, too."""
    try:
        yield
    except Exception as error:
        explained = error if isinstance(error, FlowRLError) else out_of_memory(error)
        if explained is None:
            raise
        raise type(explained)(f"{explained}\n{what}") from error


def _resume_hint(folder: Path, run: RunConfig) -> str:
    """Say how to go on; the user's own code must be named again."""
    try:
        checkpoint_folder(folder)
    except CheckpointError:
        return "there is no checkpoint yet, so it cannot be resumed."
    own = [
        word for option in ("algo", "env") if ":" in (name := getattr(run, option)) for word in (f"--{option}", name)
    ]
    rewards = list(run.eval_rewards)
    with suppress(CheckpointError):  # a run folder that has gone
        settings = (read_json(folder / "config.json").get("environment") or {}).get("settings", {})
        rewards.append(str(settings.get("reward", "")))
    modules = dict.fromkeys([*run.modules, *(module for text in rewards for module in modules_of(text))])
    own += ["--modules", *modules] if modules else []
    return f"go on with: {PROGRAM} --resume {as_word(folder)} {shlex.join(own)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
