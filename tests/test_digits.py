"""Digits: the reader of idx files, the U-Net flow, the classifiers, and what the environment gives."""

from __future__ import annotations

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flowrl
from flowrl.envs.digits import EvenDigits, real_digits
from flowrl.envs.idx import LARGEST, read_idx, read_pair
from flowrl.envs.rewards.even import DigitClassifier, EvenReward
from flowrl.errors import ConfigError, ModelLoadError, RewardError
from flowrl.functional.metrics import entropy, wasserstein2
from flowrl.models.loading import source_of
from flowrl.models.unet import UNetFlow, UNetShape, to_latents
from flowrl.runs.pictures import image_grid, save_before_after

TINY = {"n_samples": 16, "batch_size": 16, "rollout_steps": 2}


def idx(values: np.ndarray, *, kind: int = 8, shape: tuple[int, ...] | None = None) -> bytes:
    shape = values.shape if shape is None else shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, size: int = 28, n: int = 20, packed: bool = False) -> np.ndarray:
    """Four files of random pictures, whose labels count up; returns the pictures to train on."""
    rng = np.random.default_rng(0)
    for part in ("t10k", "train"):
        pictures = rng.integers(0, 256, (n, size, size))
        files = {f"{part}-images-idx3-ubyte": pictures, f"{part}-labels-idx1-ubyte": np.arange(n) % 10}
        for name, values in files.items():
            content = idx(values)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return pictures


def write_flow(folder: Path, shape: UNetShape) -> UNetFlow:
    """A flow of random weights, and its classifiers."""
    flow = UNetFlow(shape)
    folder.mkdir(exist_ok=True)
    config = {"model": "unet", "channels": shape.channels, "size": shape.size, "widths": list(shape.widths)}
    (folder / "config.json").write_text(json.dumps({**config, "patch": shape.patch, "classes": list(shape.classes)}))
    save_file(flow.network.state_dict(), folder / "model.safetensors")
    for kind in ("reward", "judge"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"kind": "cnn", "size": shape.size, "width": 2}))
        save_file(DigitClassifier("cnn", shape.size, 2).state_dict(), folder / kind / "model.safetensors")
    return flow


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_files(packed: bool, tmp_path: Path) -> None:
    written = write_mnist(tmp_path, packed=packed)
    pictures, labels = read_pair(tmp_path, "train")
    assert pictures.dtype == torch.uint8
    assert np.array_equal(pictures.numpy(), written)
    assert labels.tolist() == [i % 10 for i in range(20)]
    train, test = real_digits(str(tmp_path))
    assert train.pictures.shape == test.pictures.shape == (20, 1, 28, 28)
    assert torch.allclose(255 * train.pictures[:, 0], pictures.float())


GOOD = idx(np.arange(12).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no idx file of unsigned bytes: it starts with nothing"),
        (GOOD[:7], "is no idx file of unsigned bytes"),
        (b"PK\x03\x04" + GOOD, "it starts with 50 4b 03 04"),
        (idx(np.zeros((3, 2, 2)), kind=13), "starts with 00 00 0d 03"),
        (idx(np.arange(3)) + bytes(20), "of 1 dimensions, not of 3"),
        (GOOD[:-1], "3 x 2 x 2 bytes, but there are only 11"),
        (GOOD + b"\0", "but there are more"),
        (idx(np.zeros(0), shape=(LARGEST, 4, 4)), "more than the 1,073,741,824 that are read"),
        (gzip.compress(GOOD)[:-12], "Cannot read"),
        (gzip.compress(GOOD)[:4] + b"damaged", "Cannot read"),
    ],
    ids=["empty", "short", "zip", "floats", "labels", "cut", "longer", "bomb", "cut gzip", "damaged gzip"],
)
def test_damaged_idx_files_are_explained(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_idx(tmp_path / "a", 3)


def test_a_folder_that_is_no_mnist_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no 'train-images-idx3-ubyte'.*docs/digits\.md"):
        flowrl.make("digits-even", data_dir=str(tmp_path))
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(19)))
    with pytest.raises(ConfigError, match="20 pictures of 'train' and 19 labels"):
        real_digits(str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(20, 11)))
    with pytest.raises(ConfigError, match=r"no square pictures of digits.*labels up to 11"):
        real_digits(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 2, 3))))
    with pytest.raises(ConfigError, match="pictures of 2x3"):
        real_digits(str(tmp_path))


def test_mnist_trains_on_a_flow_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pictures = write_mnist(tmp_path / "data", size=12)
    with pytest.raises(ConfigError, match=r"draws pictures of 8x8, the real ones have 12x12.*--data-dir FOLDER"):
        flowrl.make("digits-even", data_dir=str(tmp_path / "data"))
    write_flow(tmp_path / "flow", UNetShape(1, 12, (8, 8), patch=2))
    settings = {"flow": str(tmp_path / "flow"), "data_dir": str(tmp_path / "data")}
    model = flowrl.ORWCFMW2("FlowPolicy", "digits-even", seed=0, device="cpu", env_settings=settings, **TINY)
    model.learn(16)
    assert flowrl.evaluate(model, n_samples=8).samples.shape == (8, 1, 12, 12)
    even = torch.from_numpy(pictures[::2]).float() / 255  # labels count up
    drawn = model.env.core.oracle.sample(50, torch.Generator().manual_seed(0))[:, 0]
    assert bool((drawn[:, None] == even).flatten(2).all(2).any(1).all())
    with pytest.raises(ConfigError, match=r"take pictures of 12x12, the flow draws 8x8.*--env\.classifiers"):
        flowrl.make("digits-even", classifiers=str(tmp_path / "flow"))


def test_the_split_of_the_real_digits() -> None:
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = real_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.amin() == 0
    assert train.amax() == 1
    both = torch.cat([train, test]).flatten(1)
    every = torch.from_numpy(load_digits().data).float() / 16
    assert torch.equal(both.sum(1).sort().values, every.sum(1).sort().values)
    assert torch.bincount(torch.cat([train_labels, test_labels])).tolist() == np.bincount(load_digits().target).tolist()
    again = real_digits()
    assert torch.equal(again[0].pictures, train)


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_classifiers_know_pictures_they_have_not_seen(name: str) -> None:
    reward = EvenReward(flowrl.models.loading.ASSETS / "digits" / name)
    config = json.loads((flowrl.models.loading.ASSETS / "digits" / name / "config.json").read_text())
    _, (pictures, labels) = real_digits()
    output = reward(pictures, [None] * len(labels))
    digits = torch.stack([output.components[f"digit {k}"] for k in range(10)], dim=1)
    assert torch.equal(digits.sum(1), torch.ones(len(labels)))
    accuracy = (digits.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(config["test_accuracy"], abs=1e-3)
    assert accuracy >= 0.98
    assert ((output.reward > 0.5) == (labels % 2 == 0)).float().mean() >= 0.98


def test_the_probability_of_an_even_digit(tmp_path: Path) -> None:
    """Against logits chosen by hand."""
    reward = EvenReward()
    reward.network.layers[-1].weight.zero_()
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 3.0, 0.0, 0.0, 1.0, 2.0])
    reward.network.layers[-1].bias.copy_(logits)
    output = reward(torch.rand(2, 1, 8, 8, dtype=torch.float64), [None] * 2)
    total = sum(math.exp(x) for x in logits.tolist())
    even = sum(math.exp(x) for x in logits.tolist()[::2])
    assert output.reward.tolist() == pytest.approx([even / total] * 2)
    assert output.components["digit 5"].tolist() == [1, 1]
    with pytest.raises(RewardError, match=r"takes pictures \(B, 1, 8, 8\) of digits, not \(2, 3, 8, 8\)"):
        reward(torch.rand(2, 3, 8, 8), [None] * 2)


def test_the_environment(generator: torch.Generator) -> None:
    env = flowrl.make("digits-even", render_mode="rgb_array")
    _, (pictures, labels) = real_digits()
    output = env.evaluate(pictures, torch.zeros(len(labels), dtype=torch.long))
    assert output.reward.mean() == pytest.approx((labels % 2 == 0).float().mean().item(), abs=0.02)
    assert output.components["judged even"].mean() == pytest.approx(output.reward.mean().item(), abs=0.02)
    assert not torch.equal(output.components["judged even"], output.reward)  # another classifier
    assert sum(output.components[f"digit {k}"].mean().item() for k in range(10)) == pytest.approx(1)
    env.reset(seed=0)
    env.step(pictures[0].numpy())
    assert env.render().shape == (8, 8, 3)
    assert "pictures of handwritten digits" in env.describe()[0]
    drawn = env.oracle.sample(300, generator)
    assert env.evaluate(drawn, torch.zeros(300, dtype=torch.long)).reward.mean() > 0.98


def test_real_even_digits_are_drawn_by_seed() -> None:
    one, two = (EvenDigits().sample(5, torch.Generator().manual_seed(s)) for s in (3, 3))
    assert torch.equal(one, two)


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_trains_saves_and_draws_the_same(lora_rank: int, tmp_path: Path) -> None:
    model = flowrl.ORWCFMW2("FlowPolicy", "digits-even", seed=0, device="cpu", lora_rank=lora_rank, **TINY)
    adapted = [name for name in model.policy.parameters_of("current") if ".lora_A." in name]
    kinds = ("conv1", "conv2", "time_emb_proj", "to_q", "to_out.0")
    assert all(any(kind in name for name in adapted) for kind in kinds) == bool(lora_rank)
    model.learn(16)
    result = flowrl.evaluate(model, n_samples=16)
    assert result.drift > 0
    assert {"entropy", "edge density"} == set(result.side)
    assert result.w2_to_optimum > 0
    save_before_after(result, model.env.core, tmp_path / "grid.png")
    model.save(tmp_path / "saved")
    again = flowrl.ORWCFMW2.load(tmp_path / "saved", device="cpu")
    x_0 = torch.randn(3, 1, 8, 8)
    index = torch.zeros(3, dtype=torch.long)
    assert torch.equal(*(m.policy.sample(index, x_0=x_0) for m in (model, again)))


def test_the_shipped_flow_draws_digits() -> None:
    """The held-out classifier is sure of most samples, and all ten digits are there."""
    model = flowrl.ORWCFMW2("FlowPolicy", "digits-even", seed=0, device="cpu", **TINY)
    pictures = model.policy.sample(n=256, steps=12)
    assert pictures.amin() >= 0
    assert pictures.amax() <= 1
    probability = model.env.core.judge.network(pictures.clone()).softmax(1)
    assert (probability.amax(1) > 0.9).float().mean() > 0.6
    assert torch.bincount(probability.argmax(1), minlength=10).min() >= 5
    (real, _), _ = real_digits()
    assert pictures.mean() == pytest.approx(real.mean().item(), rel=0.1)


def test_the_flow_works_between_minus_one_and_one(generator: torch.Generator) -> None:
    flow = UNetFlow(UNetShape(1, 8, (8,)))
    pictures = torch.rand(4, 1, 8, 8, generator=generator)
    assert torch.allclose(flow.decode(to_latents(pictures)), pictures, atol=1e-6)
    assert flow.decode(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_classes_and_patches(patch: int, generator: torch.Generator) -> None:
    flow = UNetFlow(UNetShape(3, 16, (8, 16), patch=patch, classes=("cat", "dog"))).eval()
    x, t = torch.randn(4, 3, 16, 16, generator=generator), torch.full((4,), 0.5)
    with torch.inference_mode():
        v, other, empty = (flow(x, t, flow.encode([name] * 4)) for name in ("cat", "dog", None))
    assert v.shape == x.shape
    assert not torch.allclose(v, other)
    assert torch.equal(flow(x, t, tuple(part.expand(4) for part in flow.null_condition())).detach(), empty)
    assert not torch.allclose(flow(x, t + 0.3, flow.encode(["cat"] * 4)), v)
    with pytest.raises(ConfigError, match=r"no class 'dgo', only cat, dog\. Did you mean 'dog'"):
        flow.encode(["cat", "dgo"])


def test_a_flow_without_classes_takes_any_context() -> None:
    flow = UNetFlow(UNetShape(1, 8, (8,)))
    assert flow.encode([None]) == ()
    with pytest.raises(ConfigError, match="guidance_scale at 1"):
        flow.null_condition()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be a whole number from 1 to 256, not 0"),
        ({"channels": 10**9}, "channels must be"),
        ({"layers": 99}, "layers must be"),
        ({"widths": [12]}, "multiples of 8"),
        ({"widths": [8] * 7}, "1 to 6 multiples"),
        ({"widths": 8}, "widths must be a list"),
        ({"widths": [8, 8, 8, 8, 8]}, "cannot be halved 4 times"),
        ({"patch": 3}, "patches of 3 cannot"),
        ({"classes": [1]}, "classes must be at most 10000 names"),
        ({"classes": ["a", "a"]}, "must differ"),
        ({"model": "transformer"}, "is no flow"),
    ],
    ids=str,
)
def test_a_folder_that_describes_no_unet_is_explained(changes: dict, message: str, tmp_path: Path) -> None:
    config = {"model": "unet", "channels": 1, "size": 8, "widths": [8]}
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelLoadError, match=message):
        source_of(str(tmp_path))


def test_a_damaged_classifier_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"missing the file.*config\.json"):
        EvenReward(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "cnn", "size": 8, "width": 100000000}')
    with pytest.raises(ModelLoadError, match="must say kind"):
        EvenReward(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "cnn", "size": 8, "width": 2}')
    with pytest.raises(ModelLoadError, match="Cannot read"):
        EvenReward(tmp_path)


def test_another_flow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples of shape \(1, H, W\), not \(2,\)"):
        flowrl.make("digits-even", flow="gaussians")


def test_grey_pictures_are_measured_as_colour_ones_are(generator: torch.Generator) -> None:
    grey = torch.rand(5, 1, 6, 6, generator=generator)
    colour = grey.expand(-1, 3, -1, -1)
    assert torch.allclose(entropy(grey), entropy(colour))
    assert image_grid(grey).tobytes() == image_grid(colour).tobytes()
    assert wasserstein2(grey, colour[:, :1] + 0.5) == pytest.approx(
        wasserstein2(grey.flatten(1), grey.flatten(1) + 0.5)
    )
