"""Win rates: how often the trained flow's sample beats the reference's of the same context and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flowrl.envs.base import check_reward
from flowrl.envs.rewards.frames import pairs_over_frames
from flowrl.errors import RewardError, raised_by
from flowrl.functional.metrics import wins
from flowrl.types import Contexts

Comparison = Callable[[torch.Tensor, torch.Tensor, Contexts], torch.Tensor]
"""Probabilities (B,) that samples (B, ...) are better than others (B, ...) of the same contexts."""


def comparisons(judges: Mapping[str, tuple[bool, Any]]) -> dict[str, Comparison | None]:
    """Find how each judge compares two samples: None where its values do.

    Args:
        judges: By name, whether the judge compares the samples of a call, and the judge. Values of such a one say
            nothing across calls: its method `win_rate` does, and without one it is left out.
    """
    found: dict[str, Comparison | None] = {}
    for name, (is_groupwise, judge) in judges.items():
        if not is_groupwise:
            found[name] = None
        elif hasattr(judge, "win_rate"):
            found[name] = pairs_over_frames(judge)
    return found


def outcomes(
    comparisons: Mapping[str, Comparison | None],
    values: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    samples: tuple[torch.Tensor, torch.Tensor],
    contexts: Contexts,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Compute how the second of each pair of samples fares against the first, by name: 1 wins, 1/2 ties, (n_samples,).

    Args:
        comparisons: How each judge compares.
        values: Values (n_samples,) of the first and of the second samples, by name.
        samples: The first and the second, (n_samples, ...) each.
        contexts: Contexts that both are of.
        batch_size: Pairs that are compared at once.
        device: Where they are compared.

    Raises:
        RewardError: A judge raised, or gives something other than a finite number for each pair.
    """
    found = {}
    for name, comparison in comparisons.items():
        if comparison is None:
            found[name] = wins(values[1][name], values[0][name]).cpu()
            continue
        parts = []
        for i, a, b in zip(range(0, len(contexts), batch_size), *(part.split(batch_size) for part in samples)):
            asked = contexts[i : i + batch_size]
            with raised_by(f"The win_rate of '{name}'", RewardError):
                b, a = (part.to(device, copy=True) for part in (b, a))  # which it may change
                probability = comparison(b, a, asked)
            parts.append(check_reward(probability, b, asked, f"{name}, win_rate").cpu())
        found[name] = torch.cat(parts)
    return found
