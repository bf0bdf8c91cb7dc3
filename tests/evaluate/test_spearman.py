"""Rank correlation by hand, against scipy, and sampled as CxC does."""

import numpy as np
import pytest

from vlscale.evaluate.spearman import ranks, sampled_spearman, spearman


def test_ties_share_the_mean_of_their_places():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_order_is_all_that_counts():
    values = np.array([0.1, 5.0, 2.0, 9.0])
    assert spearman(values, values**3) == pytest.approx(1)
    assert spearman(values, -np.exp(values)) == pytest.approx(-1)
    assert np.isnan(spearman(values, np.ones(4)))


def test_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(8, size=300).astype(float), rng.random(300)
    b[:100] = a[:100]
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_each_sample_takes_half_of_the_queries_and_one_pair_of_each():
    query = np.repeat(np.arange(100), [1, 9] * 50)
    rng = np.random.default_rng(1)
    human = rng.random(500)
    # queries with nine pairs are noise, queries with one pair are exact: by pairs the correlation would be about 0.1
    model = np.where(query % 2 == 0, human, rng.random(500))
    samples = sampled_spearman(query, model, human, samples=300)
    assert samples.shape == (300,)
    assert samples.mean() == pytest.approx(0.5, abs=0.1)
    assert np.array_equal(samples, sampled_spearman(query, model, human, samples=300))
