"""Figures of samples and their rewards: means with their intervals, by prompt, distance to an exact optimum."""

from __future__ import annotations

import math
from typing import Any

import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.prompts import are_none, with_picture
from flowrl.evaluation.results import SampleStatistics
from flowrl.functional import metrics

W2_POINTS = 2048
"""Exact transport is cubic in the number of points; more than this is not used."""


def statistics(
    env: Any,
    samples: torch.Tensor,
    context_ids: torch.Tensor,
    reward: torch.Tensor,
    components: dict[str, torch.Tensor],
    seed: int,
) -> SampleStatistics:
    """Summarise samples (n, *sample_shape) of contexts (n,) and their rewards (n,); `seed`: of exact samples."""
    n_pairs = min(len(samples), metrics.n_compared(samples, 2048, 2**29))  # 682 images of 512 pixels, 2 GiB
    return SampleStatistics(
        reward_mean=reward.mean().item(),
        reward_ci=metrics.mean_interval(reward, clusters(env, context_ids)),
        reward_std=reward.std(correction=0).item(),
        components={key: value.mean().item() for key, value in components.items()},
        diversity=metrics.diversity(samples[:n_pairs], context_ids[:n_pairs]).item(),
        w2_to_optimum=math.nan if env.oracle is None else _w2_to_optimum(env, samples, seed),
    )


def clusters(env: GenerationEnv, context_ids: torch.Tensor) -> torch.Tensor | None:
    """Give the prompts of samples where those drawn stand for others, None where all were drawn."""
    return None if len(context_ids.unique()) == len(env.contexts) else context_ids


def per_prompt(
    env: GenerationEnv, context_ids: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> list[dict[str, Any]]:
    """Give the mean rewards (n,) of each context that was drawn, before and after; nothing where there are none."""
    if are_none(env.contexts):
        return []
    drawn, index = context_ids.unique(return_inverse=True)
    n = torch.bincount(index)
    means = [torch.zeros_like(n, dtype=r.dtype).index_add_(0, index, r) / n for r in (before, after)]
    rows = zip([env.contexts[i] for i in drawn.tolist()], n.tolist(), means[0].tolist(), means[1].tolist())
    return [{"prompt": str(c), **with_picture(c), "n": k, "reference": a, "trained": b} for c, k, a, b in rows]


def _exact(env: Any, n: int, seed: int) -> torch.Tensor:
    return env.oracle.sample(n, torch.Generator().manual_seed(seed))


def _w2_to_optimum(env: Any, samples: torch.Tensor, seed: int) -> float:
    points = samples[:W2_POINTS].cpu()
    return metrics.wasserstein2(points, _exact(env, len(points), seed + 1))


def w2_floor(env: Any, n_samples: int, seed: int) -> float:
    """Measure W2 of exact samples of the optimum to others of it; nan where it is not known."""
    if env.oracle is None:
        return math.nan
    n = min(n_samples, W2_POINTS)
    return metrics.wasserstein2(_exact(env, n, seed + 1), _exact(env, n, seed + 2))
