"""`gymnasium.make_vec`: no action is lost, and every copy is as a single environment would be."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import flowrl
from flowrl.envs.vector import GenerationVectorEnv
from flowrl.errors import ConfigError
from flowrl.types import RewardOutput

PROMPTS = ("three red stars on blue", "white circles", "two green squares on black")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "points": ("gaussians-linear", {}),
    "images": ("sd3-count", {"flow": "mini-sd3", "prompts": PROMPTS}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return KINDS[request.param]


def batched(kind: tuple[str, dict[str, Any]], n: int = 3, **kwargs: Any) -> GenerationVectorEnv:
    made = gymnasium.make_vec(f"flowrl/{kind[0]}-v0", num_envs=n, **kind[1], **kwargs)
    assert isinstance(made, GenerationVectorEnv)
    return made


def test_every_action_is_scored(kind: tuple[str, dict[str, Any]]) -> None:
    env = batched(kind)
    env.action_space.seed(0)
    single = flowrl.make(kind[0], **kind[1])
    contexts, _ = env.reset(seed=0)
    for _ in range(4):
        actions = env.action_space.sample()
        following, rewards, terminated, truncated, infos = env.step(actions)
        expected = []
        for context, action in zip(contexts, actions):
            single.reset(options={"context": context})
            expected.append(single.step(action)[1])
        assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
        assert terminated.all()
        assert not truncated.any()
        assert infos["final_obs"].tolist() == contexts.tolist()
        contexts = following
    env.close()


def test_as_gymnasiums_own_copies_with_the_same_seeds(kind: tuple[str, dict[str, Any]]) -> None:
    """Contexts, rewards and infos of SyncVectorEnv, which steps one by one, with the autoreset mode SAME_STEP."""
    env = batched(kind)
    other = SyncVectorEnv([lambda: flowrl.make(kind[0], **kind[1])] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert (env.observation_space, env.action_space) == (other.observation_space, other.action_space)
    env.action_space.seed(0)
    (ours, our_infos), (theirs, their_infos) = env.reset(seed=5), other.reset(seed=5)
    for _ in range(3):
        assert ours.tolist() == theirs.tolist()
        assert our_infos.keys() == their_infos.keys()
        assert our_infos["context"].tolist() == their_infos["context"].tolist()
        actions = env.action_space.sample()
        ours, *our_rest, our_infos = env.step(actions)
        theirs, *their_rest, their_infos = other.step(actions)
        for mine, their in zip(our_rest, their_rest):
            assert mine.dtype == their.dtype
            assert mine.tolist() == pytest.approx(their.tolist(), abs=1e-5)
        assert our_infos["final_info"].keys() == their_infos["final_info"].keys()
        for key, values in their_infos["final_info"].items():
            assert our_infos["final_info"][key].tolist() == pytest.approx(values.tolist()) or key == "context"
        assert our_infos["final_info"]["context"].tolist() == their_infos["final_info"]["context"].tolist()


def test_seeds_and_options() -> None:
    env = batched(KINDS["images"])
    first = env.reset(seed=[1, 2, 3])[0]
    assert env.reset(seed=[1, 2, 3])[0].tolist() == first.tolist()
    assert env.reset(options={"context": 2})[0].tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match="2 seeds were given for 3 environments"):
        env.reset(seed=[1, 2])
    with pytest.raises(ConfigError, match="2 actions were given for 3 environments"):
        env.step(np.zeros((2, 3, 64, 64)))
    with pytest.raises(ConfigError, match="num_envs must be positive"):
        GenerationVectorEnv(flowrl.make("gaussians-linear"), 0)


def test_it_renders_every_copy() -> None:
    env = batched(KINDS["images"], render_mode="rgb_array")
    env.reset(seed=0)
    actions = np.random.default_rng(0).random((3, 3, 64, 64), dtype=np.float32)
    env.step(actions)
    frames = env.render()
    assert frames is not None
    for frame, action in zip(frames, actions):
        assert np.array_equal(frame, (action * 255).round().astype(np.uint8).transpose(1, 2, 0))
    assert batched(KINDS["points"]).render() is None


def test_rewards_with_a_graph_and_seeds_of_numpy() -> None:
    """A reward may compute with a network that could be trained; seeds often come out of arrays."""
    scale = torch.nn.Parameter(torch.tensor(2.0))
    env = GenerationVectorEnv(flowrl.make("gaussians-linear"), 2)
    env.core.reward = lambda samples, contexts: RewardOutput(scale * samples[:, 0])  # type: ignore[method-assign]
    env.reset(seed=np.int64(3))  # type: ignore[arg-type]
    actions = np.array([[1.0, 0.0], [-0.5, 0.0]], dtype=np.float32)
    assert env.step(actions)[1].tolist() == [2.0, -1.0]
