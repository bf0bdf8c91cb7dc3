"""Bootstrap intervals over images: the captions of one image are drawn together, for they are not independent.

B resamples, I images. The draws depend on (B, I, seed) alone, so two models measured on the same corpus are resampled
alike and their replicates can be subtracted one by one: that is the paired comparison.
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS_AT_ONCE = 1 << 22  # bounds the table of weights; a resample of I images takes I numbers


@dataclass(frozen=True)
class Estimate:
    """A mean over queries, its B bootstrap replicates (empty when there were none to make), and the queries counted."""

    value: float
    replicates: np.ndarray
    queries: int

    def interval(self) -> tuple[float, float] | None:
        return interval(self.replicates)


def interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """Percentile interval at LEVEL; None without replicates."""
    usable = replicates[np.isfinite(replicates)]
    if not usable.size:
        return None
    low, high = np.quantile(usable, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def estimate_means(
    columns: dict[str, tuple[np.ndarray, np.ndarray]], images: int, resamples: int, seed: int = 0
) -> dict[str, Estimate]:
    """Each column is (values (Q,), image of each query (Q,)); NaN values are queries that do not count."""
    if not columns:
        return {}
    sums, counts = np.zeros((2, images, len(columns)))
    for place, (values, image) in enumerate(columns.values()):
        counted = ~np.isnan(values)
        sums[:, place] = np.bincount(image[counted], values[counted], minlength=images)
        counts[:, place] = np.bincount(image[counted], minlength=images)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(0) / counts.sum(0)
        replicates = np.concatenate(
            [(weights @ sums) / (weights @ counts) for weights in _draws(images, resamples, seed)]
            or [np.zeros((0, len(columns)))]
        )
    return {
        name: Estimate(float(means[place]), replicates[:, place], int(counts[:, place].sum()))
        for place, name in enumerate(columns)
    }


def estimate_medians(
    columns: dict[str, tuple[np.ndarray, np.ndarray]], images: int, resamples: int, seed: int = 0
) -> dict[str, Estimate]:
    """As `estimate_means`, of medians; where the middle falls between two values, their mean."""
    found = {}
    for name, (values, image) in columns.items():
        counted = ~np.isnan(values)
        order = np.argsort(values[counted], kind="stable")
        values, image = values[counted][order], image[counted][order]
        replicates = [
            _weighted_median(values, part[:, image])
            for weights in _draws(images, resamples, seed)
            for part in np.array_split(weights, -(-weights.shape[0] * max(1, len(values)) // DRAWS_AT_ONCE))
        ]
        middle = float(np.median(values)) if len(values) else float("nan")
        found[name] = Estimate(middle, np.concatenate([*replicates, np.empty(0)]), len(values))
    return found


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b,) medians of the sorted `values` (Q,), each taken as often as a row of `counts` (b, Q) says."""
    up_to = counts.cumsum(axis=1)
    total = up_to[:, -1:] if counts.shape[1] else np.zeros((len(counts), 1))
    middle = [(up_to <= place).sum(axis=1) for place in ((total - 1) // 2, total // 2)]
    padded = np.append(values, np.nan)  # a resample may draw only images without a counted query
    return (padded[middle[0]] + padded[middle[1]]) / 2


def _draws(images: int, resamples: int, seed: int):
    """Tables (b, I) of how often each image is drawn, in all `resamples` rows."""
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // images)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(images, size=(count, images)) + np.arange(count)[:, None] * images
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)
