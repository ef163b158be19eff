"""Plans for control tasks: a sample is a sequence of actions, its reward the return of its rollout.

The tasks are Gymnasium's Pendulum-v1 and MountainCarContinuous-v0, the car also with half the engine, from a fixed
state at rest. Rollouts are batched (`PendulumTask`, `MountainCarTask`: the same equations, float64, on the samples'
device); `GymnasiumTask` rolls out in Gymnasium's own simulators, of these and of other tasks with continuous actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from flowrl.envs.base import GenerationEnv
from flowrl.errors import ConfigError
from flowrl.functional.exact import in_float64
from flowrl.models.loading import source_of
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput

LENGTH = 50
"""Numbers in a plan; each is an action in units of the largest one, and is held for some steps of the simulator."""


class Task(Protocol):
    """A deterministic control task with one continuous action.

    Attributes:
        gymnasium_id: The task in Gymnasium.
        steps: Steps of the simulator in an episode.
        bound: The largest action.
        position: Meaning of a position.
    """

    gymnasium_id: str
    steps: int
    bound: float
    position: str

    def rollout(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll out action sequences (B, steps): returns (B,) and positions (B, steps + 1)."""


class PendulumTask:
    """Pendulum-v1 (200 steps), hanging at rest. The angle is 0 upright; the motor is too weak to lift it at once."""

    gymnasium_id: str = "Pendulum-v1"
    steps: int = 200
    bound: float = 2.0
    position: str = "angle (0 and 2 pi: upright)"
    start: ClassVar[tuple[float, float]] = (math.pi, 0.0)  # angle, angular velocity

    def rollout(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll out action sequences: returns (B,) and angles (B, steps + 1), unwrapped."""
        u = in_float64(actions).clamp(-self.bound, self.bound)
        angle, speed = (u.new_full((len(u),), value) for value in self.start)
        total, angles = torch.zeros_like(angle), [angle]
        for i in range(u.shape[1]):
            wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
            total -= wrapped**2 + 0.1 * speed**2 + 0.001 * u[:, i] ** 2
            speed = (speed + 0.05 * (15.0 * angle.sin() + 3.0 * u[:, i])).clamp(-8, 8)
            angle = angle + 0.05 * speed
            angles.append(angle)
        return total, torch.stack(angles, dim=1)


class MountainCarTask:
    """MountainCarContinuous-v0 (999 steps), at rest near the bottom: 100 at the flag, less a tenth of the squared
    actions. The motor is too weak to drive up at once, and doing nothing costs nothing.

    Args:
        power: Speed that the full action adds in a step; Gymnasium's car has 0.0015.
    """

    gymnasium_id: str = "MountainCarContinuous-v0"
    steps: int = 999
    bound: float = 1.0
    position: str = "position (flag at 0.45)"
    start: ClassVar[tuple[float, float]] = (-0.5, 0.0)  # position, velocity

    def __init__(self, power: float = 0.0015) -> None:
        self.power = power

    def rollout(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll out action sequences: returns (B,) and positions (B, steps + 1); at the flag the car stays."""
        raw = in_float64(actions)
        force = raw.clamp(-self.bound, self.bound)
        place, speed = (raw.new_full((len(raw),), value) for value in self.start)
        total, places = torch.zeros_like(place), [place]
        running = torch.ones_like(place, dtype=torch.bool)
        for i in range(raw.shape[1]):
            speed_next = (speed + self.power * force[:, i] - 0.0025 * (3 * place).cos()).clamp(-0.07, 0.07)
            place_next = (place + speed_next).clamp(-1.2, 0.6)
            speed_next = torch.where((place_next <= -1.2) & (speed_next < 0), 0.0, speed_next)
            arrived = (place_next >= 0.45) & (speed_next >= 0)
            total += running * (100.0 * arrived - 0.1 * raw[:, i] ** 2)
            place, speed = torch.where(running, place_next, place), torch.where(running, speed_next, speed)
            running = running & ~arrived
            places.append(place)
        return total, torch.stack(places, dim=1)


class GymnasiumTask:
    """A task in Gymnasium's own simulator, one episode after the other on the host: exact, and slow.

    Args:
        task: The task and its initial state.
    """

    def __init__(self, task: PendulumTask | MountainCarTask) -> None:
        import gymnasium

        self.gymnasium_id, self.steps, self.bound = task.gymnasium_id, task.steps, task.bound
        self.start, self.position = task.start, task.position
        self.env = gymnasium.make(self.gymnasium_id)
        if isinstance(task, MountainCarTask):
            self.env.unwrapped.power = task.power  # type: ignore[attr-defined]

    def rollout(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll out action sequences: returns (B,) and positions (B, steps + 1)."""
        actions = in_float64(actions)
        played = [self._play(sequence) for sequence in actions.cpu().numpy()]
        totals, places = (np.array(column) for column in zip(*played))
        return torch.from_numpy(totals).to(actions.device), torch.from_numpy(places).to(actions.device)

    def _play(self, actions: np.ndarray) -> tuple[float, list[float]]:
        env: Any = self.env.unwrapped
        self.env.reset(seed=0)
        env.state = np.array(self.start)
        env.last_u = None
        total, places = 0.0, [self.start[0]]
        for i, action in enumerate(actions):
            _, reward, terminated, _, _ = env.step(np.array([action]))
            total += float(reward)
            places.append(float(env.state[0]))
            if terminated:
                return total, places + [places[-1]] * (len(actions) - 1 - i)
        return total, places


class PlanEnv(GenerationEnv):
    """One-step environment whose sample is a plan (LENGTH,) in units of the largest action.

    Besides the return, components count how often the plan first drives right, `first_right`, and whether it
    `solves` the task: two ways that mirror each other are two solutions.

    Args:
        task: Task of the plan.
        flow: Source of the flow.
        solved: `positions (B, steps + 1) -> (B,)`, whether the task is solved.
        name: Name of the environment.
        scale: Divisor of returns, so that rewards are of order 1.
    """

    def __init__(
        self,
        task: Task,
        flow: Any,
        solved: Callable[[torch.Tensor], torch.Tensor],
        name: str,
        scale: float = 100.0,
        render_mode: str | None = None,
    ) -> None:
        source = source_of(flow, sample_shape=(LENGTH,))
        if source.sample_shape != (LENGTH,):
            raise ConfigError(f"'{name}' needs a flow of samples of shape ({LENGTH},), not {source.sample_shape}.")
        super().__init__(source, contexts=[None], low=-1.0, high=1.0, name=name, render_mode=render_mode)
        self.task, self.solved, self.scale = task, solved, scale

    def actions(self, plans: torch.Tensor) -> torch.Tensor:
        """Make actions (B, steps) of plans (B, LENGTH): each number held, clipped to the task's bound."""
        hold = -(-self.task.steps // LENGTH)
        held = plans.clamp(-1, 1).repeat_interleave(hold, dim=1)[:, : self.task.steps]
        return held * self.task.bound

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Give the return of each plan, divided by `scale`."""
        total, positions = self.task.rollout(self.actions(samples))
        moved = positions - positions[:, :1]
        first = (moved.abs() > 0.05).int().argmax(dim=1, keepdim=True)  # the first step that is clearly off the start
        components = {
            "return": total.float(),
            "solved": self.solved(positions).float(),
            "first_right": (moved.gather(1, first)[:, 0] > 0).float(),
        }
        return RewardOutput((total / self.scale).float(), components)

    def plot(self, axes: Any, samples: torch.Tensor) -> None:
        """Draw where the first 100 plans lead: positions against time, better returns on top."""
        total, positions = self.task.rollout(self.actions(samples[:100]))
        order = total.argsort().tolist()
        for i in order:
            axes.plot(positions[i].cpu().numpy(), linewidth=0.6, alpha=0.5)
        axes.set(xlabel="step", ylabel=self.task.position)


def stays_upright(angles: torch.Tensor) -> torch.Tensor:
    """Tell whether the pendulum is within 0.3 rad of upright during the last fifth of its episode."""
    last = angles[:, -(angles.shape[1] // 5) :]
    return (((last + math.pi) % (2 * math.pi) - math.pi).abs() < 0.3).all(dim=1)


def reaches_flag(positions: torch.Tensor) -> torch.Tensor:
    """Tell whether the car reaches the flag."""
    return positions[:, -1] >= 0.45


@dataclass(frozen=True)
class PlanConfig:
    """Settings of the `plan-*` environments."""

    flow: str = "plans"
    """Flow to fine-tune: "plans" (shipped, trained on random smooth plans), or a folder that holds one."""
    simulator: Literal["batched", "gymnasium"] = "batched"
    """Roll out all plans at once, or one by one in Gymnasium's simulator: the same returns, and slow."""


TASKS: dict[str, tuple[Callable[[], PendulumTask | MountainCarTask], Callable[[torch.Tensor], torch.Tensor], str]] = {
    "pendulum": (PendulumTask, stays_upright, "swing a pendulum up and hold it"),
    "mountaincar": (MountainCarTask, reaches_flag, "drive a weak car up a hill"),
    "mountaincar-half": (lambda: MountainCarTask(0.00075), reaches_flag, "the same with half the engine"),
}


def _factory(kind: str) -> Callable[[PlanConfig], PlanEnv]:
    def make(config: PlanConfig) -> PlanEnv:
        task, solved, _ = TASKS[kind]
        simulated: Task = task() if config.simulator == "batched" else GymnasiumTask(task())
        return PlanEnv(simulated, config.flow, solved, f"plan-{kind}")

    return make


def smooth_plans(n: int, generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """Draw random smooth plans (n, length) in [-1, 1]: the flow "plans" is trained on them.

    The sine of a random phase that is the running sum of random frequencies is as likely at -1 as at 1, and half of the
    frequencies are one for the whole plan; a random slow amplitude goes with it.
    """
    device = generator.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    time = torch.linspace(0, 1, length, device=device)
    cycles = 0.5 + 7.5 * uniform(n, 1)
    chirp = (uniform(n, 1) < 0.5).float() * (uniform(n, 1) - 0.5) * 2 * cycles
    phase = 2 * math.pi * (uniform(n, 1) + cycles * time + 0.5 * chirp * time**2)
    ends = 0.2 + 0.8 * uniform(n, 2)
    return phase.sin() * (ends[:, :1] * (1 - time) + ends[:, 1:] * time)


FITTED = {
    "standardise": "batch",
    "tau": 3.0,
    "learning_rate": 1e-3,
    "batch_size": 256,
    "n_epochs": 2,
    "min_ess": 0.002,  # that a few of the best plans decide is what a search wants
}
RECOMMENDED = {  # tried on both tasks, one seed each; docs/plans.md has what came out
    **{
        f"{kind}.{key}": value for kind in ("endpoint", "endpoint-free", "endpoint-kl") for key, value in FITTED.items()
    },
    "endpoint.alpha": 0.05,
    "endpoint-kl.alpha": 0.05,
    "selection.learning_rate": 1e-3,
}
SPECS = [
    EnvSpec(
        name=f"plan-{kind}",
        differentiable=True,
        factory=_factory(kind),
        config=PlanConfig(),
        recommended=lambda config: RECOMMENDED,
        total_timesteps=40_000,
        summary=f"a plan of {LENGTH} actions for Gymnasium's {task().gymnasium_id}: {what}; reward is its return / 100",
    )
    for kind, (task, _, what) in TASKS.items()
]
