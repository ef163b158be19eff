"""Draw samples from a run: `python -m flowrl.sample runs/NAME --prompt "three red stars on blue"`."""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from tqdm import tqdm

from flowrl.config import FlowConfig
from flowrl.envs.base import GenerationEnv
from flowrl.envs.prompts import are_none, with_picture
from flowrl.errors import ConfigError, FlowRLError, UnknownNameError
from flowrl.functional.solver_steps import Solver
from flowrl.runs.folder import cannot_write, load_model, new_folder
from flowrl.runs.media import NO_WRITER, save_sound, save_video, sounds_of, writes_mp4
from flowrl.runs.pictures import as_images, image_grid, n_shown, save_picture
from flowrl.runs.program import AlgorithmOfRun, Device, EnvironmentOfRun, OwnModules, run_program
from flowrl.storage.files import save_tensors, write_json
from flowrl.training.algorithm import FlowAlgorithm
from flowrl.training.loading import of_newest
from flowrl.training.policy import FlowPolicy
from flowrl.training.saving import algorithm_name
from flowrl.version import __version__

PROGRAM = "python -m flowrl.sample"
OWN_PROMPTS = 8
"""How many of a run's own prompts are drawn when none is given."""
AT_ONCE = 16
"""Samples drawn at once, where a rollout draws no fewer."""
GRID = 64
"""Images in grid.png at most; of videos, an eighth."""


@dataclass(frozen=True)
class SampleConfig:
    """Samples of a trained flow, for new prompts or those it was trained on."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a checkpoint folder."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw; give it several times for several prompts. Without it, up to eight of the run's own."""
    n: Annotated[int | None, tyro.conf.arg(aliases=("-n",))] = None
    """Samples of each prompt; 4 images, videos or sounds, or 1024 points, when not given."""
    steps: int | None = None
    """Solver steps; as in training when not given."""
    solver: Solver | None = None
    """ODE solver; as in training when not given. On mini-sd3 eight steps of ab2 are as good as 16 of Euler's."""
    guidance_scale: float | None = None
    """Classifier-free guidance; as in training when not given."""
    seed: int = 0
    """Sample k (from 0) of each prompt starts from the noise of seed + k, whatever else is drawn."""
    role: Literal["current", "ema", "reference"] | None = None
    """Weights: as trained last, their moving average, or before training. The average where there is one."""
    out: Path = Path("sampled")
    """Folder to write; a number is added when it is there already."""
    batch_size: int | None = None
    """Samples drawn at once: a matter of memory and speed, not of what they are. As a rollout of the run draws, 16 at
    most, when not given."""
    device: Device = "auto"
    modules: OwnModules = ()
    algo: AlgorithmOfRun = ""
    env: EnvironmentOfRun = ""

    def __post_init__(self) -> None:
        for key in ("n", "steps", "batch_size"):
            value = getattr(self, key)
            name = key.replace("_", "-")
            FlowConfig.require(value is None or value > 0, f"--{name} must be positive, not {value}.")
        FlowConfig.require(0 <= self.seed < 2**62, f"--seed must be in [0, 2^62), not {self.seed}.")
        scale = self.guidance_scale
        FlowConfig.require(scale is None or math.isfinite(scale), f"--guidance-scale must be finite, not {scale}.")
        for prompt in self.prompt:
            FlowConfig.require(_is_text(prompt), f"--prompt takes text, not {prompt!r}.")


def main(args: list[str] | None = None) -> int:
    """Run the program; give its exit code."""
    return run_program(PROGRAM, SampleConfig, _sample, args)


def _sample(config: SampleConfig) -> int:
    named = config.algo, config.env, config.device
    run, model = of_newest(config.run, lambda folder: (folder, load_model(folder, *named)))
    config = replace(config, run=run)  # a run that goes on has another newest one soon
    contexts = chosen_contexts(model.env.core, config.prompt)
    print("\n".join(f"written: {path}" for path in write_samples(model, contexts, config, True)))
    return 0


def chosen_contexts(env: GenerationEnv, prompts: Sequence[str]) -> list[Any]:
    """Choose the contexts that the prompts of a command line name; without prompts, some of the environment's own.

    Raises:
        ConfigError: A prompt for an unconditional flow.
        UnknownNameError: A flow conditioned on something other than text has no such context.
    """
    own = env.contexts
    if are_none(own):
        if prompts:
            raise ConfigError(f"The flow of '{env.name}' is unconditional and takes no prompt: leave out --prompt.")
        return [None]
    if not prompts:
        return own[:: math.ceil(len(own) / OWN_PROMPTS)]
    asked = list(dict.fromkeys(prompts))
    labels = {str(context): context for context in reversed(own)}  # the first of a text, with its picture
    if all(isinstance(context, str) for context in own):
        return [labels.get(prompt, prompt) for prompt in asked]
    for prompt in asked:
        if prompt not in labels:
            raise UnknownNameError.of(f"context of '{env.name}'", prompt, labels)
    return [labels[prompt] for prompt in asked]


def seeded_noise(seeds: Sequence[int], latent_shape: Sequence[int]) -> torch.Tensor:
    """Draw standard normal noise (B, *latent_shape) on the CPU, each row from a generator with its own seed.

    A diffusers pipeline that is given `generator=torch.Generator().manual_seed(seed)` starts from the same noise.
    """
    return torch.stack([torch.randn(*latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(
    policy: FlowPolicy, contexts: Sequence[Any], seeds: Sequence[int], batch_size: int = AT_ONCE, **sampling: Any
) -> Iterator[torch.Tensor]:
    """Draw decoded samples to the CPU, a batch (b, *sample_shape) at a time.

    Args:
        policy: A trained policy.
        contexts: A context for each sample; prompts may be new.
        seeds: A seed for each sample; see `seeded_noise`.
        batch_size: Samples at a time. It changes samples by no more than the arithmetic's rounding.
        **sampling: `role`, `steps`, `solver`, `guidance_scale`, as in `FlowPolicy.sample_latents`.
    """
    for i in range(0, len(seeds), batch_size):
        x_0 = seeded_noise(seeds[i : i + batch_size], policy.model.latent_shape).to(policy.device)
        yield policy.sample(contexts[i : i + batch_size], x_0=x_0, **sampling).cpu()


def write_samples(
    model: FlowAlgorithm, contexts: Sequence[Any], config: SampleConfig, progress: bool = False
) -> list[Path]:
    """Draw samples of contexts into a new folder: their files, a picture of all, and `samples.json`.

    `progress`: a bar with the time left, on a terminal only.

    Returns:
        The files that matter to people, the folder first.

    Raises:
        ConfigError: The role is not kept, or the folder cannot be written.
    """
    policy, env = model.policy, model.env.core
    n = config.n or (4 if env.shows_images else 1024)
    each = [context for context in contexts for _ in range(n)]
    seeds = [config.seed + k for k in range(n)] * len(contexts)
    sampling = {
        "role": config.role or policy.sampling_role,
        "steps": config.steps or policy.steps,
        "solver": config.solver or policy.solver,
        "guidance_scale": policy.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    }
    batch_size = config.batch_size or min(policy.most_drawn, AT_ONCE)
    n_batches, is_quiet = math.ceil(len(each) / batch_size), None if progress else True
    drawn = draw(policy, each, seeds, batch_size, **sampling)
    batches = iter(tqdm(drawn, "batches", n_batches, leave=False, disable=is_quiet))
    first = next(batches)  # before there is a folder: most errors come now
    out = config.out.resolve()
    folder = new_folder(out.parent, out.name)
    try:
        write = _write_media if env.flow.is_media else _write_points
        entries, picture = write(folder, env, each, seeds, chain([first], batches), n)
        about = {
            "flowrl": __version__,
            "checkpoint": str(config.run),
            "trained_on_samples": model.num_timesteps,
            "algorithm": algorithm_name(type(model)),
            "environment": env.name,
            "flow": env.flow.source,
            **sampling,
            "guidance": policy.guidance,
            "device": str(model.device),
            "batch_size": batch_size,
            "noise": "torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)), on the CPU",
            **({"frames_per_second": env.flow.frame_rate} if env.flow.frame_rate else {}),
            **({"sample_rate": env.flow.sample_rate} if env.flow.sample_rate else {}),
            "samples": entries,
        }
        write_json(folder / "samples.json", about)
    except FlowRLError:
        raise
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    return [folder, picture, folder / "samples.json"]


def _write_media(
    folder: Path, env: GenerationEnv, contexts: list[Any], seeds: list[int], batches: Iterator[torch.Tensor], n: int
) -> tuple[list[dict[str, Any]], Path]:
    """Write a file for each image, video or sound, and `grid.png`; give entries for `samples.json`, the grid's path."""
    entries: list[dict[str, Any]] = []
    shown: list[torch.Tensor] = []
    rate, most = env.flow.frame_rate, n_shown(env, GRID)
    if rate and not writes_mp4():
        print(NO_WRITER)
    for batch in batches:
        for image in batch:
            number = len(entries)
            context, seed = contexts[number], seeds[number]
            name = f"{number:04d}-{slug(context)}-seed{seed}.png"
            if rate:
                name = save_video(image, folder / name, rate).name
            elif env.flow.sample_rate:
                name = save_sound(image, folder / name, env.flow.sample_rate).name
            else:
                image_grid(image[None], pad=0).save(folder / name)
            entries.append({"file": name, "prompt": as_json(context), **with_picture(context), "seed": seed})
        shown += batch[: most - len(shown)]
    image_grid(as_images(torch.stack(shown), env), columns=n if 1 < n < len(contexts) else 0).save(folder / "grid.png")
    return entries, folder / "grid.png"


def _write_points(
    folder: Path, env: GenerationEnv, contexts: list[Any], seeds: list[int], batches: Iterator[torch.Tensor], n: int
) -> tuple[list[dict[str, Any]], Path]:
    """Write `samples.safetensors` (samples (B, *sample_shape), seeds (B,)) and `scatter.png`, and a wav for each sample
    where there is a sound; likewise.
    """
    samples = torch.cat(list(batches))
    save_tensors(folder / "samples.safetensors", {"samples": samples.contiguous(), "seeds": torch.tensor(seeds)})
    if env.sound_rate:
        for i, sound in enumerate(sounds_of(env, samples, contexts)):
            save_sound(sound, folder / f"{i:04d}-{slug(contexts[i])}-seed{seeds[i]}", env.sound_rate)
    shown = samples[:GRID] if env.shows_images else samples
    save_picture(shown, contexts, env, folder / "scatter.png")
    entries = [
        {"file": "samples.safetensors", "rows": [i, i + n], "prompt": prompt, "seeds": [seeds[i], seeds[i] + n]}
        for i, prompt in ((i, as_json(contexts[i])) for i in range(0, len(contexts), n))
    ]
    return entries, folder / "scatter.png"


def as_json(context: Any) -> Any:
    """Give a context as JSON can hold it: arrays as lists, and what it does not know as text."""
    try:
        text = json.dumps(context, default=lambda part: part.tolist() if hasattr(part, "tolist") else str(part))
    except (TypeError, ValueError):  # keys that are no text, or a thing that holds itself
        return str(context)
    return json.loads(text)


def slug(context: Any, longest: int = 40) -> str:
    """Write a context as part of a file name: lower-case ASCII letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", str(context)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:longest].rstrip("-") or "sample"


def _is_text(prompt: str) -> bool:
    """Tell whether a prompt says anything, and holds no bytes that the command line could not decode."""
    return bool(prompt.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in prompt)


if __name__ == "__main__":
    sys.exit(main())
