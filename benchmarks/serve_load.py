"""Load on the reward server: python benchmarks/serve_load.py [--minutes 10]

Starts `flowrl.serve` with the reward `colourfulness`. First `--concurrent` clients ask at the same time, several times
each; every answer is compared with the reward computed here. With `--minutes` it is then asked for so long at a steady
rate, a third of it by what must be refused: no token, image bombs, cut bodies, clients that go away. Printed are
latencies, the server's memory (resident) and open files before and after. The exit code is 1 where an answer was
wrong, or memory or files kept growing.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from flowrl.envs.rewards import wire
from flowrl.envs.rewards.aesthetic import ColourfulnessReward

TOKEN = "a-token-of-the-benchmark"
HEAD = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
GROWTH_MB, GROWTH_FILES = 20, 5
"""More than this between the first tenth of the soak and its end is growth."""


def bomb() -> bytes:
    """A PNG file whose second header claims 12000x12000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    heads = [chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) for side in (8, 12_000)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(heads) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def usage(pid: int) -> tuple[float, int]:
    """Resident memory in MB, and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def ask(port: int, body: bytes, headers: dict[str, str] = HEAD) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", wire.SCORE_PATH, body, {**headers, "Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Load:
    """Requests with their right answers."""

    def __init__(self, port: int, n: int) -> None:
        self.port = port
        generator = torch.Generator().manual_seed(0)
        self.requests = []
        for _ in range(n):
            images = torch.randint(256, (4, 3, 64, 64), generator=generator) / 255
            expected = ColourfulnessReward()(images, [""] * 4).reward
            self.requests.append((wire.encode_request(images, ["a prompt"] * 4, "png"), expected))
        shot = {"encoding": "png", "shape": [3, 8, 8], "samples": [base64.b64encode(bomb()).decode()], "contexts": [""]}
        self.bomb = json.dumps(shot).encode()

    def right(self, i: int) -> str:
        body, expected = self.requests[i % len(self.requests)]
        status, reply = ask(self.port, body)
        if status == 503:
            return "told to come later"
        given = torch.tensor(json.loads(reply)["reward"]) if status == 200 else torch.zeros(4)
        return "answered" if status == 200 and torch.allclose(given, expected, atol=2e-6) else f"WRONG {status}"

    def refused(self, i: int) -> str:
        body = self.requests[i % len(self.requests)][0]
        kind = ("token", "bomb", "cut", "gone")[i % 4]
        if kind == "token":
            status, reply = ask(self.port, body, {**HEAD, "Authorization": "Bearer wrong"})
            good = status == 401
        elif kind == "bomb":
            status, reply = ask(self.port, self.bomb)
            good = status == 400
        elif kind == "cut":
            status, reply = ask(self.port, body[: len(body) // 2])
            good = status == 400
        else:
            with socket.create_connection(("127.0.0.1", self.port)) as sock:
                head = "".join(f"{name}: {value}\r\n" for name, value in HEAD.items())
                sock.sendall(f"POST /v1/score HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 100000\r\n\r\n{{".encode())
            return "went away"
        return "refused" if good and b"Traceback" not in reply else f"WRONG {status}"


def timed(task, i: int) -> tuple[str, float]:
    start = time.monotonic()
    try:
        outcome = task(i)
    except OSError as error:
        outcome = f"WRONG {type(error).__name__}"
    return outcome, time.monotonic() - start


def told(results: list[tuple[str, float]]) -> str:
    """Counts of outcomes, and percentiles of the latency of what was answered."""
    seconds = [s for outcome, s in results if outcome == "answered"] or [float("nan")]
    parts = np.percentile(seconds, (50, 95, 99, 100))
    latency = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in zip(("median", "95 %", "99 %", "longest"), parts))
    return f"{dict(Counter(outcome for outcome, _ in results))}; latency of answers: {latency}"


def soak(load: Load, pid: int, minutes: float, rate: float) -> tuple[list[tuple[str, float]], bool]:
    """At a steady rate; whether memory or open files grew."""
    results, usages, chance = [], [], random.Random(0)
    start, next_report = time.monotonic(), 0.0
    with ThreadPoolExecutor(32) as pool:
        futures = []
        for i in range(int(minutes * 60 * rate)):
            time.sleep(max(0.0, start + i / rate - time.monotonic()))
            futures.append(pool.submit(timed, load.refused if chance.random() < 1 / 3 else load.right, i))
            if len(futures) >= 200:
                results += [future.result() for future in futures]
                futures = []
            if time.monotonic() - start >= next_report:
                usages.append(usage(pid))
                print(f"  {next_report / 60:4.1f} min: {usages[-1][0]:.0f} MB, {usages[-1][1]} open files", flush=True)
                next_report += max(6.0, minutes * 6.0)
        results += [future.result() for future in futures]
    time.sleep(2)
    first, last = usages[min(1, len(usages) - 1)], usage(pid)
    print(f"  after: {last[0]:.0f} MB, {last[1]} open files", flush=True)
    return results, last[0] - first[0] > GROWTH_MB or last[1] - first[1] > GROWTH_FILES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--times", type=int, default=10, help="requests of each of those clients")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the steady load after that; 0 leaves it out")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second of the steady load")
    args = parser.parse_args()
    process = subprocess.Popen(
        [sys.executable, "-m", "flowrl.serve", "--reward", "colourfulness", "--port", "0", "--device", "cpu"],
        env={**os.environ, "FLOWRL_REWARD_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        head = next((line for line in process.stdout if line.startswith("serving ")), "")
        load = Load(int(head.rstrip().rpartition(":")[2]), 32)
        load.right(0)
        before = usage(process.pid)
        start = time.monotonic()
        with ThreadPoolExecutor(args.concurrent) as pool:
            results = list(pool.map(lambda i: timed(load.right, i), range(args.concurrent * args.times)))
        seconds = time.monotonic() - start
        after = usage(process.pid)
        print(
            f"{args.concurrent} clients at once, {len(results)} requests of 4 images in {seconds:.1f} s:", told(results)
        )
        print(
            f"memory {before[0]:.0f} MB before, {after[0]:.0f} MB after; open files {before[1]}, {after[1]}", flush=True
        )
        grew = False
        if args.minutes:
            print(f"steady load for {args.minutes:g} minutes, {args.rate:g} requests a second:", flush=True)
            more, grew = soak(load, process.pid, args.minutes, args.rate)
            print(told(more))
            results += more
        wrong = sum(outcome.startswith("WRONG") for outcome, _ in results)
        print(f"{wrong} wrong answers; memory and open files {'GREW' if grew else 'did not grow'}")
        return 1 if wrong or grew else 0
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
