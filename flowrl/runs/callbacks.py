"""Callbacks of a run folder: sample pictures, held-out rewards, checkpoints, and a clean stop on a signal."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from flowrl.envs.rewards.catalogue import RewardFunction
from flowrl.errors import CheckpointError, ConfigError
from flowrl.evaluation.side_effects import held_out
from flowrl.runs.logs import say, show_picture
from flowrl.runs.pictures import n_shown, save_picture
from flowrl.storage.files import clear_away, read_json
from flowrl.training.saving import Snapshot


class IterationCallback(BaseCallback):
    """A callback that acts between iterations, where the training state is whole."""

    def _on_step(self) -> bool:
        return True

    def on_iteration_end(self) -> bool:
        """Act; False stops the run."""
        raise NotImplementedError


class PictureCallback(IterationCallback):
    """Callback that writes a picture of samples, at fixed noise and contexts, every few iterations.

    One that cannot be written is reported; the run goes on. A renderer of one's own that fails before training began
    ends it.

    Args:
        folder: Where `samples/` pictures go.
        every: Iterations between pictures. None for `USUAL` of them, where pictures take no more than `SHARE` of the
            time, and for the last besides.
        n: Samples in a picture.
    """

    USUAL = 10
    SHARE = 0.05

    def __init__(self, folder: Path, every: int | None = None, n: int = 36) -> None:
        super().__init__()
        self.folder, self.every, self.n = folder.absolute(), every, n
        self._spent = self._cost = 0.0  # seconds: all pictures, the latest one
        self._drawn = 0  # iteration of the latest one

    def _on_training_start(self) -> None:
        self._began = time.monotonic()
        generator = torch.Generator(self.model.device)
        generator.manual_seed(0)
        env, policy = self.model.env.core, self.model.policy  # type: ignore[union-attr]
        n = n_shown(env, self.n)
        self.x_0 = policy.noise(n, generator)  # type: ignore[operator]
        self.contexts = torch.arange(n, device=self.x_0.device) % len(env.contexts)
        if self.model.num_timesteps == 0:
            self._draw("0000-reference")

    def on_iteration_end(self) -> bool:
        """Draw when it is time."""
        model: Any = self.model
        due = model.iteration % (self.every or self.USUAL) == 0
        if due and self.every is None:  # all ranks take part in the sampling, by the clock of the main one
            allowed = self.SHARE * (time.monotonic() - self._began)
            due = model.ranks.any(model.ranks.is_main and self._spent + self._cost <= allowed)
        if due:
            self._draw(f"{model.iteration:04d}")
        return True

    def _on_training_end(self) -> None:
        model: Any = self.model
        is_done = model.num_timesteps >= model._total_timesteps  # not where a signal asks to stop
        if self.every is None and is_done and self._drawn < model.iteration:
            self._draw(f"{model.iteration:04d}")

    def _draw(self, name: str) -> None:
        began = time.monotonic()
        self._sample_and_save(name)
        self._cost = time.monotonic() - began
        self._spent += self._cost
        self._drawn = self.model.iteration  # type: ignore[attr-defined]

    def _sample_and_save(self, name: str) -> None:
        policy, env = self.model.policy, self.model.env.core  # type: ignore[union-attr]
        n = max(1, policy.most_drawn // self.model.ranks.world_size)  # type: ignore[attr-defined]
        with policy.uncounted():  # type: ignore[operator]  # pictures are not part of the method's cost
            latents = [
                policy.sample_latents(c, x_0=x)  # type: ignore[operator]
                for c, x in zip(self.contexts.split(n), self.x_0.split(n))
            ]
        samples = policy.decode(torch.cat(latents))  # type: ignore[operator]
        if not self.model.ranks.is_main:  # type: ignore[attr-defined]
            return
        path = self.folder / f"{name}.png"
        try:
            save_picture(samples, [env.contexts[i] for i in self.contexts.tolist()], env, path)
            show_picture(self.logger, "samples", path, self.model.num_timesteps)
        except (OSError, ConfigError) as error:
            if isinstance(error, ConfigError) and self.model.iteration == 0:  # type: ignore[attr-defined]
                raise  # nothing is lost yet
            why = str(error).rstrip(".")
            say(f"warning: Cannot write a picture to '{self.folder}': {why}. Training goes on.")


class HeldOutCallback(BaseCallback):
    """Callback that scores samples with rewards that training does not see: `held_out/NAME` in the metrics.

    Args:
        rewards: By name; those that compare samples of the same context are left to the evaluation.
        every: Iterations between two of them; where the iteration then is not logged, the next one that is.
        n: Samples of an iteration that are scored, on each rank; rounded up to whole batches of the rollout.
    """

    def __init__(self, rewards: Mapping[str, RewardFunction], every: int, n: int = 256) -> None:
        super().__init__()
        self.rewards = {name: r for name, r in rewards.items() if not getattr(r, "groupwise", False)}
        self.every, self.n = every, n
        self._values: list[dict[str, torch.Tensor]] = []
        self._left = 0

    def _on_rollout_start(self) -> None:
        self._values = []
        self._left = self.n if self.rewards and self._is_due() else 0

    def _is_due(self) -> bool:
        """Tell whether this iteration is the first that is logged since one of every `every` began."""
        now, logged = self.model.iteration, self.locals.get("log_interval") or 1  # type: ignore[attr-defined]
        return bool((now + 1) % logged == 0 and now // self.every > (now - logged) // self.every)

    def _on_step(self) -> bool:
        if self._left > 0 and self.locals["samples"] is not None:  # methods on contexts draw in their updates
            samples, contexts = self.locals["samples"], self.locals["contexts"]
            known = self.model.env.core.contexts  # type: ignore[union-attr]
            self._values.append(held_out(self.rewards, samples, [known[i] for i in contexts.tolist()]))
            self._left -= len(samples)
        return True

    def _on_rollout_end(self) -> None:
        if self._values:
            means = torch.stack([torch.cat(parts).mean() for parts in zip(*(v.values() for v in self._values))])
            for name, mean in zip(self.rewards, self.model.ranks.mean_(means).tolist()):  # type: ignore[attr-defined]
                self.logger.record(f"held_out/{name}", mean)


class KeepCheckpoints(IterationCallback):
    """Callback that writes checkpoints, and keeps the newest ones and the one of the highest reward.

    A checkpoint that cannot be written is reported and tried again next time; the run goes on.

    Args:
        folder: Where `checkpoints/` go.
        every: Iterations between checkpoints; 0 for none by iterations.
        minutes: Minutes after which there is one, too; 0 for none by time.
        keep: How many of the newest to keep.
        keep_best: Whether to keep, besides, the one whose iteration had the highest mean reward; `best` links to it.
        background: Whether to write while training goes on. That takes a copy of the state in host memory.
    """

    def __init__(
        self,
        folder: Path,
        every: int = 10,
        minutes: float = 0,
        keep: int = 2,
        keep_best: bool = True,
        background: bool = True,
    ) -> None:
        super().__init__()
        self.folder, self.every, self.minutes = folder.absolute(), every, minutes
        self.keep, self.keep_best, self.background = keep, keep_best, background
        self.written = -1  # samples that the newest checkpoint written here was trained on
        self._last = time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[Path] | None = None

    def _on_training_start(self) -> None:
        if self.model.ranks.is_main:  # type: ignore[attr-defined]
            clear_away(self.folder)
        self._last = time.monotonic()

    def on_iteration_end(self) -> bool:
        """Begin to write when it is time."""
        model: Any = self.model
        due = self.every > 0 and model.iteration % self.every == 0
        if self.minutes and not due:
            due = model.ranks.any(time.monotonic() - self._last >= 60 * self.minutes)
        if due:
            self._begin()
        return True

    def write(self) -> Path | None:
        """Write a checkpoint now, unless there is one of this moment; its folder, or None when that failed."""
        self.wait()
        if self.model.ranks.any(self.written != self.model.num_timesteps):  # type: ignore[attr-defined]
            self._begin()
            self.wait()
        return self._path() if self.written == self.model.num_timesteps else None

    def wait(self) -> None:
        """Wait for what is being written, and report its failure."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except (CheckpointError, OSError) as error:
                say(f"warning: {error} It will be tried again while training goes on.")

    def _path(self) -> Path:
        return self.folder / f"{self.model.num_timesteps:010d}"

    def _begin(self) -> None:
        self.wait()
        snapshot = Snapshot.of(self.model)  # type: ignore[arg-type]
        if self.background:
            snapshot = snapshot.copied()
        self._last = time.monotonic()
        self._pending = self._writer.submit(self._write, snapshot, self._path(), self.model.num_timesteps)
        if not self.background:
            self.wait()

    def _write(self, snapshot: Snapshot, path: Path, num_timesteps: int) -> Path:
        snapshot.write(path)
        self.written = num_timesteps
        if snapshot.documents:  # the main rank
            self._clean()
        return path

    def _clean(self) -> None:
        """Delete the checkpoints that are not to be kept."""
        folders = sorted(p for p in self.folder.iterdir() if p.name.isdigit() and (p / "state.json").exists())
        kept = set(folders[-self.keep :])
        best = max(folders, key=_reward, default=None)
        if self.keep_best and best is not None and _reward(best) > -math.inf:
            kept.add(best)
            _link(self.folder / "best", best.name)
        for old in set(folders) - kept:
            shutil.rmtree(old, ignore_errors=True)


def _reward(folder: Path) -> float:
    try:
        reward = read_json(folder / "state.json").get("reward")
    except CheckpointError:
        return -math.inf
    return reward if isinstance(reward, int | float) else -math.inf


def _link(link: Path, target: str) -> None:
    """Let `link` name `target`, where the system has such links."""
    new = link.with_name(f".{link.name}-{os.getpid()}")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target, target_is_directory=True)
        new.replace(link)
    except OSError:
        new.unlink(missing_ok=True)


class StopOnSignal(IterationCallback):
    """Callback that ends the run after the current iteration on Ctrl-C, SIGTERM or a closed terminal.

    A second signal ends it at once.

    Use as a context manager around `learn`.
    """

    signals = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    @classmethod
    def heard(cls) -> list[signal.Signals]:
        """Give the signals that are to stop a program, which nohup keeps a closed terminal's from."""
        return [s for s in cls.signals if s.name != "SIGHUP" or signal.getsignal(s) != signal.SIG_IGN]

    def __enter__(self) -> StopOnSignal:
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, self._handle) for s in self.heard()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        say(f"\n{self.received.name}: finishing this iteration, then saving. Again to stop at once.")

    def on_iteration_end(self) -> bool:
        """Tell whether to go on."""
        return self.received is None
