"""Plain conditional flow matching of an MLP on fresh samples, and its folder; shared by the scripts beside it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flowrl.flow import interpolate
from flowrl.models.mlp import MLP


def train(
    draw: Callable[[int, torch.Generator], torch.Tensor],
    dim: int,
    steps: int,
    batch: int,
    width: int,
    depth: int,
    seed: int,
) -> MLP:
    """The moving average of a network trained on `draw(n, generator)`, (n, dim)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = MLP(dim, width, depth)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        x_1 = draw(batch, generator)
        x_0 = torch.randn(batch, dim, generator=generator)
        t = torch.rand(batch, generator=generator)
        x_t, u = interpolate(x_0, x_1, t)
        loss = (network(x_t, t) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        if (step + 1) % 1000 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)
    return average.eval()


def as_shipped(network: MLP) -> MLP:
    """The network with its weights rounded to float16, in place."""
    network.load_state_dict({name: tensor.half().float() for name, tensor in network.state_dict().items()})
    return network


def save(network: MLP, folder: Path, config: dict[str, Any]) -> None:
    """Write the folder that `--env.flow` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
