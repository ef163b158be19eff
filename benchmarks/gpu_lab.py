"""What the rows of the GPU benchmark share: sizes, timing, models with random weights built on the device."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import architectures
import torch

import flowrl

Figures = dict[str, Any]
PROMPTS = tuple(f"a photo of a {thing}" for thing in ("cat", "dog", "horse", "lighthouse"))
SD35, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
NO_ENCODERS = {name: [None, None] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
COMPILED, GRAPHED = {"compile": "blocks"}, {"cuda_graphs": True}
FASTEST: dict[str, tuple[str, Figures]] = {
    "sd35-rollout": ("flowrl, blocks compiled", COMPILED),
    "sd35-update": ("flowrl, blocks compiled", COMPILED),
    "sd35-iteration": ("flowrl, blocks compiled", COMPILED),
    "mini-sd3": ("flowrl, CUDA graphs", GRAPHED),
    "mlp": ("flowrl, CUDA graphs", GRAPHED),
}
"""What makes a row of flowrl's as fast as it goes, beside the row's own settings."""
SLOW_TO_COMPILE = ("sd35-update", "sd35-iteration")
"""Rows that --quick does not compile: with gradients it takes a minute or more."""
SMALL_VAE = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
SMALL: dict[str, Figures] = {
    SD35: {
        "num_layers": 3,
        "dual_attention_layers": [0, 1],
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
    },
    FLUX: {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 6, 6],
    },
}
"""What --tiny makes of the transformers."""


def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    """Reward images by their mean, on their device: the reward is not what is measured."""
    return images.flatten(1).mean(1)


@dataclass
class Sizes:
    """What is drawn and trained on; `tiny` is for trying the script."""

    resolution: int = 512
    images: int = 16
    flux_images: int = 8
    batch: int = 8
    steps: int = 10
    flux_steps: int = 4
    rank: int = 32
    matrix: int = 8192
    copied: int = 2**30
    mini: Figures = field(default_factory=lambda: {"n_samples": 512, "batch_size": 64, "rollout_steps": 8})
    mlp: Figures = field(
        default_factory=lambda: {"n_samples": 512, "batch_size": 512, "n_epochs": 4, "rollout_steps": 16}
    )

    @classmethod
    def tiny(cls) -> Sizes:
        mini = {"n_samples": 16, "batch_size": 8, "rollout_steps": 2}
        mlp = {"n_samples": 64, "batch_size": 64, "n_epochs": 2, "rollout_steps": 4}
        return cls(64, 4, 2, 2, 2, 2, 4, 256, 2**20, mini, mlp)


@dataclass
class Lab:
    """A device, sizes, and the settings that flowrl's rows get beside their own."""

    device: torch.device
    tiny: bool = False
    quick: bool = False
    only_flowrl: bool = False
    eager_only: bool = False
    as_given: bool = False
    given: Figures = field(default_factory=dict)
    """Settings by name, or by ROW.NAME."""
    say: Callable[..., None] = print
    row: str = ""
    extra: Figures = field(default_factory=dict)
    """Settings of the variant that is measured."""
    ceiling: float | None = None
    """FLOP/s of a matrix product on this device, once it is measured."""

    def __post_init__(self) -> None:
        self.sizes = Sizes.tiny() if self.tiny else Sizes()

    @property
    def settings(self) -> Figures:
        """What flowrl gets in this row beside the row's own settings."""
        common = {name: value for name, value in self.given.items() if "." not in name}
        own = {name: value for name, value in self.given.items() if name.startswith(f"{self.row}.")}
        return {**self.extra, **common, **{name.rpartition(".")[2]: value for name, value in own.items()}}

    def variants(self) -> Iterator[str]:
        """Name flowrl as it is told, then as fast as it goes in this row; meanwhile `settings` are those of each."""
        self.extra = {}
        yield "flowrl"
        name, fastest = FASTEST.get(self.row, ("", {}))
        compiles = fastest == COMPILED and (self.eager_only or (self.quick and self.row in SLOW_TO_COMPILE))
        without = fastest == GRAPHED and not self.on_gpu
        if fastest and not (self.as_given or compiles or without or fastest.keys() & self.settings.keys()):
            self.extra = fastest
            yield name
        self.extra = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def repeats(self, full: int) -> int:
        if self.tiny:
            return 2
        return max(3, full // 2) if self.quick else full

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call, until the device is done."""
        self.synchronise()
        started = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - started

    def in_turn(self, works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Figures]:
        """Median seconds of each work, called in turn, after one call of each that counts as the first."""
        first = {name: self.seconds(work) for name, work in works.items()}
        later: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                later[name].append(self.seconds(work))
        return {
            name: {"median": statistics.median(values), "first": first[name], "all": values}
            for name, values in later.items()
        }

    @contextlib.contextmanager
    def guarded(self, variant: str, figures: Figures) -> Iterator[None]:
        """Keep what a row has, where a variant of it fails."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed(f"{variant}, ", error)
            figures.setdefault("failed", {})[variant] = f"{type(error).__name__}: {error}"[:2000]

    def failed(self, what: str, error: Exception) -> None:
        line = (str(error).strip().splitlines() or [""])[0][:200]
        self.say(self.row, f"{what}failed: {type(error).__name__}: {line}", None, "")

    def free(self) -> None:
        """Give back the memory of models that nothing refers to any more, and of compiled code."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def env(self, name: str) -> Any:
        """Make an environment around a pipeline with random weights, without text encoders; reward: brightness."""
        changes: dict[str, Figures] = {"model_index.json": NO_ENCODERS}
        if self.tiny:
            changes |= {"transformer/config.json": SMALL[name], "vae/config.json": SMALL_VAE}
        self.folder = tempfile.TemporaryDirectory()
        flow = architectures.write(name, Path(self.folder.name), changes)
        env = flowrl.make("sd3-compress", flow=flow, resolution=self.sizes.resolution, prompts=PROMPTS)
        build = env.flow.imitation
        env.flow = replace(env.flow, load=_loader(build, self.device), imitation=_loader(build, torch.device("cpu")))
        env.reward_function = brightness
        return env

    def large(self, env: Any, **settings: Any) -> Any:
        """Make flowrl's algorithm on an environment of `env`."""
        config = self.large_config(env, **settings)
        return flowrl.ORWCFMW2("FlowPolicy", env, config=config, seed=0, device=self.device)

    def large_config(self, env: Any, **settings: Any) -> Any:
        """Settings of that: its rows' own, those of this row, and those of the variant and the command line."""
        own = {
            "n_samples": self.sizes.images,
            "rollout_batch_size": self.sizes.images,
            "group_size": 2,
            "batch_size": self.sizes.batch,
            "n_epochs": 1,
            "rollout_steps": self.sizes.steps,
            "guidance_scale": 1.0,
            "lora_rank": self.sizes.rank,
            "precision": "bfloat16",
            "gradient_checkpointing": False,
            "working_copies": "on",
            "fit_memory": (),
            "offload": False,
            "ema_decay": 0.0,
            "standardise": "none",
            "warmup_updates": 0,
            "alpha": 1.0,
        }
        settings = {**known(own), **settings, **self.settings}
        return flowrl.ORWCFMW2.configure(recommended=env.recommended, settings=settings)


def known(settings: Figures) -> Figures:
    """Leave out settings that this flowrl does not have: a baseline that is older has fewer."""
    names = {field.name for field in fields(flowrl.ORWCFMW2.Config)}
    return {name: value for name, value in settings.items() if name in names}


def _loader(build: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Make what builds a flow on a device, with random embeddings in place of those of text encoders."""

    def load(network_dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype = torch.float32) -> Any:
        with device:
            model = build(network_dtype, frozen_dtype)
        model.move_frozen(device)

        def encode(contexts: Any) -> tuple[torch.Tensor, ...]:
            if hasattr(model, "condition_parts"):
                parts = [(part.shape, part.dtype or frozen_dtype) for part in model.condition_parts()]
            else:  # of a baseline that is older
                parts = [(shape, frozen_dtype if shape else torch.float32) for shape in model.condition_shapes()]
            return tuple(torch.randn(len(contexts), *shape, device=model.device).to(dtype) for shape, dtype in parts)

        model.encode = encode
        return model

    return load
