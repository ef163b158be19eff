"""Optimizers of the trained parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowrl.config import FlowConfig
from flowrl.distributed.sharding import unsharded
from flowrl.errors import ConfigError
from flowrl.training.signal import check_rate

if TYPE_CHECKING:
    from flowrl.training.algorithm import FlowAlgorithm


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the decorators by which `torch.compile` leaves it alone.

    They import the compiler at the first call, which takes as long as a small run; nothing here compiles an optimizer.
    """

    add_param_group: Any = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad: Any = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict: Any = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict: Any = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step: Any = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(config: FlowConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that the settings ask for.

    Raises:
        ConfigError: Its package is not installed; gives the command.
    """
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        # fused: the other implementations read their step counter on the host
        return AdamW(list(parameters), fused=True, **settings)  # type: ignore[arg-type]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f'The optimizer "adamw8bit" needs bitsandbytes: pip install "flowrl-torch[8bit]" ({error}).'
        ) from error
    return AdamW8bit(list(parameters), **settings)


def scheduled_rate(config: FlowConfig, remaining: float) -> float:
    """Compute the learning rate after warm-up, of `remaining` (1 to 0): the share of the run that is still to come."""
    remaining = min(max(remaining, 0.0), 1.0)
    if config.lr_schedule == "linear":
        return config.learning_rate * remaining
    if config.lr_schedule == "cosine":
        return config.learning_rate * (1 - math.cos(math.pi * remaining)) / 2
    return config.learning_rate


def step_unless(bad: torch.Tensor, optimizer: torch.optim.Optimizer, is_sharded: bool = False) -> None:
    """Take an optimizer step, unless `bad` (a scalar, 0 or 1) is 1: then weights and moments stay as they are.

    Fused optimizers decide that on the device; others wait for it.
    """
    if optimizer.defaults.get("fused") and not is_sharded:
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["capturable"] = bad.is_cuda and torch.cuda.is_current_stream_capturing()
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(bad):
        optimizer.step()


def state_shapes(config: FlowConfig, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Give names and shapes of what the optimizer keeps of a parameter, by which a stored state is checked."""
    shape = tuple(parameter.shape)
    if config.optimizer == "adamw":
        return adam_shapes(parameter)
    shapes = {"step": (), "state1": shape, "state2": shape}
    if parameter.numel() >= SMALLEST_QUANTISED:
        blocks = (math.ceil(parameter.numel() / BLOCK),)
        shapes |= {"qmap1": (256,), "qmap2": (256,), "absmax1": blocks, "absmax2": blocks}
    return shapes


def adam_shapes(parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Give names and shapes of what Adam keeps of a parameter."""
    return {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}


def laid_out_like(state: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Give a stored moment its parameter's strides: fused steps pair their numbers in the order of memory."""
    if state.shape != parameter.shape or state.stride() == parameter.stride():
        return state
    return torch.empty_like(parameter, dtype=state.dtype, device=state.device).copy_(state)


SMALLEST_QUANTISED = 4096
"""bitsandbytes keeps the moments of smaller parameters in float32."""
BLOCK = 256
"""Values that share a scale in bitsandbytes' 8-bit moments."""


def share_of_step(model: FlowAlgorithm, loss: torch.Tensor, n_entries: int) -> torch.Tensor:
    """Scale the mean loss of a minibatch of so many entries on this rank to its share of a whole gradient step.

    Every entry counts alike: the last minibatch of a pass may be a small one.
    """
    config, whole = model.config, model.config.batch_size // model.ranks.world_size
    if config.accumulation == 1:
        return loss
    return loss / config.accumulation if n_entries == whole else loss * (n_entries / (whole * config.accumulation))


def clipped(parameters: Sequence[torch.nn.Parameter], maximum: float, is_sharded: bool = False) -> torch.Tensor:
    """Clip gradients in place to a norm, to the last bit as torch does; their norm before, a scalar tensor.

    All are on one device: torch groups them by it, twice, which takes longer than the rest where a network is small.
    """
    if is_sharded:
        return unsharded(torch.nn.utils.clip_grad_norm_(parameters, maximum))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if gradients:
        torch._foreach_mul_(gradients, (maximum / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gradient_step(model: FlowAlgorithm, n_entries: int) -> torch.Tensor:
    """Take one optimizer step of the trained network, with warm-up, clipping and moving average.

    Args:
        model: The algorithm, whose network has the gradients of one minibatch or, by `share_of_step`, of several.
        n_entries: Entries of these on this rank: with fewer than in a whole step the gradient is still their mean.

    Returns:
        The gradient's norm before clipping, a scalar tensor; a step whose norm is not finite changes nothing.
    """
    config, policy = model.config, model.policy
    parameters = list(policy.parameters_of("current").values())
    whole = config.batch_size * config.accumulation // model.ranks.world_size
    if config.accumulation > 1 and n_entries < whole:
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            gradient.mul_(whole / n_entries)
    rate = model.lr_schedule(model._current_progress_remaining)
    if config.warmup_updates:
        rate *= min(1.0, (model._n_updates + 1) / config.warmup_updates)
    check_rate(model, rate)
    for group in policy.optimizer.param_groups:
        group["lr"] = rate

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        norm = clipped(parameters, config.max_grad_norm, model.ranks.is_sharded)
        bad = (0 * norm).nan_to_num(1.0)  # 0 times what is not finite is not a number
        step_unless(bad, policy.optimizer, model.ranks.is_sharded)
        return norm, bad

    # a graph holds the rate as a number: one that falls from iteration to iteration would need a graph for each
    if policy.graphs.is_on and policy.optimizer.defaults.get("fused") and config.lr_schedule == "constant":
        places = tuple(0 if p.grad is None else p.grad.data_ptr() for p in parameters)
        norm, bad = policy.graphs.run("A gradient step", (rate, hash(places)), step)
    else:
        norm, bad = step()
    model.bad_updates.note(bad, norm)
    policy.networks.weights_changed("current")
    for parameter in parameters:
        parameter.grad = None
    model._n_updates += 1
    if config.ema_decay > 0:  # the average of few steps forgets its start sooner
        policy.networks.update_copy("ema", min(config.ema_decay, (1 + model._n_updates) / (10 + model._n_updates)))
    return norm
