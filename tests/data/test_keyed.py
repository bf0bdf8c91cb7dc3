"""Keyed randomness: permutations are bijections, numbers are fair and the same for ever."""

import time
import tracemalloc

import numpy as np
import pytest

from vlscale.data.keyed import hash64, permute, random64, uniforms


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_permutation_hits_every_place_once(size):
    assert sorted(permute(np.arange(size), size, key=3).tolist()) == list(range(size))


def test_a_permutation_can_be_asked_in_any_part_and_order():
    whole = permute(np.arange(1000), 1000, key=9)
    some = np.array([999, 3, 500])
    assert permute(some, 1000, key=9).tolist() == whole[some].tolist()


def test_permutations_differ_by_key_and_do_not_follow_the_order():
    first, second = (permute(np.arange(5000), 5000, key=key) for key in (1, 2))
    assert np.mean(first == second) < 0.01
    assert abs(np.corrcoef(np.arange(5000), first)[0, 1]) < 0.05


def test_values_are_fixed_for_ever():
    """A run that is resumed with another version has to see the same order."""
    assert hash64("sample", 1, 2, "key") == 4481179677903948526
    assert random64(7, 2).tolist() == [7191089600892374487, 309689372594955804]
    assert permute(np.arange(6), 6, key=11).tolist() == [4, 0, 3, 5, 1, 2]


def test_parts_of_a_hash_do_not_run_together():
    assert hash64("ab", "c") != hash64("a", "bc")


def test_uniform_numbers_are_uniform():
    drawn = np.concatenate([uniforms(hash64("u", i), 8) for i in range(4000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, bins=16, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 45  # chi-square, 15 degrees of freedom: p = 0.0001


def test_the_order_of_two_billion_samples_is_quick_and_small():
    blocks = 2_000_000
    tracemalloc.start()
    start = time.process_time()
    order = permute(np.arange(blocks), blocks, key=1)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6  # 32 MB are the positions and the order themselves
    tracemalloc.stop()
    assert np.bincount(order, minlength=blocks).tolist() == [1] * blocks
