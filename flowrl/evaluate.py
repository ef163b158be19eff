"""Evaluate a run: `python -m flowrl.evaluate runs/NAME`.

The module can also be called, `flowrl.evaluate(model)`: it then is the function `flowrl.evaluation.evaluate`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from flowrl import evaluation, runfolder
from flowrl.algorithm import FlowAlgorithm
from flowrl.checkpoint import algorithm_name, load_checkpoint
from flowrl.errors import FlowRLError
from flowrl.registry import algorithm_class, environment_spec
from flowrl.report import save_before_after, write_report
from flowrl.sampler import Solver

PROGRAM = "python -m flowrl.evaluate"


@dataclass(frozen=True)
class EvaluateConfig:
    """Reward, diversity and drift of a trained flow beside its reference, at the same noise."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a checkpoint folder."""
    n_samples: int = 1024
    """Samples of each flow."""
    seed: int = 0
    """Seed of noise and contexts."""
    steps: int | None = None
    """Solver steps; as in training when not given."""
    solver: Solver | None = None
    """ODE solver; as in training when not given."""
    guidance_scale: float | None = None
    """Classifier-free guidance; as in training when not given."""
    device: str = "auto"
    """Where to compute."""
    algo: str = ""
    """Algorithm of a run trained with a third-party class: module:Class."""
    env: str = ""
    """Environment of a run trained on a third-party environment: module:name."""


def main(args: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    config = tyro.cli(EvaluateConfig, args=args, prog=PROGRAM)
    try:
        cls: Any = algorithm_class(config.algo) if config.algo else FlowAlgorithm
        env = environment_spec(config.env).name if config.env else None
        model = load_checkpoint(cls, config.run, env=env, device=config.device)
        print(
            "\n".join(
                [
                    f"algorithm: {algorithm_name(type(model))}",
                    f"environment: {model.env.core.name}",
                    *model.env.core.describe(),
                ]
            )
        )
        sampling = {key: getattr(config, key) for key in ("steps", "solver", "guidance_scale")}
        result = evaluation.evaluate(model, config.n_samples, seed=config.seed, **sampling)
        print(result.table())
        runfolder.write_evaluation(config.run, result)
        picture = config.run / "before_after.png"
        save_before_after(result, model.env.core, picture)
        print(f"\nwritten: {config.run / 'evaluation.json'}, {picture}", end="")
        print(f", {write_report(config.run, result)}" if (config.run / "metrics.csv").exists() else "")
    except FlowRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _CallableModule(ModuleType):
    """Importing this submodule would otherwise hide the function of the same name in `flowrl`."""

    __call__ = staticmethod(evaluation.evaluate)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
