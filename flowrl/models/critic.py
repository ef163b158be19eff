"""A small network that estimates a number of a noisy state."""

from __future__ import annotations

import torch
from torch import nn

from flowrl.models.mlp import TimeFeatures


class StateCritic(nn.Module):
    """Expectation given a state, `(x_t (B, ...), t (B,), context_ids (B,)) -> (B,)`; `start` exactly, at first.

    Args:
        dim: Dimensions of a state.
        n_contexts: Number of contexts.
        width: Width of its two hidden layers.
        start: What it says before it is trained.
    """

    def __init__(self, dim: int, n_contexts: int, width: int = 128, start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.time = TimeFeatures()
        self.context = nn.Embedding(n_contexts, width)
        nn.init.zeros_(self.context.weight)
        self.state = nn.Linear(dim + 2 * len(self.time.frequencies), width)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Estimate the expectation (B,)."""
        state = self.state(torch.cat([x.flatten(1), self.time(t)], dim=1))
        return self.start + self.head(state + self.context(context_ids)).squeeze(1)
