"""HTML of pages that are one file and load nothing: they can be sent, printed and read on a phone.

Functions take plain text and escape it; those whose argument is called `body` take HTML.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #ddd; --note: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --faint: #3a3d42; --note: #4a3b10; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.9rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; font-variant-numeric: tabular-nums; }
th[scope=row] { font-weight: 500; } td { overflow-wrap: anywhere; } .figures td { white-space: nowrap; }
img { max-width: 100%; height: auto; background: #fff; } pre { overflow-x: auto; font-size: 0.8rem; }
.warnings { background: var(--note); padding: 0.1rem 1rem; border-radius: 0.5rem; } .warnings h2 { margin-top: 0.5rem; }
figure { margin: 0; break-inside: avoid; }
summary { cursor: pointer; margin-top: 1.5rem; font-weight: 600; }
@media print { :root { --ink: #000; --paper: #fff; --faint: #ccc; } body { max-width: none; } }
"""


def escaped(text: object) -> str:
    """Write text so that it stands for itself, between tags and in attributes."""
    return html.escape(str(text))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Write a whole page; empty parts of the body are left out."""
    text = "\n".join(part for part in body if part)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style></head>
<body>
{text}
</body></html>
"""


def heading(text: str, level: int = 2) -> str:
    """Write a heading."""
    return f"<h{level}>{escaped(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Write a paragraph."""
    return f"<p>{escaped(text)}</p>"


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Write a table in a part that scrolls sideways; the first cell of a row is its name."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    kind = ' class="figures"' if head else ""
    return f'<div class="wide"><table{kind}>{thead}<tbody>{lines}</tbody></table></div>'


def folded(summary: str, body: str) -> str:
    """Write a part that opens on demand."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    """Write text as it stands, with its line breaks."""
    return f"<pre>{escaped(text)}</pre>"


def warning_list(texts: Sequence[str]) -> str:
    """Write a box of warnings, each once; nothing without any."""
    if not texts:
        return ""
    items = "".join(f"<li>{escaped(text)}</li>" for text in dict.fromkeys(texts))
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def data_url(data: bytes, kind: str, of: str = "image") -> str:
    """Write a picture of a kind (png, jpeg), or a sound (wav, of="audio"), as an address that holds it."""
    return f"data:{of}/{kind};base64,{base64.b64encode(data).decode()}"


def player(wav: bytes) -> str:
    """Write a sound into the page, to be played."""
    return f'<audio controls preload="none" src="{data_url(wav, "wav", "audio")}"></audio>'


def picture(png: bytes, described: str) -> str:
    """Write a PNG picture into the page."""
    return f'<img alt="{escaped(described)}" src="{data_url(png, "png")}">'
