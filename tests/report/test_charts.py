"""Curves: shared axes, round ticks, gaps for what is not finite."""

import math
import re

import pytest

from vlscale.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, plain, ticks


def points(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def test_runs_share_axes_and_stay_inside():
    short = Series(0, "a", [1.0, 2.0, 3.0], [4.0, 3.0, 2.0])
    long = Series(1, "b", [1.0, 4.0, 5.0], [2.0, 1.0, 0.0])
    chart = line_chart("Loss", "", [short, long], smooth=False)
    first, second = (points(line.smooth) for line in chart.lines)
    assert first[0][0] == second[0][0] == LEFT
    assert second[-1] == (WIDTH - RIGHT, HEIGHT - BOTTOM) and first[0][1] == TOP
    assert first[-1][1] == second[0][1]  # the same value, the same height
    assert chart.summary == "Loss: a from 4 to 2; b from 2 to 0"


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart("Loss", "", [Series(0, "a", [1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0])], smooth=False)
    assert len(points(chart.lines[0].smooth)) == 2
    assert line_chart("Loss", "", [Series(0, "a", [1, 2], [math.nan, 1.0])]) is None


def test_a_constant_is_drawn():
    chart = line_chart("Rate", "", [Series(0, "a", [1, 2], [0.5, 0.5])], smooth=False)
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points(chart.lines[0].smooth))
    assert line_chart("Rate", "", [Series(0, "a", [1, 2], [0.0, 0.0])], from_zero=True) is not None


def test_long_runs_are_thinned_and_keep_their_mean():
    x = [float(step) for step in range(10_000)]
    chart = line_chart("Loss", "", [Series(0, "a", x, [float(step % 2) for step in range(10_000)])], smooth=False)
    heights = [y for _, y in points(chart.lines[0].smooth)]
    assert len(heights) <= 240
    assert sum(heights) / len(heights) == pytest.approx((TOP + HEIGHT - BOTTOM) / 2, rel=0.02)


@pytest.mark.parametrize("low, high", [(0, 1), (0.37, 5.2), (1e-5, 3e-4), (-3, 14), (0, 12_345)])
def test_ticks_are_round_and_span_the_values(low, high):
    values = ticks(low, high)
    assert values[0] <= low and values[-1] >= high * (1 - 1e-9) and 3 <= len(values) <= 8
    step = values[1] - values[0]
    assert round(step / 10 ** math.floor(math.log10(step)), 3) in (1, 2, 2.5, 5, 10)


def test_numbers_are_short():
    assert [plain(v) for v in (0, 1200, 3.14159, 0.0005, 2e-6)] == ["0", "1,200", "3.14", "0.0005", "2e-06"]
