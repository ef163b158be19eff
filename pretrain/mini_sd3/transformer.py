"""Trains mini-sd3's text encoders, then its transformer on latents: python pretrain/mini_sd3/transformer.py

Needs the autoencoder that autoencoder.py leaves. Writes the pipeline folder every few minutes.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from autoencoder import WORK
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from pipeline import RepeatedTokenAttention, build_pipeline, save_pipeline
from text_encoders import captions, load_text_encoders, save_text_encoders, train_text_encoders
from torch import Tensor, nn

from flowrl.envs.shapes import NUMBERS, SHAPES, Scene, complete, draw

PIPELINE = Path(__file__).parents[2] / "flowrl" / "assets" / "mini-sd3"


@dataclass
class Config:
    steps: int = 11_000
    batch_size: int = 128
    lr: float = 1e-3
    """After 300 steps of warm-up, until the decay."""
    decay: float = 0.35
    """Share of the steps, the last, over which the learning rate falls to zero."""
    pictures: int = 40_000
    """Drawn and encoded once, before training."""
    shift: float = 3.0
    """Shift of the uniform times towards noise, where count and shape are decided; as when sampling."""
    wrong_caption: float = 0.35
    """Share of the captions whose count (or shape) is wrong, on purpose: what rewards can later mend."""
    wrong_shape: float = 0.0
    """Share of the wrong captions whose shape is wrong instead of the count: then shapes of several kinds get mixed."""
    wrong_from: float = 0.5
    """Share of the steps, the first, with right captions only: what a caption means is learnt faster from them."""
    drop_caption: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    ema_decay: float = 0.999
    export_every: int = 500
    seed: int = 0
    workers: int = 2
    """Processes of one thread each, with a share of every batch: faster than threads on small layers."""
    resume: bool = False
    """Goes on from the last checkpoint, for instance towards another number of steps."""
    autoencoder: Path = WORK / "autoencoder"
    text_encoders: Path = WORK / "text_encoders"
    """Trained text encoders with their tokenizer, made if missing."""
    latents: Path = WORK / "latents.pt"
    """Encoded pictures, made if missing."""
    checkpoint: Path = WORK / "transformer.pt"
    out: Path = PIPELINE


def caption(scene: Scene, rng: np.random.Generator, config: Config, wrong: float) -> str:
    """A noisy caption of a full scene: perhaps empty or (by chance ``wrong``) wrong, attributes left out at random."""
    if rng.random() < config.drop_caption:
        return ""
    if rng.random() < wrong:
        if rng.random() < config.wrong_shape:
            scene = replace(scene, shape=str(rng.choice([name for name in SHAPES if name != scene.shape])))
        else:
            scene = replace(scene, count=int(rng.choice([n for n in NUMBERS.values() if n != scene.count])))
    left_out = {"count": 0.25, "colour": 0.3, "shape": 0.2, "background": 0.3}
    return replace(scene, **{name: None for name, p in left_out.items() if rng.random() < p}).prompt


@torch.no_grad()
def encode_pictures(config: Config) -> None:
    """Draws random scenes; stores normalised latents (n, 16, 8, 8) in bfloat16, and the scenes."""
    autoencoder = AutoencoderTiny.from_pretrained(config.autoencoder).to(memory_format=torch.channels_last)
    rng = np.random.default_rng([config.seed, 1])
    scenes = [complete(Scene(), rng) for _ in range(config.pictures)]
    factors, chunks = autoencoder.config, []
    for start in range(0, len(scenes), 100):
        pictures = np.stack([draw(scene, rng) for scene in scenes[start : start + 100]])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.autocast("cpu", torch.bfloat16):
            latents = autoencoder.encode(images.to(memory_format=torch.channels_last)).latents.float()
        chunks.append(((latents - factors.shift_factor) * factors.scaling_factor).bfloat16().contiguous())
    config.latents.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"latents": torch.cat(chunks), "scenes": [astuple(scene) for scene in scenes]}, config.latents)


def learning_rate(step: int, config: Config, warmup: int = 300) -> float:
    remaining = (config.steps - step) / (config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / warmup, remaining)


class Captions:
    """The frozen text encoders' output for every caption there is, by the pipeline's own ``encode_prompt``."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        prompts = ["", *captions()[0]]
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        with torch.no_grad():
            self.context, _, self.pooled, _ = pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
            )

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Context (B, 9, 192), one zero token last, and pooled embedding (B, 192)."""
        rows = torch.tensor([self.rows[prompt] for prompt in prompts])
        return self.context[rows], self.pooled[rows]


def flow_matching_loss(
    transformer: SD3Transformer2DModel, data: Tensor, context: Tensor, pooled: Tensor, shift: float
) -> Tensor:
    """Mean squared error of the velocity ``noise - data`` at shifted uniform times, 1 being noise."""
    noise = torch.randn_like(data)
    uniform = torch.rand(len(data))
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noised = torch.lerp(data, noise, sigma.view(-1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = transformer(
            noised,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
    return nn.functional.mse_loss(velocity.float(), noise - data)


def average_gradients(weights: list[Tensor]) -> None:
    """Replaces each gradient by its mean over the processes."""
    if dist.get_world_size() == 1:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


class Trainer:
    """The transformer in training, its averaged weights and its optimizer."""

    def __init__(self, pipe: StableDiffusion3Pipeline, config: Config) -> None:
        self.pipe, self.config = pipe, config
        self.transformer = pipe.transformer
        self.average = copy.deepcopy(pipe.transformer).requires_grad_(False)
        self.captions = Captions(pipe)
        self.attention = RepeatedTokenAttention()
        self.transformer.set_attn_processor(self.attention)
        self.weights = list(self.transformer.parameters())
        self.averages = list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def update(self, step: int, data: Tensor, prompts: list[str]) -> float:
        """One gradient step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.attention.draw_repeats(len(data))
        loss = flow_matching_loss(self.transformer, data, *self.captions(prompts), self.config.shift)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.weights)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        decay = min(self.config.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.averages, [weight.detach() for weight in self.weights], 1 - decay)
        return loss.item()

    def save(self, done: int) -> None:
        """Writes a checkpoint, and the pipeline with the averaged weights."""
        state = {"done": done, "optimizer": self.optimizer.state_dict()}
        state |= {"weights": self.transformer.state_dict(), "average": self.average.state_dict()}
        torch.save(state, self.config.checkpoint)
        exported = copy.copy(self.pipe)
        exported.transformer = self.average
        save_pipeline(exported, self.config.out)

    def load(self) -> int:
        """Restores the checkpoint; returns the number of steps done."""
        state = torch.load(self.config.checkpoint, weights_only=True)
        self.transformer.load_state_dict(state["weights"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])


def train(rank: int, config: Config, rendezvous: str) -> None:
    """What each process does: its share of every batch; the first one also saves and reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.workers)
    stored = torch.load(config.latents, weights_only=True)
    latents, scenes = stored["latents"], [Scene(*fields) for fields in stored["scenes"]]
    torch.manual_seed(config.seed)  # the same first weights everywhere
    pipe = build_pipeline(AutoencoderTiny.from_pretrained(config.autoencoder), config.shift)
    load_text_encoders(pipe, config.text_encoders)
    trainer = Trainer(pipe, config)
    first = trainer.load() if config.resume else 0
    torch.manual_seed(hash((config.seed, first, rank)))
    rng = np.random.default_rng([config.seed, first, rank])
    start, recent = time.monotonic(), 0.0
    for step in range(first, config.steps):
        chosen = rng.integers(len(scenes), size=config.batch_size // config.workers)
        wrong = config.wrong_caption if step >= config.wrong_from * config.steps else 0.0
        prompts = [caption(scenes[i], rng, config, wrong) for i in chosen]
        recent += trainer.update(step, latents[torch.from_numpy(chosen)].float(), prompts)
        done = step + 1
        if rank == 0 and done % 100 == 0:
            print(f"step {done} loss {recent / 100:.4f} {time.monotonic() - start:.0f} s", flush=True)
            recent = 0.0
        if rank == 0 and (done % config.export_every == 0 or done == config.steps):
            trainer.save(done)


def main(config: Config) -> None:
    if not config.text_encoders.exists():
        start = time.monotonic()
        torch.manual_seed(config.seed)
        pipe = build_pipeline(AutoencoderTiny.from_pretrained(config.autoencoder), config.shift)
        named = train_text_encoders(pipe)
        save_text_encoders(pipe, config.text_encoders)
        print(f"text encoders name {named:.1%} of the captions after {time.monotonic() - start:.0f} s", flush=True)
    if not config.latents.exists():
        start = time.monotonic()
        encode_pictures(config)
        print(f"{config.pictures} pictures drawn and encoded in {time.monotonic() - start:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (config, f"file://{folder}/rendezvous"), nprocs=config.workers)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
