"""What several GPUs send each other in an iteration, and what that costs: the tables of docs/scaling.md, as Markdown.

Reads and downloads no weights; work is counted by running the network on tensors without storage.

python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import flowrl
from flowrl.distributed.ranks import Ranks
from flowrl.training.without_storage import without_storage

RATE = 400e12
"""FLOP/s of a GPU in bfloat16: 40 % of an H100's 989e12."""
WITHIN, BETWEEN = 300e9, 40e9
"""Bytes/s of a GPU to others of its machine (NVLink) and of other machines (400 Gbit/s each, at 80 %)."""
LATENCY = 2e-4
"""Seconds to start a collective over many machines."""
MACHINE = 8
"""GPUs of a machine."""
SAMPLES, MINIBATCH, EPOCHS, STEPS = 16, 8, 1, 28
"""Of each GPU: samples per iteration, and per gradient step; passes; sampler steps, without guidance."""


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What torch's own counter leaves out."""


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def work(name: str, resolution: int, lora_rank: int) -> tuple[float, int, int]:
    """FLOP of one network evaluation, trained parameters, and values of a sample's latents."""
    with tempfile.TemporaryDirectory() as folder:
        flow = architectures.write(name, Path(folder))
        env: Any = flowrl.make("sd3-compress", flow=flow, resolution=resolution)
        config = flowrl.ORWCFMW2.configure(
            recommended=env.recommended, settings={"lora_rank": lora_rank, "gradient_checkpointing": False}
        )
        env = copy.copy(env)
        env.flow = replace(env.flow, load=env.flow.imitation)
        with without_storage():
            model = flowrl.ORWCFMW2("FlowPolicy", env, config=config, device="cpu", ranks=Ranks())
            policy = model.policy
            x, t = torch.zeros(1, *policy.model.latent_shape), torch.zeros(1)
            counter = FlopCounterMode(display=False, custom_mapping={ATTENTION: _attention})
            with counter, torch.no_grad():
                policy.velocity(x, t, policy.condition(torch.zeros(1, dtype=torch.long)))
            trained = sum(p.numel() for p in policy.parameters_of("current").values())
            return counter.get_total_flops(), trained, x.numel()


def traffic(n_gpus: int, trained: int, latent: int, path_steps: int, is_sharded: bool) -> dict[str, float]:
    """Bytes that a GPU sends in an iteration, by what they are."""
    share = (n_gpus - 1) / n_gpus
    updates = EPOCHS * SAMPLES // MINIBATCH * max(1, path_steps)
    weights = share * 4 * trained
    forwards = (path_steps + 1 if path_steps else STEPS) + updates * (3 if path_steps else 4)
    total = SAMPLES * n_gpus
    row = 3 if path_steps else 1  # a step's two states and the sample, in float32; else the sample, in float16
    rows = EPOCHS * SAMPLES * max(1, path_steps) * row * latent * (4 if path_steps else 2)
    return {
        "weights": forwards * weights if is_sharded else 0,
        "gradients": updates * weights * (1 if is_sharded else 2),  # reduced and scattered, or also gathered
        "samples dealt out": share * rows,
        "vectors": 2 * share * total * (8 + 4 + 4 + 4 * path_steps),
    }


def row(algo: str, name: str, resolution: int, what: str, n_gpus: int, counted: tuple[float, int, int]) -> str:
    """A line of the table."""
    flop, trained, latent = counted
    path_steps = 9 if algo == "flow_grpo" else 0
    sent = traffic(n_gpus, trained, latent, path_steps, what.endswith("FSDP"))
    drawing = SAMPLES * (10 if path_steps else STEPS) * flop / RATE
    # with checkpointing a backward pass counts 3; ORW-CFM-W2 also asks v_ref and v_old, Flow-GRPO v_ref
    updating = EPOCHS * SAMPLES * max(1, path_steps) * (4 + (1 if path_steps else 2)) * flop / RATE
    rate = WITHIN if n_gpus <= MACHINE else BETWEEN
    collectives = EPOCHS * SAMPLES // MINIBATCH * max(1, path_steps) * 2 + 6
    sending = sum(sent.values()) / rate + collectives * LATENCY
    efficiency = (drawing + updating) / (drawing + updating + sending)
    mib = " | ".join(f"{value / 2**20:,.1f}" for value in sent.values())
    return (
        f"| {algo} | {name} | {resolution} | {what} | {n_gpus} | {mib} | {drawing:.1f} + {updating:.1f} | "
        f"{sending:.3f} | {100 * efficiency:.1f} % |"
    )


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| algorithm | pipeline | pixels | trained | GPUs | weights, MiB | gradients, MiB | samples, MiB "
        "| vectors, MiB | drawing + updating, s | sending, s | efficiency |"
    )
    print("|---" * 12 + "|")
    medium, flux = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
    cases = [(medium, 512, 32, ["LoRA"]), (medium, 512, 0, ["full, DDP", "full, FSDP"]), (flux, 1024, 32, ["LoRA"])]
    for name, resolution, lora_rank, ways in cases:
        counted = work(name, resolution, lora_rank)
        print(f"{name}: {counted[0]:.3g} FLOP, {counted[1]:,} parameters trained", file=sys.stderr, flush=True)
        for algo, what, n_gpus in itertools.product(("orw_w2", "flow_grpo"), ways, (8, 64, 512)):
            print(row(algo, name.rpartition("/")[2], resolution, what, n_gpus, counted), flush=True)


if __name__ == "__main__":
    main()
