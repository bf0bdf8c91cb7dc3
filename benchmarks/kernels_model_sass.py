"""Instructions that every kernel configuration executes a tile, counted in its SASS for sm_90; no GPU is needed.

    python benchmarks/kernels_model_sass.py [--only NAME]

Writes benchmarks/results/instruction_table.csv, what benchmarks/kernels_model.py prices. A kernel walks over tiles in a
loop or makes one a program; in it the loops over features hold the products. Counts are of one warp and one tile:

    issued, fp32, special, memory   outside the loops over features: all, and those for the pipes of float32
                                    arithmetic, of special functions (MUFU), of loads, stores and shuffles
    step                            of one pass of a loop over features
    round                           of one round of a loop without products inside a tile (neighbours moved over)

A loop over teachers is counted K times. What a predicate or a branch may skip counts as executed, but for the masks of
tiles with own pairs or ends, where a kernel leaves them out of all others (those that have a constant WHOLE).
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes Triton's interpreter away from who imports it
    from kernels_compile import Build

TABLE = Path(__file__).resolve().parent / "results" / "instruction_table.csv"
COLUMNS = ["kernel", "variant", "dtype", "tile", "warps", "registers", "shared_bytes"]
COLUMNS += ["issued", "fp32", "special", "memory", "step", "round", "triton"]
OVER_TILES = (
    "maxima_kernel",
    "statistics_kernel",
    "fused_gradient_kernel",
    "double_statistics_kernel",
    "relation_maxima_kernel",
    "rank_counts_kernel",
    "neighbours_kernel",
)
PIPES = {
    "fp32": ("FADD", "FMUL", "FFMA"),
    "special": ("MUFU",),
    "memory": ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "LDL", "STL"),
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[^;]*?(?:`\((\.L_x_\d+)\))? *;")
REGISTERS = re.compile(r"EIATTR_REGCOUNT.*?\.word\s+index.*?\.word\s+(0x[0-9a-f]+)", re.DOTALL)
FMA_LOOP = 100  # FFMA of a product's pass without tensor cores, at least


@dataclass(frozen=True)
class Loop:
    """Instructions first..last, and whether a product is made directly in them or in a loop inside."""

    first: int
    last: int
    product: bool

    def holds(self, other: "Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def read(sass: str) -> tuple[list[str], list[Loop]]:
    """(opcodes in order, loops) of a disassembly."""
    opcodes, labels, jumps = [], {}, []
    for line in sass.splitlines():
        if line.startswith(".L_x_"):
            labels[line.split(":")[0]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            if found[1] == "BRA" and found[2]:
                jumps.append((len(opcodes), found[2]))
            opcodes.append(found[1])
    ends = {}
    for place, label in jumps:
        if labels.get(label, place + 1) <= place:
            ends[labels[label]] = max(place, ends.get(labels[label], 0))
    return opcodes, [Loop(first, last, _multiplies(opcodes[first : last + 1])) for first, last in ends.items()]


def _multiplies(opcodes: list[str]) -> bool:
    return any(code in ("HGMMA", "HMMA") for code in opcodes) or opcodes.count("FFMA") >= FMA_LOOP


def counts(sass: str, *, over_tiles: bool, teachers: int) -> dict[str, int]:
    opcodes, loops = read(sass)
    making = [loop for loop in loops if loop.product]
    innermost = [loop for loop in making if not any(loop.holds(other) for other in making)]
    tiles = next((loop for loop in making if not any(other.holds(loop) for other in making)), None)
    tiles = tiles if over_tiles else None
    steps = [loop for loop in innermost if loop != tiles]
    between = [loop for loop in making if loop != tiles and loop not in innermost]
    first, last = (tiles.first, tiles.last) if tiles else (0, len(opcodes) - 1)
    rounds = [loop for loop in loops if not loop.product and tiles and tiles.holds(loop)]
    found = Counter()
    for place in range(first, last + 1):
        if any(loop.first <= place <= loop.last for loop in steps):
            continue
        if any(loop.first <= place <= loop.last for loop in rounds):
            found["round"] += 1
            continue
        times = teachers if any(loop.first <= place <= loop.last for loop in between) else 1
        found["issued"] += times
        for pipe, names in PIPES.items():
            found[pipe] += times * (opcodes[place] in names)
    found["step"] = max((loop.last - loop.first + 1 for loop in steps), default=0)
    return {name: found[name] for name in ("issued", *PIPES, "step", "round")}


def hopper() -> Iterator["Build"]:
    """What is compiled for sm_90 elsewhere, and the losses made without their gradients; float16 is as bfloat16."""
    from kernels_compile import builds

    for build in builds([90]):
        if build.dtype == "fp16":
            continue
        yield build
        if "GRADIENT" in build.constants:
            alone = ", ".join(part for part in (build.variant, "no gradient") if part)
            yield replace(build, variant=alone, constants=build.constants | {"GRADIENT": False})


def measure(build: "Build") -> dict:
    from kernels_compile import triton

    compiled = build.compile()
    sass = disassembled(compiled)
    name, variant, dtype, _ = build.name
    row = {"kernel": name, "variant": variant, "dtype": dtype, "tile": build.tile, "warps": build.config.warps}
    row |= {"registers": int(REGISTERS.search(sass)[1], 16), "shared_bytes": compiled.metadata.shared}
    if "WHOLE" in build.kernel.arg_names:
        sass = disassembled(replace(build, constants=build.constants | {"WHOLE": True}).compile())
    found = counts(sass, over_tiles=name in OVER_TILES, teachers=build.constants.get("K", 1))
    return row | found | {"triton": triton.__version__}


def disassembled(compiled) -> str:
    from kernels_compile import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        disassembler = Path(get_ptxas(90).path).with_name("nvdisasm")
        return subprocess.run([str(disassembler), str(cubin)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a kernel's name, or part of several; others keep their rows")
    only = parser.parse_args().only
    known = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            known = {(row["kernel"], row["variant"], row["dtype"]): row for row in csv.DictReader(file)}
    from kernels_compile import named

    every, rows = list(hopper()), []
    names = named({build.kernel.__name__ for build in every}, only)
    for build in every:
        name = build.name[:3]
        rows.append(measure(build) if name[0] in names else known.get(name))
        print(rows[-1], file=sys.stderr)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if row)


if __name__ == "__main__":
    main()
