"""A critic: what is to be expected of a sample whose noisy state is known."""

from __future__ import annotations

import torch
from torch import nn


class Critic(nn.Module):
    """Expected reward of a state: `(x_k (B, ...), t (B,), context_ids (B,)) -> (B,)`; zero at first."""

    def __init__(self, dim: int, n_contexts: int, width: int) -> None:
        super().__init__()
        self.context = nn.Embedding(n_contexts, width)
        self.state = nn.Linear(dim + 1, width)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context_ids: torch.Tensor) -> torch.Tensor:
        """Estimate the expected reward (B,)."""
        state = self.state(torch.cat([x.flatten(1), t[:, None]], dim=1))
        return self.head(state + self.context(context_ids)).squeeze(1)
