"""Agreement of a picture with the asked relation of two things: objects by the image analysis of `count`.

For pictures of the world of ``flowrl.envs.spatial``: two flat objects on a flat background. A relation holds as in
T2I-CompBench (Huang et al., NeurIPS 2023, arXiv 2307.06350): the centres lie that way, and further apart along it than
across.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.envs.rewards.catalogue import register_reward
from flowrl.envs.rewards.count import Finding, analyse
from flowrl.envs.rewards.ranges import UNIT
from flowrl.envs.spatial import RELATIONS, Pair, Thing, parse_pair
from flowrl.types import RewardOutput

PARTS = ("two", "first", "second", "relation")


@register_reward("spatial")
class SpatialReward:
    """Share of what is right: two objects, the first thing, the second thing, their relation."""

    description = "share of number, first thing, second thing and relation that are right"
    scale = 0.2
    takes = UNIT
    on_host = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Reward images (B, 3, H, W) in [0, 1], with values in [0, 1].

        Components, each 1 or 0: `two` (there are two objects), `first` and `second` (an object has that colour and
        shape), `relation` (both are there, and one lies as asked to the other), `all_right` (their product).

        Raises:
            ValueError: If sizes differ, or a prompt is not one of the world of pairs.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"expected images (B, 3, H, W) and B prompts, not {tuple(images.shape)} and {len(prompts)}"
            )
        asked = [parse_pair(prompt) for prompt in prompts]
        rows = [_judge(finding, pair) for finding, pair in zip(analyse(images), asked)]
        right = torch.tensor(rows, dtype=torch.float32).view(len(prompts), len(PARTS))
        components = dict(zip(PARTS, right.unbind(dim=1)))
        return RewardOutput(right.mean(dim=1), {**components, "all_right": right.prod(dim=1)})


def _judge(finding: Finding, asked: Pair) -> tuple[bool, bool, bool, bool]:
    firsts, seconds = (_places(finding, thing) for thing in (asked.first, asked.second))
    related = any(_holds(asked.relation, a, b) for a in firsts for b in seconds)
    return len(finding.shapes) == 2, bool(firsts), bool(seconds), related


def _places(finding: Finding, thing: Thing) -> list[tuple[float, float]]:
    """Find the centres of the objects that are this thing."""
    found = zip(finding.colours, finding.shapes, finding.centres)
    return [centre for colour, shape, centre in found if shape == thing.shape and thing.colour in (None, colour)]


def _holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    right, down = RELATIONS[relation]
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = (dx * right, abs(dy)) if right else (dy * down, abs(dx))
    return along > across
