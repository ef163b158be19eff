"""The command line of `flowrl.run`: its options, and those of the algorithm and the environment it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from flowrl.checks import check_types
from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv
from flowrl.envs.registration import make
from flowrl.errors import CheckpointError, ConfigError
from flowrl.registry import ALGORITHMS, ENVIRONMENTS, EnvSpec, algorithm_class, algorithms_with, environment_spec
from flowrl.runs.folder import imported_algorithm
from flowrl.runs.program import Device, OwnModules
from flowrl.storage.files import read_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.construction import check_idle, check_known, without_given
from flowrl.training.loading import check_description, pinned_settings, tupled
from flowrl.training.saving import algorithm_name

PROGRAM = "python -m flowrl.run"


@dataclass(frozen=True)
class RunConfig:
    """Options of a run: what to train, how long, and where the files go."""

    algo: str = ""
    """Algorithm: a name from the list below, or module:Class."""
    env: str = ""
    """Environment: a name from the list below, or module:name (the module registers it)."""
    total_timesteps: int | None = None
    """Samples to train on; the environment's own number when not given."""
    seed: int = 0
    """Seed of everything random."""
    device: Device = "auto"
    modules: OwnModules = ()
    deterministic: bool = False
    """Only operations that give the same numbers every time; slower on a GPU, where some have none."""
    out: Path = Path("runs")
    """Folder that run folders go into."""
    name: str = ""
    """Name of the run folder; made from environment, algorithm and seed when not given."""
    config: Path | None = None
    """Run folder, or a config.json of one, to run again from the start: what is not given here is as it was there."""
    resume: Path | None = None
    """Run folder to go on with, exactly where it stopped."""
    dry_run: bool = False
    """Print the plan (samples, gradient steps, parameters, memory, files) and exit."""
    log_every: int = 1
    """Iterations between two rows of the metrics."""
    picture_every: int | None = None
    """Iterations between two pictures of samples, and between two scores by --eval-rewards. When not given, 10, and
    pictures between the first and the last are left out where they would take more than a twentieth of the time."""
    checkpoint_every: int = 10
    """Iterations between two checkpoints; 0 for none by iterations."""
    checkpoint_minutes: float = 0
    """Minutes after the last checkpoint until there is another, too; 0 for none by time."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    keep_best: bool = True
    """Keep, besides, the checkpoint whose iteration had the highest mean reward; checkpoints/best links to it."""
    checkpoint_background: bool = True
    """Write checkpoints while training goes on; takes a copy of the training state in host memory."""
    eval_samples: int = 512
    """Samples of the final evaluation, of the trained flow and of the reference each."""
    eval_rewards: tuple[str, ...] = ()
    """Rewards that training does not see, for curves and the final evaluation: a warning when they fall while the
    trained one rises."""
    eval_reward_options: tuple[str, ...] = ()
    """Options of those rewards, each as REWARD.OPTION=VALUE."""
    wandb: str = ""
    """Project of Weights & Biases, NAME or TEAM/NAME, that metrics, pictures and config.json also go to. Not kept: a
    resumed run needs it again."""
    progress: bool = True
    """Show a progress bar with the time left (on a terminal only)."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))  # a resumed run's come from a file
        for key in ("log_every", "picture_every", "keep_checkpoints", "eval_samples"):
            value = getattr(self, key)
            FlowConfig.require(value is None or value > 0, f"--{key.replace('_', '-')} must be positive.")
        FlowConfig.require(0 <= self.seed < 2**32, f"--seed must be from 0 to {2**32 - 1}, not {self.seed}.")
        plain = self.name != ".." and self.name in ("", Path(self.name).name)
        FlowConfig.require(plain, f"--name is that of a folder in --out, not a path: not {self.name!r}.")
        for key in ("total_timesteps", "checkpoint_every", "checkpoint_minutes"):
            value = getattr(self, key)
            FlowConfig.require(value is None or value >= 0, f"--{key.replace('_', '-')} must not be negative.")
        FlowConfig.require(
            self.checkpoint_every + self.checkpoint_minutes > 0,
            "--checkpoint-every and --checkpoint-minutes cannot both be 0: a run without checkpoints can be lost.",
        )


@dataclass(frozen=True)
class Description:
    """An earlier run as its config.json describes it: the defaults of one that is to be the same.

    Attributes:
        run: Its options, with `algo` and `env`.
        algorithm: Settings of the algorithm.
        environment: Settings of the environment.
    """

    run: RunConfig
    algorithm: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Description:
        """Read a run folder, or a `config.json`.

        Raises:
            ConfigError: There is none, it is damaged, or it names code that would have to be imported.
        """
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise ConfigError(f"--config: there is no '{file}'. Name a run folder, or the config.json of one.")
        try:
            stored = read_json(file)
            check_description(stored, file)
        except CheckpointError as error:
            raise ConfigError(f"--config: {error}") from error
        environment = stored.get("environment")
        if environment is None or not isinstance(stored.get("run"), dict):
            raise ConfigError(f"--config: '{file}' does not come from a run of {PROGRAM}.")
        algo, env = stored["algorithm"], environment["name"]
        if (algo not in ALGORITHMS and imported_algorithm(algo) is None) or env not in ENVIRONMENTS:
            raise ConfigError(
                f"--config: '{file}' is of '{algo}' on '{env}', of which one is not registered here. Code named by a "
                "file is never imported: name its module yourself (--modules NAME, --algo module:Class or --env "
                "module:name)."
            )
        run = replace(kept_options(stored["run"]), algo=algo, env=env, seed=stored.get("seed") or 0)
        if isinstance(stored.get("device"), str):
            run = replace(run, device=stored["device"])
        settings = pinned_settings(env, environment["settings"], stored) or {}
        return cls(run, tupled(stored["settings"]), tupled(settings))


def kept_options(stored: Mapping[str, Any]) -> RunConfig:
    """Take the options of a run from its config.json.

    Raises:
        ConfigError: They are of types that no run wrote.
    """
    return RunConfig(**{name: value for name, value in tupled(stored).items() if name in KEPT})


def first_pass(args: list[str]) -> tuple[RunConfig, Description | None]:
    """Parse the options that say to which algorithm and environment the others belong."""
    run, _ = tyro.cli(RunConfig, args=args, prog=PROGRAM, add_help=False, return_unknown_args=True)
    if run.config is None:
        return run, None
    given = {
        "algo": algorithm_name(algorithm_class(run.algo)) if run.algo else "",
        "env": environment_spec(run.env).name if run.env else "",
    }
    before = Description.read(run.config)
    for option, name in given.items():
        if name not in ("", getattr(before.run, option)):
            raise ConfigError(
                f"--config is of a run with --{option} {getattr(before.run, option)}: its settings mean nothing for "
                f"--{option} {name}. Leave out one of the two."
            )
    return replace(run, algo=before.run.algo, env=before.run.env), before


def second_pass(
    args: list[str], algo: type[FlowAlgorithm] | None, spec: EnvSpec | None, before: Description | None
) -> tuple[RunConfig, FlowConfig | None, Any]:
    """Parse all options, a group for each part chosen.

    Defaults are those of the run before, or what the environment recommends.
    """
    default_run = RunConfig() if before is None else before.run
    parts: list[Any] = [("run", tyro.conf.OmitArgPrefixes[RunConfig], field(default=default_run))]
    if spec is not None:
        default_env = spec.config if before is None else spec.configured(before.environment)
        parts.append(("env", type(spec.config), field(default=default_env)))
    if algo is not None:
        default = algo.Config()
        if before is not None:
            try:
                default = algo.configure(algo.Config(), settings=before.algorithm)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"The settings in --config do not fit {algo.__name__}: {str(error).rstrip('.')}."
                ) from error
        elif spec is not None:  # the recommendations depend on the environment's own settings
            env = spec.config
            if given_settings(args, ("--env.",)):
                reduced = dataclasses.make_dataclass("Reduced", parts, frozen=True)
                known: Any = tyro.cli(reduced, args=args, prog=PROGRAM, add_help=False, return_unknown_args=True)[0]
                env = known.env
            default = algo.configure(recommended=spec.recommended(env))
        parts.append(("algo", algo.Config, field(default=default)))
        other = given_settings(args, ("--algo.",)) - {f.name for f in dataclasses.fields(algo.Config)}
        check_known(algo, sorted(name for name in other if algorithms_with(name)))
    whole = dataclasses.make_dataclass("Run", parts, frozen=True)
    whole.__doc__ = f"Train a flow on a reward.\n\n{names()}"
    parsed: Any = tyro.cli(whole, args=args, prog=PROGRAM, config=(tyro.conf.HelptextFromCommentsOff,))
    config = getattr(parsed, "algo", None)
    if algo is not None and config is not None:
        of_algo = given_settings(args, ("--algo.",))
        config = without_given(meant(algo, config, of_algo), given_settings(args))
        check_idle(config, of_algo, vars(default))
    return parsed.run, config, getattr(parsed, "env", None)


def given_settings(args: list[str], parts: tuple[str, ...] = ("--algo.", "--env.")) -> set[str]:
    """Collect the names of the settings that arguments give, of algorithm and environment or of one of them."""
    options = [arg.partition("=")[0] for arg in args if arg.startswith(parts)]
    names = {option.partition(".")[2].replace("-", "_") for option in options}
    return names | {name.removeprefix("no_") for name in names}


def meant(algo: type[FlowAlgorithm], config: FlowConfig, given: Collection[str]) -> FlowConfig:
    """Leave out a `target_lambda` that is not among the `given` settings where the one that it would set is."""
    setting = algo.tilt_setting
    if setting is None or setting[0] not in given or "target_lambda" in given:
        return config
    return replace(config, target_lambda=0.0)


def make_env(spec: EnvSpec, config: Any) -> GenerationEnv:
    """Make the environment with these settings."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: getattr(spec.config, f.name) for f in dataclasses.fields(config)}
    return make(spec.name, **{key: value for key, value in given.items() if value != defaults[key]})


KEPT = (
    "total_timesteps",
    "deterministic",
    "log_every",
    "picture_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best",
    "checkpoint_background",
    "eval_samples",
    "eval_rewards",
    "eval_reward_options",
    "progress",
)
"""Options that a resumed run takes over."""


def require_names(run: RunConfig) -> None:
    """Raise ConfigError where the algorithm or the environment is missing."""
    if not (run.algo and run.env):
        missing = " and ".join(f"--{key}" for key in ("algo", "env") if not getattr(run, key))
        raise ConfigError(f"{missing} must be given.\n\n{names()}")


def names() -> str:
    """List algorithms and environments, a line each."""
    lines = ["algorithms:"]
    lines += [f"  {name:20s} {ALGORITHMS.summary(name)}".rstrip() for name in ALGORITHMS]
    lines += ["", "environments:"]  # without an empty line `--help` joins the two
    for name, spec in ENVIRONMENTS.items():
        lines.append(f"  {name:20s} {spec.summary}" + (" [differentiable]" if spec.differentiable else ""))
    return "\n".join(lines)
