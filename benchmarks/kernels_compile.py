"""Compile every Triton kernel configuration for sm_80, sm_90 and sm_100 without a GPU, and read what came out.

    python benchmarks/kernels_compile.py [--arch 80 90 100 120] [--only NAME] [--missing] [--write] [--table NAME]

One line a configuration: registers and spills (ptxas), shared memory, and tensor-core instructions counted in the SASS.
`--write` puts the rows into benchmarks/results/compile_table.csv and .md (a table of another Triton goes by a name of
its own); the tests hold the code to the committed table. The figures are the compiler's: none of them is a time.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the compiler takes compiled functions, not interpreted ones
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from vlscale.kernels.triton_tiles import FUSED, Config, Work, config_for, generation  # noqa: E402

from vlscale.kernels import triton_contrastive as contrastive  # noqa: E402
from vlscale.kernels import triton_contrastive_double as double  # noqa: E402
from vlscale.kernels import triton_contrastive_fused as fused  # noqa: E402
from vlscale.kernels import triton_contrastive_passes as sides  # noqa: E402
from vlscale.kernels import triton_contrastive_waves as waves  # noqa: E402
from vlscale.kernels import triton_passes as passes  # noqa: E402
from vlscale.kernels import triton_relation_kl as kl  # noqa: E402
from vlscale.kernels import triton_relation_match as match  # noqa: E402
from vlscale.kernels import triton_relation_passes as of_relations  # noqa: E402
from vlscale.kernels import triton_retrieval as retrieval  # noqa: E402
from vlscale.kernels import triton_sigmoid as sigmoid  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ["kernel", "variant", "dtype", "arch", "tile", "warps", "registers", "spill_bytes", "shared_bytes", "mma"]
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|TCGEN05|WGMMA)\b")


@dataclass(frozen=True)
class Build:
    kernel: object
    variant: str
    dtype: str
    arch: int
    config: object
    constants: dict

    @property
    def name(self) -> tuple[str, str, str, str]:
        return self.kernel.__name__, self.variant, self.dtype, f"sm_{self.arch}"

    @property
    def tile(self) -> str:
        return f"{self.config.block_m}x{self.config.block_n}x{self.config.block_k}"

    def signature(self) -> dict[str, str]:
        """Types by the kernels' naming: ids, indices and keys int64, flags and counts int32, embeddings `dtype`."""
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constants or name == "WHOLE" or name.startswith("BLOCK_"):
                types[name] = "constexpr"
            elif not name.endswith("_ptr"):
                types[name] = "fp32" if name in FLOATS else "i32"
            elif (self.kernel.__name__, name) in FLOAT64 or (name in OUTS and "float64" in self.variant):
                types[name] = "*fp64"
            elif name in FLAGS or name.endswith("starts_ptr") or (self.kernel.__name__, name) in COUNTS:
                types[name] = "*i32"
            elif name.endswith("ids_ptr") or name in INDICES or (self.kernel.__name__, name) in KEYS:
                types[name] = "*i64"
            elif self.kernel.__name__ in SPLITTING and name in SPLIT:
                types[name] = f"*{self.dtype}"
            elif name == "kept_ptr":
                types[name] = "*i16"
            elif name in STORED or (self.kernel.__name__, name) in STORED_OUT:
                narrow = self.dtype != "fp32" and not self.constants.get("EUCLIDEAN")
                types[name] = "*fp16" if narrow else "*fp32"
            elif name in EMBEDDINGS or (self.kernel.__name__, name) in EMBEDDINGS_OUT:
                types[name] = f"*{self.dtype}"
            else:
                types[name] = "*fp32"
        return types

    def compile(self):
        blocks = {k: v for k, v in self.config.launch().items() if k in self.kernel.arg_names}
        whole = {"WHOLE": False} if "WHOLE" in self.kernel.arg_names else {}
        constants = whole | self.constants | blocks
        signature = self.signature()
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in "DF" or name.startswith("stride")
        }
        source = ASTSource(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)


EMBEDDINGS = {"x_ptr", "y_ptr", "z_ptr", "xc_ptr", "zc_ptr", "query_ptr", "gallery_ptr", "partner_ptr"}
EMBEDDINGS_OUT = {("gradient_kernel", "out_ptr")}
FLAGS = {"flag_ptr", "run_ptr", "unsound_ptr", "differs_ptr"}
FLOAT64 = {("side_sums_kernel", "term_ptr"), ("pair_weights_kernel", "along_ptr")}
FLOAT64 |= {("relation_sums_kernel", "term_ptr"), ("weight_sums_kernel", "along_out_ptr")}
OUTS = {"out_ptr", "out_a_ptr"}
FLOATS = {"floor", "reach"}
INDICES = {"count_ptr", "table_ptr", "exclude_ptr", "ceiling_ptr"}
KEYS = {("neighbours_kernel", "out_ptr")}
COUNTS = {("rank_counts_kernel", "out_ptr")}
SPLITTING = {"double_statistics_kernel", "double_weights_kernel"}  # store weights as sums of embeddings' dtype
SPLIT = {"u_ptr", "v_ptr", "toward_ptr", "g_ptr"}
STORED = {"g_ptr", "h_ptr", "right_ptr"}
STORED_OUT = {("centre_kernel", "out_ptr")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


NO_NORMS = dict.fromkeys(("x_norms_ptr", "xc_norms_ptr", "z_norms_ptr", "zc_norms_ptr"))


def builds(archs: list[int]) -> Iterator[Build]:
    for arch in archs:
        for dtype in DTYPES:
            for kernel, variant, work, constants in kernels(dtype):
                yield Build(kernel, variant, dtype, arch, config_for(DTYPES[dtype], arch // 10, work), constants)
            for kernel, variant, constants in around(dtype):
                own = {name.lower(): constants.pop(name) for name in ("BLOCK_M", "BLOCK_N") if name in constants}
                config = replace(PASS, **own, warps=constants.pop("WARPS", PASS.warps))
                yield Build(kernel, variant, dtype, arch, config, constants)
        for dtype in ("bf16", "fp16"):
            yield from fused_builds(arch, dtype)


def fused_builds(arch: int, dtype: str) -> Iterator[Build]:
    """The fused gradient, by the features that its tiles hold."""
    for features, config in FUSED[generation(arch // 10)].items():
        for shared in (True, False):
            variant = f"{features} features, " + ("shared" if shared else "vectors")
            yield Build(fused.fused_gradient_kernel, variant, dtype, arch, config, {"SHARED": shared})


PASS = Config(passes.ROWS, passes.PLACES, passes.FEATURES, warps=4)  # what a launch takes that names no warps


def around(dtype: str) -> Iterator[tuple[object, str, dict]]:
    """Passes around the kernels, (kernel, variant, compile-time constants); those over sums are float32 whatever."""
    yield from around_relations(dtype)
    yield passes.own_products_kernel, "", {}
    gradient = {"CENTRED": dtype != "fp32", "HAS_FACTOR": True}
    for own in (True, False):
        yield passes.gradient_kernel, "own pairs" if own else "", gradient | {"HAS_OWN": own}
    if dtype != "fp32":
        kept = config_for(DTYPES[dtype], 9, Work.NARROW)
        yield sides.kept_weights_kernel, "", {"BLOCK_M": kept.block_m, "BLOCK_N": kept.block_n, "WARPS": kept.warps}
        yield passes.deviations_kernel, "", {}
        yield passes.centre_kernel, "", {}
        return
    yield from between()


def around_relations(dtype: str) -> Iterator[tuple[object, str, dict]]:
    """Passes around the relation kernels."""
    for count in (1, 2):
        starts = {"x_starts_ptr": None} | ({"z_starts_ptr": None} if count == 1 else {})
        for euclidean in (False, True):
            variant = f"{count} teacher" + "s" * (count > 1) + (", euclidean" if euclidean else "")
            constants = {"K": count, "EUCLIDEAN": euclidean} | starts
            yield of_relations.relation_bounds_kernel, variant, constants
    if dtype != "fp32":
        return
    places = {"BLOCK_N": of_relations.PLACES}
    for first in (True, False):
        on_top = "" if first else ", on top"
        each = {"ROW_FIRST": first, "COLUMN_FIRST": first} | places
        for shared in (True, False):
            variant = ("shared" if shared else "vectors") + on_top
            yield of_relations.relation_sums_kernel, variant, each | {"TERMS": True, "GUARDED": not shared}
        yield of_relations.relation_sums_kernel, f"sums{on_top}", each | {"TERMS": False, "GUARDED": False}
        each |= {"SUMMED": True, "WEIGHTED": True, "MIRRORED": not first}
        yield of_relations.weight_sums_kernel, f"1 launch{on_top}", each | {"EITHER": False}
        yield of_relations.weight_sums_kernel, f"2 launches{on_top}", each | {"EITHER": True}


def between() -> Iterator[tuple[object, str, dict]]:
    """Passes over sums; the rest are the contrastive loss's."""
    for first in (True, False):
        each = {f"FIRST_{job}": first for job in "ABC"}
        for count, kind in ((1, "float64"), (2, ""), (2, "maxima"), (3, "float64")):
            maximum = kind == "maxima"
            absent = {f"{name}_{job}_ptr": None for job in "abc"[count:] for name in ("part", "out")}
            variant = str(count) + (f", {kind}" if kind else "") + ("" if first else ", on top")
            constants = each | absent | {"COUNT": count, "MAXIMUM": maximum, "GUARDED": maximum}
            yield passes.several_sums_kernel, variant, constants
    yield sides.reference_kernel, "", {"BLOCK_N": sides.WIDE}
    for ids in (False, True):
        each = {"HAS_IDS": ids, "CHECKED": True, "BLOCK_N": sides.WIDE}
        yield sides.pair_weights_kernel, "ids" if ids else "", each
        for shared in (True, False):
            variant = ("shared" if shared else "vectors") + (", ids" if ids else "")
            each = {"SHARED": shared, "HAS_IDS": ids, "TERMS": True, "FIRST": False, "LAST": True}
            yield sides.side_sums_kernel, variant, each


def kernels(dtype: str) -> Iterator[tuple[object, str, Work, dict]]:
    """(kernel, variant, the work its tiles are chosen for, compile-time constants)."""
    yield contrastive.maxima_kernel, "", Work.LIGHT, {}
    for shared in (True, False):
        for ids in (False, True):
            variant = ("shared" if shared else "vectors") + (", ids" if ids else "")
            constants = {"SHARED": shared, "HAS_IDS": ids}
            work, without = Work.LIGHT if shared and not ids else Work.FULL, {"kept_ptr": None, "unit_ptr": None}
            yield contrastive.statistics_kernel, variant, work, constants | {"KEPT": False} | without
            if shared and not ids and dtype != "fp32":
                yield contrastive.statistics_kernel, "shared, kept", Work.FULL, constants | {"KEPT": True}
            work = Work.FULL if ids else Work.LIGHT if shared else Work.NARROW
            yield waves.weights_kernel, variant, work, constants
    for ids in (False, True):
        work = Work.FULL if ids else Work.LIGHT
        yield sigmoid.sigmoid_kernel, "ids" if ids else "", work, {"HAS_IDS": ids, "GRADIENT": True}
    if dtype != "fp16":
        yield double.double_statistics_kernel, "", Work.DOUBLE, {}
        for ids in (False, True):
            yield double.double_weights_kernel, "ids" if ids else "", Work.CROWDED, {"HAS_IDS": ids}
    yield retrieval.listed_scores_kernel, "", Work.FULL, {}
    yield retrieval.rank_counts_kernel, "", Work.FULL, {}
    for keep, bounded in ((16, False), (64, False), (64, True)):
        variant = f"{keep}" + (", later pass" if bounded else "")
        yield retrieval.neighbours_kernel, variant, Work.DOUBLE, {"KEEP": keep, "BOUNDED": bounded}
    yield from relation_kernels()


def relation_kernels() -> Iterator[tuple[object, str, Work, dict]]:
    for count in (1, 2):
        teachers = f"{count} teacher" + "s" * (count > 1)
        several = Work.PARTS if count == 1 else Work.DOUBLE
        whole = Work.DOUBLE if count == 1 else Work.CROWDED
        yield match.relation_mae_kernel, teachers, several, {"K": count, "GRADIENT": True}
        for euclidean in (False, True):
            plain = Work.CROWDED if euclidean and count > 1 else several
            kind = {"K": count, "EUCLIDEAN": euclidean, **({} if euclidean else NO_NORMS)}
            name = teachers + (", euclidean" if euclidean else "")
            yield kl.relation_maxima_kernel, name, whole, kind
            for shared in (True, False):
                variant = f"{name}, " + ("shared" if shared else "vectors")
                constants = {**kind, "SHARED": shared}
                yield kl.relation_statistics_kernel, variant, plain if shared else Work.CROWDED, constants
                for teacher, learns in enumerate(("", ", teacher gradient", ", teacher weights")):
                    label = variant + learns
                    work = plain if shared and not teacher else Work.CROWDED
                    yield kl.relation_weights_kernel, label, work, {**constants, "TEACHER": teacher}


def measure(build: Build) -> dict:
    compiled = build.compile()
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        command = [get_ptxas(build.arch).path, "-v", f"--gpu-name={target}", str(ptx), "-o", str(Path(folder) / "out")]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        disassembler = Path(get_ptxas(90).path).with_name("nvdisasm")
        sass = subprocess.run([str(disassembler), str(cubin)], check=True, capture_output=True, text=True).stdout
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return dict(zip(COLUMNS, build.name, strict=False)) | {
        "tile": build.tile,
        "warps": build.config.warps,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spill_bytes": sum(spills),
        "shared_bytes": compiled.metadata.shared,
        "mma": len(TENSOR_CORE.findall(sass)),
    }


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def committed(table: str, builds: list[Build]) -> dict[tuple, dict]:
    """The rows of a written table whose configuration exists at the same tile."""
    if not (path := RESULTS / f"{table}.csv").exists():
        return {}
    tiles = {build.name: (build.tile, str(build.config.warps)) for build in builds}
    with path.open() as file:
        rows = {tuple(row[c] for c in COLUMNS[:4]): row for row in csv.DictReader(file)}
    return {name: row for name, row in rows.items() if tiles.get(name) == (row["tile"], row["warps"])}


def write(rows: list[dict], table: str, command: str) -> None:
    with (RESULTS / f"{table}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    head = (
        f"# What the Triton kernels compile to\n\ntriton {triton.__version__}, no GPU involved; nothing here is a time."
    )
    text = f"{head}\n`python benchmarks/kernels_compile.py {command}`\n\n{markdown(rows)}"
    (RESULTS / f"{table}.md").write_text(text)


def named(kernels: set[str], only: str) -> set[str]:
    """The kernel of that name, or all that have it as a part of theirs."""
    return {only} & kernels or {name for name in kernels if only in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="a kernel's name, or part of several")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--missing", action="store_true", help="only what the committed table lacks at these tiles")
    parser.add_argument("--write", action="store_true", help="put the rows into the committed table")
    parser.add_argument("--table", default="compile_table", help="its name")
    arguments = parser.parse_args()
    every = list(builds([80, 90, 100]))
    beside = builds([arch for arch in arguments.arch if arch not in (80, 90, 100)])  # printed, not in the table
    names = named({b.kernel.__name__ for b in every}, arguments.only)
    chosen = [b for b in [*every, *beside] if b.arch in arguments.arch and b.kernel.__name__ in names]
    known = committed(arguments.table, every)
    if arguments.missing:
        chosen = [b for b in chosen if b.name not in known]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(measure, chosen))
    print(markdown(rows))
    if arguments.write:
        command = "--write" if arguments.table == "compile_table" else f"--write --table {arguments.table}"
        known |= {tuple(row[c] for c in COLUMNS[:4]): row for row in rows}
        write([known[build.name] for build in every if build.name in known], arguments.table, command)


if __name__ == "__main__":
    main()
