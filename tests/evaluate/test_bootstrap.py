"""Intervals: by images, paired, and as wide as they should be."""

import numpy as np
import pytest

from vlscale.evaluate.bootstrap import _draws, estimate_means, estimate_medians, interval


def test_a_mean_counts_queries_and_skips_those_without_an_answer():
    found = estimate_means({"x": (np.array([1.0, 0.0, np.nan, 1.0]), np.array([0, 0, 1, 2]))}, 3, 10)["x"]
    assert (found.value, found.queries, len(found.replicates)) == (pytest.approx(2 / 3), 3, 10)


def test_the_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).random(2000)
    low, high = estimate_means({"x": (values, np.arange(2000))}, 2000, 2000)["x"].interval()
    standard_error = values.std() / 2000**0.5
    assert (high - low) == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert low < values.mean() < high


def test_captions_of_one_image_are_drawn_together():
    # 5 equal answers an image carry the information of one
    by_image = np.random.default_rng(1).random(400)
    values, image = by_image.repeat(5), np.arange(400).repeat(5)
    together = estimate_means({"x": (values, image)}, 400, 2000)["x"]
    alone = estimate_means({"x": (values, np.arange(2000))}, 2000, 2000)["x"]
    assert np.ptp(together.interval()) == pytest.approx(5**0.5 * np.ptp(alone.interval()), rel=0.15)


def test_models_on_one_corpus_are_resampled_alike():
    values = np.random.default_rng(2).random(100)
    first = estimate_means({"x": (values, np.arange(100))}, 100, 50)["x"]
    second = estimate_means({"y": (values + 0.25, np.arange(100))}, 100, 50)["y"]
    assert second.replicates - first.replicates == pytest.approx(np.full(50, 0.25))


def test_blocks_of_draws_are_of_the_asked_number(monkeypatch):
    monkeypatch.setattr("vlscale.evaluate.bootstrap.DRAWS_AT_ONCE", 30)
    found = estimate_means({"x": (np.arange(10.0), np.arange(10))}, 10, 7)["x"]
    assert found.replicates.shape == (7,)


@pytest.mark.parametrize("at_once", [1 << 22, 60])
def test_medians_are_those_of_the_drawn_queries(monkeypatch, at_once):
    rng = np.random.default_rng(3)
    values, image = rng.integers(1, 40, 31).astype(float), rng.integers(12, size=31)
    values[4] = np.nan
    monkeypatch.setattr("vlscale.evaluate.bootstrap.DRAWS_AT_ONCE", at_once)
    found = estimate_medians({"x": (values, image)}, 12, 40)["x"]
    drawn = np.concatenate(list(_draws(12, 40, 0))).astype(int)
    by_hand = [np.nanmedian(values.repeat(counts[image])) for counts in drawn]
    assert found.replicates.tolist() == by_hand and len(set(by_hand)) > 2
    assert (found.value, found.queries) == (np.nanmedian(values), 30)
    low, high = found.interval()
    assert low < found.value < high


def test_no_resamples_no_interval():
    found = estimate_means({"x": (np.arange(10.0), np.arange(10))}, 10, 0)["x"]
    assert found.value == 4.5 and found.interval() is None
    assert interval(np.array([np.nan])) is None
    found = estimate_medians({"x": (np.arange(10.0), np.arange(10))}, 10, 0)["x"]
    assert found.value == 4.5 and found.interval() is None
