"""What the fuzzing scripts share: ways to damage files, and children that read them under watch.

A case is a seed: it chooses a target, a copy of its sound folder is damaged, and the target's reader is called. It must
return or raise a FlowRLError. Anything else is a finding: another exception, a crash, a hang, much memory, a file
written or removed, a program started, a connection, an import of what only the files name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.errors import FlowRLError

ODD: list[Any] = [None, True, -1, 0, 1.5, 1e308, 2**63, -(2**70)]
ODD += ["nan", "", "../x", "x" * 10_000, [], {}, [[1]], {"a": 1}]
CANARY = "hostile_module"
"""A module that can be imported where the children run, and that nothing but the damaged files names."""
NAMING_CODE = [f"{CANARY}:thing", f"{CANARY}:gaussians-linear", "os:PathLike", f"0.5:{CANARY}:x+compress"]
EXTRA_MEMORY = 2 * 2**30
"""Bytes of address space that a reader may take beyond what the child has."""
SLOW, HANGING = 20, 600
"""Seconds of computing after which a case is a finding, and seconds of silence after which its child is killed."""

Damage = Callable[[Path, np.random.Generator], None]


@dataclass(frozen=True)
class Target:
    """Something that reads a folder.

    Attributes:
        name: For people.
        folder: A sound one.
        damages: What can be done to a file of it, by the ending of the file's name.
        read: Reads a folder; what it returns is counted as "read".
    """

    name: str
    folder: Path
    damages: dict[str, Sequence[Damage]]
    read: Callable[[Path], None]


def pick(rng: np.random.Generator, things: Sequence[Any]) -> Any:
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


def pipe_instead(file: Path, rng: np.random.Generator) -> None:
    """Opening it waits for a writer that never comes."""
    file.unlink()
    os.mkfifo(file)


def bytes_between(file: Path, rng: np.random.Generator) -> None:
    """Bytes that no text has, marks of other encodings, or a long line, somewhere."""
    content = file.read_bytes()
    odd = [b"\0", b"\0" * 5000, b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\x85", b"\x0c"]
    odd += [b"x" * 100_000, b" " * 1_000_000, b"\n" * 10_000, "\u2028\u202e\U0001f600".encode()]
    place = int(rng.integers(len(content) + 1)) if rng.random() < 0.7 else 0
    file.write_bytes(content[:place] + pick(rng, odd) + content[place:])


def recode(file: Path, rng: np.random.Generator) -> None:
    text = file.read_text(errors="replace") + "ä"
    file.write_bytes(text.encode(pick(rng, ["utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"]), "replace"))


def lines(file: Path, rng: np.random.Generator) -> None:
    """Lines doubled, left out or exchanged."""
    content = file.read_bytes().split(b"\n")
    one, other = (int(rng.integers(len(content))) for _ in range(2))
    action = int(rng.integers(4))
    if action == 0:
        content.insert(one, content[other])
    elif action == 1:
        del content[one]
    elif action == 2:
        content[one], content[other] = content[other], content[one]
    elif sum(map(len, content)) < 100_000:
        content *= int(rng.integers(2, 200))
    file.write_bytes(b"\n".join(content))


def endless(file: Path, rng: np.random.Generator) -> None:
    """Larger than memory; as a hole, it takes no disk."""
    with file.open("ab") as handle:
        handle.truncate(pick(rng, [2**25, 2**33, 2**40]))


def json_value(file: Path, rng: np.random.Generator) -> None:
    """An odd value somewhere in a JSON file."""
    content = json.loads(file.read_text())
    if change_somewhere(content, rng, ODD):
        file.write_text(json.dumps(content))


def json_code(file: Path, rng: np.random.Generator) -> None:
    """The name of a module instead of a value."""
    content = json.loads(file.read_text())
    if change_somewhere(content, rng, NAMING_CODE, only_values=True):
        file.write_text(json.dumps(content))


def change_somewhere(content: Any, rng: np.random.Generator, odd: Sequence[Any], *, only_values: bool = False) -> bool:
    """Put an odd value, or another name, somewhere into nested dicts and lists."""
    place = content
    while True:
        if isinstance(place, dict) and place:
            key: Any = pick(rng, list(place))
        elif isinstance(place, list) and place:
            key = int(rng.integers(len(place)))
        else:
            return False
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        action = 0 if only_values else rng.random()
        if action < 0.6:
            place[key] = pick(rng, odd)
        elif action < 0.8 and isinstance(place, dict):
            del place[key]
        elif isinstance(place, dict):
            place[pick(rng, ["x", "../../x", "__class__", ""])] = place.pop(key)
        return True


def json_bomb(file: Path, rng: np.random.Generator) -> None:
    depth = int(rng.integers(500, 200_000))
    bombs = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * depth, '"' * depth]
    file.write_text(pick(rng, bombs))


ANY: list[Damage] = [truncate, flip, remove, garbage, swap, link, folder_instead]
JSON: list[Damage] = [*ANY, json_value, json_value, json_value, json_value, json_bomb]
TEXT: list[Damage] = [*ANY, pipe_instead, bytes_between, bytes_between, recode, lines, lines, endless]


def damage(folder: Path, rng: np.random.Generator, damages: dict[str, Sequence[Damage]]) -> str:
    """Damage one or two files; says how."""
    done = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        if not files:
            break
        file = pick(rng, [file for file in files if file.suffix in damages] or files)
        change = pick(rng, damages.get(file.suffix, ANY))
        try:
            change(file, rng)
        except Exception:  # it was damaged before
            continue
        done.append(f"{change.__name__} {file.relative_to(folder)}")
    return ", ".join(done)


def snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime) for path in folder.rglob("*")}


WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect")
WATCHED += ("socket.getaddrinfo", "pickle.find_class", "os.remove", "os.rename", "os.mkdir", "os.rmdir")
WATCHED += ("os.truncate", "os.symlink", "os.link", "shutil.rmtree", "shutil.copyfile", "ctypes.dlopen")


class Watch:
    """Notes, while it is on, what a reader must not do anywhere on the machine."""

    def __init__(self) -> None:
        self.on, self.seen = False, ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        canary = event == "import" and args[0] == CANARY
        if (writes and args[0] != os.devnull) or event in WATCHED or canary:
            self.seen = self.seen or f"{event} {str(args)[:200]}"


def child(seeds: range, targets: Sequence[Target], work: Path, results: Any) -> None:
    """Read the folders of these seeds; a result for each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(work))
    watch, silence = Watch(), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    os.chdir(work)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_MEMORY, -1))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        target = pick(rng, targets)
        folder = work / f"{os.getpid()}"
        shutil.copytree(target.folder, folder)
        how = f"{target.name}: {damage(folder, rng, target.damages)}"
        before, start = snapshot(work.parent), time.process_time()
        results.put((seed, how, "started", ""))
        watch.seen, watch.on = "", True
        try:
            target.read(folder)
            outcome, detail = "read", ""
        except FlowRLError as error:
            outcome, detail = type(error).__name__, str(error)
        except BaseException as error:
            outcome, detail = "FINDING", f"{type(error).__name__}: {error}"
        watch.on = False
        if len(detail) > 20_000:
            outcome, detail = "FINDING", f"a message of {len(detail)} characters: {detail}"
        if time.process_time() - start > SLOW:
            outcome, detail = "FINDING", f"more than {SLOW} seconds of computing"
        if watch.seen:
            outcome, detail = "FINDING", watch.seen
        if snapshot(work.parent) != before:
            outcome, detail = "FINDING", "files were written"
        sys.modules.pop(CANARY, None)
        results.put((seed, how, outcome, detail[:300]))
        shutil.rmtree(folder)


def main(doc: str | None, what: str, sound: Callable[[Path], Sequence[Target]]) -> int:
    """The program of a script; the exit code is 1 when there are findings.

    Args:
        doc: What `--help` says.
        what: What is damaged, in the plural.
        sound: Makes the targets, with sound folders in an empty one.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-child", type=int, default=100)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    findings: list[str] = []

    def found(text: str) -> None:
        findings.append(text)
        print(text, flush=True)

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as root:
        targets = sound(Path(root) / "sound")
        for target in {target.name: target for target in targets}.values():
            target.read(target.folder)  # or nothing that follows would mean anything
        work = Path(root) / "work"
        work.mkdir()
        (work / f"{CANARY}.py").write_text("open('imported', 'w')\n")
        for first in range(args.seed, args.seed + args.n, args.per_child):
            seeds = range(first, min(first + args.per_child, args.seed + args.n))
            while seeds:
                results = context.SimpleQueue()
                process = context.Process(target=child, args=(seeds, targets, work, results))
                process.start()
                last, heard = (seeds.start, "", "started", ""), time.monotonic()
                while process.is_alive() or not results.empty():
                    if results.empty():
                        time.sleep(0.01)
                        if time.monotonic() - heard > HANGING and process.is_alive():
                            process.kill()
                        continue
                    last, heard = results.get(), time.monotonic()
                    outcomes[last[2]] += last[2] != "started"
                    if last[2] == "FINDING":
                        found(f"seed {last[0]}: {last[1]}: {last[3]}")
                process.join()
                if process.exitcode:
                    found(f"seed {last[0]}: {last[1]}: the process ended with {process.exitcode}")
                    shutil.rmtree(work / f"{process.pid}", ignore_errors=True)
                seeds = range(last[0] + 1, seeds.stop)
    outcomes = +outcomes
    print(f"{args.n} {what}: {dict(outcomes)}")
    print(f"{len(findings)} findings" if findings else "no findings")
    return 1 if findings else 0
