"""The words of the first screen follow from the intervals."""

import numpy as np
import pytest

from vlscale.evaluate import EvalResult, Measure
from vlscale.report.verdict import changes, duration, reach


def result(rsum: float, spread: float | None, **others: float) -> EvalResult:
    """Replicates lie evenly within `spread` of each value, paired between results."""
    values = {"rsum": rsum} | {f"{task}/ndcg@10_norm": value for task, value in others.items()}
    drawn = {} if spread is None else {name: v + np.linspace(-spread, spread, 101) for name, v in values.items()}
    return EvalResult("synthetic", 100, 500, {name: Measure(v) for name, v in values.items()}, replicates=drawn)


@pytest.mark.parametrize(
    "after, spread, word",
    [(330.0, 5.0, "better"), (270.0, 5.0, "worse"), (303.0, 5.0, "no clear change"), (303.0, None, "higher")],
)
def test_a_difference_counts_when_its_interval_leaves_out_zero(after, spread, word):
    steady = result(300.0, 0.0 if spread is not None else None)
    change = changes(steady, result(after, spread))[0]
    assert change.word == word and change.difference == pytest.approx(after - 300)


def test_only_measures_that_both_have_are_compared():
    found = changes(result(300.0, 1.0, i2i=50.0), result(310.0, 1.0, i2i=40.0, t2t=30.0))
    assert [change.endpoint.title for change in found] == ["Across", "Picture to picture"]
    assert [change.word for change in found] == ["better", "worse"]


def test_all_strips_have_one_scale_and_rsum_counts_by_its_mean():
    found = changes(result(300.0, 0.0, i2i=50.0), result(312.0, 0.0, i2i=46.0))
    width = reach(found)
    rsum, i2i = (change.places(width) for change in found)
    assert width == pytest.approx(4.4)
    assert rsum["at"] == pytest.approx(50 + 50 * 2 / 4.4) and i2i["at"] == pytest.approx(50 - 50 * 4 / 4.4)
    assert all(0 <= place <= 100 for place in (*rsum.values(), *i2i.values()))


def test_durations():
    assert [duration(s) for s in (5.2, 125, 3725)] == ["5 s", "2 min 05 s", "1 h 02 min"]
