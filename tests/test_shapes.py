"""The world of shapes: its grammar, its drawings and the scorer that judges pictures of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowrl.envs.rewards.count import analyse, count_components
from flowrl.envs.shapes import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    SHAPES,
    Scene,
    all_scenes,
    draw,
    full_prompts,
    open_prompts,
    parse_prompt,
)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, list[str]]:
    """1,000 pictures (1000, 3, 64, 64) of random full scenes, and their true prompts."""
    rng = np.random.default_rng(0)
    scenes = all_scenes()
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=1000)]
    return to_tensor([draw(scene, rng) for scene in chosen]), [scene.prompt for scene in chosen]


def test_prompts_are_read_back_as_the_scenes_they_came_from():
    options = [(None, *NUMBERS.values()), (None, *COLOURS), (None, *SHAPES), (None, *BACKGROUNDS)]
    n_scenes = 0
    for count in options[0]:
        for colour in options[1]:
            for shape in options[2]:
                for background in options[3]:
                    if colour is None or colour != background:
                        scene = Scene(count, colour, shape, background)
                        assert parse_prompt(scene.prompt) == scene
                        n_scenes += 1
    assert n_scenes == 5 * 6 * (7 * 6 - 5)


def test_prompts_read_as_english():
    assert Scene(3, "red", "star", "blue").prompt == "three red stars on blue"
    assert Scene(1, "red", "cross", "blue").prompt == "one red cross on blue"
    assert Scene(2, None, "cross", None).prompt == "two crosses"
    assert Scene().prompt == "shapes"


def test_prompt_lists():
    assert len(full_prompts()) == len(set(full_prompts())) == len(all_scenes()) == 4 * 5 * (6 * 5 - 5)
    for prompt in open_prompts():
        scene = parse_prompt(prompt)
        assert scene.colour is None
        assert scene.background is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("three red strs on blue", "'strs'.*'stars'"),
        ("three red stars on yelow", "'yelow'.*'yellow'"),
        ("stars three", "not of the form"),
        ("three star", "not of the form"),
        ("red stars on", "not of the form"),
        ("red stars on yellow", "not of the form"),
        ("", "not of the form"),
        ("red stars on red", "cannot be seen"),
    ],
)
def test_bad_prompts_are_explained(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


def test_drawing_is_reproducible_and_varied():
    scene = Scene(2, "red", "star", "blue")
    first = draw(scene, np.random.default_rng(3))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == draw(scene, np.random.default_rng(3))).all()
    assert (first != draw(scene, np.random.default_rng(4))).any()
    assert draw(scene, np.random.default_rng(3), size=128).shape == (128, 128, 3)


def test_scorer_is_right_on_true_pictures(drawn: tuple[Tensor, list[str]]):
    components = count_components(*drawn)
    for name in ("background", "colour", "count", "shape", "score", "all_right", "clean"):
        assert components[name].shape == (1000,)
        assert components[name].dtype == torch.float32
        assert components[name].mean() >= 0.99, name


def test_scorer_bears_jpeg_blur_and_noise(drawn: tuple[Tensor, list[str]]):
    images, prompts = drawn[0][:300], drawn[1][:300]
    compressed = []
    for pixels in (images * 255).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=50)
        compressed.append(np.asarray(Image.open(file)))
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    noisy = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for degraded in (to_tensor(compressed), blurred, noisy):
        assert count_components(degraded, prompts)["all_right"].mean() > 0.95


def test_scorer_works_at_other_sizes():
    rng = np.random.default_rng(1)
    scenes = [all_scenes()[i] for i in rng.integers(len(all_scenes()), size=50)]
    images = to_tensor([draw(scene, rng, size=128) for scene in scenes])
    assert count_components(images, [scene.prompt for scene in scenes])["score"].mean() >= 0.99


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("two red stars on blue", {"count"}),
        ("three green stars on blue", {"colour"}),
        ("three red crosses on blue", {"shape"}),
        ("three red stars on white", {"background"}),
        ("four white circles on black", {"background", "colour", "count", "shape"}),
        ("three red stars on blue", set()),
        ("stars", set()),
        ("circles on blue", {"shape"}),
        ("shapes", set()),
    ],
)
def test_scorer_notices_what_is_wrong(prompt: str, wrong: set[str]):
    picture = draw(Scene(3, "red", "star", "blue"), np.random.default_rng(0))
    components = count_components(to_tensor([picture]), [prompt])
    found = {name for name in ("background", "colour", "count", "shape") if components[name] == 0}
    assert found == wrong
    assert components["score"] == pytest.approx(1 - len(wrong) / 4)
    assert components["all_right"] == float(not wrong)
    assert components["clean"] == 1


def test_scorer_notices_pictures_that_are_not_clean():
    rng = np.random.default_rng(0)
    empty = np.full((64, 64, 3), COLOURS["blue"], dtype=np.uint8)
    two_kinds = np.concatenate(
        [
            draw(Scene(4, "red", "star", "blue"), rng)[:, :32],
            draw(Scene(4, "red", "circle", "blue"), rng)[:, 32:],
        ],
        axis=1,
    )
    two_colours = draw(Scene(4, "red", "circle", "blue"), rng)
    two_colours[:32] = draw(Scene(4, "white", "circle", "blue"), rng)[:32]
    blob = empty.copy()
    blob[10:14, 5:60] = COLOURS["red"]
    blob[10:50, 5:9] = COLOURS["red"]
    noise = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
    images = to_tensor([empty, two_kinds, two_colours, blob, noise])
    components = count_components(images, ["red shapes on blue"] * 5)
    assert components["clean"].sum() == 0
    assert components["colour"].tolist()[:3] == [0, 1, 0]
    assert analyse(images)[0].shapes == ()


@pytest.mark.parametrize(("lone", "clean"), [(23, 1), (24, 0)])
def test_lone_pixels_are_stray_ones(lone: int, clean: int) -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[24:48, 24:48] = COLOURS["red"]
    rows, columns = np.divmod(np.arange(lone), 8)
    picture[2 * rows, 8 * columns] = COLOURS["red"]
    components = count_components(to_tensor([picture]), ["one red square on black"])
    assert (components["clean"], components["all_right"]) == (clean, 1)


def test_in_tiny_pictures_a_pixel_is_an_object() -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[4, 4] = COLOURS["red"]
    assert len(analyse(to_tensor([picture]))[0].shapes) == 1


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        count_components(torch.zeros(2, 3, 64, 64), ["stars"])
