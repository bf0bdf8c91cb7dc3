"""Seconds of what benchmarks/kernels_model_trace.py counts, from rates and the instruction table: a model on paper.

A multiprocessor takes for a tile

    products       operations / rate of tensor cores; float32 operands: the instructions of the loop over features
    feeding        what bringing the operands takes longer than that, from the second-level cache or through shared
                   memory, and until the first operands are there
    instructions   the rest of the program, by issue slots and by the pipe that has most to do; named exponentials
                   where that is the one of special functions

and as long as one program fits on it, one after another: within a program only loads are pipelined. r programs hide
each other's parts: it takes the products with their feeding or the instructions, whichever is longer, and 1 / r of the
other. Device memory beyond that is memory. A pass takes the
sum over its kernels, or what the host needs to start them all, if that is longer.
"""

import csv
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from kernels_bench_entries import NEIGHBOURS
from kernels_model_rates import Rates
from kernels_model_trace import Launch, Op

TABLE = Path(__file__).resolve().parent / "results" / "instruction_table.csv"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}  # as the instruction table counts
REGISTERS, SHARED, WARPS = 65536, 233472, 64  # of a multiprocessor: registers, bytes for programs, warps
COUNTS = ("warps", "registers", "shared_bytes", "issued", "fp32", "special", "memory", "step", "round")
SORTS = ("sort", "topk")


@dataclass
class Cost:
    """Seconds by what they are spent on, of `count` launches."""

    parts: Counter = field(default_factory=Counter)
    count: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        return max(self.parts, key=self.parts.get, default="nothing")

    def add(self, other: "Cost", times: int = 1) -> None:
        self.parts.update({name: times * seconds for name, seconds in other.parts.items()})
        self.count += times * other.count


@cache
def instructions(table: Path = TABLE) -> dict[tuple[str, frozenset, str], dict]:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["kernel"], frozenset(filter(None, row["variant"].split(", "))), row["dtype"]): row for row in rows}


def counted(launch: Launch) -> dict[str, int]:
    """The instruction table's row of a launch."""
    dtype = DTYPES[launch.dtype]
    row = instructions().get((launch.kernel, launch.variant, dtype))
    tile = "x".join(map(str, launch.block))
    if row is None or row["tile"] != tile:
        variant = ", ".join(sorted(launch.variant)) or "plain"
        raise ValueError(
            f"{launch.kernel} ({variant}, {dtype}, {tile}): not in {TABLE.name};"
            " count it by `python benchmarks/kernels_model_sass.py`"
        )
    return {name: int(row[name]) for name in COUNTS}


def resident(row: dict[str, int]) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = 32 * row["warps"]
    by_registers = REGISTERS // (threads * (-(-row["registers"] // 8) * 8))
    return max(1, min(by_registers, SHARED // (row["shared_bytes"] + 1024), WARPS // row["warps"]))


def kernel(launch: Launch, rates: Rates) -> Cost:
    row = counted(launch)
    programs = launch.grid[0] * launch.grid[1]
    clock = rates.clock_ghz * 1e9
    fitting = min(resident(row), math.ceil(programs / rates.multiprocessors))
    places = rates.multiprocessors * fitting
    if launch.idle:
        waited = math.ceil(programs / places) * rates.idle_program_us * 1e-6
        return Cost(Counter({"idle kernels": waited, "launches": rates.launch_us * 1e-6}), 1)
    tiles = tiles_of(launch, programs)
    parts = tile_parts(launch, row, rates)
    if row["round"]:
        moved = neighbour_rounds(tiles / programs) * programs / tiles
        parts["instructions"] += moved * _issue(row["round"], row, rates) / clock
    together = sum(parts.values())
    apart = max(parts["products"] + parts["feeding"], together - parts["products"] - parts["feeding"])
    hidden = (apart + (together - apart) * (1 - rates.overlap) / fitting) / together
    uneven = math.ceil(programs / places) * places / programs
    share = tiles / rates.multiprocessors * hidden * uneven
    cost = Counter({name: seconds * share for name, seconds in parts.items()})
    memory = (launch.stored + launch.read) / (rates.memory_tbytes * 1e12)
    cost["memory"] += max(0.0, memory - sum(cost.values()))
    cost["launches"] += rates.launch_us * 1e-6
    return Cost(cost, 1)


def tiles_of(launch: Launch, programs: int) -> int:
    if launch.kernel == "listed_scores_kernel":  # the diagonal of a tile as high as it is wide
        return programs * max(1, launch.block[0] // launch.block[1])
    walks = launch.columns is not None and launch.grid[1] < math.ceil(launch.columns / launch.block[1])
    return launch.grid[0] * math.ceil(launch.columns / launch.block[1]) if walks else programs


def tile_parts(launch: Launch, row: dict[str, int], rates: Rates) -> Counter:
    """Seconds of one tile on a multiprocessor that has nothing else to do."""
    (m, n, k), clock = launch.block, rates.clock_ghz * 1e9
    parts = Counter()
    parts["feeding"] = launch.loops * rates.first_load_us * 1e-6
    cache = launch.fed / (rates.cache_tbytes * 1e12 / rates.multiprocessors)
    if launch.dtype == torch.float32:
        parts["products"] = math.ceil(launch.multiplied / k) * _issue(row["step"], row, rates) / clock
        parts["feeding"] += max(0.0, cache - parts["products"])
    else:
        rate = rates.product_tflops * 1e12 / rates.multiprocessors * rates.tile_product
        parts["products"] = 2 * m * n * launch.multiplied / rate
        groups = row["warps"] // 4
        down = min(groups, max(1, m // 64))
        operands = launch.multiplied * (m * (groups // down) + n * down)
        if not launch.loops:  # the second product's left factor is in registers
            operands -= launch.multiplied // 2 * m
        shared = (operands * launch.dtype.itemsize + launch.fed) / (rates.shared_bytes * clock)
        parts["feeding"] += max(0.0, cache - parts["products"], shared - parts["products"])
    integer = row["issued"] - row["fp32"] - row["special"] - row["memory"]
    clocks = {
        "issue": _issue(row["issued"], row, rates),
        "fp32": row["warps"] * row["fp32"] * rates.fp32_clocks,
        "integer": row["warps"] * integer * rates.integer_clocks,
        "memory": row["warps"] * row["memory"] * rates.memory_clocks,
        "special": row["warps"] * row["special"] * rates.special_clocks,
    }
    longest = max(clocks, key=clocks.get)
    parts["exponentials" if longest == "special" else "instructions"] += clocks[longest] / clock
    return parts


def _issue(count: int, row: dict[str, int], rates: Rates) -> float:
    """Clocks of a multiprocessor for `count` instructions of each warp of a program."""
    return count * row["warps"] / (rates.issue * rates.issue_share)


def neighbour_rounds(tiles: float) -> float:
    """Rounds of a program over its tiles: of its queries the one that gains most, k / i on average in the i-th tile."""
    gains = (NEIGHBOURS / i for i in range(1, math.ceil(tiles) + 1))
    return sum(min(NEIGHBOURS, gain + 3 * math.sqrt(gain)) for gain in gains)


def operation(op: Op, rates: Rates) -> Cost:
    """A torch operation on the device; nothing where it is free there."""
    if op.free:
        return Cost()
    memory = op.moved / (rates.memory_tbytes * 1e12)
    if op.product:
        m, k, n = op.product
        rate = rates.product_tflops if op.dtype.itemsize == 2 else rates.float32_tflops
        rate = rates.float64_tflops if op.dtype == torch.float64 else rate
        name = "products" if op.dtype.itemsize == 2 else f"{str(op.dtype)[6:]} products"
        busy = 2 * m * k * n / (rate * 1e12 * filled(m, n, rates))
        return Cost(Counter({name: busy, "memory": max(0.0, memory - busy), "launches": rates.launch_us * 1e-6}), 1)
    if op.name in SORTS:
        return Cost(Counter({"sorting": op.elements / (rates.sort_gkeys * 1e9), "launches": rates.launch_us * 1e-6}), 1)
    return Cost(Counter({"memory": memory, "launches": rates.launch_us * 1e-6}), 1)


def filled(m: int, n: int, rates: Rates) -> float:
    """Of cuBLAS's rate: the better of tiles of 128 x 256 and of 128 x 128, a tenth slower, on all multiprocessors; or
    a product split along its inner side."""

    def full(height: int, width: int) -> float:
        tiles = math.ceil(m / height) * math.ceil(n / width)
        return tiles / (math.ceil(tiles / rates.multiprocessors) * rates.multiprocessors)

    return max(full(128, 256), 0.9 * full(128, 128), rates.few_tiles)


def host(event: Launch | Op, rates: Rates) -> float:
    if isinstance(event, Launch) or event.triton:
        return rates.host_triton_us * 1e-6
    if event.name.startswith("vlscale::"):
        return rates.host_op_us * 1e-6
    return (rates.host_view_us if event.free else rates.host_us) * 1e-6


@dataclass
class Pass:
    """A pass's prediction; `by_kernel` also names torch's products and what is left of its operations."""

    cost: Cost
    by_kernel: dict[str, Cost]
    host_s: float
    device_s: float

    @property
    def seconds(self) -> float:
        return max(self.host_s, self.device_s)

    @property
    def limit(self) -> str:
        return "launches" if self.host_s > self.device_s else self.cost.limit


def price(events: Counter, rates: Rates) -> Pass:
    by_kernel: dict[str, Cost] = {}
    waited = 0.0
    for event, times in events.items():
        cost = kernel(event, rates) if isinstance(event, Launch) else operation(event, rates)
        waited += times * host(event, rates)
        if cost.count:
            by_kernel.setdefault(name_of(event), Cost()).add(cost, times)
    total = Cost()
    for cost in by_kernel.values():
        total.add(cost)
    return Pass(total, by_kernel, waited, total.seconds)


def name_of(event: Launch | Op) -> str:
    if isinstance(event, Launch):
        words = ", ".join([*sorted(event.variant), "x".join(map(str, event.block))] + ["idle"] * event.idle)
        return f"{event.kernel} ({words})"
    if event.product:
        return f"torch.mm, {str(event.dtype)[6:]}"
    return f"torch.{event.name}" if event.name in SORTS else "other torch operations"
