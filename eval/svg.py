"""Plots as inline SVG: no script, no file beside it, colours from the page's style so that they follow light and dark.

Every mark has a ``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 64, 16, 12, 44


@dataclass(frozen=True)
class Point:
    """A mark at ``(x, y)`` and what it says on hover."""

    x: float
    y: float
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points joined by a line in the page's colour ``tone`` (a CSS value); ``marks``: each has a dot as well."""

    name: str
    points: Sequence[Point]
    tone: str
    marks: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From a value to a place; ``log`` needs positive values."""

    label: str
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def at(self, value: float) -> float:
        """Where ``value`` is, in the picture's units; held to the axis."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        part = (min(here, high) - low) / (high - low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 6))]
        rough = (self.high - self.low) / 5
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(
    label: str,
    values: Sequence[float],
    start: float,
    end: float,
    log: bool = False,
    zero: bool = False,
    whole: bool = False,
) -> Axis:
    """An axis that holds the values, with some room; ``zero``: from there; ``whole``: marked at whole numbers."""
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = 10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)) + 1e-9)
        return Axis(label, low, high if high > low else low * 10, start, end, True)
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(label, min(0.0, low) if zero else low - room, high + room, start, end, whole=whole)


def number(value: float) -> str:
    """A tick's value, short."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 1e-3 else f"{value:,.4g}"


def lines(
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    log: bool = False,
    whole: bool = False,
    width: int = WIDTH,
    height: int = 300,
) -> str:
    """A plot of several series; ``log``: the ordinates are; ``whole``: the abscissae are whole numbers."""
    marks = [point for each in series for point in each.points]
    across = axis(x, [point.x for point in marks], LEFT, width - RIGHT, whole=whole)
    up = axis(y, [point.y for point in marks], height - BOTTOM, TOP, log, zero=True)
    body = [_frame(across, up)]
    for each in series:
        places = [(across.at(point.x), up.at(point.y)) for point in each.points]
        path = " ".join(f"{left:g},{top:g}" for left, top in places)
        dash = ' stroke-dasharray="5 4"' if each.dashed else ""
        title = f"<title>{escape(each.name)}</title>"
        body.append(f'<polyline class="line" points="{path}" style="stroke:{each.tone}"{dash}>{title}</polyline>')
        for (left, top), point in zip(places, each.points, strict=True) if each.marks else ():
            title = escape(point.title or f"{each.name}: {point.x:g}, {point.y:.4g}")
            body.append(
                f'<circle class="dot" cx="{left:g}" cy="{top:g}" r="4" style="fill:{each.tone}"><title>{title}</title></circle>'
            )
    return picture("".join(body), height, f"{y} against {x}", width)


def _frame(across: Axis, up: Axis) -> str:
    """Grid, ticks and labels."""
    bottom, parts = up.start, []
    for value in up.ticks():
        top = up.at(value)
        parts.append(f'<line class="grid" x1="{across.start}" x2="{across.end}" y1="{top}" y2="{top}"/>')
        parts.append(f'<text x="{across.start - 6}" y="{top + 4}" text-anchor="end">{number(value)}</text>')
    for value in across.ticks():
        left = across.at(value)
        parts.append(f'<text x="{left}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    middle = (across.start + across.end) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(across.label)}</text>'
    )
    centre = (up.start + up.end) / 2
    turn = f'transform="rotate(-90 14 {centre})"'
    parts.append(f'<text class="label" x="14" y="{centre}" text-anchor="middle" {turn}>{escape(up.label)}</text>')
    return "".join(parts)


def legend(series: Sequence[Series]) -> str:
    """The names of the series beside their colours, as HTML."""
    items = "".join(f'<li><i style="background:{each.tone}"></i>{escape(each.name)}</li>' for each in series)
    return f'<ul class="legend">{items}</ul>'


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], tuple[float, str]]) -> str:
    """A cell for every ``(row, column)`` there is, of a value from 0 to 1 and a title; columns run from left to right."""
    side, left = 18, 8 + 7 * max(len(row) for row in rows)
    places = {name: index for index, name in enumerate(columns)}
    parts = []
    for line, row in enumerate(rows):
        top = TOP + line * side
        parts.append(f'<text x="{left - 6}" y="{top + 13}" text-anchor="end">{escape(row)}</text>')
        for column in columns:
            if (row, column) in cells:
                value, title = cells[row, column]
                tone = shade(value)
                place = f'x="{left + places[column] * side}" y="{top}" width="{side - 1}" height="{side - 1}"'
                parts.append(f'<rect class="cell" {place} style="fill:{tone}"><title>{escape(title)}</title></rect>')
    every = max(1, len(columns) // 16)
    bottom = TOP + len(rows) * side
    for column in columns[::every]:
        middle = left + (places[column] + 0.5) * side
        parts.append(f'<text x="{middle}" y="{bottom + 14}" text-anchor="middle">{escape(column)}</text>')
    return picture("".join(parts), bottom + 22, "heat map", left + len(columns) * side + RIGHT)


def shade(value: float) -> str:
    """From the page's surface (0) to its accent (1)."""
    return f"color-mix(in srgb, var(--accent) {round(8 + 92 * min(max(value, 0.0), 1.0))}%, var(--surface))"


def picture(body: str, height: float, label: str, width: float) -> str:
    """The SVG in a box of its own that scrolls where the page is narrower than the plot can be read at."""
    box = f'viewBox="0 0 {width:g} {height:g}" style="min-width:{min(width, 560):g}px;max-width:{1.3 * width:g}px"'
    return f'<div class="scroll"><svg role="img" aria-label="{escape(label)}" {box}>{body}</svg></div>'
