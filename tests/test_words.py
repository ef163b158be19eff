"""Words: the pictures that mini-words is made of, the shipped pipeline, and the environment that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

import flowrl
from flowrl.envs.rewards.ocr import OCRReward
from flowrl.envs.text_to_image import embedded_for
from flowrl.envs.words import PAIRS, TEXTS, Sign, all_signs, draw_sign, word_prompts

FOLDER = Path(flowrl.__file__).parent / "assets" / "mini-words"
PROMPTS = word_prompts()


@pytest.fixture(scope="module")
def ocr() -> OCRReward:
    pytest.importorskip("rapidocr")
    return OCRReward()


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    """A true picture of each of the 128 signs, (128, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(0)
    pictures = np.stack([draw_sign(sign, rng) for sign in all_signs()])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def test_prompts_name_the_word_and_its_colours() -> None:
    assert len(set(PROMPTS)) == len(TEXTS) * len(PAIRS) == 128
    assert Sign("SUN", "red", "white").prompt == '"SUN" in red on white'
    assert Sign("SUN", paper="white").prompt == '"SUN" on white'


def test_pictures_are_seeded() -> None:
    sign = Sign("KEY", "blue", "white")
    first, again, other = (draw_sign(sign, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_true_pictures_are_read_right(ocr: OCRReward, drawn: torch.Tensor) -> None:
    output = ocr(drawn[::3], PROMPTS[::3])
    assert output.components["exact"].mean() > 0.97
    next_word = PROMPTS[len(PAIRS) :] + PROMPTS[: len(PAIRS)]  # the same colours, another word
    other = ocr(drawn[::3], next_word[::3])
    assert other.components["exact"].max() == 0
    assert (output.reward > other.reward).all()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_is_small_and_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1.2e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            assert all(tensors.get_slice(name).get_dtype() == "F16" for name in tensors.keys())  # noqa: SIM118


def test_autoencoder_keeps_letters(pipe: StableDiffusion3Pipeline, ocr: OCRReward, drawn: torch.Tensor) -> None:
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(drawn[::3] * 2 - 1).latents).sample
    assert ocr((decoded.clamp(-1, 1) + 1) / 2, PROMPTS[::3]).components["exact"].mean() > 0.95


@pytest.mark.slow
def test_draws_the_asked_word_in_part(ocr: OCRReward) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "sd3-ocr", env_settings={"flow": "mini-words"}, seed=0, device="cpu")
    ids = torch.arange(0, len(PROMPTS), 3)  # of words and of colours alike
    images = model.policy.sample(ids, steps=20)
    assert 0.3 < ocr(images, [PROMPTS[i] for i in ids]).components["exact"].mean() < 0.7


def test_reading_takes_the_flow_that_draws_words() -> None:
    assert embedded_for("ocr") == "mini-words"
    assert embedded_for("ocr:0.5+colourfulness:0.5") == "mini-words"
    assert embedded_for("count") == "mini-sd3"


def test_environment_asks_for_the_words_of_its_flow() -> None:
    pytest.importorskip("rapidocr")
    env = flowrl.make("sd3-ocr", flow="mini-words")
    assert env.contexts == PROMPTS
    assert env.sample_shape == (3, 64, 64)
    assert [str(prompt) for prompt in flowrl.make("sd3-ocr", flow="mini-sd3").contexts] != PROMPTS
