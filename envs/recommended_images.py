"""What environments of images recommend to algorithms, by the reward's kind and the size of the flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "endpoint.alpha": 0.25,
    "endpoint-kl.alpha": 0.5,
    "ema_decay": 0.9,
    "mixture.control_variate": "one",  # of pictures there are too few samples for a critic
}
MINI_MODEL: Mapping[str, Any] = {
    **IMAGES,
    "endpoint.preference.learning_rate": 5e-5,  # by benchmarks/tuning/count_preference.toml
    # of the baselines, by benchmarks/tuning/laptop.toml
    "likelihood.learning_rate": 4e-4,
    "selection.n_epochs": 12,
    "selection.learning_rate": 4e-4,
    "steps-free.clip_range": 1e-3,
    "steps.clip_range": 1e-3,
}
RIGHT_OR_WRONG: Mapping[str, Any] = {
    "tau": 0.7,
    "endpoint.alpha": 0.1,
    "endpoint-kl.alpha": 0.1,
    "baseline": "mean",  # wrong samples must repel
    "endpoint.w2.max_own_loss": 1.2,  # which errors reach after 25 refreshes and more (docs/signal.md)
}
EARLY: Mapping[str, Any] = {  # numbers and colours are laid out early, by the text (docs/signal.md)
    "trained_parameters": ("context", "add_k", "add_v", "add_q", "to_add_out", "norm_added"),
    "max_time": 0.3,
    "draw_steps": 8,
    "learning_rate": 7e-4,
    "lr_schedule": "linear",
    "ema_decay": 0.95,
}


def _early(*kinds: str) -> dict[str, Any]:
    """Recommend `EARLY` to algorithms of these kinds."""
    return {f"{kind}.{name}": value for kind in kinds for name, value in EARLY.items()}


# rates of methods without a penalty; the others of these kinds have rates of their own
WITHOUT_PENALTY = ("endpoint.preference.learning_rate", "endpoint-free.ratio.learning_rate")
APPEARANCE: Mapping[str, Any] = {  # of how pictures look, not of what is on them
    **_early("advantages", "endpoint.preference", "endpoint-free.ratio", "mixture"),
    # by benchmarks/tuning/aesthetic.toml
    "advantages.decay_rate": 0.0,
    "advantages.early_times": False,
    "advantages.noisings": 1,
    "advantages.beta_old": 0.2,
    "advantages.gain": 0.2,
    "advantages.beta_ref": 0.1,
    "advantages.contrast.beta_ref": 0.0,
    **dict.fromkeys(WITHOUT_PENALTY, 6e-5),  # which is all that bounds them
    "endpoint-free.ratio.draws": 2,
    "endpoint.preference.pairs.learning_rate": 2e-4,
    "endpoint.preference.regression.learning_rate": 5e-4,
    "endpoint.preference.regression.beta": 0.02,
    "mixture.reward_units": "std",
    "mixture.tau": 2.0,
    "mixture.own_share": 0.5,
    "mixture.pool": 2048,
    "mixture.pool_group": 8,
}
COLOURS: Mapping[str, Any] = {
    **_early("endpoint.w2"),
    **APPEARANCE,
    "gradient.sampled.alpha": 0.1,  # without, pictures are made for the reward alone
    "gradient.estimated.alpha": 2.0,
}
BYTES: Mapping[str, Any] = {  # by benchmarks/tuning/compress.toml
    **APPEARANCE,
    **dict.fromkeys(WITHOUT_PENALTY, 5e-5),
    "mixture.tau": 1.0,
}
LAYOUT: Mapping[str, Any] = {
    **_early("endpoint.w2", "advantages", "endpoint.preference", "endpoint-free.ratio", "mixture"),
    "endpoint.w2.priority": 0.8,
    "advantages.priority": 0.8,
    "endpoint.w2.weight_normalisation": "group",
    "endpoint.w2.tau": 1.0,
    "endpoint.w2.alpha": 0.0,  # in place of a penalty on the drift, a limit
    "endpoint.w2.max_drift": 0.35,
    "advantages.max_drift": 0.35,
    # by benchmarks/tuning/count_early.toml
    "advantages.beta_ref": 0.0,
    "advantages.decay_rate": 0.0,
    "advantages.early_times": False,
    "advantages.noisings": 1,
    "advantages.beta_old": 0.2,
    "advantages.gain": 0.2,
    "advantages.strength": 4.0,
    "advantages.contrast.beta": 0.2,
    # by benchmarks/tuning/count_early_others.toml
    "endpoint.preference.learning_rate": 5e-4,
    "endpoint.preference.max_drift": 0.35,
    "endpoint.preference.regression.beta": 0.02,
    "endpoint.preference.regression.max_drift": 0.0,  # has one optimum, as the old policy stays
    "endpoint-free.ratio.learning_rate": 4e-4,
    "endpoint-free.ratio.draws": 2,
    "endpoint-free.ratio.max_drift": 0.35,
    "mixture.reward_units": "std",
    "mixture.tau": 5.0,
    "mixture.own_share": 0.7,
    "mixture.pool": 2048,
    "mixture.pool_group": 8,
    "mixture.max_drift": 0.35,
}
WORDS: Mapping[str, Any] = {"learning_rate": 6e-4, "tau": 0.7, "endpoint.alpha": 0.1, "endpoint-kl.alpha": 0.1}
PAIRS: Mapping[str, Any] = {
    **WORDS,
    **{f"{kind}.baseline": "mean" for kind in ("endpoint", "endpoint-free", "endpoint-kl")},
}
OWN: Mapping[str, Mapping[str, Any]] = {
    "mini-words": {**WORDS, **LAYOUT, "endpoint.w2.baseline": "mean"},  # by benchmarks/tuning/words.toml
    "mini-spatial": PAIRS,
}
LARGE_MODEL: Mapping[str, Any] = {
    **IMAGES,
    "batch_size": 8,
    "rollout_batch_size": 8,
    "rollout_steps": 20,
    "guidance_scale": 4.5,
    "lora_rank": 32,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "fit_memory": ("gradient_checkpointing", "batch_size", "rollout_batch_size", "decode_batch"),
    "offload": True,
    "half_buffer": True,
}
