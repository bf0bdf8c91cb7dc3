"""Several sources by weight: exact shares in every stretch, caps, resume."""

from collections import Counter

import numpy as np
import pytest

from vlscale.sections import DataConfig


@pytest.fixture
def mixed(corpus, make_config):
    """Sources of 810, 270 and 920 samples at 1 : 2 : 5."""

    def make(**changes):
        parts = ["000000..000002", "000003..000003", "000004..000007"]
        train = [str(corpus / f"train-{{{part}}}.tar") for part in parts]
        return make_config(corpus, train=train, **{"weights": [1, 2, 5], "lanes": 8, **changes})

    return make


def source_of(key):
    shard = int(key.split("-")[1]) // 270
    return 0 if shard < 3 else 1 if shard == 3 else 2


def test_shares_are_exact_in_every_batch(run_stream, keys_of, mixed):
    for keys in keys_of(run_stream(20, data=mixed())[0]):
        assert Counter(map(source_of, keys)) == {0: 8, 1: 16, 2: 40}


def test_a_source_is_passed_evenly(run_stream, keys_of, mixed):
    keys = [key for batch in keys_of(run_stream(40, data=mixed())[0]) for key in batch]
    repeats = Counter(key for key in keys if source_of(key) == 1)
    assert len(repeats) == 270 and set(repeats.values()) <= {1, 2, 3, 4}
    assert max(Counter(key for key in keys if source_of(key) == 0).values()) == 1


def test_the_mixture_is_one_for_all_ranks_and_resumes(run_stream, keys_of, mixed):
    expected = keys_of(run_stream(12, data=mixed())[0])
    first, state = run_stream(5, 4, data=mixed())
    rest, _ = run_stream(7, 2, state=state, data=mixed(prefetch=4))
    assert keys_of(first) + keys_of(rest) == expected
    assert state.rows.shape == (8, 3) and state.rows["taken"].sum() == 5 * 64


def test_a_cap_on_repeats_ends_a_source_and_then_the_run(run_stream, keys_of, mixed):
    data = mixed(max_repeats=1)
    rows, _ = run_stream(24, data=data)
    keys = [key for batch in keys_of(rows) for key in batch]
    assert max(Counter(keys).values()) == 1 and len({key for key in keys if source_of(key) == 1}) > 250
    with pytest.raises(ValueError, match=r"every source has been passed data.max_repeats=1 times"):
        run_stream(33, data=data)


def test_changed_weights_do_not_resume(run_stream, mixed):
    _, state = run_stream(1, data=mixed())
    with pytest.raises(ValueError, match=r"data.weights changed, the checkpoint has \(1.0, 2.0, 5.0\)"):
        run_stream(1, state=state, data=mixed(weights=[1, 1, 1]))
    with pytest.raises(ValueError, match="changed"):
        run_stream(1, state=state, data=mixed(weights=None))


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1, 0, 1], "above 0, got 0"),
        ([1, -2, 1], "above 0, got -2"),
        ([1, 1], "2 numbers for the 3 entries"),
        ([1, float("nan"), 1], "got nan"),
    ],
)
def test_weights_that_make_no_mixture(mixed, weights, message):
    with pytest.raises(ValueError, match=message):
        mixed(weights=weights)


def test_weights_without_shards_are_told_as_missing_shards(run_stream):
    with pytest.raises(ValueError, match=r"data.train is not given"):
        run_stream(1, data=DataConfig(weights=[1.0]))


def test_a_source_too_small_for_the_lanes(run_stream, corpus, make_config):
    train = [str(corpus / "train-000000.tar"), str(corpus / "val-000000.tar")]
    with pytest.raises(ValueError, match=r"source 1 has 60 samples, too few for 64 lanes"):
        run_stream(1, data=make_config(corpus, train=train, weights=[1, 1]))


def test_far_behind_means_next(run_stream, keys_of, mixed):
    """Within a lane too, no source is ever more than a sample away from its share."""
    data = mixed(lanes=1)
    keys = [key for batch in keys_of(run_stream(4, data=data)[0]) for key in batch]
    taken = np.cumsum(np.eye(3)[[source_of(key) for key in keys]], axis=0)
    share = np.outer(np.arange(1, len(keys) + 1), np.array([1, 2, 5]) / 8)
    assert np.abs(taken - share).max() <= 1
