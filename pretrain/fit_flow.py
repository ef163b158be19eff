"""Plain conditional flow matching of a network on fresh samples, and its folder; shared by the scripts beside it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from flowrl.functional.flow import interpolate
from flowrl.models.base import VelocityModel
from flowrl.models.mlp import MLP, ModuleFlow
from flowrl.types import Condition


def train(
    draw: Callable[[int, torch.Generator], torch.Tensor],
    dim: int,
    steps: int,
    batch: int,
    width: int,
    depth: int,
    seed: int,
) -> nn.Module:
    """The moving average of an MLP trained on `draw(n, generator)`, (n, dim)."""
    torch.manual_seed(seed)
    flow = ModuleFlow(MLP(dim, width, depth), (dim,))
    return fit(flow, lambda n, generator: (draw(n, generator), ()), steps, batch, seed).network


def fit(
    flow: VelocityModel,
    draw: Callable[[int, torch.Generator], tuple[torch.Tensor, Condition]],
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float = 2e-3,
    decay: float = 0.999,
    bfloat16: bool = False,
    keep: Callable[[VelocityModel], None] | None = None,
    until: int | None = None,
) -> VelocityModel:
    """The moving average of a flow trained on `draw(n, generator)`: latents (n, *latent_shape) and their condition.

    Args:
        flow: Where to start.
        draw: Fresh data.
        steps: Gradient steps.
        batch: Samples of each.
        seed: Of noise, times and data.
        learning_rate: The largest, of a one-cycle schedule.
        decay: Of the moving average.
        bfloat16: Compute the network in it.
        keep: Called with the average every 1000 steps.
        until: Step to stop at, on the schedule of all `steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    network = flow.network.train()
    average = flow.with_network(copy.deepcopy(network).eval())
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps if until is None else until):
        x_1, cond = draw(batch, generator)
        x_0 = torch.randn(x_1.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        x_t, u = interpolate(x_0, x_1, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            v = flow(x_t, t, cond)
        loss = (v.float() - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            share = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.network.parameters()), list(network.parameters()), share)
        if (step + 1) % 1000 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
            if keep is not None:
                keep(average)
    average.network.eval()
    return average


def as_shipped(network: nn.Module) -> Any:
    """The network with its weights rounded to float16, in place."""
    network.load_state_dict({name: tensor.half().float() for name, tensor in network.state_dict().items()})
    return network


def save(network: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Write the folder that `--env.flow` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
