"""Loads thousands of damaged and hostile checkpoint folders: python tests/fuzz_checkpoints.py --n 5000

Every one must load or give a FlowRLError: no other exception, no crash, no file written, memory bounded. Children take
some each, so that a crash or too much memory is seen. Findings are printed with the seed that makes them again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import flowrl
from flowrl.errors import FlowRLError

ODD: list[Any] = [None, True, -1, 0, 1.5, 1e308, 2**63, -(2**70)]
ODD += ["nan", "", "../x", "x" * 10_000, [], {}, [[1]], {"a": 1}]
EXTRA_MEMORY = 2 * 2**30
"""Bytes of address space that a load may take beyond what the child has."""


def sound(folder: Path) -> list[Path]:
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
    return [folder / name for name in made]


def pick(rng: np.random.Generator, things: list[Any]) -> Any:
    return things[int(rng.integers(len(things)))]


def truncate(file: Path, rng: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(rng.integers(len(content) + 1))])


def flip(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        content[int(rng.integers(min(len(content), pick(rng, [16, 400, len(content)]))))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def remove(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


def garbage(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(rng.bytes(int(rng.integers(1000))))


def swap(file: Path, rng: np.random.Generator) -> None:
    shutil.copy(pick(rng, [other for other in file.parent.iterdir() if other.is_file()]), file.with_name("swapped"))
    file.with_name("swapped").replace(file)


def link(file: Path, rng: np.random.Generator) -> None:
    file.unlink()
    file.symlink_to(pick(rng, ["/etc/passwd", "/dev/zero", "/nowhere", str(file), "/", "/dev/null"]))


def folder_instead(file: Path, rng: np.random.Generator) -> None:
    file.unlink()
    file.mkdir()


def json_value(file: Path, rng: np.random.Generator) -> None:
    """An odd value somewhere in a JSON file."""
    content = json.loads(file.read_text())
    place = content
    while True:
        if isinstance(place, dict) and place:
            key: Any = pick(rng, list(place))
        elif isinstance(place, list) and place:
            key = int(rng.integers(len(place)))
        else:
            return
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        action = rng.random()
        if action < 0.6:
            place[key] = pick(rng, ODD)
        elif action < 0.8 and isinstance(place, dict):
            del place[key]
        elif isinstance(place, dict):
            place[pick(rng, ["x", "../../x", "__class__", ""])] = place.pop(key)
        file.write_text(json.dumps(content))
        return


def json_bomb(file: Path, rng: np.random.Generator) -> None:
    depth = int(rng.integers(500, 200_000))
    bombs = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * depth, '"' * depth]
    file.write_text(pick(rng, bombs))


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


ANY: list[Callable[[Path, np.random.Generator], None]] = [truncate, flip, remove, garbage, swap, link, folder_instead]
JSON = [*ANY, json_value, json_value, json_value, json_value, json_bomb]
TENSORS = [*ANY, tensor, tensor, tensor, header, header]


def damage(folder: Path, rng: np.random.Generator) -> str:
    """Damage one or two files; says how."""
    done = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        file = pick(rng, sorted(file for file in folder.iterdir() if file.is_file() and not file.is_symlink()))
        change = pick(rng, JSON if file.suffix == ".json" else TENSORS)
        try:
            change(file, rng)
        except Exception:  # it was damaged before
            continue
        done.append(f"{change.__name__} {file.name}")
    return ", ".join(done)


def snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime) for path in folder.rglob("*")}


def child(seeds: range, sources: list[Path], work: Path, results: Any) -> None:
    """Load the folders of these seeds; a result for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_MEMORY, -1))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        folder = work / f"{os.getpid()}"
        shutil.copytree(pick(rng, sources), folder)
        how = damage(folder, rng)
        before, start = snapshot(work.parent), time.monotonic()
        results.put((seed, how, "started", ""))
        try:
            flowrl.FlowAlgorithm.load(folder, device="cpu")
            outcome, detail = "loaded", ""
        except FlowRLError as error:
            outcome, detail = type(error).__name__, str(error)
        except BaseException as error:
            outcome, detail = "FINDING", f"{type(error).__name__}: {error}"
        if time.monotonic() - start > 20:
            outcome, detail = "FINDING", "slower than 20 seconds"
        if snapshot(work.parent) != before:
            outcome, detail = "FINDING", "files were written"
        results.put((seed, how, outcome, detail[:300]))
        shutil.rmtree(folder)


def main() -> int:
    """Run; the exit code is 1 when there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-child", type=int, default=100)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    findings = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as root:
        sources = sound(Path(root) / "sound")
        work = Path(root) / "work"
        work.mkdir()
        for first in range(args.seed, args.seed + args.n, args.per_child):
            seeds = range(first, min(first + args.per_child, args.seed + args.n))
            while seeds:
                results = context.SimpleQueue()
                process = context.Process(target=child, args=(seeds, sources, work, results))
                process.start()
                last = (seeds.start, "", "started", "")
                while process.is_alive() or not results.empty():
                    if results.empty():
                        time.sleep(0.01)
                        continue
                    last = results.get()
                    outcomes[last[2]] += last[2] != "started"
                    if last[2] == "FINDING":
                        findings.append(f"seed {last[0]}: {last[1]}: {last[3]}")
                if process.exitcode:
                    findings.append(f"seed {last[0]}: {last[1]}: the process ended with {process.exitcode}")
                    shutil.rmtree(work / f"{process.pid}", ignore_errors=True)
                seeds = range(last[0] + 1, seeds.stop)
    outcomes = +outcomes
    print(f"{args.n} folders: {dict(outcomes)}")
    print("\n".join(findings) or "no findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
