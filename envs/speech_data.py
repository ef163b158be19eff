"""Data of `speech-mos`: sentences, where their words are, and random prosodies around those of a synthesiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORDS = 5
"""Words of every sentence."""
ROWS = ("pitch", "duration", "loudness")
"""Rows of a prosody (3, WORDS): mean pitch of a word in semitones above `BASE` Hz; log2 of its length in seconds; its
loudness in dB above the synthesiser's."""
BASE = 200.0
LEVEL = (3.0, 0.25, 0.0)
"""Standard deviations, by row, of what a random prosody adds to all words of a sentence."""
EACH = (5.0, 0.5, 5.0)
"""The same of what it adds to each word by itself."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of five words.

    Attributes:
        text: What is said.
        edges: Frame of the synthesiser, of 12.5 ms, where each word begins, and the one where the last one is over.
    """

    text: str
    edges: tuple[int, ...]


SENTENCES = (
    Sentence("She has a new book.", (18, 31, 45, 48, 64, 98)),
    Sentence("I would like some water.", (24, 34, 44, 60, 78, 112)),
    Sentence("He never said a word.", (19, 31, 55, 72, 76, 111)),
    Sentence("My brother plays the piano.", (21, 37, 63, 91, 97, 139)),
)
"""Contexts. `pretrain/speech.py --align` finds the edges by forced alignment of what the synthesiser says."""
TEXTS = tuple(sentence.text for sentence in SENTENCES)


def perturbed(prosodies: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add to prosodies (n, 3, WORDS) what random ones differ by: a level for all words, and a part of each word."""
    n = len(prosodies)
    level = torch.tensor(LEVEL)[:, None] * torch.randn(n, len(ROWS), 1, generator=generator)
    each = torch.tensor(EACH)[:, None] * torch.randn(n, len(ROWS), WORDS, generator=generator)
    return prosodies + level + each
