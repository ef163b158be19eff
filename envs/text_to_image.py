"""Text-to-image environments: prompts, a Stable Diffusion 3 flow, and a reward of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowrl.envs.function_env import FunctionEnv
from flowrl.envs.prompts import PromptSet, prompts_from
from flowrl.envs.recommended_images import BYTES, COLOURS, LARGE_MODEL, LAYOUT, MINI_MODEL, OWN, RIGHT_OR_WRONG
from flowrl.envs.rewards.catalogue import RewardFunction, parse_options
from flowrl.envs.rewards.frames import MEAN_OVER_FRAMES, is_of_frames, over_frames
from flowrl.envs.rewards.mixture import make_mixture, parse_mixture
from flowrl.envs.sizes import sides
from flowrl.errors import ConfigError
from flowrl.models.loading import EMBEDDED, FlowSource, chosen_sd3, source_of
from flowrl.models.pipeline_options import PipelineOptions
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
    """Flow to fine-tune: "mini-sd3", "mini-words" or "mini-spatial" (ship with flowrl), a folder, or a hub name such as
    stabilityai/stable-diffusion-3.5-medium, which "auto" takes where there is a CUDA device and its files can be had
    (in the cache, or the hub answers for them), and else a shipped one."""
    reward: str = "auto"
    """Reward: "auto" is the one in the environment's name; or another registered one, module:name,
    winrate(NAME) (share of the samples of the same prompt that are beaten), or a weighted sum of them written
    NAME[:WEIGHT[:NORMALISATION]]+..., as clip:0.7+aesthetic:0.3; NORMALISATION is fixed, running or group."""
    reward_options: tuple[str, ...] = ()
    """Options of rewards, each as REWARD.OPTION=VALUE: aesthetic.head=FILE, clip.model=FOLDER."""
    prompts: tuple[str, ...] = ()
    """Prompts to train on, instead of the environment's own."""
    prompt_file: str = ""
    """Prompts from a file (.txt or .jsonl) or a shipped set: animals, colours, counts, spatial, words."""
    held_out_share: float = 0.0
    """Share of the prompts to keep out of training, for evaluation; a file may say itself which."""
    resolution: int | str | None = None
    """Height and width of the samples in pixels, one number for both or HEIGHTxWIDTH as 768x1344; the pipeline's own
    when not given."""
    height: int | None = None
    """Height in pixels, with `width`, in place of `resolution`."""
    width: int | None = None
    """Width in pixels."""
    frames: int | None = None
    """Frames of a video, or of the latents of a sound; the pipeline's own number when not given."""
    sequence_length: int | None = None
    """Tokens of a prompt; as in the pipeline's own call when not given."""
    embedded_guidance: float | None = None
    """Guidance scale that a guidance-distilled network is always given, so that `guidance_scale` is of classifier-free
    guidance; without it, the network is given `guidance_scale`."""
    decode_batch: int = 64
    """Images, or frames of videos, that the autoencoder decodes at once; at least one sample. On a CPU images are at
    most 8 a thread."""
    vae_tiling: bool = False
    """Decode large images in tiles, for little memory."""
    t5: bool = True
    """Load the T5 text encoder; Stable Diffusion 3 can do without it (10 GB less to load)."""

    def __post_init__(self) -> None:
        if self.decode_batch < 1:
            raise ConfigError(f"decode_batch must be positive, not {self.decode_batch}.")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigError(f"sequence_length must be positive, not {self.sequence_length}.")
        if self.embedded_guidance is not None and not math.isfinite(self.embedded_guidance):
            raise ConfigError(f"embedded_guidance must be finite, not {self.embedded_guidance}.")
        sides(self.resolution, self.height, self.width)

    def pipeline(self) -> PipelineOptions:
        """Collect how the pipeline is used."""
        return PipelineOptions(
            sides(self.resolution, self.height, self.width),
            self.decode_batch,
            self.vae_tiling,
            self.t5,
            self.sequence_length,
            self.embedded_guidance,
            self.frames,
        )


class TextToImageEnv(FunctionEnv):
    """A text-to-image task: the sample is an image (3, H, W) with values in [0, 1], the context a prompt.

    Or a text-to-video task: a sample is (T, 3, H, W) then. A reward of images is averaged over its frames, one that
    says `takes_videos = True` is given whole videos. Or one of sounds (channels, values) in [-1, 1], with a reward that
    says `takes_sounds = True`.

    Args:
        flow: Source of the flow, see `source_of`.
        prompts: Prompts to draw contexts from.
        reward: `(images (B, 3, H, W) in [0, 1], B prompts) -> (B,)`, or a `RewardOutput`.
        reward_name: Description of the reward for the head of a run.
        held_out: Prompts that are never drawn, for evaluation.

    Raises:
        ConfigError: The flow draws sounds, and the reward does not say that it takes them.
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
        held_out: Sequence[str] = (),
    ) -> None:
        source = source_of(flow)
        if source.sample_rate and not getattr(reward, "takes_sounds", False):
            raise ConfigError(
                f"The flow '{source.source}' draws sounds {source.sample_shape}, and the reward is of images: give one "
                "of sounds (B, channels, values) in [-1, 1], that says takes_sounds = True."
            )
        super().__init__(
            source,
            contexts=prompts,
            low=-1.0 if source.sample_rate else 0.0,
            high=1.0,
            name=name,
            render_mode=render_mode,
            held_out=held_out,
        )
        self.reward_function = reward
        self.groupwise = getattr(reward, "groupwise", False)
        self.reward_name = reward_name or getattr(reward, "description", getattr(reward, "__name__", "custom"))
        if self.flow.frame_rate and is_of_frames(reward):
            self.reward_name += f" ({MEAN_OVER_FRAMES})"

    def asked(self, function: Callable[..., Any], samples: torch.Tensor, contexts: Contexts) -> RewardOutput:
        """Ask a function for the rewards of images (B, 3, H, W), or of videos (B, T, 3, H, W)."""
        return super().asked(over_frames(function), samples, contexts)

    def describe(self) -> list[str]:
        """Write lines for the head of a run."""
        prompts = f"prompts: {len(self.contexts)}"
        prompts += f" to train on, {len(self.held_out)} held out" if self.held_out else ""
        prompts += "" if self.shares is None else ", drawn in proportion to their weights"
        return [*super().describe(), f"reward: {self.reward_name}", prompts]

    def render(self) -> np.ndarray | None:
        """Draw the last image as (H, W, 3) uint8, when `render_mode` is "rgb_array"; a video's frames in a row."""
        if self.render_mode != "rgb_array":
            return None
        row = self._last if self._last.ndim == 3 else np.concatenate(self._last, axis=-1)
        return (row.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


OWN_WORLD: Mapping[str, str] = {"ocr": "mini-words", "spatial": "mini-spatial"}
"""Rewards that have a shipped pipeline of their own."""


def embedded_for(reward: str) -> str:
    """Choose the shipped pipeline that suits a reward: words for reading, pairs for relations, else shapes."""
    names = [part.name for part in parse_mixture(reward)] if reward else []
    return next((OWN_WORLD[name] for name in names if name in OWN_WORLD), "mini-sd3")


def _own_prompts(reward: str, flow: FlowSource) -> Sequence[str] | str:
    """Choose prompts that suit the reward: the small worlds' own for embedded flows and for counting."""
    from flowrl.envs.shapes import full_prompts, open_prompts
    from flowrl.envs.spatial import pair_prompts
    from flowrl.envs.words import word_prompts

    if flow.source == "mini-words":
        return word_prompts()
    if "mini-spatial" in (flow.source, embedded_for(reward)):
        return pair_prompts()
    if embedded_for(reward) == "mini-words":
        return "words"
    if any(part.name == "count" for part in parse_mixture(reward)):
        return full_prompts()
    return open_prompts() if flow.is_embedded else PHOTO_PROMPTS


def _prompts(config: TextToImageConfig, own: Sequence[str] | str) -> PromptSet:
    if config.prompts and config.prompt_file:
        raise ConfigError("--env.prompts and --env.prompt-file both say what to train on: give one of them.")
    for prompt in config.prompts:
        if prompt.lower().endswith((".txt", ".jsonl")) and os.path.isfile(prompt):
            raise ConfigError(f"--env.prompts takes prompts, and '{prompt}' is a file: --env.prompt-file {prompt}.")
    return prompts_from(config.prompt_file or config.prompts or own, config.held_out_share)


def _factory(reward: str) -> Callable[..., TextToImageEnv]:
    def make(config: TextToImageConfig, render_mode: str | None = None) -> TextToImageEnv:
        wanted = reward if config.reward == "auto" else config.reward
        flow = source_of(config.flow, pipeline=config.pipeline(), embedded=embedded_for(wanted))
        chosen, note = wanted, ""
        if config.reward == "auto" and reward == "aesthetic" and flow.is_embedded:
            chosen = "colourfulness"
            note = "; the LAION predictor is not meant for drawings this small: choose it with --env.reward aesthetic"
        reward_function = make_mixture(chosen, parse_options(config.reward_options))
        prompts = _prompts(config, _own_prompts(wanted, flow))
        return TextToImageEnv(
            flow,
            prompts.train,
            reward_function,
            name=f"sd3-{reward}",
            reward_name=getattr(reward_function, "description", chosen) + note,
            render_mode=render_mode,
            held_out=prompts.held_out,
        )

    return make


def recommended_for(flow: str, reward: str = "") -> Mapping[str, Any]:
    """Recommend algorithm settings for a text-to-image flow, the embedded one or a large one, and a reward."""
    name = chosen_sd3(embedded_for(reward))[0] if flow in ("auto", "sd3") else flow
    model = MINI_MODEL if name in EMBEDDED else LARGE_MODEL
    if name in OWN:
        return {**model, **OWN[name]}
    if reward == "count":
        return {**model, **RIGHT_OR_WRONG, **(LAYOUT if model is MINI_MODEL else {})}
    own = {"aesthetic": COLOURS, "colourfulness": COLOURS, "compress": BYTES}.get(reward, {})
    return {**model, **(own if model is MINI_MODEL else {})}


SPECS = [
    EnvSpec(
        name=f"sd3-{reward}",
        differentiable=reward == "aesthetic",
        factory=_factory(reward),
        config=TextToImageConfig(),
        recommended=lambda config, reward=reward: recommended_for(  # type: ignore[misc]
            config.flow, reward if config.reward == "auto" else config.reward
        ),
        total_timesteps=total_timesteps,
        summary=summary,
    )
    for reward, total_timesteps, summary in (
        ("aesthetic", 5_120, "pleasing images: LAION predictor; colourfulness on the embedded model"),
        ("compress", 7_680, "images that compress well: minus the JPEG size in kB"),
        ("count", 5_120, "the asked number, colour and shape, checked by image analysis"),
        ("ocr", 5_120, "the asked word, read by a text recogniser (extra [ocr])"),
        ("spatial", 7_680, "two things in the asked relation (left of, above), checked by image analysis"),
    )
]
