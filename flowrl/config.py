"""Settings of every algorithm. A subclass of `FlowConfig` adds its own, each stated once."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from flowrl.checks import check_types, take_python_values
from flowrl.errors import ConfigError
from flowrl.functional.flow import TimeSampling
from flowrl.functional.guidance import GUIDANCES, Guidance
from flowrl.functional.solver_steps import SOLVERS, Solver
from flowrl.types import Compile, Switch

Precision = Literal["float32", "bfloat16"]
OptimizerKind = Literal["adamw", "adamw8bit"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
OnRewardError = Literal["raise", "retry", "drop"]

FITTED = ("gradient_checkpointing", "batch_size", "rollout_batch_size", "decode_batch")
"""Settings that `fit_memory` may name."""
CHOICES = {
    "solver": SOLVERS,
    "guidance": GUIDANCES,
    "optimizer": get_args(OptimizerKind),
    "lr_schedule": get_args(LearningRateSchedule),
    "precision": get_args(Precision),
    "compile": get_args(Compile),
    "working_copies": get_args(Switch),
    "overlap_rewards": get_args(Switch),
    "on_reward_error": get_args(OnRewardError),
}


@dataclass(frozen=True)
class FlowConfig:
    """Settings that every algorithm has."""

    learning_rate: float = 2e-4
    """Learning rate of AdamW."""
    warmup_updates: int = 0
    """Gradient steps over which the learning rate rises linearly from 0."""
    lr_schedule: LearningRateSchedule = "constant"
    """Learning rate after warm-up: constant, or falling to 0 at the end of the run, from iteration to iteration, by a
    line ("linear") or half a cosine ("cosine"), which averages the noise of late gradients out."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down."""
    target_lambda: float = 0.0
    """Aim at the tilt q_ref e^(lambda r) / Z with this lambda: the algorithm's own coefficient is set so, by the spread
    of the first iteration's rewards where it goes by that, and advantages keep that unit. 0 leaves both as they are."""
    n_samples: int = 512
    """Samples drawn and scored per iteration."""
    group_size: int = 1
    """Samples of the same context per iteration; must divide n_samples."""
    rollout_batch_size: int = 0
    """Samples drawn at once; 0 draws all n_samples at once. Must divide n_samples."""
    batch_size: int = 128
    """Samples per minibatch."""
    accumulation: int = 1
    """Minibatches per gradient step. A critic takes a step of its own for each minibatch."""
    n_epochs: int = 1
    """Passes over the samples of an iteration."""
    rollout_steps: int = 16
    """Solver steps per sample."""
    solver: Solver = "euler"
    """ODE solver of the rollouts: euler; ab2 (Adams-Bashforth: of second order, with one evaluation a step as Euler's);
    midpoint or heun (two); rk4 (four)."""
    guidance_scale: float = 1.0
    """Guidance of the rollouts, classifier-free or (FLUX.1-dev) distilled into the network; 1 is none."""
    guidance: Guidance = "cfg"
    """Classifier-free guidance as it is ("cfg"), or CFG-Zero* ("cfg_zero")."""
    time_sampling: TimeSampling = "uniform"
    """How the loss draws flow times: uniform, or logit_normal as Stable Diffusion 3 was trained."""
    refresh_every: int = 1
    """Iterations between two copies of the trained network to the behaviour policy, which draws the samples."""
    ema_decay: float = 0.0
    """Decay per gradient step of a moving average of the weights, used to evaluate and to sample; 0 keeps none."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 fine-tunes all weights."""
    lora_alpha: float = 0.0
    """Scale of LoRA adapters; 0 takes twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before the trained adapter, in updates only."""
    lora_targets: tuple[str, ...] = ()
    """Modules that LoRA adapts, by the ends of their names; the flow's own choice when not given."""
    init_lora: str = ""
    """LoRA weights to start from, a folder or a .safetensors file: they are put into the weights, and the reference is
    that start. Exported LoRA weights hold both, the start and what was trained."""
    trained_parameters: tuple[str, ...] = ()
    """Train only the parameters whose names contain one of these; all when not given. With LoRA: adapt, of its
    modules, only those with such parameters."""
    optimizer: OptimizerKind = "adamw"
    """AdamW, or with moments in 8 bits ("adamw8bit", needs bitsandbytes)."""
    precision: Precision = "float32"
    """Type that networks compute in; losses, weights and samplers stay in float32. With LoRA the frozen weights are
    kept in it too."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, one more forward pass for each backward."""
    compile: Compile = "off"
    """Compile the networks for speed: "blocks", each kind of block that a network repeats (a minute or two at the first
    iteration); "whole", at once (longer); "off"; "auto", the blocks of large networks that train on CUDA."""
    attention_backend: str = ""
    """Backend of diffusers that networks compute attention with in training: native, flash, flex, xformers, ...; any
    other name lists those that are there. diffusers' own choice when not given, and in programs that do not train."""
    cuda_graphs: bool = False
    """Capture updates and samplers of small networks on CUDA, and replay them: the same numbers with few launches."""
    working_copies: Switch = "auto"
    """Compute passes without gradients on copies of the weights, with adapters merged and in the type that is computed
    in: faster, at the memory of the adapted matrices (without LoRA, of the network for each role that draws). "off":
    adapters beside the weights, as in training; "auto": off on CUDA where the copies do not fit."""
    fit_memory: tuple[str, ...] = ()
    """Settings that the memory plan lowers, from the values here, until a run fits into the memory that is free on a
    CUDA device: gradient_checkpointing (off where it can be), batch_size (with accumulation, so that a gradient step is
    of as many samples), rollout_batch_size, decode_batch. A setting that is given is left as it is."""
    offload: bool = False
    """Keep the autoencoder on the host while the network trains."""
    half_buffer: bool = False
    """Keep the buffer's samples in float16."""
    on_reward_error: OnRewardError = "raise"
    """A reward that fails (raises, is not one finite number per sample, gives no answer in time) stops the run
    ("raise"), is asked again first ("retry"), or has the samples that it fails for left out ("drop")."""
    reward_retries: int = 3
    """How often "retry" asks again, after 1, 2, 4, ... seconds."""
    reward_timeout: float = 0.0
    """Seconds for a batch after which a reward has failed; 0 waits for ever."""
    overlap_rewards: Switch = "off"
    """Reward samples in a thread while the next rollout_batch_size are drawn: the same numbers in the same order.
    "auto": on CUDA, for rewards that compute on the host; "on": for any reward; in several processes, and with
    cuda_graphs, never."""
    max_bad_updates: int = 10
    """Gradient steps in a row whose gradient is not finite. They are left out; so many stop the run."""
    max_dropped: float = 0.1
    """Share of an iteration's samples that "drop" may leave out; more stop the run."""

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):  # as of version 0.1.0
            object.__setattr__(self, "compile", "blocks" if self.compile else "off")
        take_python_values(self)
        for name in ("init_lora", "data"):  # a run goes on from any folder
            place = getattr(self, name, "")
            if isinstance(place, str) and place and os.path.exists(place):
                object.__setattr__(self, name, os.path.abspath(place))
        self.require(
            not callable(self.learning_rate),
            "learning_rate is a number here, not a function; lr_schedule 'linear' or 'cosine' lets it fall over a run.",
        )
        check_types(type(self), {field.name: getattr(self, field.name) for field in fields(self)})
        positive = ("learning_rate", "max_grad_norm", "n_samples", "group_size", "batch_size", "accumulation")
        for name in (*positive, "n_epochs", "rollout_steps", "refresh_every", "max_bad_updates"):
            self.require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        others = ("warmup_updates", "weight_decay", "rollout_batch_size", "lora_rank", "lora_alpha", "target_lambda")
        for name in (*others, "reward_retries", "reward_timeout"):
            self.require(getattr(self, name) >= 0, f"{name} must not be negative, not {getattr(self, name)}.")
        for name in ("lora_targets", "trained_parameters"):
            self.require("" not in getattr(self, name), f"{name} has an empty name in it: leave it out.")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout must be in [0, 1), not {self.lora_dropout}.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            self.require(value in known, f"{name} must be one of {', '.join(known)}, not '{value}'.")
        for name in self.fit_memory:
            self.require(name in FITTED, f"fit_memory knows {', '.join(FITTED)}, not '{name}'.")
        self.require(0 <= self.max_dropped < 1, f"max_dropped must be in [0, 1), not {self.max_dropped}.")
        self.require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), not {self.ema_decay}.")
        for name in ("group_size", "rollout_batch_size"):
            value = getattr(self, name) or self.n_samples
            self.require(self.n_samples % value == 0, f"{name} = {value} must divide n_samples = {self.n_samples}.")
        object.__setattr__(self, "_checked", True)

    def check_itself(self) -> None:
        """Check that every setting was checked: that a `__post_init__` of one's own has called that of its base.

        Raises:
            ConfigError: It has not.
        """
        self.require(
            hasattr(self, "_checked"),
            f"{type(self).__name__}.__post_init__ must call super().__post_init__(), which checks all other settings.",
        )

    @staticmethod
    def require(condition: bool, message: str) -> None:
        """Raise `ConfigError(message)` unless the condition holds."""
        if not condition:
            raise ConfigError(message)

    def idle(self) -> dict[str, str]:
        """Name the settings that do nothing beside the others, each with the reason; a subclass adds its own.

        Whoever gives one is told: it would be left out without a word.
        """
        of_lora = ("lora_alpha", "lora_dropout", "lora_targets")
        found = {} if self.lora_rank else dict.fromkeys(of_lora, "without lora_rank")
        for name, kind in (("reward_retries", "retry"), ("max_dropped", "drop")):
            if self.on_reward_error != kind:
                found[name] = f"unless on_reward_error is '{kind}'"
        return found

    def parts(self) -> int:
        """Count the entries of minibatches that a sample makes: 1, or the recorded steps of its path."""
        return 1

    def entries_per_epoch(self) -> int:
        """Count the entries of one epoch."""
        return self.n_samples * self.parts()

    def check_ranks(self, count: int) -> None:
        """Check that so many ranks can share every batch of these settings evenly.

        Raises:
            ConfigError: They cannot; names the setting.
        """
        batches = {name: getattr(self, name) for name in ("n_samples", "rollout_batch_size", "batch_size")}
        batches["the last minibatch of an epoch"] = self.entries_per_epoch() % self.batch_size
        for name, n in batches.items():
            self.require(
                n % count == 0,
                f"{count} processes share every batch evenly, but {name} = {n} is no multiple of {count}. Settings "
                "count over all processes: with twice as many each does half.",
            )

    def of_one_rank(self, count: int) -> FlowConfig:
        """Make the settings for predicting one rank's memory."""
        n_samples = -(-self.n_samples // (count * self.group_size)) * self.group_size
        chunk = self.rollout_batch_size // count
        chunk = next(n for n in range(chunk, n_samples + 1) if n_samples % n == 0) if chunk else 0
        return replace(self, n_samples=n_samples, rollout_batch_size=chunk, batch_size=self.batch_size // count)

    def updates_per_iteration(self) -> int:
        """Count the gradient steps per iteration."""
        minibatches = self.n_epochs * -(-self.entries_per_epoch() // self.batch_size)
        return -(-minibatches // self.accumulation)
