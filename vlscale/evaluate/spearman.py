"""Rank correlation with human scores, and its bootstrap as Crisscrossed Captions (CxC) defines it.

Letters: P pairs of items that people scored.
"""

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """(P,) from 1; equal values share the mean of their places."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks; NaN where one of them is constant."""
    a, b = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else float("nan")


def sampled_spearman(
    query: np.ndarray, model: np.ndarray, human: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> np.ndarray:
    """(samples,) correlations; their mean is CxC's figure, their spread its interval.

    Each sample takes half of the queries, and of each one scored pair at random, so that no query weighs more by having
    more pairs. `query`, `model`, `human` are (P,).
    """
    rng = np.random.default_rng(seed)
    _, group, counts = np.unique(query, return_inverse=True, return_counts=True)
    by_query = np.argsort(group, kind="stable")
    starts = counts.cumsum() - counts
    half = max(2, len(counts) // 2)
    found = np.empty(samples)
    for place in range(samples):
        chosen = rng.choice(len(counts), size=min(half, len(counts)), replace=False)
        pairs = by_query[starts[chosen] + rng.integers(counts[chosen])]
        found[place] = spearman(model[pairs], human[pairs])
    return found
