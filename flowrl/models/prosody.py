"""A velocity network for prosodies of sentences: pitch, length and loudness of each word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from flowrl.checks import is_finite, is_whole
from flowrl.errors import ConfigError
from flowrl.models.base import VelocityModel
from flowrl.models.mlp import MLP
from flowrl.types import Condition, Contexts

LARGEST, LARGEST_WIDTH, DEEPEST = 64, 4096, 100


class ProsodyFlow(VelocityModel):
    """An MLP whose samples are prosodies (rows, words), conditioned on which sentence it is.

    Latents are `(sample - centre) / scale`, row by row.

    Args:
        sentences: Texts that it was trained for.
        words: Words of each.
        centre: Mean of the data, a number for each row.
        scale: Standard deviation of the data, likewise.
        width: Width of the hidden layers.
        depth: Number of them.

    Raises:
        ConfigError: Sizes or numbers without meaning; says which.
    """

    centre: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        sentences: Sequence[str],
        words: int,
        centre: Sequence[float],
        scale: Sequence[float],
        width: int = 256,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.sentences = check_sentences(sentences)
        rows = [len(numbers) if isinstance(numbers, list | tuple) else 0 for numbers in (centre, scale)]
        if not (is_whole(words, 1, LARGEST) and 1 <= rows[0] <= LARGEST and rows[0] == rows[1]):
            raise ConfigError(f"words must be from 1 to {LARGEST}, centre and scale as many numbers each.")
        if not all(is_finite(number) for number in [*centre, *scale]) or min(scale) <= 0:
            raise ConfigError(f"centre must be numbers and scale positive ones, not {centre!r} and {scale!r}.")
        if not (is_whole(width, 1, LARGEST_WIDTH) and is_whole(depth, 1, DEEPEST)):
            raise ConfigError(f"width must be from 1 to {LARGEST_WIDTH} and depth to {DEEPEST}.")
        self.latent_shape = self.sample_shape = (rows[0], words)
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32)[:, None], persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32)[:, None], persistent=False)
        self.network = MLP(rows[0] * words, width, depth, n_features=len(self.sentences))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Compute the velocity."""
        return self.network(x_t.flatten(1), t, *cond).view_as(x_t)

    def encode(self, contexts: Contexts) -> Condition:
        """Encode sentences as one-hot rows (n, sentences).

        Raises:
            ConfigError: One that the flow was not trained for.
        """
        unknown = [context for context in contexts if context not in self.sentences]
        if unknown:
            raise ConfigError(
                f"This flow has prosodies of {', '.join(map(repr, self.sentences))} and none of {unknown[0]!r}: train "
                "one by pretrain/speech.py."
            )
        index = torch.tensor([self.sentences.index(context) for context in contexts])
        return (nn.functional.one_hot(index, len(self.sentences)).float(),)

    def decode(self, x_1: torch.Tensor) -> torch.Tensor:
        """Decode latents to prosodies (B, rows, words)."""
        return self.centre + self.scale * x_1

    def encode_samples(self, samples: torch.Tensor) -> torch.Tensor:
        """Encode prosodies (B, rows, words) as latents: the inverse of `decode`."""
        return (samples - self.centre) / self.scale


def check_sentences(sentences: Sequence[str]) -> list[str]:
    """Check the texts that a config.json names, and give them as a list."""
    are_texts = isinstance(sentences, list | tuple) and all(isinstance(text, str) and text for text in sentences)
    if not are_texts or not 1 <= len(sentences) <= LARGEST or len(set(sentences)) < len(sentences):
        raise ConfigError(f"sentences must be 1 to {LARGEST} different texts.")
    return list(sentences)
