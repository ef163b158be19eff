"""Coverage-guided fuzzing of everything that reads bytes of others: python tests/fuzz_coverage.py --minutes 10

atheris (`pip install atheris`) changes files so that new lines of flowrl, json, tomllib and safetensors are reached;
a third of the changes keep the form of JSON. The first byte chooses the reader: checkpoints (configuration, state,
tensors, with a load of the whole folder), run folders' JSON and CSV, flows, suites, prompt files, requests and replies
of reward servers. Each must return or raise a FlowRLError; everything else is printed, once for each place in the
code. The exit code is 1 when there is any.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before atheris instruments what is imported: it is large, and not ours

SEEDS = Path(__file__).with_name("fuzz_files.py")
INSTRUMENTED = ["flowrl", "json", "tomllib", "tomli", "safetensors", "csv"]
Readers = dict[str, tuple[Callable[[bytes], Any], list[bytes]]]
LONGEST = 2**14
"""Bytes of an input."""
SLOW, MEMORY_MB = 20, 4096


def checkpoint(folder: Path) -> Path:
    """A small checkpoint: few weights, so that whole files can be changed."""
    import flowrl
    from flowrl.models.mlp import MLP

    def flow() -> Any:
        network = MLP(2, 4, 1)
        network.sample_shape = (2,)  # type: ignore[assignment]
        return network

    @flowrl.register_env("fuzzed", flow=flow)
    def reward(samples: Any, contexts: Any) -> Any:
        """Nothing."""
        return samples[:, 0]

    model = flowrl.ORWCFMW2("FlowPolicy", "fuzzed", n_samples=4, batch_size=4, rollout_steps=1, seed=0, device="cpu")
    model.learn(4)
    model.save(folder)
    return folder


def readers(folder: Path) -> Readers:
    """What reads bytes, with sound ones to begin with."""
    import flowrl
    from flowrl.envs.prompts import fingerprint, prompts_from
    from flowrl.envs.rewards import wire
    from flowrl.models.loading import ASSETS, source_of
    from flowrl.runs.logs import read_metrics
    from flowrl.storage import hub
    from flowrl.storage.files import read_json, read_rows, read_tensors
    from flowrl.suites.suite import load_suite

    suite = re.search(r'^SUITE = """(.*?)"""', SEEDS.read_text(), re.DOTALL | re.MULTILINE)
    assert suite is not None
    saved = checkpoint(folder / "sound")
    made: Readers = {}

    def load(file: Path) -> Any:
        return flowrl.FlowAlgorithm.load(file.parent, device="cpu")

    def add(name: str, file: Path, read: Callable[[Path], Any], *seeds: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)

        def from_bytes(data: bytes) -> Any:
            file.write_bytes(data)
            return read(file)

        made[name] = (from_bytes, [*seeds])

    for name in ("config.json", "state.json", "policy.safetensors", "optimizer.safetensors", "random.safetensors"):
        copy = folder / f"with {name}"
        shutil.copytree(saved, copy)
        whole = (saved / name).read_bytes()
        add(f"checkpoint, {name}", copy / name, load, whole)
    tensors = (saved / "optimizer.safetensors").read_bytes()
    add("safetensors", folder / "a.safetensors", read_tensors, tensors[:LONGEST], header({"a": [2], "b": [1, 2]}))
    add("JSON", folder / "a.json", read_json, b'{"a": [1, -2.5e3, null, true, "\\u00e4\\n"], "b": {}}')
    add("suite", folder / "a.toml", lambda file: load_suite(str(file)), suite[1].encode())
    for suffix, seed in ((".txt", b"# a comment\na red car\n\nthree apples\n"), (".jsonl", PROMPTS)):
        add(f"prompts {suffix}", folder / f"a{suffix}", lambda file: fingerprint(prompts_from(file).train), seed)
    rows = b"time/total_timesteps,rollout/reward_mean\n8,0.5\n16,\n24,-1e-3\n"
    add("metrics", folder / "metrics.csv", lambda file: (read_rows(file), read_metrics(file)), rows)
    mlp = (ASSETS / "gaussians" / "config.json").read_bytes()
    add("flow", folder / "flow" / "config.json", lambda file: source_of(str(file.parent)), mlp)
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        copy = folder / f"pipeline with {name.replace('/', ' ')}"
        for other in ("model_index.json", "transformer/config.json", "vae/config.json"):
            (copy / other).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ASSETS / "mini-sd3" / other, copy / other)
        read = lambda file, copy=copy: source_of(str(copy))  # noqa: E731
        add(f"pipeline, {name}", copy / name, read, (ASSETS / "mini-sd3" / name).read_bytes())
    manifest = b'{"flowrl": "0", "name": "o/n", "kind": "lora", "files": ["a.json"]}'
    add("export", folder / "export" / hub.MANIFEST, lambda file: hub.exported_files(file.parent), manifest)
    sample = base64.b64encode(struct.pack("<2f", 1, 2)).decode()
    request = {"encoding": "float32", "shape": [2], "samples": [sample], "contexts": ["a"]}
    made["request"] = (lambda data: wire.decode_request(data, 8), [json.dumps(request).encode(), png_request()])
    reply = b'{"reward": [1.5, -4], "components": {"a": [0.1, 7]}}'
    made["reply"] = (lambda data: (wire.decode_error(data), wire.decode_reply(data, 2)), [reply])
    return made


PROMPTS = b'{"prompt": "three apples", "count": 3, "weight": 2.5}\n{"prompt": "a dog", "split": "held_out"}\n'


def header(shapes: dict[str, list[int]]) -> bytes:
    """A safetensors file of float32 zeros."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def png_request() -> bytes:
    from flowrl.envs.rewards import wire

    return wire.encode_request(torch.zeros(1, 3, 2, 2), ["a"], "png")


class Cases:
    """What atheris calls: the readers, and what came out."""

    def __init__(self, made: Readers, folder: Path) -> None:
        self.readers = [(name, read) for name, (read, _) in made.items()]
        self.folder, self.known, self.told = folder, set[str](), time.monotonic()
        self.counts = dict.fromkeys(made, 0)
        self.expected = sys.modules["flowrl.errors"].FlowRLError  # imported where atheris sees it, not above

    def __call__(self, data: bytes) -> None:
        name, read = self.readers[data[0] % len(self.readers) if data else 0]
        self.counts[name] += 1
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            (self.folder / "counts.json").write_text(json.dumps(self.counts))
        try:
            read(data[1:])
        except self.expected:
            pass
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{name}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            if where not in self.known:
                self.known.add(where)
                with (self.folder / "findings.txt").open("a") as file:
                    print(f"{where}: {str(error)[:200]!r}; bytes {data[1:200]!r}", file=file)


def fuzz(folder: Path, seconds: int) -> None:
    """The child: libFuzzer ends its process, so findings go into a file and figures to the standard error."""
    import atheris

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with atheris.instrument_imports(include=INSTRUMENTED):
        made = readers(folder / "read")
    from fuzzing import ODD, change_somewhere

    odd = [value for value in ODD if not (isinstance(value, str) and len(value) > 100)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, (_, seeds) in enumerate(made.values()):
        for j, seed in enumerate(seeds):
            (corpus / f"{i}-{j}").write_bytes(bytes([i]) + seed)

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if rng.random() < 1 / 3:
            try:
                content = json.loads(data[1:])
            except (ValueError, RecursionError):
                content = None
            if change_somewhere(content, rng, odd):
                return (data[:1] + json.dumps(content).encode())[:longest]
        return atheris.Mutate(data, longest)

    options = [f"-max_total_time={seconds}", f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY_MB}"]
    options += [f"-max_len={LONGEST + 1}", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], Cases(made, folder), custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds = max(1, round(60 * args.minutes))
    if args.child is not None:
        fuzz(args.child, seconds)
        return 0
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("This needs atheris (Linux or macOS): pip install atheris. Nothing was fuzzed.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cwd").mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        command = [sys.executable, os.path.abspath(__file__), "--minutes", str(args.minutes), "--child", name]
        pipe: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        done = subprocess.run(command, cwd=folder / "cwd", env=environment, **pipe)
        told = re.findall(r"^stat::.*|^#\d+\s+(?:INITED|DONE).*|^SUMMARY.*", done.stderr, re.MULTILINE)
        print("\n".join(told) or done.stderr[-3000:])
        counts = folder / "counts.json"
        print(f"inputs of each reader: {counts.read_text() if counts.exists() else 'none'}")
        findings = folder / "findings.txt"
        found = findings.read_text().splitlines() if findings.exists() else []
        if done.returncode:
            found.append(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
        if any((folder / "cwd").iterdir()):
            found.append("files were written into the working directory")
        print("\n".join(found))
        print(f"{len(found)} findings" if found else "no findings")
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
