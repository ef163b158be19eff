"""Line charts as SVG, for pages that need nothing else: colours and sizes come from the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 30, 40
MOST_POINTS = 400
"""Points of a curve; more are averaged in groups."""

STYLE = """
svg.chart { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.chart text { fill: var(--ink); } .chart .title { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: var(--faint); stroke-width: 1; } .chart .curve { fill: none; stroke-width: 1.6; }
.chart .end { stroke: var(--paper); stroke-width: 1; }
.s0 { --c: #0072b2; } .s1 { --c: #d55e00; } .s2 { --c: #009e73; } .s3 { --c: #cc79a7; } .s4 { --c: #e69f00; }
.s5 { --c: #56b4e9; } .s6 { --c: #8c564b; } .s7 { --c: #7f7f7f; }
.curve { stroke: var(--c); } .end, .mark { fill: var(--c); color: var(--c); }
"""
"""For the page's style sheet; it also needs the colours --ink, --paper and --faint."""
N_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: What it is of.
        points: (x, y) in the order in which they are joined.
        marks_end: Whether its last point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks_end: bool = False


def chart(title: str, series: Sequence[Series], xlabel: str) -> str:
    """The curves in one picture, as an `<svg>` element; those without a finite point are left out.

    Pointing at a curve shows its name and its last value.
    """
    drawn = [(i, s, _finite(s.points)) for i, s in enumerate(series)]
    drawn = [(i, s, points) for i, s, points in drawn if points]
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text class="title" x="{LEFT}" y="18">{html.escape(title)}</text>',
    ]
    if not drawn:
        return "\n".join([*parts, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>', "</svg>"])
    x_ticks = ticks([x for _, _, points in drawn for x, _ in points], 5)
    y_ticks = ticks([y for _, _, points in drawn for _, y in points], 5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for y in y_ticks:
        _, down = place(x_ticks[0], y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label(y, y_ticks)}</text>')
    for x in x_ticks:
        across, _ = place(x, y_ticks[0])
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = f'x="{across:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle"'
        parts.append(f"<text {anchor}>{label(x, x_ticks)}</text>")
    middle = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle"'
    parts.append(f"<text {middle}>{html.escape(xlabel)}</text>")
    for i, curve, points in drawn:
        colour = f"s{i % N_COLOURS}"
        name = f"<title>{html.escape(curve.name)}: {points[-1][1]:.4g}</title>"
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
        parts.append(f'<polyline class="curve {colour}" points="{path}">{name}</polyline>')
        if curve.marks_end or len(points) == 1:
            a, b = place(*points[-1])
            parts.append(f'<circle class="end {colour}" cx="{a:.1f}" cy="{b:.1f}" r="4">{name}</circle>')
    return "\n".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Names with the colours that `chart` gives them."""
    marks = (
        f'<span class="key"><span class="mark s{i % N_COLOURS}" aria-hidden="true">&#9679;</span> {html.escape(name)}'
        "</span>"
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(marks)}</p>'


def ticks(values: Sequence[float], n: int) -> list[float]:
    """About `n` round numbers that span the values, at equal distances of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, among: Sequence[float]) -> str:
    """A tick in few characters, with as many digits as the ticks need to differ."""
    largest, step = max(abs(among[0]), abs(among[-1])), among[1] - among[0]
    if largest >= 1e4 or largest < 1e-3:
        scale = 10.0 ** (3 * math.floor(math.log10(largest) / 3))
        digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
        exponent = round(math.log10(scale))
        suffix = {3: "k", 6: "M", 9: "G"}.get(exponent, f"e{exponent}")
        return f"{value / scale:.{digits}f}{suffix}" if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}"


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, few enough to draw."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    group = -(-len(kept) // MOST_POINTS)
    if group <= 1:
        return kept
    groups = [kept[i : i + group] for i in range(0, len(kept), group)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
