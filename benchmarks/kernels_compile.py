"""Compile every Triton kernel configuration for sm_80, sm_90 and sm_100 without a GPU, and read what came out.

    python benchmarks/kernels_compile.py [--arch 80 90 100] [--only NAME] [--write]

One line a configuration: registers and spills (ptxas), shared memory, and tensor-core instructions counted in the SASS.
`--write` puts the rows into benchmarks/results/compile_table.csv and .md; the tests hold the code to the committed
table. The figures are the compiler's: none of them is a time.
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
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the compiler takes compiled functions, not interpreted ones
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

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

    def signature(self) -> dict[str, str]:
        """Types by the kernels' naming: ids and counts int64, the flag int32, embeddings `dtype`."""
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constants or name.startswith("BLOCK_"):
                types[name] = "constexpr"
            elif not name.endswith("_ptr"):
                types[name] = "i32"
            elif name in ("flag_ptr", "run_ptr") or name.endswith("starts_ptr"):
                types[name] = "*i32"
            elif name.endswith("ids_ptr") or name == "count_ptr":
                types[name] = "*i64"
            elif name in STORED:
                narrow = self.dtype == "bf16" and not self.constants.get("HAS_IDS")
                types[name] = "*fp16" if narrow else "*fp32"
            else:
                types[name] = f"*{self.dtype}" if name in EMBEDDINGS else "*fp32"
        return types

    def compile(self):
        blocks = {k: v for k, v in self.config.launch().items() if k.startswith("BLOCK_")}
        constants = self.constants | blocks
        signature = self.signature()
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in "DF" or name.startswith("stride")
        }
        source = ASTSource(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        return triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)


EMBEDDINGS = {"x_ptr", "y_ptr", "z_ptr", "left_ptr", "right_ptr"}
STORED = {"g_ptr", "h_ptr"}


def builds(archs: list[int]) -> Iterator[Build]:
    from vlscale.kernels.triton_tiles import FP32, Work, config_for

    from vlscale.kernels import triton_contrastive as contrastive
    from vlscale.kernels import triton_contrastive_double as double
    from vlscale.kernels import triton_relation_kl as kl
    from vlscale.kernels import triton_relation_match as match
    from vlscale.kernels import triton_sigmoid as sigmoid

    for arch in archs:
        for dtype in ("bf16", "fp32"):
            light, full, double_work = (config_for(arch // 10, w) if dtype == "bf16" else FP32 for w in Work)
            yield Build(contrastive.maxima_kernel, "", dtype, arch, light, {})
            for shared in (True, False):
                for ids in (False, True):
                    variant = ("shared" if shared else "vectors") + (", ids" if ids else "")
                    constants = {"SHARED": shared, "HAS_IDS": ids}
                    config = light if shared and not ids else full
                    yield Build(contrastive.statistics_kernel, variant, dtype, arch, config, constants)
                    if not ids or dtype == "fp32":
                        yield Build(contrastive.weights_kernel, variant, dtype, arch, full, constants)
            for ids in (False, True) if dtype == "fp32" else (False,):
                constants = {"HAS_IDS": ids, "GRADIENT": True}
                yield Build(sigmoid.sigmoid_kernel, "ids" if ids else "", dtype, arch, full, constants)
            for count in (1, 2):
                variant = f"{count} teacher" + "s" * (count > 1)
                constants = {"K": count, "GRADIENT": True}
                yield Build(match.relation_mae_kernel, variant, dtype, arch, double_work, constants)
                yield Build(kl.relation_maxima_kernel, variant, dtype, arch, double_work, {"K": count})
                for shared in (True, False):
                    name = f"{variant}, " + ("shared" if shared else "vectors")
                    constants = {"K": count, "SHARED": shared}
                    yield Build(kl.relation_statistics_kernel, name, dtype, arch, double_work, constants)
                    for teacher in (False, True):
                        more = {**constants, "TEACHER": teacher}
                        label = name + (", teacher gradient" if teacher else "")
                        yield Build(kl.relation_weights_kernel, label, dtype, arch, double_work, more)
        yield Build(double.double_statistics_kernel, "", "fp32", arch, FP32, {})
        for ids in (False, True):
            yield Build(double.double_weights_kernel, "ids" if ids else "", "fp32", arch, FP32, {"HAS_IDS": ids})


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
    tile = f"{build.config.block_m}x{build.config.block_n}x{build.config.block_k}"
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return dict(zip(COLUMNS, build.name, strict=False)) | {
        "tile": tile,
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


def merged(rows: list[dict], names: list[tuple]) -> list[dict]:
    """The committed table with `rows` put in: one row a configuration that exists, in their order."""
    known = {}
    if (table := RESULTS / "compile_table.csv").exists():
        with table.open() as file:
            known = {tuple(row[c] for c in COLUMNS[:4]): row for row in csv.DictReader(file)}
    known |= {tuple(row[c] for c in COLUMNS[:4]): row for row in rows}
    return [known[name] for name in names if name in known]


def write(rows: list[dict]) -> None:
    with (RESULTS / "compile_table.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    head = (
        f"# What the Triton kernels compile to\n\ntriton {triton.__version__}, no GPU involved; nothing here is a time."
    )
    text = f"{head}\n`python benchmarks/kernels_compile.py --write`\n\n{markdown(rows)}"
    (RESULTS / "compile_table.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--write", action="store_true", help="put the rows into the committed table")
    arguments = parser.parse_args()
    every = list(builds([80, 90, 100]))
    chosen = [b for b in every if b.arch in arguments.arch and arguments.only in b.kernel.__name__]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(measure, chosen))
    print(markdown(rows))
    if arguments.write:
        write(merged(rows, [build.name for build in every]))


if __name__ == "__main__":
    main()
