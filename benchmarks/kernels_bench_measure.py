"""Interleaved timing of the entries of one point, their peak memory, and the rate of a matrix product among them.

Every round calls each entry once, so that clocks and neighbours of this process disturb all alike; the median and the
20th and 80th percentile are over rounds. Seconds by CUDA events on a GPU, by perf_counter on a CPU. The first call of
each, which compiles and chooses algorithms, is not counted; the second gives the memory.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kernels_bench_entries import Loss, Problem

PASSES = ("forward", "backward", "both")
SQUARE = {"cuda": 8192, "cpu": 768}  # side of the product whose rate is the yardstick
MEGABYTE = 2**20
LEAST_ROUNDS = 3


@dataclass
class Timing:
    """One entry, one pass: seconds of each round, and megabytes above what was there before."""

    seconds: list[float]
    peak_mb: float

    def quantiles(self) -> tuple[float, float, float]:
        """20th percentile, median, 80th percentile."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        cuts = statistics.quantiles(self.seconds, n=5, method="inclusive")
        return cuts[0], statistics.median(self.seconds), cuts[3]


class OutOfMemory(Exception):
    pass


class Device:
    """Time and memory of calls on one device."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_mb(self, call: Callable[[], object]) -> float:
        """Growth of the peak while `call` runs: of allocated memory on a GPU, of the resident set on a CPU."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - before) / MEGABYTE
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident_mb("VmRSS")
        call()
        return resident_mb("VmHWM") - before

    def free_bytes(self) -> int:
        if self.cuda:
            return torch.cuda.mem_get_info(self.device)[0]
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

    def clear(self, *, cycles: bool = False) -> None:
        """Gives cached memory back; `cycles`: also what a failed call may have left in reference cycles."""
        if cycles:
            gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def square(self, dtype: torch.dtype) -> Callable[[], object]:
        side = SQUARE[self.device.type]
        left, right = torch.randn(2, side, side, device=self.device).to(dtype)
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of the plain product."""
        square = self.square(dtype)
        square()
        return self.square_tflops(min(self.seconds(square) for _ in range(3))) * 1e12

    def square_tflops(self, seconds: float) -> float:
        return 2 * SQUARE[self.device.type] ** 3 / seconds / 1e12


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


class Calls:
    """One entry's passes over one problem."""

    def __init__(self, loss: Loss, problem: Problem):
        self.loss, self.problem = loss, problem
        self.leaves = list(problem.leaves().values())

    def passes(self) -> tuple[str, ...]:
        return PASSES if self.leaves else ("forward",)

    def forward(self) -> None:
        with torch.no_grad():
            self.loss(self.problem)

    def both(self) -> None:
        torch.autograd.grad(self.loss(self.problem), self.leaves)

    def seconds(self, name: str, device: Device) -> float:
        if name != "backward":
            return device.seconds(getattr(self, name))
        value = self.loss(self.problem)
        return device.seconds(lambda: torch.autograd.grad(value, self.leaves))


def said_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def warm(calls: Calls, device: Device) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds, megabytes) of each pass, after a first call; raises OutOfMemory."""
    try:
        calls.forward()
        peak = {"forward": device.peak_mb(calls.forward)}
        if calls.leaves:
            calls.both()
            peak["both"] = device.peak_mb(calls.both)
            peak["backward"] = peak["both"]
        return {name: calls.seconds(name, device) for name in calls.passes()}, peak
    except Exception as error:
        if said_of_memory(error):
            raise OutOfMemory(str(error).splitlines()[0]) from None
        raise


def rounds_for(budget: float, seconds: list[float], most: int) -> int:
    return max(min(LEAST_ROUNDS, most), min(most, int(budget / max(sum(seconds), 1e-6))))


def interleave(
    ready: dict[str, tuple[Calls, dict[str, float], dict[str, float]]],
    device: Device,
    dtype: torch.dtype,
    budget: float,
    most: int,
) -> tuple[dict[tuple[str, str], Timing], float]:
    """({(entry, pass): timing}, TFLOP/s of the plain product), in up to `most` rounds that fit `budget` seconds.

    `ready`: each entry's calls, and what `warm` found.
    """
    square = device.square(dtype)
    square()
    estimates = [s for _, seconds, _ in ready.values() for s in seconds.values()] + [device.seconds(square)]
    timings = {(name, p): Timing([], peak[p]) for name, (_, seconds, peak) in ready.items() for p in seconds}
    squares = []
    for _ in range(rounds_for(budget, estimates, most)):
        squares.append(device.seconds(square))
        for (name, which), timing in timings.items():
            timing.seconds.append(ready[name][0].seconds(which, device))
    return timings, device.square_tflops(statistics.median(squares))
