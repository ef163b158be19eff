"""Loads thousands of damaged and hostile checkpoint folders: python tests/fuzz_checkpoints.py --n 5000

Every one must load or give a FlowRLError: no other exception, no crash, no file written, memory bounded. Children take
some each, so that a crash or too much memory is seen. Findings are printed with the seed that makes them again.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from fuzzing import ANY, JSON, Damage, Target, json_code, main, pick
from safetensors.torch import load_file, save_file

import flowrl


def sound(folder: Path) -> list[Target]:
    """Checkpoints to damage."""
    small = {"n_samples": 16, "batch_size": 8, "group_size": 4, "seed": 0, "device": "cpu"}
    made = {
        "full": flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", ema_decay=0.9, **small),
        "lora": flowrl.ORWCFMW2("FlowPolicy", "gaussians-linear", lora_rank=2, **small),
        "ddpo": flowrl.DDPO("FlowPolicy", "gaussians-linear", **small),
        "dpok": flowrl.DPOK("FlowPolicy", "gaussians-linear", **small),
    }
    for name, model in made.items():
        model.learn(16)
        model.save(folder / name)
    damages = {".json": [*JSON, json_code], ".safetensors": TENSORS}
    return [Target(name, folder / name, damages, load) for name in made]


def load(folder: Path) -> None:
    flowrl.FlowAlgorithm.load(folder, device="cpu")


def tensor(file: Path, rng: np.random.Generator) -> None:
    """A tensor of another shape or type, without or under another name, or with odd values."""
    tensors = load_file(file)
    name = pick(rng, list(tensors))
    old = tensors[name]
    action = int(rng.integers(7))
    if action == 0:
        tensors[name] = torch.zeros(*old.shape, 2)
    elif action == 1:
        tensors[name] = old.to(pick(rng, [torch.int64, torch.float16, torch.bool, torch.complex64, torch.uint8]))
    elif action == 2:
        del tensors[name]
    elif action == 3:
        tensors[pick(rng, ["../../evil", "/etc/evil", "current.x", "", "a" * 5000])] = tensors.pop(name)
    elif action == 4:
        tensors[name] = torch.zeros(0)
    elif action == 5:
        tensors[name] = torch.full_like(old, 255 if not old.is_floating_point() else torch.nan)
    else:
        tensors[name] = old.flatten()[:1].clone()
    save_file(tensors, file)


def header(file: Path, rng: np.random.Generator) -> None:
    """A safetensors file whose header lies."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    action = int(rng.integers(5))
    if action == 0:
        file.write_bytes(struct.pack("<Q", pick(rng, [2**63, 2**40, length + 1, 0, length - 1])) + content[8:])
        return
    key = pick(rng, [key for key in entries if key != "__metadata__"])
    entry = entries[key]
    if action == 1:
        entry["shape"] = pick(rng, [[2**40], [-1], [2**31, 2**31], ["x"], [0], []])
    elif action == 2:
        entry["data_offsets"] = pick(rng, [[0, 2**50], [5, 1], [-1, 4], [0], ["a", "b"]])
    elif action == 3:
        entry["dtype"] = pick(rng, ["F64", "X", "", 5, "BOOL"])
    else:
        entries = {f"{key}{i}": entry for i in range(20_000)}
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


TENSORS: list[Damage] = [*ANY, tensor, tensor, tensor, header, header]


if __name__ == "__main__":
    sys.exit(main(__doc__, "folders", sound))
