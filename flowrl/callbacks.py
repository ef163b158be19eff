"""Callbacks of a run folder: sample pictures, checkpoints, and a clean stop on Ctrl-C."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from flowrl.checkpoint import save_checkpoint
from flowrl.errors import CheckpointError
from flowrl.report import save_picture


class IterationCallback(BaseCallback):
    """A callback that acts between iterations, where the training state is whole."""

    def _on_step(self) -> bool:
        return True

    def on_iteration_end(self) -> bool:
        """Act; False stops the run."""
        raise NotImplementedError


class PictureCallback(IterationCallback):
    """Writes a picture of samples at fixed noise and contexts every few iterations.

    One that cannot be written is reported; the run goes on.

    Args:
        folder: Where `samples/` pictures go.
        every: Iterations between pictures.
        n: Samples in a picture.
    """

    def __init__(self, folder: Path, every: int, n: int = 36) -> None:
        super().__init__()
        self.folder, self.every, self.n = folder, every, n

    def _on_training_start(self) -> None:
        generator = torch.Generator(self.model.device)
        generator.manual_seed(0)
        env, policy = self.model.env.core, self.model.policy  # type: ignore[union-attr]
        n = self.n if env.flow.is_image else 1024
        self.x_0 = policy.noise(n, generator)  # type: ignore[operator]
        self.contexts = torch.arange(n, device=self.x_0.device) % len(env.contexts)
        if self.model.num_timesteps == 0:
            self._draw("0000-reference")

    def on_iteration_end(self) -> bool:
        """Draw when it is time."""
        iteration = self.model.iteration  # type: ignore[attr-defined]
        if iteration % self.every == 0:
            self._draw(f"{iteration:04d}")
        return True

    def _draw(self, name: str) -> None:
        policy, env = self.model.policy, self.model.env.core  # type: ignore[union-attr]
        spent = policy.evaluations  # pictures are not part of the method's cost
        latents = [
            policy.sample_latents(c, x_0=x)  # type: ignore[operator]
            for c, x in zip(self.contexts.split(256), self.x_0.split(256))
        ]
        samples = policy.decode(torch.cat(latents))  # type: ignore[operator]
        policy.evaluations = spent
        if not self.model.ranks.is_main:  # type: ignore[attr-defined]
            return
        try:
            save_picture(samples, [env.contexts[i] for i in self.contexts.tolist()], env, self.folder / f"{name}.png")
        except OSError as error:
            print(f"warning: Cannot write a picture to '{self.folder}': {error}. Training goes on.", flush=True)


class KeepCheckpoints(IterationCallback):
    """Writes a checkpoint every few iterations and keeps the newest ones.

    A checkpoint that cannot be written is reported and tried again next time; the run goes on.

    Args:
        folder: Where `checkpoints/` go.
        every: Iterations between checkpoints.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        super().__init__()
        self.folder, self.every, self.keep = folder, every, keep

    def on_iteration_end(self) -> bool:
        """Write when it is time."""
        if self.model.iteration % self.every == 0:  # type: ignore[attr-defined]
            self.write()
        return True

    def write(self) -> Path | None:
        """Write a checkpoint now; its folder, or None when that failed."""
        try:
            folder = save_checkpoint(self.model, self.folder / f"{self.model.num_timesteps:010d}")  # type: ignore[arg-type]
        except CheckpointError as error:
            print(f"warning: {error} Training goes on; it will be tried again.", flush=True)
            return None
        if not self.model.ranks.is_main:  # type: ignore[attr-defined]
            return folder
        for old in sorted(p for p in self.folder.iterdir() if p.name.isdigit())[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return folder


class StopOnSignal(IterationCallback):
    """Ends the run after the current iteration on Ctrl-C or SIGTERM; a second signal ends it at once.

    Use as a context manager around `learn`.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopOnSignal:
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, self._handle) for s in self.signals}
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
        print(
            f"\n{self.received.name}: finishing this iteration, then saving. Again to stop at once.",
            flush=True,
        )

    def on_iteration_end(self) -> bool:
        """Whether to go on."""
        return self.received is None
