"""What mkdocs does besides: CONTRIBUTING.md is a page of the site, and links that leave docs/ are mended.

In the repository a page links to `../CONTRIBUTING.md` or `../flowrl/suites/toy.toml`. The site has the first as a page
of its own; of the second only the text stays, as no address of the repository is known here.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
CONTRIBUTING = "contributing.md"
LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING.md."""
    files.append(File.generated(config, CONTRIBUTING, abs_src_path=os.fspath(ROOT / "CONTRIBUTING.md")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links as the site needs them."""
    return mended(markdown, page.file.src_uri)


def mended(markdown: str, page: str) -> str:
    """Links of a page (its path in docs/) to files outside docs/, as links to pages of the site or as plain text.

    Raises:
        FileNotFoundError: There is no such file.
    """
    folder = "" if page == CONTRIBUTING else posixpath.join("docs", posixpath.dirname(page))

    def mend(link: re.Match[str]) -> str:
        text, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "CONTRIBUTING.md":
            path = f"docs/{CONTRIBUTING}"
        elif folder and path.startswith("docs/"):
            return link.group(0)  # mkdocs checks it
        elif not (ROOT / path).exists():
            raise FileNotFoundError(f"{page} links to '{target}', which is not there.")
        if not path.startswith("docs/"):
            return text
        return f"[{text}]({posixpath.relpath(path, posixpath.join('docs', posixpath.dirname(page)))}{anchor})"

    return LINK.sub(mend, markdown)
