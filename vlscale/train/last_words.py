"""Which rank is gone: those that are left call the roll in the store by which the job has met.

A collective that fails tells that somebody is gone or late, not who. Each rank that notices leaves a mark in the store,
hangs up on the others, so that those who wait for it notice too, and waits a few seconds for their marks. The lowest
one that left a mark names those that left none; the others end as soon as they see its mark. Connections tell the rest:
a process that has ended has closed its own, one that sleeps, hangs or still computes has not.

The store lives in torchrun's agent on the first node, else in rank 0, and may be gone or asleep itself. So it is asked
in a thread of its own, for which nobody waits longer than a few seconds more.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from vlscale.distributed import Ranks

WAIT = 5.0  # seconds for the marks of the others
GRACE = 3.0  # seconds more for a store that does not answer
_CONNECT = 2.0  # seconds
_POLL = 0.2  # seconds
_HANG_UP = timedelta(seconds=0.1)
_TAG = 7_654_321  # of no message that any rank sends


@dataclass(frozen=True)
class Roll:
    """Who tells it; and on that rank alone, whose process has ended, and who else left no mark."""

    teller: int
    gone: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)


class RollCall:
    """Begins when it is made. `timed_out`: this rank's own collective did, which has closed all its connections."""

    def __init__(self, ranks: Ranks, *, timed_out: bool, store: Callable[[], dist.Store] | None = None):
        self._ranks, self._timed_out, self._wait = ranks, timed_out, WAIT
        self._store = store
        self._in_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._roll: Roll | None = None
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._call, name="vlscale-roll-call", daemon=True)
        self._thread.start()

    def line(self, where: str, said: str) -> str:
        """What this rank has to say, at most WAIT and GRACE seconds after the roll call began. `where` it noticed, and
        what its collective `said`."""
        self._thread.join(self._wait + GRACE)
        rank, size, roll = self._ranks.rank, self._ranks.size, self._roll
        if roll is None:
            return self._without_roll(where, said)
        if roll.teller != rank:
            return f"rank {rank}: another rank is gone or too late, noticed in {where}; rank {roll.teller} tells which"
        if roll.gone:
            seen = "them" if len(roll.gone) > 1 else "it"
            what = f"{'are' if len(roll.gone) > 1 else 'is'} gone (no sign of {seen} for {self._wait:g} s)"
            return self._named(roll.gone, what, where, said)
        if roll.silent:
            what = f"{'give' if len(roll.silent) > 1 else 'gives'} no sign (for {self._wait:g} s)"
            return self._named(roll.silent, what, where, said)
        return f"rank {rank}: a collective failed in {where}, with all {size} ranks there; --resume continues ({said})"

    def _without_roll(self, where: str, said: str) -> str:
        if not self._in_agent and not self._ranks.first:  # then rank 0 keeps the store
            if self._thread.is_alive():
                return self._named([0], "gives no sign, nor does the job's store with it", where, said)
            if isinstance(self._failed, OSError | dist.DistNetworkError):
                return self._named([0], "is gone, and the job's store with it", where, said)
        return (
            f"rank {self._ranks.rank}: another rank is gone or too late, noticed in {where}: {said}; "
            "--resume continues from the newest checkpoint"
        )

    def _named(self, missing: list[int], what: str, where: str, said: str) -> str:
        who, log = numbers(missing), "their own logs" if len(missing) > 1 else "its own log"
        noticed = f"noticed by rank {self._ranks.rank} in {where}"
        return f"{who} of {self._ranks.size} {what}, {noticed}; see {log}; start again with --resume ({said})"

    def _call(self) -> None:
        try:
            closed, expected = connections()
            if self._timed_out:
                closed = set()
            store = self._store() if self._store else dist.distributed_c10d._get_default_store()
            check_there(store)
            self._roll = self._ask(store, closed, expected)
        except Exception as error:  # whatever it is: the run is over, and nothing may keep this rank from its end
            self._failed = error

    def _ask(self, store: dist.Store, closed: set[int], expected: list[dist.Work]) -> Roll:
        rank, size = self._ranks.rank, self._ranks.size
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives a start of its ranks
        told, marks = f"vlscale/{start}/told", [f"vlscale/{start}/gone/{each}" for each in range(size)]
        store.set(marks[rank], "")
        hang_up(expected)
        deadline = time.monotonic() + self._wait
        while True:
            if store.check([told]):
                return Roll(int(store.get(told)))
            lower = next((each for each in range(rank) if store.check([marks[each]])), None)
            if lower is not None:
                return Roll(lower)
            if store.check(marks) or time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        missing = {each for each in range(size) if not store.check([marks[each]])}
        store.set(told, str(rank))
        return Roll(rank, gone=sorted(missing & closed), silent=sorted(missing - closed))


def check_there(store: dist.Store) -> None:
    """OSError where nobody keeps it any more, which asking it would answer with a page of C++."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        socket.create_connection((store.host, store.port), timeout=_CONNECT).close()


def connections() -> tuple[set[int], list[dist.Work]]:
    """Of all gloo groups: ranks that closed theirs, whose messages cannot even be waited for, and a message expected
    from each of the others, which never comes. Other backends tell nothing."""
    closed: set[int] = set()
    expected: list[dist.Work] = []
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) != "gloo":
            continue
        for peer in set(range(group.size())) - {group.rank()}:
            try:
                expected.append(group.recv([torch.empty(1)], peer, _TAG))
            except RuntimeError:
                closed.add(dist.get_global_rank(group, peer))
    return closed, expected


def hang_up(expected: list[dist.Work]) -> None:
    """gloo closes all connections of a group where a wait times out; it has no other way (abort does nothing)."""
    for work in expected:
        with suppress(RuntimeError):
            work.wait(_HANG_UP)


def numbers(ranks: list[int]) -> str:
    """`rank 3`; `ranks 0, 8-15`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
