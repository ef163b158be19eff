"""Pairs of shapes: the pictures that mini-spatial is made of, the reward that reads relations, the shipped pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

import flowrl
from flowrl.envs.rewards.spatial import SpatialReward
from flowrl.envs.shapes import Placed, paint
from flowrl.envs.spatial import Pair, Thing, all_pairs, draw_pair, pair_prompts, parse_pair
from flowrl.envs.text_to_image import embedded_for

FOLDER = Path(flowrl.__file__).parent / "assets" / "mini-spatial"
PAIRS = all_pairs()[::5]
PROMPTS = [pair.prompt for pair in PAIRS]
RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """A true picture of each of the pairs, (n, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(0)
    return tensor([draw_pair(pair, rng) for pair in PAIRS])


def tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def score(objects: list[Placed], prompt: str) -> dict[str, float]:
    output = SpatialReward()(tensor([paint(objects, "white")]), [prompt])
    return {"reward": output.reward.item(), **{key: value.item() for key, value in output.components.items()}}


def test_prompts_can_be_read_back() -> None:
    assert len(set(pair_prompts())) == len(all_pairs()) == 576
    assert [parse_pair(prompt) for prompt in PROMPTS] == PAIRS
    assert Pair(RED_CIRCLE, "left of", BLUE_SQUARE).prompt == "a red circle left of a blue square"
    assert parse_pair("A circle  above a square") == Pair(Thing(None, "circle"), "above", Thing(None, "square"))


NONE = ("", "a red circle", "a red circle near a blue square", "two stars", "a circle left a cross")


@pytest.mark.parametrize("text", NONE)
def test_other_prompts_are_an_error_that_says_the_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form .* such as 'a red circle left of a blue square'"):
        parse_pair(text)


def test_true_pictures_are_right_and_reversed_ones_wrong(drawn: torch.Tensor) -> None:
    right = SpatialReward()(drawn, PROMPTS)
    assert right.components["all_right"].mean() > 0.99
    assert torch.equal(right.reward[right.components["all_right"] == 1].unique(), torch.ones(1))
    wrong = SpatialReward()(drawn, [pair.reversed.prompt for pair in PAIRS])
    assert wrong.components["relation"].max() == 0
    assert torch.equal(wrong.components["first"], right.components["first"])
    swapped = [Pair(pair.second, pair.relation, pair.first).prompt for pair in PAIRS]
    assert SpatialReward()(drawn, swapped).components["relation"].max() == 0


def test_what_is_wrong_costs_its_share() -> None:
    prompt = Pair(RED_CIRCLE, "left of", BLUE_SQUARE).prompt
    circle, square = Placed("circle", "red", 14, 30, 11), Placed("square", "blue", 48, 34, 11)
    assert score([circle, square], prompt)["reward"] == 1
    other = score([circle._replace(colour="green"), square], prompt)
    assert (other["first"], other["second"], other["relation"], other["reward"]) == (0, 1, 0, 0.5)
    third = score([circle, square, Placed("cross", "green", 32, 10, 8)], prompt)
    assert (third["two"], third["relation"], third["all_right"], third["reward"]) == (0, 1, 0, 0.75)
    alone = score([circle], prompt)
    assert (alone["two"], alone["first"], alone["second"], alone["reward"]) == (0, 1, 0, 0.25)
    steep = score([circle._replace(x=26, y=14), square._replace(x=40, y=50)], prompt)  # further below than beside
    assert (steep["relation"], steep["reward"]) == (0, 0.75)


def test_an_open_colour_takes_any() -> None:
    circle, square = Placed("circle", "green", 32, 14, 11), Placed("square", "yellow", 32, 48, 11)
    assert score([circle, square], "a circle above a square")["reward"] == 1
    assert score([circle, square], "a circle above a blue square")["reward"] == 0.5


def test_sizes_that_do_not_fit_are_an_error(drawn: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected images"):
        SpatialReward()(drawn, PROMPTS[:1])


def test_the_pipeline_has_an_environment_of_its_own() -> None:
    assert embedded_for("spatial") == "mini-spatial"
    env = flowrl.make("sd3-spatial", flow="mini-spatial", held_out_share=0.25)
    assert not set(env.contexts) & set(env.held_out)
    assert set(env.contexts) | set(env.held_out) == set(pair_prompts())
    assert 0.15 < len(env.held_out) / 576 < 0.35
    together = [{frozenset(parse_pair(p).things) for p in prompts} for prompts in (env.contexts, env.held_out)]
    assert not together[0] & together[1]
    assert {pair.first for pair in map(parse_pair, env.contexts)} >= {p.first for p in map(parse_pair, env.held_out)}


def test_folder_is_small_and_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            assert all(tensors.get_slice(name).get_dtype() == "F16" for name in tensors.keys())  # noqa: SIM118


def test_autoencoder_keeps_pairs(drawn: torch.Tensor) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(drawn * 2 - 1).latents).sample
    assert SpatialReward()((decoded.clamp(-1, 1) + 1) / 2, PROMPTS).components["all_right"].mean() > 0.97


@pytest.mark.slow
def test_draws_what_is_asked_in_part() -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-spatial", env_settings={"flow": "mini-spatial"}, seed=0, device="cpu")
    asked = torch.arange(0, 576, 5)
    images = model.policy.sample(asked, steps=20)
    parts = SpatialReward()(images, [pair_prompts()[i] for i in asked]).components
    assert min(parts["first"].mean(), parts["second"].mean()) > 0.7
    assert 0.5 < parts["all_right"].mean() < 0.8
