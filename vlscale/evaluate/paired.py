"""Methods compared over seeds: the same corpus, teachers and batches a seed, so differences are paired by seed.

Measured values are `level -> seed -> method -> endpoint -> value`. An interval is Student's t of the mean difference. A
percentile bootstrap of so few is too narrow: of five normal differences it covers the mean 84 times of 100, this 95. It
is there to be compared.
"""

from itertools import product

import numpy as np

ENOUGH = 5  # seeds below which an interval is not to be trusted
# 0.975 quantiles of Student's t, by degrees of freedom from 1
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_LISTED = 6  # seeds whose bootstrap samples are all listed, 46,656 at most; of more, DRAWN of them
_DRAWN = 20_000
_Z = 1.95996  # the normal's, which more degrees of freedom come close to (Abramowitz and Stegun, 26.7.5)

BySeed = dict[int, dict[str, dict[str, float]]]  # seed -> method -> endpoint -> value


def paired(by_seed: BySeed, first: str, second: str, endpoint: str) -> np.ndarray:
    """(seeds,) first minus second."""
    return np.array([cell[first][endpoint] - cell[second][endpoint] for cell in by_seed.values()])


def seed_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over seeds; of one seed there is none: NaN."""
    free = len(differences) - 1
    if free == 0:
        return float("nan"), float("nan")
    more = (_Z**3 + _Z) / (4 * free) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * free**2)
    quantile = _T[free - 1] if free <= len(_T) else _Z + more
    half = quantile * differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() - half), float(differences.mean() + half)


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over seeds, every time the same."""
    count = len(differences)
    if count <= _LISTED:
        samples = np.array(list(product(range(count), repeat=count)))
    else:
        samples = np.random.default_rng(0).integers(count, size=(_DRAWN, count))
    low, high = np.quantile(differences[samples].mean(1), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
