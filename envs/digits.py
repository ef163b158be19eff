"""Handwritten digits: the target-generation task of ORW-CFM-W2 (arXiv 2502.06061), on real pictures.

The flow draws any digit; the reward is the probability that a picture is even, by a classifier. A second classifier,
which training never sees, judges. scikit-learn's digits (8x8) need nothing more; MNIST is read from its idx files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.idx import read_pair
from flowrl.envs.rewards.even import CLASSES, EvenReward
from flowrl.errors import ConfigError
from flowrl.models.loading import ASSETS, source_of
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput

SPLIT_SEED = 0
TEST_SHARE = 0.2
"""Share of test pictures among scikit-learn's; MNIST has test pictures of its own."""


class Digits(NamedTuple):
    """Pictures (n, 1, size, size) in [0, 1] and their labels (n,), int64."""

    pictures: torch.Tensor
    labels: torch.Tensor

    def at(self, index: torch.Tensor) -> Digits:
        """Pick those of these indices."""
        return Digits(self.pictures[index], self.labels[index])


def real_digits(data_dir: str = "") -> tuple[Digits, Digits]:
    """Load real pictures to train and to test on.

    Args:
        data_dir: Folder of MNIST's idx files; scikit-learn's 1,797 pictures when empty.

    Raises:
        ConfigError: Files are missing, damaged, or hold no square pictures of digits.
    """
    if data_dir:
        train, test = (_of_folder(Path(data_dir).expanduser(), part) for part in ("train", "t10k"))
        return train, test
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    pictures = torch.from_numpy(loaded.images).float()[:, None] / 16
    every = Digits(pictures, torch.from_numpy(loaded.target).long())
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(SPLIT_SEED))
    n_test = round(TEST_SHARE * len(pictures))
    return every.at(order[n_test:]), every.at(order[:n_test])


def _of_folder(folder: Path, part: str) -> Digits:
    pictures, labels = read_pair(folder, part)
    if pictures.shape[1] != pictures.shape[2] or int(labels.max()) >= CLASSES:
        size = f"{pictures.shape[1]}x{pictures.shape[2]}"
        raise ConfigError(
            f"'{folder}' holds no square pictures of digits: '{part}' has pictures of {size} and labels up to "
            f"{int(labels.max())}."
        )
    return Digits(pictures[:, None].float() / 255, labels.long())


class EvenDigits:
    """Real even digits: samples of the best flow for this reward that leaves everything else as it is.

    Args:
        data_dir: As `real_digits` takes it.
    """

    def __init__(self, data_dir: str = "") -> None:
        self.data_dir = data_dir
        self.pictures = self._read() if data_dir else None  # scikit-learn's are read when they are asked for

    def _read(self) -> torch.Tensor:
        pictures, labels = real_digits(self.data_dir)[0]
        return pictures[labels % 2 == 0]

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `n` of the training pictures (n, 1, size, size) with replacement."""
        if self.pictures is None:
            self.pictures = self._read()
        return self.pictures[torch.randint(len(self.pictures), (n,), generator=generator)]


class DigitsEnv(GenerationEnv):
    """One-step environment whose sample is a picture (1, size, size) of a digit, with values in [0, 1].

    Components are those of the held-out classifier: `judged even`, and of each digit its share.

    Args:
        flow: Source of the flow.
        reward: The classifier that rewards.
        judge: The one that judges.
        oracle: Real even digits.
    """

    def __init__(
        self,
        flow: Any,
        reward: EvenReward,
        judge: EvenReward,
        oracle: EvenDigits,
        render_mode: str | None = None,
        name: str = "digits-even",
    ) -> None:
        super().__init__(source_of(flow), contexts=[None], low=0.0, high=1.0, name=name, render_mode=render_mode)
        self.reward_function, self.judge, self.oracle = reward, judge, oracle

    def reward(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Compute the probability of an even digit."""
        judged = self.judge(samples, contexts)
        components = {"judged even": judged.reward, **judged.components}
        return RewardOutput(self.reward_function(samples, contexts).reward, components)

    def describe(self) -> list[str]:
        """Write lines for the head of a run."""
        return [*super().describe(), f"reward: {self.reward_function.description}; another one judges"]

    def render(self) -> np.ndarray | None:
        """Draw the last picture as (size, size, 3) uint8, when `render_mode` is "rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return (self._last.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0).repeat(3, axis=2)


@dataclass(frozen=True)
class DigitsConfig:
    """Settings of `digits-even` and `latent-digits`."""

    flow: str = "digits"
    """Flow to fine-tune: "digits" or "latent-digits" (shipped, 8x8), or a folder that `pretrain/digits.py` or
    `pretrain/latent_digits.py` wrote."""
    classifiers: str = ""
    """Folder that holds the classifiers, reward/ and judge/; when not given the flow's own folder, or the shipped ones
    where it has none."""
    data_dir: str = ""
    """Folder of MNIST's idx files, whose even digits samples are measured against; scikit-learn's when not given."""


def _make(config: DigitsConfig, name: str = "digits-even") -> DigitsEnv:
    source = source_of(config.flow)
    channels, size, _ = source.sample_shape if len(source.sample_shape) == 3 else (0, 0, 0)
    if channels != 1:
        raise ConfigError(f"'{name}' needs a flow of samples of shape (1, H, W), not {source.sample_shape}.")
    oracle = EvenDigits(config.data_dir)
    expected = 8 if oracle.pictures is None else oracle.pictures.shape[-1]
    if size != expected:
        raise ConfigError(
            f"The flow '{config.flow}' draws pictures of {size}x{size}, the real ones have {expected}x{expected}. "
            "Train one of that size with `python pretrain/digits.py --data-dir FOLDER --out FLOW`, and give both as "
            "--env.flow FLOW --env.data-dir FOLDER."
        )
    own = Path(config.flow) if (Path(config.flow) / "reward").is_dir() and not source.is_embedded else None
    folder = Path(config.classifiers or own or ASSETS / "digits")
    reward, judge = (EvenReward(folder / kind) for kind in ("reward", "judge"))
    for classifier in (reward, judge):
        if classifier.network.size != size:
            raise ConfigError(
                f"The classifiers in '{folder}' take pictures of {classifier.network.size}x"
                f"{classifier.network.size}, the flow draws {size}x{size}: give others as --env.classifiers FOLDER."
            )
    return DigitsEnv(source, reward, judge, oracle, name=name)


RECOMMENDED: Mapping[str, Any] = {
    "n_samples": 512,
    "batch_size": 128,
    "n_epochs": 4,
    "rollout_steps": 10,
    "learning_rate": 1e-3,
    "tau": 2.5,
    # raw weights, as published: alpha is on their scale. Many samples and few refreshes keep all even digits
    "endpoint.n_samples": 1024,
    "endpoint.n_epochs": 3,
    "endpoint.tau": 4.0,
    "endpoint.weight_normalisation": "none",
    "endpoint.baseline": "mean",
    "endpoint.alpha": 0.3,
    # the published target, which collapses
    "endpoint-free.weight_normalisation": "none",
    "endpoint-free.target": "plain",
}

LATENTS: Mapping[str, Any] = {
    "n_samples": 4096,
    "batch_size": 256,
    "n_epochs": 8,
    "rollout_steps": 8,
    "solver": "midpoint",  # gives the latents of the reference back; Euler's would shrink them
    "learning_rate": 1e-3,
    "ema_decay": 0.98,
    "tau": 2.5,
    "endpoint.weight_normalisation": "none",
    "endpoint.baseline": "mean",  # for these 20 iterations; with it errors grow in longer runs
    "endpoint.alpha": 0.3,
    "endpoint-free.weight_normalisation": "none",
    **{f"{kind}.solver": "euler" for kind in ("gradient", "steps", "steps-free")},  # what noisy samplers take
    **{f"{kind}.rollout_steps": 32 for kind in ("gradient", "steps", "steps-free")},
}

SPECS = [
    EnvSpec(
        name="digits-even",
        differentiable=True,
        factory=_make,
        config=DigitsConfig(),
        recommended=lambda config: RECOMMENDED,
        total_timesteps=9_216,
        summary="real handwritten digits of 8x8 pixels (or MNIST): make them even, by a classifier's probability",
    ),
    EnvSpec(
        name="latent-digits",
        differentiable=True,
        factory=lambda config: _make(config, "latent-digits"),
        config=DigitsConfig(flow="latent-digits"),
        recommended=lambda config: LATENTS,
        total_timesteps=81_920,
        summary="the same through the latents of a GAN: which of 16 latents it draws is learnt, the GAN stays as it is",
    ),
]
