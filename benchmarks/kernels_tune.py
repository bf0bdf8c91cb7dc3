"""Tile sizes of the Triton kernels, measured on this GPU.

    vlscale bench tune [--out FOLDER] [--minutes 8] [--launches ...] [--pairs 32768] [--widths 512 1024]

Each launch is timed by the pass of the loss that it carries, with every tile that fits the device: compiled by several
processes first, then in interleaved rounds, of which the faster half goes on. What gives other values than the sizes in
use is left out and said. The fastest tile's waves are measured after. Sizes in use stay unless others are 2 % faster.

Writes tiles.json, tune.csv and tune.md into FOLDER; VLSCALE_TILES=FOLDER/tiles.json makes the kernels take the sizes.
Launches that tiles.json holds of an earlier call are kept, those that --launches names are measured anew.
"""

import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))

import kernels_tune_choices as choices  # noqa: E402
from common import end_with  # noqa: E402
from kernels_bench_measure import Calls, Device  # noqa: E402
from kernels_bench_report import about, markdown_table  # noqa: E402
from kernels_tune_choices import BY_NAME, DTYPES, SCALE, Choice, Place, described  # noqa: E402
from vlscale.kernels.measured_tiles import FUSED, LAUNCHES, Sizes, Table, device_name, read_tiles  # noqa: E402

GAIN = 0.98  # of the time of the sizes in use, from which others take their place
APART = 5e-3  # relative difference of values and gradients: tiles round alike but for the order of sums
ROUNDS = (3, 5, 9, 15)  # of each halving
WORKERS = 8  # that compile
COLUMNS = ["launch", "width", "tile", "warps", "stages", "waves", "splits", "median_ms", "times_in_use", "status"]


@dataclass
class Trial:
    """A choice and the seconds of its rounds, by width."""

    choice: Choice
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def times(self, other: "Trial") -> float:
        """Of the other's time in the same rounds, the geometric mean over widths."""
        ratios = [self.ratio(other, width) for width in self.seconds]
        return math.exp(statistics.fmean(map(math.log, ratios)))

    def ratio(self, other: "Trial", width: int) -> float:
        mine = self.seconds[width]
        return statistics.median(mine) / statistics.median(other.seconds[width][-len(mine) :])


def compiled(place: Place, launch: str, choice: Choice, others: dict[str, Sizes], widths: list[int]) -> str:
    """Runs a choice once, which leaves it in Triton's cache; what it failed of, if it did."""
    try:
        with place.taking(launch, choice, others):
            for width in widths:
                values(place.calls(launch, width))
        if place.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # shared memory, registers, a compiler's own failure
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
    return ""


def values(calls: Calls) -> list[Tensor]:
    """The loss and its gradients, or a search's scores or ranks, without what near ties decide."""
    if not calls.leaves:
        return [calls.loss(calls.problem)[0].double()]
    loss = calls.loss(calls.problem)
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, calls.leaves))]


def difference(found: list[Tensor], truth: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(found, truth, strict=True))


class Tuner:
    """Fills `kept`, sizes by launch."""

    def __init__(self, place: Place, kept: dict[str, Sizes], deadline: float, most: int | None):
        self.place, self.kept, self.deadline, self.most = place, kept, deadline, most
        self.device = Device(torch.device(place.device))
        self.workers: ProcessPoolExecutor | None = None
        self.rows: list[dict] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def tune(self, launch: str, widths: list[int], until: float) -> None:
        """Keeps the sizes for a launch: those in use, or faster ones that give the same values."""
        widths = list(BY_NAME[launch].widths) or widths
        now = Trial(choices.in_use(self.place, launch, widths[0]))
        tiles = choices.tiles_for(launch, now.choice, self.place)[: self.most]
        print(f"{launch}: {len(tiles)} tiles beside the one in use, {described(now.choice)['tile']}", flush=True)
        tried = self.prepare(launch, tiles, widths, until)
        best = self.race(launch, now, tried, widths, until)
        if BY_NAME[launch].waved or launch in ("ranks", "neighbours"):
            others = choices.waves_for(best.choice, launch, self.place)[: self.most]
            trials = [*([] if best is now else [best]), *map(Trial, others)]
            best = self.race(launch, now, trials, widths, until, start=1)
        chosen = best if best.times(now) < GAIN else now
        said = ", ".join(f"{name} {value}" for name, value in described(chosen.choice).items())
        print(f"  {chosen.times(now):.3f} of the time in use: {said}", flush=True)
        self.kept[launch] = choices.sizes_of(chosen.choice)

    def prepare(self, launch: str, tiles: list[Choice], widths: list[int], until: float) -> list[Trial]:
        """Trials of what compiles and runs, within two thirds of the time; several processes fill Triton's cache."""
        trials, others = [], self.others(launch)
        end = time.monotonic() + (until - time.monotonic()) * 2 / 3
        waiting: dict[Future, Choice] = {
            self.pool().submit(compiled, self.place, launch, tile, others, widths): tile for tile in tiles
        }
        done, late = wait(waiting, timeout=max(1.0, end - time.monotonic()))
        for future, choice in waiting.items():
            failed = "not compiled in time" if future in late else future.exception() or future.result()
            if failed:
                self.note(launch, choice, None, str(failed))
            else:
                trials.append(Trial(choice))
        if late or any(future.exception() for future in done):  # what still compiles would disturb the rounds
            self.close()
        return trials

    def others(self, launch: str) -> dict[str, Sizes]:
        return {name: sizes for name, sizes in self.kept.items() if name != launch}

    def pool(self) -> ProcessPoolExecutor:
        if self.workers is None:
            count = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
            self.workers = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        return self.workers

    def close(self) -> None:
        if self.workers is not None:
            self.workers.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
            self.workers = None

    def race(
        self, launch: str, now: Trial, trials: list[Trial], widths: list[int], until: float, start: int = 0
    ) -> Trial:
        """The fastest that gives the values of `now`, by halving; each round calls every one left once."""
        calls = {width: self.place.calls(launch, width) for width in widths}
        others = self.others(launch)
        with self.place.taking(launch, now.choice, others):
            truth = {width: values(calls[width]) for width in widths}
        left = []
        for trial in trials:
            if wrong := self.wrong(launch, trial.choice, calls, truth):
                self.note(launch, trial.choice, None, wrong)
            else:
                left.append(trial)
        for rounds in ROUNDS[start:]:
            for _ in range(rounds):
                for width, trial in product(widths, [now, *left]):
                    with self.place.taking(launch, trial.choice, others):
                        seconds = calls[width].seconds(BY_NAME[launch].timed, self.device)
                    trial.seconds.setdefault(width, []).append(seconds)
            left.sort(key=lambda trial: trial.times(now))
            if len(left) <= 2 or time.monotonic() > until:
                break
            for trial in left[(len(left) + 1) // 2 :]:
                self.note(launch, trial.choice, now, "slower", trial)
            left = left[: (len(left) + 1) // 2]
        self.note(launch, now.choice, now, "in use", now)
        for trial in left:
            self.note(launch, trial.choice, now, "ok", trial)
        self.device.clear()
        return left[0] if left and left[0].times(now) < 1 else now

    def wrong(self, launch: str, choice: Choice, calls: dict[int, Calls], truth: dict[int, list[Tensor]]) -> str:
        try:
            with self.place.taking(launch, choice, self.others(launch)):
                apart = max(difference(values(calls[width]), truth[width]) for width in calls)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
        return "" if apart <= APART else f"other values: {apart:.1e} apart"

    def note(self, launch: str, choice: Choice, now: Trial | None, status: str, trial: Trial | None = None) -> None:
        row = {"launch": launch, "status": status} | described(choice)
        if trial is None:
            self.rows.append(row)
            return
        for width, seconds in trial.seconds.items():
            measured = {"width": width, "median_ms": f"{statistics.median(seconds) * 1e3:.5g}"}
            measured["times_in_use"] = f"{trial.ratio(now, width):.4f}"
            self.rows.append(row | measured)


def save(folder: Path, table: Table, rows: list[dict], given: argparse.Namespace, command: str) -> None:
    """tiles.json, tune.csv and tune.md, each whole at any moment."""
    last = {tuple(row.get(c, "") for c in COLUMNS[:7]): row for row in rows if row["status"] in ("in use", "ok")}
    cells = [[str(row.get(column, "")) for column in COLUMNS] for row in last.values()]
    said = [f"N = {given.pairs}, {given.dtype}, scale {SCALE:g}. Time of the pass that a launch carries; times_in_use:"]
    said += ["over the sizes that the kernels take by themselves. All trials: tune.csv.", ""]
    head = about(command, device_name(torch.device(given.device)))
    page = ["# Tile sizes, measured", "", *head, "", *said, markdown_table(COLUMNS, cells)]
    plain = {  # null where a width is better not fused
        device: {dtype: {name: sizes or None for name, sizes in launches.items()} for dtype, launches in dtypes.items()}
        for device, dtypes in table.items()
    }
    put(folder / "tiles.json", json.dumps(plain, indent=1) + "\n")
    put(folder / "tune.md", "\n".join(page))
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    put(folder / "tune.csv", lines.getvalue())


def put(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vlscale bench tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tune"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all launches together; 0: no limit")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, help="these alone, anew")
    parser.add_argument("--pairs", type=int, help="N; 32768 on a GPU")
    parser.add_argument("--widths", type=int, nargs="+", help="D; sizes are chosen for all together; 512 1024 on a GPU")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--most", type=int, help="tiles of a launch, the nearest to those in use first")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    given = parser.parse_args(argv)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if given.device == "cuda" and (interpreted or not torch.cuda.is_available()):
        got = "TRITON_INTERPRET=1" if interpreted else "none that torch sees"
        raise ValueError(f"--device: expected a CUDA device, got {got} (to try the way: TRITON_INTERPRET=1, cpu)")
    if given.device == "cpu" and not interpreted:
        raise ValueError("--device cpu: expected TRITON_INTERPRET=1, which tries the way and measures nothing of use")
    on_gpu = given.device == "cuda"
    given.pairs = given.pairs or (32768 if on_gpu else 130)
    given.widths = given.widths or ([512, 1024] if on_gpu else [40])
    for name, least in (("pairs", 2), ("widths", 1), ("most", 1)):
        value = getattr(given, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if given.minutes < 0:
        raise ValueError(f"--minutes: expected at least 0, got {given.minutes:g}")
    return given


def main(argv: list[str]) -> int:
    """0, or 1 where a choice gave other values. Stopped by SIGTERM, it keeps the launches that it finished."""
    given = arguments_of(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(given, " ".join(["vlscale bench tune", *argv]))
    finally:
        signal.signal(signal.SIGTERM, before)


def run(given: argparse.Namespace, command: str) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    path, name = given.out / "tiles.json", device_name(torch.device(given.device))
    table = read_tiles(str(path)) if path.exists() else {}
    kept = table.setdefault(name, {}).setdefault(given.dtype, {})
    wanted = given.launches or [launch for launch in LAUNCHES if launch not in kept]
    if DTYPES[given.dtype] not in (torch.bfloat16, torch.float16):
        wanted = [launch for launch in wanted if launch not in FUSED]  # float32 is never fused
    deadline = time.monotonic() + 60 * (given.minutes or 7 * 24 * 60)
    tuner = Tuner(Place(given.device, given.dtype, given.pairs), kept, deadline, given.most)
    try:
        for done, launch in enumerate(wanted):
            if tuner.left() <= 0:
                print(f"the minutes were over; left: {', '.join(wanted[done:])}; the same command goes on there")
                break
            until = time.monotonic() + tuner.left() / (len(wanted) - done)
            tuner.tune(launch, given.widths, until)
            save(given.out, table, tuner.rows, given, command)
    finally:
        tuner.close()
    print(f"VLSCALE_TILES={path} makes the kernels take them")
    return int(any(row["status"].startswith("other values") for row in tuner.rows))


if __name__ == "__main__":
    end_with(main, sys.argv[1:])
