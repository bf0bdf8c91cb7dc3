"""Work in processes: results as they come, the first failure ends it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")


def core_count() -> int:
    return len(os.sched_getaffinity(0))


def in_processes(function: Callable[..., Result], jobs: list[tuple], processes: int) -> Iterator[Result]:
    """`function(*job)` for every job, in no fixed order; in this process when `processes` is one."""
    if processes <= 1:
        yield from (function(*job) for job in jobs)
        return
    # Spawned, not forked: a progress bar's thread may hold a lock that a fork would copy.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(function, *job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
