"""Plans: the batched simulators against Gymnasium's own, the prior, and what the environment gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import flowrl
from flowrl.envs.plans import (
    LENGTH,
    TASKS,
    GymnasiumTask,
    MountainCarTask,
    PendulumTask,
    PlanEnv,
    reaches_flag,
    smooth_plans,
    stays_upright,
)
from flowrl.errors import ConfigError
from flowrl.runs.pictures import save_picture

KINDS = sorted(TASKS)


def swing_up() -> torch.Tensor:
    """Actions (1, 200) that pump energy until it is enough to stand, then hold the pendulum."""
    angle, speed, actions = math.pi, 0.0, []
    for _ in range(200):
        wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
        if abs(wrapped) < 0.5:
            push = -20 * wrapped - 4 * speed
        else:
            push = (15.5 - speed**2 / 2 - 15 * math.cos(angle)) * (1 if speed >= 0 else -1)
        actions.append(max(-2.0, min(2.0, push)))
        speed = max(-8.0, min(8.0, speed + 0.05 * (15 * math.sin(angle) + 3 * actions[-1])))
        angle += 0.05 * speed
    return torch.tensor([actions], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_rollouts_are_those_of_gymnasium(kind: str, generator: torch.Generator) -> None:
    """Random plans, wild ones that hit every bound, and doing nothing."""
    task = TASKS[kind][0]()
    smooth = smooth_plans(6, generator)
    wild = torch.randn(4, LENGTH, generator=generator).sign() * (torch.arange(LENGTH) // 8 % 2 * 2 - 1)
    plans = torch.cat([smooth, wild, torch.ones(1, LENGTH), -torch.ones(1, LENGTH), torch.zeros(1, LENGTH)])
    actions = plans.repeat_interleave(20, dim=1)[:, : task.steps] * task.bound
    mine, places = task.rollout(actions)
    theirs, their_places = GymnasiumTask(task).rollout(actions)
    assert torch.allclose(mine, theirs, rtol=1e-9)
    assert torch.allclose(places, their_places, atol=2e-5)  # Gymnasium keeps the car's state in float32
    assert places.shape == (len(plans), task.steps + 1)


def test_a_pendulum_that_is_swung_up_stays_there() -> None:
    task, actions = PendulumTask(), swing_up()
    total, angles = task.rollout(actions)
    assert bool(stays_upright(angles)[0])
    assert total.item() == pytest.approx(-372, abs=1)
    assert not bool(stays_upright(task.rollout(torch.zeros(1, 200))[1])[0])
    mirrored, mirrored_angles = task.rollout(-actions)
    assert mirrored.item() == pytest.approx(total.item(), rel=1e-4)
    assert torch.allclose(mirrored_angles, 2 * math.pi - angles, atol=1e-3)


def test_a_car_that_swings_reaches_the_flag_and_stops_paying() -> None:
    task = MountainCarTask()
    actions = torch.cat([-torch.ones(1, 50), torch.ones(1, 949)], dim=1)
    total, places = task.rollout(actions)
    arrived = int((places[0] >= 0.45).int().argmax())
    assert bool(reaches_flag(places)[0])
    assert total.item() == pytest.approx(100 - 0.1 * arrived)
    assert not bool(reaches_flag(task.rollout(torch.ones(1, 999))[1])[0])  # too weak


@pytest.mark.parametrize("kind", KINDS)
def test_reward_and_components(kind: str, generator: torch.Generator) -> None:
    env = flowrl.make(f"plan-{kind}")
    plans = smooth_plans(64, generator)
    output = env.evaluate(plans, torch.zeros(64, dtype=torch.long))
    assert torch.allclose(output.reward, output.components["return"] / 100)
    assert set(output.components) == {"return", "solved", "first_right"}
    share = output.components["first_right"].mean().item()
    assert 0.2 < share < 0.8
    assert torch.equal(output.components["first_right"].unique(), torch.tensor([0.0, 1.0]))
    beyond = env.evaluate(3 * plans.sign(), torch.zeros(64, dtype=torch.long))
    at_bound = env.evaluate(plans.sign(), torch.zeros(64, dtype=torch.long))
    assert torch.equal(beyond.reward, at_bound.reward)  # actions are clipped


@pytest.mark.parametrize("kind", KINDS)
def test_gymnasium_as_the_simulator(kind: str, generator: torch.Generator) -> None:
    plans, contexts = smooth_plans(3, generator), torch.zeros(3, dtype=torch.long)
    fast, slow = (flowrl.make(f"plan-{kind}", simulator=s).evaluate(plans, contexts) for s in ("batched", "gymnasium"))
    assert torch.allclose(fast.reward, slow.reward, rtol=1e-6)
    for key, value in fast.components.items():
        assert torch.allclose(value, slow.components[key], rtol=1e-6), key


def test_random_plans(generator: torch.Generator) -> None:
    plans = smooth_plans(4000, generator)
    assert plans.shape == (4000, LENGTH)
    assert plans.abs().max() <= 1
    assert plans.mean().abs() < 0.02
    assert plans.diff(dim=1).abs().mean() < 0.3  # white noise of that size: 0.6
    assert torch.equal(
        smooth_plans(3, torch.Generator().manual_seed(4)), smooth_plans(3, torch.Generator().manual_seed(4))
    )


def test_the_shipped_flow_draws_smooth_plans(generator: torch.Generator) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "plan-pendulum", seed=0, device="cpu")
    with torch.inference_mode():
        plans = model.policy.sample(torch.zeros(512, dtype=torch.long), steps=20)
    data = smooth_plans(512, generator)
    assert plans.diff(dim=1).abs().mean() == pytest.approx(data.diff(dim=1).abs().mean().item(), rel=0.25)
    assert plans.std() == pytest.approx(data.std().item(), rel=0.15)


def test_a_flow_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples of shape \(50,\), not \(2,\)"):
        flowrl.make("plan-pendulum", flow="gaussians")


def test_a_picture_of_trajectories(tmp_path: Path) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "plan-mountaincar", seed=0, device="cpu", n_samples=16, batch_size=16)
    save_picture(torch.zeros(4, LENGTH), [None] * 4, model.env.core, tmp_path / "a.png")
    save_picture(torch.ones(4, LENGTH), [None] * 4, model.env.core, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_plan_env_of_a_users_own(generator: torch.Generator) -> None:
    env = PlanEnv(PendulumTask(), lambda: torch.nn.Linear(LENGTH, LENGTH), stays_upright, "mine", scale=1.0)
    output = env.evaluate(smooth_plans(2, generator), torch.zeros(2, dtype=torch.long))
    assert torch.equal(output.reward, output.components["return"])


def test_recommended_settings_learn() -> None:
    """Six thousand plans suffice to move the mean return by more than the spread between seeds of evaluation."""
    model = flowrl.ORWCFMW2("FlowPolicy", "plan-pendulum", seed=0, device="cpu")
    model.learn(6_000)
    result = flowrl.evaluate(model, n_samples=256)
    assert result.reference is not None
    assert result.reward_mean > result.reference.reward_mean + 2
