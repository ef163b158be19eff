"""Rewards of images against independent versions: numpy, Pillow, the published head's own scores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, forgetting
from PIL import Image
from safetensors.torch import save_file

from flowrl.envs.rewards.aesthetic import AestheticHead, AestheticReward, ColourfulnessReward, colourfulness
from flowrl.envs.rewards.catalogue import REWARDS, make_reward, parse_options, register_reward
from flowrl.envs.rewards.compress import CompressReward, IncompressReward, jpeg_kilobytes
from flowrl.errors import ConfigError, ModelLoadError, UnknownNameError
from flowrl.registry import environment_spec

SHARED = REPOSITORY.parent / "shared" / "data"
HEAD = SHARED / "laion_aesthetic_head.safetensors"
EXPECTED = SHARED / "laion_aesthetic_expected.json"


def numpy_colourfulness(image: np.ndarray) -> float:
    """Hasler and Süsstrunk (2003): rg = R - G, yb = (R + G) / 2 - B; sigma + 0.3 mu, on (H, W, 3) in 0 to 255."""
    rg = image[..., 0] - image[..., 1]
    yb = 0.5 * (image[..., 0] + image[..., 1]) - image[..., 2]
    sigma = np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2)
    mu = np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)
    return float(sigma + 0.3 * mu)


def test_colourfulness_as_in_the_paper() -> None:
    images = torch.rand(5, 3, 12, 9) * torch.rand(5, 3, 1, 1)
    expected = [numpy_colourfulness(255 * image.permute(1, 2, 0).double().numpy()) for image in images]
    assert colourfulness(images).tolist() == pytest.approx(expected, rel=1e-4)
    assert ColourfulnessReward()(images, [""] * 5).reward.tolist() == pytest.approx(
        [value / 100 for value in expected], rel=1e-4
    )


def test_colourfulness_by_hand() -> None:
    grey = torch.full((1, 3, 8, 8), 0.4)
    assert colourfulness(grey).item() == pytest.approx(0, abs=1e-3)
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1  # rg = 255, yb = 127.5 everywhere
    assert colourfulness(red).item() == pytest.approx(0.3 * np.hypot(255, 127.5), rel=1e-4)
    half = red.clone()
    half[:, :, :, :4] = torch.tensor([0.0, 1.0, 0.0])[None, :, None, None]  # half green: rg = -255, yb = 127.5
    assert colourfulness(half).item() == pytest.approx(255 + 0.3 * 127.5, rel=1e-4)


def pictures() -> torch.Tensor:
    flat = torch.full((1, 3, 32, 32), 0.5)
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.cat([flat, ramp, noise])


def test_colourfulness_of_images_of_one_colour_has_a_gradient() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1] = 1.0  # white
    images[2] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    (gradient,) = torch.autograd.grad(colourfulness(images.requires_grad_()).sum(), images)
    assert gradient.isfinite().all()
    assert gradient[1].abs().max() == 0 < min(gradient[0].abs().max(), gradient[2].abs().max())


@pytest.mark.parametrize("quality", [95, 40])
def test_jpeg_size_is_pillows(quality: int) -> None:
    expected = []
    for image in pictures():
        stream = io.BytesIO()
        array = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(array, "RGB").save(stream, "JPEG", quality=quality)
        expected.append(len(stream.getvalue()) / 1000)
    assert jpeg_kilobytes(pictures(), quality).tolist() == pytest.approx(expected, rel=1e-6)
    assert CompressReward(quality)(pictures(), [""] * 3).reward.tolist() == pytest.approx([-e for e in expected])
    assert IncompressReward(quality)(pictures(), [""] * 3).reward.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_a_quality_that_jpeg_does_not_have(quality: int) -> None:
    with pytest.raises(ConfigError, match=f"quality must be 1 to 100, not {quality}"):
        CompressReward(quality)


def test_the_description_names_the_quality_that_is_used() -> None:
    assert CompressReward(40).description == "minus the JPEG size in kB at quality 40"


def test_noise_compresses_worse_than_flat() -> None:
    flat, ramp, noise = jpeg_kilobytes(pictures()).tolist()
    assert flat < ramp < noise


def test_jpeg_size_keeps_the_order_of_a_large_batch() -> None:
    """The batch is spread over threads."""
    images = pictures().repeat(20, 1, 1, 1)
    assert jpeg_kilobytes(images).tolist() == jpeg_kilobytes(pictures()).tolist() * 20


def test_values_outside_the_range_are_clipped() -> None:
    images = 3 * torch.rand(2, 3, 16, 16) - 1
    assert torch.equal(jpeg_kilobytes(images), jpeg_kilobytes(images.clamp(0, 1)))


@pytest.mark.skipif(not (HEAD.exists() and EXPECTED.exists()), reason=f"no {HEAD}")
def test_aesthetic_head_gives_the_published_scores() -> None:
    expected = json.loads(EXPECTED.read_text())["scores"]
    rows = []
    for k in range(len(expected)):
        e = np.cos(0.37 * (k + 1) * np.arange(768) + k)
        rows.append(e / np.linalg.norm(e))
    scores = AestheticHead.load(HEAD)(torch.tensor(np.array(rows), dtype=torch.float32))
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_head_written_and_read_again(tmp_path: Path) -> None:
    head, x = AestheticHead().eval(), torch.randn(3, 768)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    for name in ("head.safetensors", "head.pth"):
        assert torch.equal(AestheticHead.load(tmp_path / name)(x), head(x))


@pytest.mark.parametrize("kind", ["missing", "other weights", "rubbish"])
def test_wrong_head_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "wrong-head.safetensors"
    if kind == "other weights":
        save_file({"layers.0.weight": torch.zeros(2, 2)}, file)
    elif kind == "rubbish":
        file.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelLoadError, match=r"wrong-head\.safetensors"):
        AestheticHead.load(file)


def test_a_head_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "hostile.pth"
    torch.save({"layers.0.weight": Path("anything but a tensor")}, file)
    with pytest.raises(ModelLoadError, match=r"hostile\.pth"):
        AestheticHead.load(file)


def test_missing_clip_names_the_way_out(tmp_path: Path) -> None:
    save_file(AestheticHead().state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(ModelLoadError, match=r"no-clip-here.*aesthetic\.clip=FOLDER.*colourfulness"):
        AestheticReward(str(tmp_path / "head.safetensors"), str(tmp_path / "no-clip-here"))


def test_every_registered_reward_says_what_it_is() -> None:
    shipped = {"aesthetic", "classifier", "clip", "colourfulness", "compress", "count", "hpsv2", "imagereward"}
    assert shipped | {"incompress", "pickscore"} <= REWARDS.keys()
    for name, entry in REWARDS.items():
        assert entry.summary, name


def test_options_take_the_type_of_the_parameter() -> None:
    options = parse_options(["compress.quality=40", "aesthetic.head=a=b.pth", "aesthetic.clip=x"])
    assert options == {"compress": {"quality": "40"}, "aesthetic": {"head": "a=b.pth", "clip": "x"}}
    assert make_reward("compress", options["compress"]).quality == 40


@pytest.mark.parametrize("text", ["quality=40", "compress.quality", "compress.=40", ".quality=40"])
def test_an_option_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"REWARD\.OPTION=VALUE"):
        parse_options([text])


def test_wrong_names_and_values() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'compress'"):
        make_reward("compres")
    with pytest.raises(UnknownNameError, match="Did you mean 'quality'"):
        make_reward("compress", {"qualty": "40"})
    with pytest.raises(ConfigError, match=r"compress\.quality must be int, not 'high'"):
        make_reward("compress", {"quality": "high"})
    with pytest.raises(UnknownNameError, match="no_such_module"):
        make_reward("no_such_module:reward")


def test_modules_that_register_nothing_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_rewards.py").write_text("def darkest(images, prompts): ...\n\n\nclass Compress: ...\n")
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    with forgetting("plain_rewards"):
        with pytest.raises(UnknownNameError, match=r"no registered reward: put @flowrl.register_reward\('darkest'"):
            make_reward("plain_rewards:darkest")
        with pytest.raises(UnknownNameError, match="Did you mean 'compress'"):
            make_reward("plain_rewards:Compress")
        with pytest.raises(UnknownNameError, match=r"no registered environment: put @flowrl.register_env\('darkest'"):
            environment_spec("plain_rewards:darkest")
    with pytest.raises(UnknownNameError, match="Importing 'broken_rewards' of 'broken_rewards:a' failed: ZeroDivision"):
        make_reward("broken_rewards:a")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="'compress' is registered already"):

        @register_reward("compress")
        def other(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            """Something else."""
            return images.mean((1, 2, 3))


def test_a_reward_of_ones_own_module(run_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "import flowrl\n\n\n"
        '@flowrl.register_reward("dark")\n'
        "def dark(images, prompts):\n"
        '    """Minus the brightness."""\n'
        "    return -images.mean((1, 2, 3))\n"
    )
    small = ["--algo.n-samples", 4, "--algo.group-size", 2, "--algo.rollout-steps", 2, "--total-timesteps", 4]
    args = ["--algo", "orw_w2", "--env", "sd3-compress", "--env.reward", "my_rewards:dark", "--eval-samples", 4]
    with forgetting("my_rewards"):
        done = run_here("flowrl.run", *args, *small)
    assert done.returncode == 0, done.stderr
    assert "reward: my_rewards:dark" in done.stdout
    with forgetting("my_rewards"):
        misdirected = run_here("flowrl.run", *args, *small, "--env.reward-options", "compress.quality=40")
    assert misdirected.returncode == 2
    assert "reward to give options to 'compress'" in misdirected.stderr
