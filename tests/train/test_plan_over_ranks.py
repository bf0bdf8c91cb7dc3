"""The plan of two ranks, held to what two gloo ranks measure: peaks, and the bytes of our own collectives."""

import os

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.forked import ON_CPU, server
from tests.train.plan_over_ranks import RUNS, on_rank
from tests.train.test_plan import config_of, planned
from vlscale.cli.launcher import free_port


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    server()
    given = 2, free_port(), str(folder), os.environ | ON_CPU
    multiprocessing.start_processes(on_rank, given, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_rank_is_within_15_percent(measured, name):
    plan = planned(config_of(*RUNS[name]), 2)
    for own in measured:
        assert plan.peak == pytest.approx(own[name]["peak"], rel=0.15), (plan.memory, plan.moments)


@pytest.mark.parametrize("name", RUNS)
def test_the_bytes_of_the_losses_are_those_counted(measured, name):
    """Of hard negatives as many come from the other rank as are drawn there: half of them, more or less. By half ring
    the lower ranks get less back: the plan is of the upper ones."""
    traffic = planned(config_of(*RUNS[name]), 2).traffic
    expected, negatives = traffic["losses"], traffic.get("negatives", 0)
    lower = measured[:1] if "half ring" in name else []
    assert all(0.5 * expected < own[name]["losses"] < 1.05 * expected for own in lower)
    for own in measured[len(lower) :]:
        assert own[name]["losses"] == pytest.approx(expected + negatives, abs=0.05 * expected + 0.25 * negatives)
    assert bool(negatives) == name.startswith("fusion")
