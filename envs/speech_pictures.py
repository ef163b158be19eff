"""Pictures of prosodies: a bar for each word, as long as the word, as high as its pitch, as dark as it is loud."""

from __future__ import annotations

import torch

SIZE = (72, 144)
"""Height and width."""
SECONDS, SEMITONES, DECIBELS = 3.2, 12.0, 12.0
"""Time from left to right, and what is at the top (and, negative, at the bottom) and darkest."""
THICK = 4


def melodies(samples: torch.Tensor) -> torch.Tensor:
    """Draw prosodies (B, 3, words) as images (B, 1, *SIZE): time to the right from the first word, pitch upwards."""
    pitch, duration, loudness = samples.detach().float().cpu().unbind(1)
    height, width = SIZE
    ends = (2 ** duration.clamp(-8, 2)).cumsum(1) / SECONDS * width
    starts = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    middle = (0.5 - pitch.clamp(-SEMITONES, SEMITONES) / (2 * SEMITONES)) * (height - THICK) + THICK / 2
    dark = (0.6 + 0.4 * loudness / DECIBELS).clamp(0.2, 1)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    across = (x >= starts[..., None] + 0.5) & (x < ends[..., None] - 0.5)
    along = (y - middle[..., None]).abs() <= THICK / 2
    inked = (across[:, :, None] & along[..., None]) * dark[..., None, None]
    paper = torch.ones(height, 1)
    paper[height // 2] = 0.85  # the middle of the range
    return (paper - inked.amax(1)).clamp_min(0)[:, None]
