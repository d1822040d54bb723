"""Small plots as inline SVG: no library, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
COLOURS = ("#4269d0", "#ef7c29", "#3ca951", "#a463f2")
TICKS = 5
ASIDE = 8  # pixels between error bars, or dots of several series, at the same x


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y), drawn as dots, as a line, or as dots with error bars (x, y, low, high)."""

    name: str
    points: Sequence[tuple[float, ...]]
    line: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A horizontal band for reference, such as a published figure."""

    name: str
    low: float
    high: float


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers that span the range."""
    span = (high - low) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    bands: Sequence[Band] = (),
    zero: bool = True,
    log_x: bool = False,
) -> str:
    """An XY plot. `zero` puts 0 into the range of y. With `log_x` several series lie side by side at each x."""
    xs = [point[0] for one in series for point in one.points]
    ys = [y for one in series for point in one.points for y in point[1:]]
    ys += [y for band in bands for y in (band.low, band.high)]
    if not xs:
        return "<p>No data.</p>"
    x_of = math.log2 if log_x else float
    x_low, x_high = padded(min(map(x_of, xs)), max(map(x_of, xs)))
    y_low, y_high = padded(min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x_of(x) - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_band(place(xs[0], band.low)[1], place(xs[0], band.high)[1]) for band in bands]
    shown_x = sorted(set(xs)) if log_x else ticks(x_low, x_high)
    parts += [_tick_x(place(x, y_low)[0], x) for x in shown_x]
    parts += [_tick_y(place(shown_x[0], y)[1], y) for y in ticks(y_low, y_high)]
    for i, one in enumerate(series):
        aside = ASIDE * (i - (len(series) - 1) / 2) if log_x else 0.0
        parts.append(_draw(one, COLOURS[i % len(COLOURS)], place, aside))
    parts.append(_labels(x_label, y_label))
    legend = " ".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">● {escape(one.name)}</span>' for i, one in enumerate(series)
    )
    legend += "".join(f' <span style="color:#888">▬ {escape(band.name)}</span>' for band in bands)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">{"".join(parts)}</svg>'
    return f"<figure>{picture}<figcaption>{legend}</figcaption></figure>"


def padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def _band(low: float, high: float) -> str:
    width = WIDTH - LEFT - RIGHT
    return f'<rect x="{LEFT}" y="{high:.1f}" width="{width}" height="{max(1.0, low - high):.1f}" class="band"/>'


def _tick_x(x: float, value: float) -> str:
    bottom = HEIGHT - BOTTOM
    return (
        f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" class="grid"/>'
        f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    )


def _tick_y(y: float, value: float) -> str:
    return (
        f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    )


def _labels(x_label: str, y_label: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )


def _draw(series: Series, colour: str, place: Callable[[float, float], tuple[float, float]], aside: float) -> str:
    parts = []
    placed = [place(point[0], point[1]) for point in series.points]
    if series.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for point, (x, y) in zip(series.points, placed):
        x += aside
        if len(point) == 4:
            _, low = place(point[0], point[2])
            _, high = place(point[0], point[3])
            parts.append(f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.8"/>')
    return "".join(parts)
