"""Line charts as SVG, for pages that need nothing else: colours and sizes come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowrl.pages.html import escaped

Point = tuple[float, float]
WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 30, 40
MOST_POINTS = 400
"""Points of a curve; more are averaged in groups."""
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f"),
    *("#bcbd22", "#8a63c9", "#e31a1c", "#17becf", "#b15928", "#f781bf", "#66a61e"),
)
"""Of the series, in their order; the first six are Okabe and Ito's, which colour-blind people tell apart."""

STYLE = (
    """
svg.chart { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.chart text { fill: var(--ink); } .chart .title { font-size: 13px; font-weight: 600; }
.chart .grid { stroke: var(--faint); stroke-width: 1; } .chart .curve { fill: none; stroke-width: 1.6; }
.chart .end { stroke: var(--paper); stroke-width: 1; } .chart .dotted { stroke-dasharray: 2 3; }
.curve { stroke: var(--c); } .end, .mark { fill: var(--c); color: var(--c); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0.5rem; }
.key { margin-right: 1rem; white-space: nowrap; }
"""
    + " ".join(f".s{i} {{ --c: {colour}; }}" for i, colour in enumerate(COLOURS))
    + "\n"
)
"""For the page's style sheet, which has the colours --ink, --paper and --faint."""


@dataclass(frozen=True)
class Mark:
    """A point that stands out.

    Attributes:
        place: (x, y).
        text: Shown when it is pointed at.
        symbol: A character; a dot in the colour of its series when empty.
        data: Further attributes of its element, `data-KEY`, for the page's script; the point can then have the focus.
    """

    place: Point
    text: str
    symbol: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: For the legend, and for whoever points at the curve.
        points: (x, y) in the order in which they are joined.
        marks_end: Whether its last point is marked.
        dotted: Whether the line is dotted.
        marks: Further points on it or beside it.
        colour: Position of its colour; its own position among the series when None.
    """

    name: str
    points: Sequence[Point]
    marks_end: bool = False
    dotted: bool = False
    marks: Sequence[Mark] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Frame:
    """The part of the plane that a chart shows, by the ticks of its axes."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def place(self, point: Point) -> Point:
        """Give the place of a point in the picture; one outside of the frame is put on its border."""
        across, up = (
            min(max((value - ticks[0]) / (ticks[-1] - ticks[0]), 0.0), 1.0)
            for value, ticks in zip(point, (self.x_ticks, self.y_ticks))
        )
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def axes(self, xlabel: str) -> list[str]:
        """Draw the grid, its numbers, and what the horizontal axis shows."""
        parts = []
        for y in self.y_ticks:
            _, down = self.place((self.x_ticks[0], y))
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label(y, self.y_ticks)}</text>')
        for x in self.x_ticks:
            across, _ = self.place((x, self.y_ticks[0]))
            parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            anchor = f'x="{across:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle"'
            parts.append(f"<text {anchor}>{label(x, self.x_ticks)}</text>")
        middle = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle"'
        return [*parts, f"<text {middle}>{escaped(xlabel)}</text>"]


def chart(title: str, series: Sequence[Series], xlabel: str, limits: tuple[Point, Point] | None = None) -> str:
    """Draw curves in one picture, as an `<svg>` element; those without a finite point are left out.

    Pointing at a curve shows its name and its last value.

    Args:
        title: Above the picture.
        series: The curves.
        xlabel: What the horizontal axis shows.
        limits: Ranges of x and of y to show; those of all points when None.
    """
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">',
        f'<text class="title" x="{LEFT}" y="18">{escaped(title)}</text>',
    ]
    shown = [point for curve in series for point in (*_kept(curve.points), *_finite(m.place for m in curve.marks))]
    if not shown:
        return "\n".join([*parts, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>', "</svg>"])
    across, up = limits or zip(*shown)
    frame = Frame(ticks(across, 5), ticks(up, 5))
    parts += frame.axes(xlabel)
    for i, curve in enumerate(series):
        parts += _drawn(curve, frame, (i if curve.colour is None else curve.colour) % len(COLOURS))
    return "\n".join([*parts, "</svg>"])


def _drawn(curve: Series, frame: Frame, colour: int) -> list[str]:
    points, parts = _kept(curve.points), []
    if points:
        name = f"<title>{escaped(curve.name)}: {points[-1][1]:.4g}</title>"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.place, points))
        dotted = " dotted" if curve.dotted else ""
        parts.append(f'<polyline class="curve s{colour}{dotted}" points="{path}">{name}</polyline>')
        if curve.marks_end or (len(points) == 1 and not curve.marks):
            parts.append(f'<circle {_at(points[-1], frame)} r="4" class="end s{colour}">{name}</circle>')
    return parts + [_mark(mark, frame, colour) for mark in curve.marks if _finite([mark.place])]


def _mark(mark: Mark, frame: Frame, colour: int) -> str:
    told = f"<title>{escaped(mark.text)}</title>"
    if mark.symbol:
        x, y = frame.place(mark.place)
        anchor = 'text-anchor="middle" dominant-baseline="central"'
        return f'<text x="{x:.1f}" y="{y:.1f}" {anchor}>{escaped(mark.symbol)}{told}</text>'
    data = "".join(f' data-{key}="{escaped(value)}"' for key, value in mark.data.items())
    focus = ' tabindex="0"' if mark.data else ""
    return f'<circle {_at(mark.place, frame)} r="4" class="end s{colour}"{focus}{data}>{told}</circle>'


def _at(point: Point, frame: Frame) -> str:
    x, y = frame.place(point)
    return f'cx="{x:.1f}" cy="{y:.1f}"'


def legend(names: Sequence[str]) -> str:
    """Write names with the colours that `chart` gives them."""
    marks = (
        f'<span class="key"><span class="mark s{i % len(COLOURS)}" aria-hidden="true">&#9679;</span> {escaped(name)}'
        "</span>"
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(marks)}</p>'


def ticks(values: Sequence[float], n: int) -> list[float]:
    """Choose about `n` round numbers that span the values, at distances of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float, among: Sequence[float]) -> str:
    """Write a tick in few characters, with as many digits as the ticks need to differ."""
    largest, step = max(abs(among[0]), abs(among[-1])), among[1] - among[0]
    if largest >= 1e4 or largest < 1e-3:
        scale = 10.0 ** (3 * math.floor(math.log10(largest) / 3))
        digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
        exponent = round(math.log10(scale))
        suffix = {3: "k", 6: "M", 9: "G"}.get(exponent, f"e{exponent}")
        return f"{value / scale:.{digits}f}{suffix}" if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}"


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _kept(points: Sequence[Point]) -> list[Point]:
    """Keep the finite points; average them in groups where there are too many to draw."""
    finite = _finite(points)
    size = -(-len(finite) // MOST_POINTS)
    if size <= 1:
        return finite
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
