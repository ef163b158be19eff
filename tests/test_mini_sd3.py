"""The shipped mini-sd3: a diffusers pipeline that draws well and follows its prompt in part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from torch import Tensor

import flowrl
from flowrl.envs.rewards.count import count_components
from flowrl.envs.shapes import all_scenes, draw, full_prompts

FOLDER = Path(flowrl.__file__).parent / "assets" / "mini-sd3"
SAMPLING = json.loads((FOLDER / "sampling.json").read_text())


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, list[str]]:
    """200 pictures (200, 3, 64, 64) in [0, 1] of random full scenes, and their true prompts."""
    rng = np.random.default_rng(12345)
    scenes = all_scenes()
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=200)]
    images = torch.from_numpy(np.stack([draw(scene, rng) for scene in chosen])).permute(0, 3, 1, 2)
    return images.float() / 255, [scene.prompt for scene in chosen]


def generate(pipe: StableDiffusion3Pipeline, prompts: list[str], **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompts, generator=generator, output_type="pt", **{**SAMPLING, **options}).images


def test_folder_is_small_and_half_precision():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            assert all(tensors.get_slice(name).get_dtype() == "F16" for name in tensors.keys())  # noqa: SIM118


def test_loads_without_arguments_and_generates(pipe: StableDiffusion3Pipeline):
    plain = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    plain.set_progress_bar_config(disable=True)
    images = plain("three red stars on blue", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    half = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


def test_every_word_is_one_token(pipe: StableDiffusion3Pipeline):
    for prompt in full_prompts():
        assert len(pipe.tokenizer(prompt).input_ids) == len(prompt.split()) + 2


def test_stands_in_for_t5_with_zeros(pipe: StableDiffusion3Pipeline):
    without = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    for n in (1, 7):
        with torch.no_grad():
            ours, theirs = (
                p.encode_prompt(["two crosses", ""], None, None, max_sequence_length=n) for p in (pipe, without)
            )
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[2], theirs[2])


def test_latents_are_normalised(pipe: StableDiffusion3Pipeline, drawn: tuple[Tensor, list[str]]):
    with torch.no_grad():
        latents = pipe.vae.encode(drawn[0] * 2 - 1).latents
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert latents.shape == (200, 16, 8, 8)
    assert abs(float(latents.mean())) < 0.1
    assert 0.9 < float(latents.std()) < 1.1


def test_autoencoder_keeps_pictures(pipe: StableDiffusion3Pipeline, drawn: tuple[Tensor, list[str]]):
    images, prompts = drawn
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latents).sample
    decoded = (decoded.clamp(-1, 1) + 1) / 2
    psnr = -10 * (decoded - images).square().flatten(1).mean(1).log10()
    assert psnr.mean() >= 27.0
    assert count_components(decoded, prompts)["all_right"].mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "n"), [({}, 64), ({"max_sequence_length": 256}, 20)], ids=["recommended", "diffusers-context"]
)
def test_draws_what_is_asked(pipe: StableDiffusion3Pipeline, options: dict[str, int], n: int):
    prompts = [str(prompt) for prompt in np.random.default_rng(0).choice(full_prompts(), size=n)]
    components = count_components(generate(pipe, prompts, **options), prompts)
    for name in ("colour", "background", "clean"):
        assert components[name].mean() >= 0.85, name  # 0.9 over 1,000 prompts, less three standard errors
    both = (components["count"] * components["shape"]).mean()
    assert 0.3 < both < 0.9
