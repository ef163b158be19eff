"""Text-to-image environments: prompts, a Stable Diffusion 3 flow, and a reward of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowrl.envs.base import GenerationEnv
from flowrl.envs.rewards import make_reward
from flowrl.envs.rewards.catalogue import RewardFunction, options_for
from flowrl.models.loading import EMBEDDED, FlowSource, chosen_sd3
from flowrl.registry import EnvSpec
from flowrl.types import Contexts, RewardOutput

PHOTO_PROMPTS = (
    "a photo of a cat",
    "a photo of a dog",
    "a bird on a branch",
    "a horse in a field",
    "a lighthouse by the sea",
    "a street in an old town",
    "a bowl of fruit on a table",
    "a mountain lake at dawn",
)


@dataclass(frozen=True)
class TextToImageConfig:
    """Settings of the `sd3-*` environments."""

    flow: str = "auto"
    """Flow to fine-tune: "mini-sd3" (ships with flowrl), a folder, or a hub name such as
    stabilityai/stable-diffusion-3.5-medium. "auto" takes mini-sd3 where there is no CUDA device."""
    reward: str = "auto"
    """What to score: "auto" is the reward in the environment's name; or another registered one, or module:name."""
    reward_options: tuple[str, ...] = ()
    """Options of the reward, each as REWARD.OPTION=VALUE: aesthetic.head=FILE, aesthetic.clip=FOLDER."""
    prompts: tuple[str, ...] = ()
    """Prompts to train on, instead of the environment's own."""
    resolution: int | None = None
    """Height and width of the images in pixels; the pipeline's own when not given."""


class TextToImageEnv(GenerationEnv):
    """The sample is an image (3, H, W) with values in [0, 1], the context a prompt.

    Args:
        flow: Source of the flow, see `FlowSource.of`.
        prompts: Prompts to draw contexts from.
        reward: `(images (B, 3, H, W) in [0, 1], B prompts) -> (B,)`, or a `RewardOutput`.
        reward_name: What the head of a run says of the reward.
    """

    def __init__(
        self,
        flow: Any,
        prompts: Sequence[str],
        reward: RewardFunction,
        *,
        name: str = "text-to-image",
        reward_name: str = "",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(FlowSource.of(flow), contexts=prompts, low=0.0, high=1.0, name=name, render_mode=render_mode)
        self.reward = reward
        self.reward_name = reward_name or getattr(reward, "description", getattr(reward, "__name__", "custom"))

    def score(self, samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Reward of images (B, 3, H, W)."""
        output = self.reward(samples, contexts)
        return output if isinstance(output, RewardOutput) else RewardOutput(output)

    def describe(self) -> list[str]:
        """Lines for the head of a run."""
        return [*super().describe(), f"reward: {self.reward_name}", f"prompts: {len(self.contexts)}"]

    def render(self) -> np.ndarray | None:
        """The last image as (H, W, 3) uint8, when `render_mode` is "rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return (self._last.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def _own_prompts(reward: str, flow: FlowSource) -> Sequence[str]:
    """Prompts that suit the reward: the small world's own for mini-sd3 and for counting."""
    from flowrl.envs.shapes import full_prompts, open_prompts

    if reward == "count":
        return full_prompts()
    return open_prompts() if flow.is_embedded else PHOTO_PROMPTS


def _factory(reward: str) -> Callable[..., TextToImageEnv]:
    def make(config: TextToImageConfig, render_mode: str | None = None) -> TextToImageEnv:
        flow = FlowSource.of(config.flow, resolution=config.resolution)
        wanted = reward if config.reward == "auto" else config.reward
        chosen, note = wanted, ""
        if config.reward == "auto" and reward == "aesthetic" and flow.is_embedded:
            chosen = "colourfulness"
            note = "; the LAION predictor is not meant for drawings this small: choose it with --env.reward aesthetic"
        scorer = make_reward(chosen, options_for(chosen, config.reward_options))
        return TextToImageEnv(
            flow,
            config.prompts or _own_prompts(wanted, flow),
            scorer,
            name=f"sd3-{reward}",
            reward_name=getattr(scorer, "description", chosen) + note,
            render_mode=render_mode,
        )

    return make


def recommended_for(flow: str, reward: str = "") -> Mapping[str, Any]:
    """Algorithm settings that suit a text-to-image flow, the embedded one or a large one, and a reward."""
    name = chosen_sd3() if flow in ("auto", "sd3") else flow
    model = MINI_MODEL if name in EMBEDDED else LARGE_MODEL
    return {**model, **RIGHT_OR_WRONG} if reward == "count" else model


IMAGES: Mapping[str, Any] = {
    "n_samples": 512,
    "group_size": 8,
    "batch_size": 64,
    "n_epochs": 3,
    "rollout_steps": 16,
    "learning_rate": 2e-4,
    "warmup_updates": 10,
    "standardise": "group",
    "tau": 1.0,
    "orw_w2.alpha": 0.25,
    "orw_kl.alpha": 0.5,
    "ema_decay": 0.9,
}
MINI_MODEL: Mapping[str, Any] = {
    **IMAGES,
    # of the baselines, by benchmarks/tuning/laptop.toml
    "kl.learning_rate": 4e-4,
    "raft.n_epochs": 12,
    "raft.learning_rate": 4e-4,
    "ddpo.clip_range": 1e-3,
    "dpok.clip_range": 1e-3,
    "flow_grpo.clip_range": 1e-3,
}
RIGHT_OR_WRONG: Mapping[str, Any] = {
    "tau": 0.7,
    "orw_w2.alpha": 0.1,
    "orw_kl.alpha": 0.1,
    "baseline": "mean",  # wrong samples must repel; measured over 25 refreshes, longer runs need "clipped"
}
LARGE_MODEL: Mapping[str, Any] = {
    **IMAGES,
    "batch_size": 8,
    "rollout_batch_size": 8,
    "rollout_steps": 20,
    "guidance_scale": 4.5,
    "lora_rank": 32,
}

SPECS = [
    EnvSpec(
        name=f"sd3-{reward}",
        factory=_factory(reward),
        config=TextToImageConfig(),
        recommended=lambda config, reward=reward: recommended_for(  # type: ignore[misc]
            config.flow, reward if config.reward == "auto" else config.reward
        ),
        total_timesteps=total_timesteps,
        summary=summary,
    )
    for reward, total_timesteps, summary in (
        ("aesthetic", 7_680, "pleasing images: LAION predictor; colourfulness on the embedded model"),
        ("compress", 7_680, "images that compress well: minus the JPEG size in kB"),
        ("count", 12_800, "the asked number, colour and shape, checked by image analysis"),
    )
]
