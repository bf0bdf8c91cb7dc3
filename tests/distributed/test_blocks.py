"""The rule that chooses how columns travel, and the counter of what travelled."""

import pytest
import torch

from vlscale.distributed import Ranks, choose_comm, count_traffic, gather_rows, mean_over_ranks, sum_over_ranks
from vlscale.distributed.traffic import received


@pytest.mark.parametrize(
    ("comm", "size", "relation", "chosen"),
    [
        ("auto", 100, False, "gather"),
        ("auto", 100, True, "gather"),
        ("auto", 101, False, "ring"),
        ("auto", 101, True, "half_ring"),
        ("gather", 10**15, True, "gather"),
        ("ring", 1, True, "ring"),
        ("half_ring", 1, True, "half_ring"),
        ("half_ring", 1, False, "ring"),
    ],
)
def test_what_travels_is_chosen_by_memory(comm, size, relation, chosen):
    assert choose_comm(comm, size, relation=relation, budget=100) == chosen


def test_an_unknown_way_lists_the_known():
    with pytest.raises(ValueError, match="comm: expected one of auto, gather, ring, half_ring, got 'tree'"):
        choose_comm("tree", 1, relation=True)


def test_one_rank_communicates_nothing():
    rows = torch.ones(3, 2, requires_grad=True)
    with count_traffic() as traffic:
        for collective in (gather_rows, sum_over_ranks, mean_over_ranks):
            collective(rows, Ranks()).sum().backward()
    assert not traffic and (rows.grad == 3).all()


def test_counters_nest_and_stop():
    whole = torch.zeros(10, 2)
    with count_traffic() as outer:
        received("all_gather", whole, 0.5)
        with count_traffic() as inner:
            received("all_gather", whole, 0.5)
            received("transfer", whole.half())
    received("all_gather", whole)
    assert inner == {"all_gather": 40, "transfer": 40} and outer == {"all_gather": 80, "transfer": 40}
