"""What an evaluation returns: named measures with intervals, plain enough for JSON."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vlscale.evaluate.bootstrap import Estimate, interval

RERANKED = "reranked:"  # begins the name of what is measured after re-ranking


@dataclass(frozen=True)
class Measure:
    """`value` in percent, or a rank; `low` and `high` bound it at 95 %; `chance` is what a random order scores."""

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    queries: int = 0


@dataclass(frozen=True)
class EvalResult:
    """One model on one corpus.

    Names of measures: `i2t/r@1`, `rsum`, `i2t/mean_rank`; graded tasks have four columns, `i2i/ndcg@10` (fixed, as
    measured), `i2i/ndcg@10_norm` (fixed, over chance), `i2i/ndcg@10_paper` (as the papers' own code), and for labels
    the field comes first: `concept:i2i/r@1`. What re-ranking changes stands a second time, as `reranked:i2t/r@1`, and
    there the recalls too have a column `_paper`. `replicates` are kept in memory for paired comparisons, not in JSON.
    """

    protocol: str
    images: int
    captions: int
    metrics: dict[str, Measure]
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rerank: int | None = None  # candidates of a query that a fusion encoder scored; measures under `reranked:` then
    replicates: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Measure:
        return self.metrics[name]

    def value(self, name: str) -> float | None:
        """The measure's value, None where this protocol has no such measure."""
        return self.metrics[name].value if name in self.metrics else None

    def split(self) -> tuple["EvalResult", "EvalResult | None"]:
        """The dual encoder's measures; and, where it was re-ranked, all with the changed ones in their place."""
        dual, again = zip(*map(_split, (self.metrics, self.replicates)), strict=True)
        alone = replace(self, metrics=dual[0], replicates=dual[1], rerank=None)
        return alone, replace(self, metrics=again[0], replicates=again[1]) if self.rerank else None

    def to_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.__dict__.items() if key not in ("metrics", "replicates")}
        return plain | {"metrics": {name: asdict(measure) for name, measure in self.metrics.items()}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "EvalResult":
        """Of what `to_json` wrote; keys of others, such as a training step's, are left out."""
        tree = json.loads(text)
        own = {key: tree[key] for key in ("protocol", "images", "captions", "labels", "notes")}
        metrics = {name: Measure(**parts) for name, parts in tree["metrics"].items()}
        return cls(metrics=metrics, rerank=tree.get("rerank"), **own)


@dataclass(frozen=True)
class Difference:
    """`value` = second minus first, with its paired 95 % interval where both results carry replicates."""

    value: float
    low: float | None
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def _split(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    dual = {name: value for name, value in table.items() if not name.startswith(RERANKED)}
    changed = {name.removeprefix(RERANKED): value for name, value in table.items() if name.startswith(RERANKED)}
    return dual, dual | changed


def compare(first: EvalResult, second: EvalResult, name: str) -> Difference:
    """Paired by images: both results must come from the same corpus with the same number of resamples."""
    a, b = first.replicates.get(name), second.replicates.get(name)
    paired = a is not None and b is not None and len(a) == len(b) and first.images == second.images
    bounds = interval(b - a) if paired else None
    return Difference(second[name].value - first[name].value, *(bounds or (None, None)))


def measure(estimate: Estimate, chance: float | None = None) -> Measure:
    low, high = estimate.interval() or (None, None)
    return Measure(
        estimate.value, low, high, None if chance is None or math.isnan(chance) else chance, estimate.queries
    )
