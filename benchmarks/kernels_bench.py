"""Every kernel against dense torch and other libraries: time, memory, rate; or error against float64; or pictures.

    vlscale bench kernels [--out FOLDER] [--minutes 8] [--families ...] [--pairs ...] [--widths ...] [--scales ...]
    vlscale bench kernels --accuracy
    vlscale bench kernels --pictures

Writes kernels.csv, kernels.md and plots into FOLDER. Points run from small to large within the minutes; what is
predicted to be too long for them is a row that says so, and so are an entry that ran out of memory and a library that
is not there. The same command later goes on where the CSV ends.
"""

import argparse
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))

import kernels_bench_accuracy as accuracy  # noqa: E402
import kernels_bench_pictures as pictures  # noqa: E402
from common import end_with  # noqa: E402
from kernels_bench_entries import FAMILIES, Entry, Missing, Problem, entries, make_problem  # noqa: E402
from kernels_bench_measure import Calls, Device, OutOfMemory, interleave, warm  # noqa: E402
from kernels_bench_report import Rows, key, write  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_GPU = {"pairs": [4096, 16384, 65536, 262144, 1048576], "widths": [256, 512, 1024, 4096], "scales": [14.0, 100.0]}
ON_CPU = {"pairs": [4096, 8192], "widths": [256], "scales": [14.0, 100.0]}
A_WEEK = 7 * 24 * 60  # minutes
CALLS_A_POINT = 8  # of a pass at least: warming up, memory, an estimate, rounds


@dataclass(frozen=True)
class Point:
    family: str
    pairs: int
    width: int
    scale: float
    dtype: str

    def row(self, entry: str, which: str) -> dict:
        place = {"pairs": self.pairs, "width": self.width, "scale": self.scale, "dtype": self.dtype}
        return {"family": self.family, "entry": entry, **place, "pass": which}


@dataclass
class Clock:
    """What is left of the minutes, and how long an entry will take: at least its operations at the rate of a plain
    product, and what it took before, growing with the square of the pairs."""

    deadline: float
    rate: float  # operations a second
    known: dict[tuple[str, str, int], tuple[int, float]] = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def learn(self, entry: Entry, point: Point, seconds: float) -> None:
        self.known[entry.family, entry.name, point.width] = (point.pairs, seconds)

    def predict(self, entry: Entry, point: Point) -> float:
        """Seconds of one call of each pass."""
        family = FAMILIES[entry.family]
        forward, both = (count(point.pairs, point.width) if count else 0.0 for count in (family.forward, family.both))
        pairs, seconds = self.known.get((entry.family, entry.name, point.width), (1, 0.0))
        growth = 1 if point.family in ("neighbours", "ranks", "relation_mse") else 2
        return max((forward + 2 * both) / self.rate, seconds * (point.pairs / pairs) ** growth)


class Bench:
    def __init__(self, rows: Rows, device: Device, clock: Clock, settings: argparse.Namespace):
        self.rows, self.device, self.clock, self.settings = rows, device, clock, settings

    def run(self, points: list[Point]) -> None:
        for done, point in enumerate(points):
            if self.clock.left() <= 0:
                self.skip_rest(points[done:])
                return
            self.measure(point, until=time.monotonic() + self.clock.left() / (len(points) - done))
            self.rows.save()

    def passes(self, point: Point) -> tuple[str, ...]:
        return ("forward", "backward", "both") if FAMILIES[point.family].both else ("forward",)

    def note(self, point: Point, entry: Entry, status: str, detail: str) -> None:
        for which in self.passes(point):
            self.rows.add(point.row(entry.name, which) | {"status": status, "detail": detail})

    def wanted(self, point: Point) -> list[Entry]:
        def finished(entry: Entry) -> bool:
            return all(self.rows.finished(key(point.row(entry.name, which))) for which in self.passes(point))

        return [entry for entry in entries([point.family], self.settings.without) if not finished(entry)]

    def skip_rest(self, points: list[Point]) -> None:
        for point in points:
            for entry in self.wanted(point):
                self.note(point, entry, "skipped", "the minutes were over")
        self.rows.save()

    def measure(self, point: Point, until: float) -> None:
        """All unfinished entries of one point, interleaved in rounds that end by the time `until` if three do."""
        entries_here = self.wanted(point)
        if not entries_here:
            return
        print(f"{point.family}: N={point.pairs} D={point.width} scale={point.scale:g}", flush=True)
        dtype = DTYPES[point.dtype]
        problem = make_problem(point.family, point.pairs, point.width, point.scale, dtype, self.device.device)
        ready = {}
        for entry in entries_here:
            if found := self.prepare(entry, point, problem):
                ready[entry.name] = found
        if ready:
            self.time(point, ready, until - time.monotonic())
        self.device.clear()

    def prepare(self, entry: Entry, point: Point, problem: Problem) -> tuple[Calls, dict, dict] | None:
        """The entry's calls after their first ones, with seconds and memory; None where a row says why not."""
        try:
            loss = entry.load(self.device.device)
        except Missing as reason:
            self.note(point, entry, "missing", str(reason))
            return None
        needed = entry.matrices * 4 * point.pairs**2
        if not self.device.cuda and needed > self.device.free_bytes():
            free = self.device.free_bytes() / 2**30
            self.note(point, entry, "out of memory", f"needs about {needed / 2**30:.0f} GiB, {free:.0f} GiB are free")
            return None
        if (predicted := CALLS_A_POINT * self.clock.predict(entry, point)) > self.clock.left() / 2:
            self.note(point, entry, "skipped", f"predicted {predicted:.0f} s, {self.clock.left():.0f} s were left")
            return None
        try:
            calls = Calls(loss, problem)
            seconds, peak = warm(calls, self.device)
        except OutOfMemory as reason:
            self.note(point, entry, "out of memory", str(reason))
        except Exception as error:  # a peer may fail in its own ways; the others go on
            said = (str(error).strip().splitlines() or [""])[0]
            self.note(point, entry, "failed", f"{type(error).__name__}: {said}"[:200])
            if "CUDA error" in str(error):
                self.rows.save()
                raise RuntimeError(f"{entry.name} broke the GPU's context ({said}); start again to go on") from None
        else:
            self.clock.learn(entry, point, sum(seconds.values()))
            return calls, seconds, peak
        self.device.clear(cycles=True)
        return None

    def time(self, point: Point, ready: dict, budget: float) -> None:
        family = FAMILIES[point.family]
        timings, square = interleave(ready, self.device, DTYPES[point.dtype], budget, self.settings.rounds)
        forward = family.forward(point.pairs, point.width)
        both = family.both(point.pairs, point.width) if family.both else 0.0
        least = {"forward": forward, "both": both, "backward": 0.0 if family.together else both - forward}
        for (name, which), timing in timings.items():
            low, median, high = timing.quantiles()
            rate = least[which] / median / 1e12
            self.rows.add(
                point.row(name, which)
                | {"status": "ok", "median_ms": f"{median * 1e3:.6g}", "p20_ms": f"{low * 1e3:.6g}"}
                | {"p80_ms": f"{high * 1e3:.6g}", "rounds": len(timing.seconds), "peak_mb": f"{timing.peak_mb:.1f}"}
                | {"tflops": f"{rate:.4g}" if rate else "", "fraction": f"{rate / square:.4g}" if rate else ""}
                | {"square_tflops": f"{square:.4g}"}
            )


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vlscale bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-kernels"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new points after this; 0: never")
    parser.add_argument("--rounds", type=int, default=20, help="of a point at most")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pairs", type=int, nargs="+", help="N; by default what suits the device")
    parser.add_argument("--widths", type=int, nargs="+", help="D")
    parser.add_argument("--scales", type=float, nargs="+", help="logit_scale, and 1 / temperature of relations")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="leave out entries named so")
    parser.add_argument("--dtype", choices=DTYPES, help="of the embeddings; bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--accuracy", action="store_true", help="errors against float64 instead of times")
    mode.add_argument("--pictures", action="store_true", help="the preprocessing of pictures instead of the losses")
    parser.add_argument("--batch", type=int, help="of --pictures, how many")
    given = parser.parse_args(argv)
    for name, default in (ON_GPU if given.device == "cuda" else ON_CPU).items():
        if getattr(given, name) is None:
            setattr(given, name, [accuracy.PAIRS] if given.accuracy and name == "pairs" else default)
        if min(getattr(given, name)) <= 0:
            raise ValueError(f"--{name}: expected positive numbers, got {getattr(given, name)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu where torch sees no CUDA device, got cuda")
    if given.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {given.rounds}")
    if given.batch is not None and given.batch < 1:
        raise ValueError(f"--batch: expected at least 1 picture, got {given.batch}")
    if min(given.pairs) < 2:
        raise ValueError(f"--pairs: expected at least 2, got {min(given.pairs)}")
    given.dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    return given


def main(argv: list[str]) -> int:
    """0, or 1 when an entry of ours failed. Stopped by SIGTERM, as `timeout` does, it writes what it has."""
    given = arguments_of(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(given, " ".join(["vlscale bench kernels", *argv]))
    finally:
        signal.signal(signal.SIGTERM, before)


def run(given: argparse.Namespace, command: str) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if given.accuracy:
        return accuracy.run(given, device, name, DTYPES[given.dtype], command)
    if given.pictures:
        return pictures.run(given, device, name, DTYPES[given.dtype], command)
    rows = Rows(given.out, name)
    places = product(given.pairs, given.widths, given.scales, given.families)
    points = [Point(family, n, d, scale, given.dtype) for n, d, scale, family in places]  # N in the order given
    deadline, measured = time.monotonic() + 60 * (given.minutes or A_WEEK), Device(device)
    try:
        Bench(rows, measured, Clock(deadline, measured.rate(DTYPES[given.dtype])), given).run(points)
    finally:
        print(write(rows, given.out, name, command))
    ours = [row for row in rows.values() if row["entry"].startswith("vlscale") and row["status"] == "failed"]
    return int(bool(ours))


if __name__ == "__main__":
    end_with(main, sys.argv[1:])
