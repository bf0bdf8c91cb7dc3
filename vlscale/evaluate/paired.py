"""Methods compared over seeds: the same corpus, teachers and batches a seed, so differences are paired by seed.

Measured values are `level -> seed -> method -> endpoint -> value`. An interval resamples the seeds: all n^n draws with
replacement of up to EXACT seeds, or DRAWS random ones of more; percentile, 95 %.
"""

import itertools

import numpy as np

ENOUGH = 5  # seeds below which an interval is not to be trusted
EXACT = 6  # seeds up to which all resamples are made
DRAWS = 10_000

BySeed = dict[int, dict[str, dict[str, float]]]  # seed -> method -> endpoint -> value


def paired(by_seed: BySeed, first: str, second: str, endpoint: str) -> np.ndarray:
    """(seeds,) first minus second."""
    return np.array([cell[first][endpoint] - cell[second][endpoint] for cell in by_seed.values()])


def seed_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean over seeds."""
    n = len(differences)
    if n <= EXACT:
        draws = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        draws = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
