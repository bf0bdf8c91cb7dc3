"""Which run is marked in the report's tables."""

import numpy as np

from vlscale.evaluate import EvalResult, Measure
from vlscale.report.tables import sections


def result(**values: float) -> EvalResult:
    names = {name.replace("__", "/"): value for name, value in values.items()}
    drawn = {name: value + np.linspace(-1, 1, 51) for name, value in names.items()}
    return EvalResult("pairs", 100, 500, {n: Measure(v, chance=1.0) for n, v in names.items()}, replicates=drawn)


def marks(results: dict[str, EvalResult]) -> dict[str, list[str]]:
    rows = [row for section in sections(results) for _, group in section.groups for row in group]
    return {row.label: [cell.mark for cell in row.cells] for row in rows}


def test_recalls_are_best_high_and_ranks_low():
    found = marks({"a": result(rsum=300, i2t__mean_rank=20), "b": result(rsum=310, i2t__mean_rank=30)})
    assert found == {"rsum, of 600": ["", "best"], "mean rank": ["best", ""]}


def test_a_lead_that_may_be_chance_has_no_star():
    leading = result(rsum=310)
    leading.replicates["rsum"] = 310 + np.linspace(-30, 30, 51)
    assert marks({"a": result(rsum=300), "b": leading})["rsum, of 600"] == ["", "highest"]


def test_no_mark_without_a_rival_or_a_lead():
    assert marks({"a": result(rsum=300)})["rsum, of 600"] == [""]
    assert marks({"a": result(rsum=300), "b": result(rsum=300)})["rsum, of 600"] == ["", ""]
    assert marks({"a": result(rsum=300), "b": result(i2t__mean_rank=3)}) == {
        "rsum, of 600": ["", ""],
        "mean rank": ["", ""],
    }


def test_being_of_ones_own_modality_is_no_merit():
    graded = {"i2i__ndcg@10": 60.0, "i2it__own_modality@10": 70.0}
    found = marks({"a": result(**graded), "b": result(**(graded | {"i2it__own_modality@10": 90.0}))})
    assert found["picture to both"] == ["", ""]
