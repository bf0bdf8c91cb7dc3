"""Curves and intervals as shapes of an inline SVG; the template draws them and escapes their texts.

One chart holds a line a run on shared axes. Units are those of the SVG's view box, y downwards.
"""

import math
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30
POINTS = 240  # of a line: more would not be seen


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    run: int  # place of the run, which chooses colour and dashes
    raw: str  # path of every point, drawn faintly; empty where it would equal `smooth`
    smooth: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str  # the chart in words


@dataclass(frozen=True)
class Series:
    """One run's values; points that are not finite are left out."""

    run: int
    name: str
    x: list[float]
    y: list[float]

    def finite(self) -> "Series":
        kept = [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        return Series(self.run, self.name, [x for x, _ in kept], [y for _, y in kept])


def line_chart(
    title: str, unit: str, series: list[Series], *, from_zero: bool = False, smooth: bool = True
) -> Chart | None:
    """None where no run has two points."""
    series = [each for each in (one.finite() for one in series) if len(each.x) > 1]
    if not series:
        return None
    shown = [_thinned(each) for each in series]
    soft = [_smoothed(each) if smooth else each for each in shown]
    x_low, x_high = min(min(s.x) for s in shown), max(max(s.x) for s in shown)
    y_low = 0.0 if from_zero else min(min(s.y) for s in shown)
    y_high = max(max(s.y) for s in shown)
    if y_high == y_low:
        y_high, y_low = y_high + (abs(y_high) or 1) / 2, y_low - (abs(y_low) or 1) / 2
    y_values = ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_values[0]), max(y_high, y_values[-1])

    def across(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def path(s: Series) -> str:
        return "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in zip(s.x, s.y, strict=True))

    lines = [
        Line(one.run, path(one) if smooth and len(one.x) > 20 else "", path(calm if len(one.x) > 20 else one))
        for one, calm in zip(shown, soft, strict=True)
    ]
    x_ticks = [Tick(across(x), plain(x)) for x in ticks(x_low, x_high, 5) if x_low <= x <= x_high]
    y_ticks = [Tick(down(y), plain(y)) for y in y_values]
    words = "; ".join(f"{s.name} from {plain(s.y[0])} to {plain(s.y[-1])}" for s in soft)
    return Chart(title, unit, lines, x_ticks, y_ticks, f"{title}: {words}")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round values that span low to high."""
    raw = (high - low) / about or 1.0
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def plain(value: float) -> str:
    """Short and readable: 1,200; 0.0005; 3.4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}"


def _thinned(series: Series) -> Series:
    """Means of equal runs of points, at most POINTS of them."""
    size = -(-len(series.x) // POINTS)
    if size == 1:
        return series
    parts = [slice(start, start + size) for start in range(0, len(series.x), size)]
    mean = [[sum(axis[part]) / len(axis[part]) for part in parts] for axis in (series.x, series.y)]
    return Series(series.run, series.name, *mean)


def _smoothed(series: Series) -> Series:
    """Running mean over 5 % of the points on either side."""
    reach = max(1, len(series.y) // 20)
    y = []
    for place in range(len(series.y)):
        near = series.y[max(0, place - reach) : place + reach + 1]
        y.append(sum(near) / len(near))
    return Series(series.run, series.name, series.x, y)
