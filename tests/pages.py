"""The pages of the project and their code blocks, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
MODULE = re.compile(r"# (\w+)\.py\n")


@dataclass(frozen=True)
class Block:
    """A fenced block. `<!-- not run: WHY -->` in the line above it says that tests do not run it."""

    page: str
    line: int
    language: str
    text: str
    why: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("", "bash")

    @property
    def module(self) -> str:
        """The module that a block is the whole of, by its first line `# NAME.py`; empty for others."""
        match = MODULE.match(self.text)
        return match[1] if match else ""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.relative_to(ROOT).as_posix(),
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["text"],
            match["why"] or "",
        )
        for match in FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, as lists of words."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def write_modules(page: Path, folder: Path) -> list[str]:
    """Write the modules that a page's blocks are the whole of; their names."""
    modules = [block for block in blocks(page) if block.module]
    for block in modules:
        (folder / f"{block.module}.py").write_text(block.text)
    return [block.module for block in modules]
