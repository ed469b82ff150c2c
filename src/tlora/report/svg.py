"""Small charts as inline SVG, with colors and fonts from the page's style sheet.

Every chart has a title for screen readers. Panels are drawn at their display size, so that text
keeps its size on a phone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tlora.report.intervals import Interval

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end], linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> Scale:
        """Return a scale for ``values`` with some margin on both sides."""
        known = [v for v in values if not log or v > 0] or [1.0]
        low, high = min(known), max(known)
        if log:
            room = max(1.15, (high / low) ** 0.06)
            return cls(low / room, high * room, start, end, log)
        room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        a, b = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - a) / (b - a)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 4) -> list[float]:
        """Return about ``count`` round values inside."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**d for d in decades for m in steps]
                inside = [v for v in found if self.low <= v <= self.high]
                if len(inside) >= min(3, count):
                    break
            return inside[:: max(1, math.ceil(len(inside) / count))]
        raw = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
        first = math.ceil(self.low / step)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Frame:
    """The plot area of a chart: two scales and the positions of axis labels."""

    x: Scale
    y: Scale
    width: int
    height: int

    def axes(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[float]) -> list[str]:
        """Return grid lines and labels."""
        parts = []
        for value in y_ticks:
            at = self.y(value)
            parts.append(_line((self.x.start, at), (self.x.end, at), "grid"))
            parts.append(_text(self.x.start - 5, at + 3.5, short(value), "tick end"))
        for value, label in x_ticks:
            at = self.x(value)
            parts.append(_line((at, self.y.start), (at, self.y.start + 3), "axis"))
            parts.append(_text(at, self.y.start + 15, label, "tick middle"))
        base = self.y.start
        return [*parts, _line((self.x.start, base), (self.x.end, base), "axis")]


def strip(score: Interval, seeds: Sequence[float], domain: tuple[float, float], text: str) -> str:
    """Draw one row of the table's chart: each seed a dot, the mean a tick, the interval a line."""
    width, height = 280, 26
    x = Scale(*domain, 8, width - 8)
    middle = height / 2
    parts = [_line((8, middle), (width - 8, middle), "grid")]
    if score.low is not None and score.high is not None:
        ends = (max(x.start, x(score.low)), min(x.end, x(score.high)))
        parts.append(_line((ends[0], middle), (ends[1], middle), "interval"))
    parts += [_dot(x(value), middle, 3, "seed") for value in seeds]
    parts.append(_line((x(score.mean), 4), (x(score.mean), height - 4), "mean"))
    return _svg(width, height, parts, text, "strip")


def intervals(rows: Sequence[tuple[str, Interval]], width: int, text: str) -> str:
    """Draw one score per row under its name, with its interval, and a line at the first score."""
    step, top, foot = 34, 4, 24
    values = [e for _, s in rows for e in (s.low, s.mean, s.high) if e is not None]
    height = top + step * len(rows) + foot
    frame = Frame(
        Scale.over(values, 10, width - 14), Scale(0, 1, height - foot, top), width, height
    )
    ticks = [(value, short(value)) for value in frame.x.ticks(4)]
    first = frame.x(rows[0][1].mean)
    parts = [*frame.axes(ticks, []), _line((first, top), (first, height - foot), "grid")]
    for place, (name, score) in enumerate(rows):
        at = top + step * place + 22
        parts.append(_text(frame.x.start, at - 10, name, "name"))
        if score.low is not None and score.high is not None:
            parts.append(_line((frame.x(score.low), at), (frame.x(score.high), at), "interval"))
        parts.append(_dot(frame.x(score.mean), at, 4, "score"))
    return panel(frame, parts, text)


def seeds(rows: Mapping[str, Sequence[float]], width: int, text: str) -> str:
    """Draw one method's scores per row under its name: each seed a dot, the mean a tick."""
    step, top, foot = 40, 4, 24
    height = top + step * len(rows) + foot
    x = Scale.over([value for values in rows.values() for value in values], 10, width - 14)
    frame = Frame(x, Scale(0, 1, height - foot, top), width, height)
    parts = frame.axes([(value, short(value)) for value in x.ticks(5)], [])
    for place, (name, values) in enumerate(rows.items()):
        at, mean = top + step * place + 29, x(statistics.fmean(values))
        parts.append(_text(x.start, at - 14, name, "name"))
        parts += [_dot(x(value), at, 4, "seed") for value in values]
        parts.append(_line((mean, at - 8), (mean, at + 7), "mean"))
    return panel(frame, parts, text)


def lines(
    frame: Frame, own: Sequence[Point], others: Iterable[Sequence[Point]], extra: list[str]
) -> list[str]:
    """Return one method's line in front of all others in gray, with ``extra`` in between."""
    parts = [*(_path(frame, line, "other") for line in others), *extra, _path(frame, own, "own")]
    # A line of one point would be invisible.
    return [*parts, *dots(frame, own, "seed")] if len(own) == 1 else parts


def panel(frame: Frame, parts: Sequence[str], text: str) -> str:
    """Return a whole chart."""
    return _svg(frame.width, frame.height, parts, text, "panel")


def dots(frame: Frame, points: Iterable[Point], kind: str, radius: float = 2.6) -> list[str]:
    """Return a dot for each point."""
    return [_dot(frame.x(a), frame.y(b), radius, kind) for a, b in points]


def labeled(frame: Frame, points: Sequence[tuple[float, float, str]]) -> list[str]:
    """Return dots with names next to them, moved apart to avoid overlap."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for a, b, name in sorted(points, key=lambda point: -point[1]):
        x, y = frame.x(a), frame.y(b)
        wide = 6.6 * len(name) + 4
        right = x + wide + 8 < frame.width
        left = x + 7 if right else x - 7 - wide
        at = y
        while any(
            abs(at - other) < 12 and left < end and start < left + wide
            for other, start, end in taken
        ):
            at += 2
        taken.append((at, left, left + wide))
        if abs(at - y) > 5:
            parts.append(_line((x, y), (left if right else left + wide, at), "leader"))
        anchor = left if right else left + wide
        parts.append(_text(anchor, at + 4, name, "name" if right else "name end"))
        parts.append(_dot(x, y, 4, "seed"))
    return parts


def caption(frame: Frame, x: str, y: str) -> list[str]:
    """Return the axis titles."""
    return [
        _text((frame.x.start + frame.x.end) / 2, frame.height - 4, x, "tick middle"),
        _text(frame.x.start, 11, y, "tick"),
    ]


def short(value: float) -> str:
    """Return a number for an axis: 0.8, 3e-04, 1.2M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-2:
        mantissa, _, power = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:g}"


def _svg(width: int, height: int, parts: Sequence[str], text: str, kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img"><title>{escape(text)}</title>{"".join(parts)}</svg>'
    )


def _line(start: Point, end: Point, kind: str) -> str:
    (a, b), (c, d) = start, end
    return f'<line class="{kind}" x1="{a:g}" y1="{b:g}" x2="{c:g}" y2="{d:g}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _dot(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'


def _path(frame: Frame, points: Sequence[Point], kind: str) -> str:
    if not points:
        return ""
    way = " ".join(f"{frame.x(a):g},{frame.y(b):g}" for a, b in points)
    return f'<polyline class="{kind}" points="{way}"/>'
