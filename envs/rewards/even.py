"""Probability that a picture of a digit is even, by a small classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowrl.checks import is_whole
from flowrl.envs.rewards.catalogue import ModelReward, register_reward
from flowrl.errors import ModelLoadError, RewardError
from flowrl.models.loading import ASSETS, read_json
from flowrl.types import Contexts, RewardOutput

CLASSES = 10
KINDS = ("cnn", "mlp")
LARGEST_SIZE, WIDEST = 256, 4096


class DigitClassifier(nn.Module):
    """Classifier of digits: pictures (B, 1, size, size) in [0, 1] -> logits (B, 10).

    Args:
        kind: "cnn", three convolutions that halve the picture twice; or "mlp", two hidden layers on its pixels.
        size: Height and width of a picture in pixels.
        width: Channels of the first convolution, or units of a hidden layer.
        dropout: Before the last layer, in training.
    """

    def __init__(self, kind: str, size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        if kind == "mlp":
            layers = [nn.Flatten(), nn.Linear(size**2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
            n = width
        else:
            layers, n = [], 1
            for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
                layers += [nn.Conv2d(n, out, 3, stride, 1), nn.SiLU()]
                n = out
            layers.append(nn.Flatten())
            n *= (-(-size // 4)) ** 2
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(n, CLASSES))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        return self.layers(2 * pictures - 1)


def load_classifier(folder: Path) -> DigitClassifier:
    """Load a frozen classifier from a folder: config.json (kind, size, width) and model.safetensors.

    Raises:
        ModelLoadError: A file is missing, or does not describe or hold a classifier.
    """
    from safetensors.torch import load_file

    config = read_json(folder / "config.json", f"digit classifier '{folder}'")
    kind, size, width = (config.get(key, 0) for key in ("kind", "size", "width"))
    if kind not in KINDS or not (is_whole(size, 1, LARGEST_SIZE) and is_whole(width, 1, WIDEST)):
        raise ModelLoadError(
            f"'{folder / 'config.json'}' must say kind ({' or '.join(KINDS)}), size (1 to {LARGEST_SIZE}) and width (1 "
            f"to {WIDEST}) of a digit classifier."
        )
    network: Any = DigitClassifier(kind, size, width)
    try:
        state = load_file(folder / "model.safetensors")
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except Exception as error:
        raise ModelLoadError(f"Cannot read '{folder / 'model.safetensors'}': {error}") from error
    return network.eval().requires_grad_(False)


@register_reward("even")
class EvenReward(ModelReward):
    """Probability that a picture (B, 1, size, size) of a digit is even, under a classifier.

    The shares of the digits among its answers are components.

    Args:
        model: Folder of the classifier; the shipped held-out one of `digits-even` when not given.
    """

    def __init__(self, model: Path = ASSETS / "digits" / "judge") -> None:
        self.network = load_classifier(model)
        self.modules = (self.network,)
        self.description = f"probability of an even digit under {model.name}"

    def reward(self, images: torch.Tensor, prompts: Contexts) -> RewardOutput:
        """Reward pictures; each component is 1 for pictures taken for that digit.

        Raises:
            RewardError: They are of another size, or have colours.
        """
        shape = (1, self.network.size, self.network.size)
        if tuple(images.shape[1:]) != shape:
            raise RewardError(
                f"The reward 'even' takes pictures (B, {shape[0]}, {shape[1]}, {shape[2]}) of digits, not "
                f"{tuple(images.shape)}."
            )
        probability = self.network(images.float()).softmax(dim=1)
        answers = nn.functional.one_hot(probability.argmax(dim=1), CLASSES).float()
        return RewardOutput(probability[:, ::2].sum(1), {f"digit {k}": answers[:, k] for k in range(CLASSES)})
