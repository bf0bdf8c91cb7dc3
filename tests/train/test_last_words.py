"""The ranks that are left name the one that is gone: by the marks of four ranks in a store, and with real ones."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vlscale.cli.launcher import free_port
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.train import last_words
from vlscale.train.last_words import RollCall, numbers
from vlscale.train.stop import StopWatch
from vlscale.train.watchdog import WARM_AFTER, Watchdog

RANKS = 4
UNNAMED = (
    "another rank is gone or too late, noticed in step 12: no answer; --resume continues from the newest checkpoint"
)


@pytest.fixture(autouse=True)
def short_and_without_a_launcher(monkeypatch):
    monkeypatch.setattr(last_words, "WAIT", 0.5)
    monkeypatch.setattr(last_words, "GRACE", 0.5)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def lines(store, *left: int) -> list[str]:
    calls = [RollCall(Ranks(rank, RANKS), timed_out=False, store=lambda: store) for rank in left]
    return [call.line("step 12", "no answer") for call in calls]


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_the_lowest_rank_that_is_left_names_those_without_a_mark(kind, tmp_path, monkeypatch):
    stores = {
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(str(tmp_path / "store"), RANKS),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    }
    store = stores[kind]()
    first, second = lines(dist.PrefixStore("job", store), 1, 3)
    assert first == (
        "ranks 0, 2 of 4 give no sign (for 0.5 s), noticed by rank 1 in step 12; see their own logs; "
        "start again with --resume (no answer)"
    )
    assert second == "rank 3: another rank is gone or too late, noticed in step 12; rank 1 tells which"
    late = lines(dist.PrefixStore("job", store), 0)
    assert late == ["rank 0: another rank is gone or too late, noticed in step 12; rank 1 tells which"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the agent's store still holds the marks of the start before
    assert "ranks 0-2 of 4 give no sign" in lines(dist.PrefixStore("job", store), 3)[0]


def test_a_rank_that_closed_its_connections_is_gone_and_one_that_still_computes_is_not(monkeypatch):
    monkeypatch.setattr(last_words, "connections", lambda: ({2}, []))  # and 3 has not noticed yet
    first, second = lines(dist.HashStore(), 0, 1)
    assert first.startswith(
        "rank 2 of 4 is gone (no sign of it for 0.5 s), noticed by rank 0 in step 12; see its own log"
    )
    assert second.endswith("rank 0 tells which")
    monkeypatch.setattr(last_words, "connections", lambda: ({1, 2, 3}, []))
    assert lines(dist.HashStore(), 0, 1)[0].startswith("ranks 2, 3 of 4 are gone (no sign of them for 0.5 s)")


def test_a_timeout_closes_all_connections_of_a_rank_which_then_tell_nothing(monkeypatch):
    monkeypatch.setattr(last_words, "connections", lambda: ({1, 2, 3}, []))
    call = RollCall(Ranks(0, 2), timed_out=True, store=dist.HashStore)
    assert call.line("step 12", "timed out").startswith("rank 1 of 2 gives no sign (for 0.5 s)")


def test_when_all_are_there_nobody_is_named_and_nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr(last_words, "WAIT", 60.0)
    began = time.monotonic()
    told = lines(dist.HashStore(), 0, 1, 2, 3)
    assert told[0] == "rank 0: a collective failed in step 12, with all 4 ranks there; --resume continues (no answer)"
    assert time.monotonic() - began < 30


def test_the_store_is_gone_with_rank_0_or_with_its_launcher(monkeypatch, capfd):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    left = dist.PrefixStore("job", dist.TCPStore("127.0.0.1", server.port, is_master=False))
    del server
    gc.collect()
    expected = "rank 0 of 4 is gone, and the job's store with it, noticed by rank 2 in step 12; see its own log;"
    assert lines(left, 2)[0].startswith(expected)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert lines(left, 2) == [f"rank 2: {UNNAMED}"]
    assert "c10d" not in capfd.readouterr().err, "no page of C++ around the one line"


class Failing(dist.HashStore):
    """Breaks where it is asked, or never answers."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error, self.answers = error, threading.Event()

    def check(self, keys):
        if self.error is not None:
            raise self.error
        self.answers.wait(60)


def test_a_store_that_breaks_or_never_answers_keeps_nobody():
    assert "rank 0 of 4 is gone" in lines(Failing(dist.DistNetworkError("reset")), 1)[0]
    assert lines(Failing(ValueError("unknown")), 1) == [f"rank 1: {UNNAMED}"]
    began, asleep = time.monotonic(), Failing()
    assert "rank 0 of 4 gives no sign, nor does the job's store with it, noticed by rank 1" in lines(asleep, 1)[0]
    assert lines(asleep, 0) == [f"rank 0: {UNNAMED}"]
    assert time.monotonic() - began < 20
    asleep.answers.set()


def test_numbers_are_told_in_runs():
    assert [numbers(ranks) for ranks in ([3], [0, 1], [0, *range(8, 16)])] == ["rank 3", "ranks 0, 1", "ranks 0, 8-15"]


@contextmanager
def _slow_to_close() -> Iterator[None]:
    """As an engine may be; StopWatch has given SIGTERM back by then."""
    try:
        yield
    finally:
        time.sleep(2)


def _work(rank: int, port: int, folder: str, victim: int, number: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    last_words.WAIT = 2.0
    if dist.is_initialized():  # by a test before the fork
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))
    dist.new_group(list(range(RANKS)))  # DeepSpeed has groups of its own, too
    ranks = Ranks(rank, RANKS, torch.device("cpu"), dist.group.WORLD)
    get_logger().addHandler(logging.FileHandler(Path(folder, f"rank-{rank}.log")))
    with (
        Watchdog(Path(folder), ranks, None, (300.0, 3.0)) as watchdog,
        _slow_to_close(),
        watchdog.ending_at_once(),
        StopWatch(ranks, Path(folder)),
    ):
        for step in range(1, WARM_AFTER + 2):
            watchdog.enter("data", step)
            watchdog.enter("step", step)
            if step == WARM_AFTER + 1 and rank == victim:
                time.sleep(0.3)  # the others wait already
                os.kill(os.getpid(), number)
            ranks.sum(torch.ones(100_000))
    os._exit(0)


@pytest.mark.parametrize(
    ("victim", "number", "told"),
    [
        (
            2,
            signal.SIGKILL,
            "rank 2 of 4 is gone (no sign of it for 2 s), noticed by rank 0 in step 3;",
        ),
        (2, signal.SIGSTOP, "rank 2 of 4 gives no sign (for 2 s), noticed by rank 0 in step 3;"),
        (0, signal.SIGKILL, "rank 0 of 4 is gone, and the job's store with it, noticed by rank 1 in step 3;"),
        (
            0,
            signal.SIGSTOP,
            "rank 0 of 4 gives no sign, nor does the job's store with it, noticed by rank 1 in step 3",
        ),
    ],
    ids=["killed", "asleep", "killed with the store", "asleep with the store"],
)
def test_ranks_that_are_left_name_the_one_that_is_not_and_end_with_1(victim, number, told, tmp_path):
    """Though a launcher that has seen it end tells them to stop."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    started = [fork.Process(target=_work, args=(rank, port, str(tmp_path), victim, number)) for rank in range(RANKS)]
    for process in started:
        process.start()
    left = [process for rank, process in enumerate(started) if rank != victim]
    try:
        if number == signal.SIGKILL:
            started[victim].join(60)
            time.sleep(0.5)
            for process in left:
                process.terminate()
        for process in left:
            process.join(60)
        assert [process.exitcode for process in left] == [1, 1, 1]
    finally:
        for process in started:
            process.kill()
            process.join()
    said = [path.read_text() for path in sorted(tmp_path.glob("rank-*.log")) if path.name != f"rank-{victim}.log"]
    assert told in said[0] and [text.count("\n") for text in said] == [1, 1, 1]
    assert all(("rank 0 of 4" if victim == 0 else "rank 0 tells which") in text for text in said[1:]), said
