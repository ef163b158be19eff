"""One cell of a benchmark: train (or steer), evaluate, write what it cost and what came out."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.registration import make
from flowrl.envs.rewards.mixture import make_rewards
from flowrl.evaluation.measure import check_eval_samples, evaluate
from flowrl.evaluation.results import EvaluationResult
from flowrl.evaluation.steering import Steering
from flowrl.registry import algorithm_class, named_by_a_file, own_module
from flowrl.runs.callbacks import IterationCallback
from flowrl.runs.folder import alone_in, finite_or_none
from flowrl.runs.pictures import image_grid, save_picture
from flowrl.storage.files import write_json
from flowrl.suites.finished import finished_before
from flowrl.suites.suite import REMEDY, Cell
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.policy import FlowPolicy
from flowrl.types import Compile

UNBOUNDED = 10**12


class StopAtBudget(IterationCallback):
    """Callback that records cost and metrics of every iteration, and ends training when the budget is spent."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_iteration_end(self) -> bool:
        """Record a row."""
        model: Any = self.model
        model._update_current_progress_remaining(model.policy.evaluations, self.budget)
        logged = {key: value for key, value in model.last_logged.items() if isinstance(value, int | float)}
        self.rows.append(
            {**logged, "evaluations": model.policy.evaluations, "seconds": time.monotonic() - self.started}
        )
        return bool(model.policy.evaluations < self.budget)


def run_cell(folder: Path, modules: tuple[str, ...] = (), compile: Compile | None = None) -> None:
    """Train, evaluate, and write `curve.json`, `samples.png` (where it can be drawn) and, last, `result.json`.

    Nothing is done where another process has finished the cell meanwhile.

    Args:
        folder: Holds `cell.json`.
        modules: To import first; nothing else that the cell names is imported.
        compile: Instead of the cell's own setting, which counts as the same: it changes no figure but by rounding.
    """
    for module in modules:
        own_module(module)
    cell = Cell(**json.loads((folder / "cell.json").read_text("utf-8")))
    if finished_before(cell, folder.parents[cell.folder.count("/")]):
        return
    stop, settings = StopAtBudget(cell.budget), {**cell.settings, **({"compile": compile} if compile else {})}
    with named_by_a_file("The suite", REMEDY):
        core = make(cell.env, **cell.env_settings)
        unseen = make_rewards(cell.eval_rewards, ())
        check_eval_samples(cell.eval_samples, (core, *unseen.values()))
        model = algorithm_class(cell.algo)("FlowPolicy", core, seed=cell.seed, **settings) if cell.algo else None
    if model is not None:
        model.learn(UNBOUNDED, callback=stop)
    training_seconds = time.monotonic() - stop.started
    policy = _untrained(core, settings, cell.seed) if model is None else model.policy
    subject: tuple[Any, Any] = (policy, core) if model is None else (model, None)
    steering = Steering(**cell.steer) if cell.steer else None
    how: dict[str, Any] = {"n_samples": cell.eval_samples, "seed": 10_000 + cell.seed, "eval_rewards": unseen}
    result = evaluate(*subject, **how, steering=steering)
    numbers = result.to_dict()
    if core.held_out:
        numbers["held_out"] = evaluate(*subject, **how, prompts="held_out", steering=steering).to_dict()
    write_json(folder / "curve.json", stop.rows)
    _save_samples(result, core, folder / "samples.png")
    cost = {
        "network_evaluations": 0 if model is None else policy.evaluations,
        "samples": 0 if model is None else model.num_timesteps,
        "gradient_steps": 0 if model is None else model._n_updates,
        "training_seconds": round(training_seconds, 1),
        "buffer_bytes": 0 if model is None else model.buffer.nbytes,
        "peak_memory_bytes": _peak_memory(),
    }
    about = {"cell": cell.to_dict(), "compiled": policy.networks.compiled, "cost": cost}
    write_json(folder / "result.json", finite_or_none({**about, **numbers}))


def _peak_memory() -> int:
    """Give the most bytes that this process has had in memory; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _save_samples(result: EvaluationResult, env: GenerationEnv, path: Path) -> None:
    """Draw samples; a renderer of the environment's own that fails is reported, since what was trained matters more."""
    try:
        if env.shows_images:
            image_grid(env.pictures(result.samples[:16]), columns=4).save(path)
        else:
            save_picture(result.samples, result.sample_contexts, env, path)
    except Exception:
        print("No picture of the samples was drawn; the figures are kept.", file=sys.stderr)
        traceback.print_exc()


def _untrained(env: GenerationEnv, settings: dict[str, Any], seed: int) -> FlowPolicy:
    """Load the flow of a cell that trains nothing, to be steered."""
    config = FlowAlgorithm.configure(recommended=env.recommended, settings=settings)
    return FlowPolicy.of(env, config, seed=seed)


def run_logged(folder: Path, modules: tuple[str, ...] = (), compile: Compile | None = None) -> None:
    """Run a cell in a process of its own, which ends with 1 on an error; what it prints goes into `log.txt`.

    One that another call is running, or that a killed one left behind, is waited for.
    """
    torch.set_num_threads(1)
    folder = folder.absolute()  # a reward may leave the current folder for another
    try:
        with alone_in(folder, wait=True):
            with (folder / "log.txt").open("w", encoding="utf-8") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            run_cell(folder, modules, compile)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
