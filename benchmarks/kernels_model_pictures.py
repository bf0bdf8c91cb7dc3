"""The time of the CUDA kernel that makes a batch of pictures, from its own constants: a model on paper.

A block owns kRows x kThreads outputs of one picture and takes the source lines under them by kChunk: a thread filters
each line along x, tap by tap, then adds it to its kRows outputs. Instructions are counted by hand from
kernels/csrc/preprocess_core.h; bytes are those of each source and each output value once.
"""

import math
import re
from pathlib import Path

from kernels_bench_pictures import HEIGHT, PICTURES, SIDE, WIDTH
from kernels_model_rates import Rates

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "csrc" / "preprocess_core.h"
CONSTANT = re.compile(r"constexpr int (kThreads|kRows|kChunk) = (\d+);")
REACH = 2  # of the cubic filter
COLOURS = 3
WEIGHT = 14  # instructions of one filter weight
TAP = 4  # of a value: load, conversion, multiply-add, a share of the address
LINE = 4  # of a line and an output: three multiply-adds, the weight from shared memory


def constants() -> dict[str, int]:
    return {name: int(value) for name, value in CONSTANT.findall(SOURCE.read_text())}


def counted(itemsize: int = 2, pictures: int = PICTURES["cuda"]) -> dict[str, float]:
    """Instructions of warps and bytes of one call."""
    of = constants()
    across, down = (max(1.0, length / SIDE) for length in (WIDTH, HEIGHT))
    taps = 2 * REACH * across
    lines = of["kChunk"] * math.ceil(((of["kRows"] - 1) + 2 * REACH) * down / of["kChunk"])
    each = lines * (taps * COLOURS * TAP + of["kRows"] * LINE) + lines / of["kChunk"] * taps * WEIGHT
    blocks = pictures * math.ceil(SIDE / of["kRows"]) * math.ceil(SIDE / of["kThreads"])
    moved = pictures * COLOURS * (HEIGHT * WIDTH + SIDE * SIDE * itemsize)
    return {"instructions": blocks * of["kThreads"] / 32 * each, "bytes": moved, "pictures": pictures}


def predict(rates: Rates) -> dict[str, float]:
    """Milliseconds of the kernel, its bytes' alone, and its share of the rate of a copy."""
    found = counted()
    issued = found["instructions"] / (rates.multiprocessors * rates.issue * rates.issue_share * rates.clock_ghz * 1e9)
    copied = found["bytes"] / (rates.memory_tbytes * 1e12)
    kernel = max(issued, copied) + rates.launch_us * 1e-6
    return {"ms": 1e3 * kernel, "bytes_ms": 1e3 * copied, "share": copied / kernel, "pictures": found["pictures"]}
