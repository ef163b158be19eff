"""The frontier of a benchmark as a page: point at a setting to see its samples."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from flowrl.errors import CheckpointError
from flowrl.pages import charts
from flowrl.pages.benchmark_frontier import before, frontiers, limits, rows_of
from flowrl.pages.benchmark_results import Entry
from flowrl.pages.benchmark_tables import figure, interval
from flowrl.pages.charts import Mark, Series, chart, legend
from flowrl.pages.html import data_url, heading, page, paragraph
from flowrl.suites.suite import AGAIN

THUMBNAIL = 160  # pixels
STYLE = (
    charts.STYLE
    + """
svg.chart { max-width: 48rem; } circle { cursor: pointer; }
circle:hover, circle:focus { stroke: var(--ink); stroke-width: 2; outline: none; }
#shown { position: fixed; right: 1rem; top: 1rem; width: 19rem; background: var(--paper); border: 1px solid #888;
  padding: .6rem; white-space: pre-wrap; font-size: 13px; } #shown img { width: 100%; }
"""
)
EXPLAINED = (
    "Each point is an algorithm at one setting, the mean over its seeds; lines join the values of a sweep, dotted ones "
    "show the training of a single setting. Point at one to see its settings and samples. What lies far out is put on "
    "the border."
)
SCRIPT = """<div id="shown">no point chosen</div>
<script>
const shown = document.getElementById("shown");
for (const point of document.querySelectorAll("circle[data-told]")) {
  const show = () => {
    shown.textContent = point.dataset.told;
    if (!point.dataset.picture) return;
    const image = document.createElement("img");
    image.src = point.dataset.picture;
    shown.append(image);
  };
  point.addEventListener("mouseenter", show);
  point.addEventListener("focus", show);
}
</script>"""


def benchmark_page(entries: Sequence[Entry], root: Path) -> str:
    """Write the page; `root` holds the folders of the cells."""
    rows = rows_of(entries)
    body = []
    for env in dict.fromkeys(entry["env"] for entry in entries):
        done = [entry for entry in entries if entry["env"] == env and entry["seeds_finished"]]
        if done:
            body += [heading(env), _chart(done, rows, root)]
    title = f"Benchmark {root.name}"
    return page(title, [heading(title, 1), paragraph(EXPLAINED), legend(list(rows)), *body, SCRIPT], STYLE)


def _chart(entries: Sequence[Entry], rows: dict[str, int], root: Path) -> str:
    """Draw the frontier of an environment."""
    series = []
    for row, (ends, path) in frontiers(entries).items():
        marks = [_mark(entry, root) for entry in entries if entry["row"] == row]
        series.append(Series(row, ends, marks=marks, colour=rows[row]))
        series.append(Series(f"{row}, training", path if len(path) > 1 else [], dotted=True, colour=rows[row]))
    series.append(Series("before training", [], marks=[Mark(before(entries), "before training", symbol="★")]))
    return chart("reward against diversity", series, "diversity", limits(entries))


def _mark(entry: Entry, root: Path) -> Mark:
    """Mark a setting, with its figures and samples."""
    place = entry["diversity"]["mean"], entry["reward_mean"]["mean"]
    told = f"{entry['label']}\nreward {interval(entry['reward_mean'])}, diversity {interval(entry['diversity'])}"
    told += f", drift {figure(entry['drift']['mean'], 2)}\nsettings: {json.dumps(entry['settings'])}"
    path = root / entry["folders"][0] / "samples.png"
    picture = {"picture": data_url(_thumbnail(path), "jpeg")} if path.exists() else {}
    return Mark(place, told, data={"told": told, **picture})


def _thumbnail(path: Path) -> bytes:
    """Make a small JPEG of a picture: a page may hold hundreds.

    Raises:
        CheckpointError: It is damaged.
    """
    from PIL import Image

    try:
        picture, data = Image.open(path).convert("RGB"), io.BytesIO()
    except (OSError, SyntaxError) as error:  # SyntaxError: of PNGs
        raise CheckpointError(f"The picture '{path}' is damaged: {error}. {AGAIN}") from error
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(data, "JPEG", quality=50)
    return data.getvalue()
