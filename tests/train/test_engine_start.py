"""A rank that dies or sleeps while the engines are built, under no launcher: the other ends, and names it."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.train.forked_ranks import Group, run_groups, said
from vlscale.train.rendezvous import groups_within
from vlscale.train.watchdog import timed_out

SOON = 25  # seconds from there to the end of the rank that is left, which a signal ends then: -14
LOST = """
import importlib, os, signal, time
import psutil
from vlscale.train import last_words
last_words.WAIT = 1.0
owner = importlib.import_module({module!r})
real = getattr(owner, {name!r})
def lost(*given, **named):
    if os.environ["RANK"] == "0":
        signal.alarm({soon})
        return real(*given, **named)
    if {how!r} == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while len(psutil.Process().parent().children()) > 1:
        time.sleep(0.1)
    os._exit(3)
setattr(owner, {name!r}, lost)
"""
INSIDE, BEFORE = ("deepspeed", "initialize"), ("vlscale.train.engine", "build_optimizer")
CASES = {  # where rank 1 is lost, how, the timeout, and its end
    "killed inside": (INSIDE, "killed", 8, -9),
    "asleep inside": (INSIDE, "asleep", 8, 3),
    "killed before": (BEFORE, "killed", 600, -9),  # whose connections have broken: nobody waits that long
}
NAMED = {"killed": "is gone (no sign of it for 1 s)", "asleep": "gives no sign (for 1 s)"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def codes(tiny_config, place) -> dict[str, list[int]]:
    groups = []
    for name, ((module, function), how, timeout, _) in CASES.items():
        words = [str(tiny_config), "--out", str(place / name), f"engine.timeout_seconds={timeout}"]
        groups.append(Group(words, 2, LOST.format(module=module, name=function, how=how, soon=SOON)))
    return dict(zip(CASES, run_groups(place, groups), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_lost_while_engines_are_built_is_named_by_the_other_in_time(codes, place, case):
    _, how, _, end = CASES[case]
    told = said(place, list(CASES).index(case))
    assert codes[case] == [1, end], told
    (line,) = [line for line in told.splitlines() if "rank 1 of 2" in line]
    assert f"rank 1 of 2 {NAMED[how]}, noticed by rank 0 in start; see its own log; start again with --resume" in line
    assert "Traceback" not in told


def test_the_timeout_of_groups_is_torchs_own_again_outside():
    own = dist.new_group
    with pytest.raises(ZeroDivisionError), groups_within(2.0):
        assert dist.new_group is not own
        raise ZeroDivisionError
    assert dist.new_group is own


def test_a_wait_in_the_store_says_nothing_of_connections():
    assert timed_out(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv"))
    with pytest.raises(dist.DistStoreError, match="timeout") as late:
        dist.HashStore().wait(["never"], timedelta(milliseconds=50))
    assert not timed_out(late.value)
