"""Time and peak memory of the chunked losses against dense torch, on this CPU.

    python benchmarks/kernels_cpu.py [--pairs 16384] [--width 256] [--repeats 5] [--threads 2] [--families contrastive]

Each pair of variants runs alternately in one process (median of the repeats, forward + backward); memory is the growth
of the peak resident set of a process that runs one variant once, less its gradients (median of three). Dense
contrastive is open_clip's ClipLoss on one rank: two products, two cross-entropies. A third comparison is topk_neighbors
against faiss-cpu's flat index where that is installed, else against the bare product it is made of. Writes
benchmarks/results/DATE-kernels-cpu-FAMILIES.json and .md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import RESULTS, provenance, today  # noqa: E402

from vlscale.kernels import contrastive_loss, relation_kl_loss, topk_neighbors  # noqa: E402

TEMPERATURE = 0.1


def dense_contrastive(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x))
    per_image, per_text = scale * x @ y.T, scale * y @ x.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def dense_relation_kl(x: Tensor, z: Tensor, _: Tensor) -> Tensor:
    s, t = x @ x.T / TEMPERATURE, z @ z.T / TEMPERATURE
    own = torch.eye(len(x), dtype=torch.bool)
    log_s, log_t = (F.log_softmax(m.masked_fill(own, -1e4), 1) for m in (s, t))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def chunked_relation_kl(x: Tensor, z: Tensor, _: Tensor) -> Tensor:
    return relation_kl_loss(x, z, student_temperature=TEMPERATURE, teacher_temperature=TEMPERATURE, impl="chunked")


FAMILIES = ["contrastive", "relation_kl", "neighbours"]
VARIANTS: dict[str, tuple[Callable, bool]] = {  # the loss, and whether its second embedding is trained
    "contrastive dense": (dense_contrastive, True),
    "contrastive chunked": (lambda x, y, s: contrastive_loss(x, y, s, impl="chunked"), True),
    "relation_kl dense": (dense_relation_kl, False),
    "relation_kl chunked": (chunked_relation_kl, False),
}


def problem(pairs: int, width: int, second_trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(pairs, width), dim=1) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_(second_trained), torch.tensor(100.0, requires_grad=second_trained)


def step(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.autograd.grad(VARIANTS[name][0](*inputs), [t for t in inputs if t.requires_grad])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, measured in turn; one round to warm up is not counted."""
    times = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            taken = seconds(call)
            if round_number:
                times[name].append(taken)
    return times


def resident_megabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def extra_memory(name: str, pairs: int, width: int) -> float:
    """MB that one forward + backward adds to the peak beyond inputs, gradients and what 64 pairs already load."""
    inputs = problem(pairs, width, VARIANTS[name][1])
    step(name, problem(64, width, VARIANTS[name][1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here; getrusage's keeps the parent's
    before = resident_megabytes("VmRSS")
    step(name, inputs)
    gradients = sum(t.numel() * t.element_size() for t in inputs if t.requires_grad) / 2**20
    return resident_megabytes("VmHWM") - before - gradients


def extra_memory_elsewhere(name: str, arguments: argparse.Namespace) -> float:
    """The median of three processes: what an allocator keeps differs by tens of megabytes from one to the next."""
    command = [sys.executable, __file__, "--memory-of", name, "--pairs", str(arguments.pairs)]
    command += ["--width", str(arguments.width), "--threads", str(arguments.threads)]
    runs = (subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3))
    return statistics.median(map(float, runs))


def neighbour_calls(queries: int, gallery: int, width: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    query, rows = torch.randn(queries, width), torch.randn(gallery, width)
    calls = {"topk_neighbors": lambda: topk_neighbors(query, rows, 10)}
    if find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(width)
        index.add(rows.numpy())
        return {"faiss flat index": lambda: index.search(query.numpy(), 10), **calls}
    return {"product alone": lambda: [query @ part.T for part in rows.split(4608)], **calls}


def measure(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for family in (name for name in arguments.families if name != "neighbours"):
        names = [f"{family} dense", f"{family} chunked"]
        inputs = problem(arguments.pairs, arguments.width, VARIANTS[names[0]][1])
        times = compare({name: partial(step, name, inputs) for name in names}, arguments.repeats)
        shape = f"N={arguments.pairs}, D={arguments.width}"
        rows += summary(times, shape, {name: extra_memory_elsewhere(name, arguments) for name in names})
    if "neighbours" not in arguments.families:
        return rows
    calls = neighbour_calls(arguments.queries, arguments.gallery, arguments.width)
    shape = f"Q={arguments.queries}, G={arguments.gallery}, D={arguments.width}"
    return rows + summary(compare(calls, arguments.repeats), shape, {})


def summary(times: dict[str, list[float]], shape: str, memory: dict[str, float]) -> list[dict]:
    """One row a variant; ratios are against the first."""
    base = statistics.median(next(iter(times.values())))
    return [
        {
            "variant": name,
            "shape": shape,
            "seconds": taken,
            "median": statistics.median(taken),
            "ratio": statistics.median(taken) / base,
            "extra_megabytes": memory.get(name),
        }
        for name, taken in times.items()
    ]


def table(rows: list[dict]) -> str:
    lines = ["| variant | shape | median s | ratio | extra MB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        extra = "" if row["extra_megabytes"] is None else f"{row['extra_megabytes']:.0f}"
        lines.append(f"| {row['variant']} | {row['shape']} | {row['median']:.2f} | {row['ratio']:.2f} | {extra} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict], arguments: argparse.Namespace) -> str:
    command = "python benchmarks/kernels_cpu.py " + " ".join(sys.argv[1:])
    about = {"measured": provenance(command), "threads": arguments.threads}
    text = (
        f"# Chunked losses on a CPU\n\n{about['measured']} {arguments.threads} threads.\n\n"
        "Losses forward + backward, float32; the ratio is to the variant above it, memory beyond inputs and "
        "gradients.\n\n"
    )
    stem = RESULTS / "-".join([today(), "kernels-cpu", *arguments.families])
    stem.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + table(rows))
    return text + table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 16384), ("width", 256), ("repeats", 5), ("threads", torch.get_num_threads())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--gallery", type=int, default=200_000)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print the table, write no files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(extra_memory(arguments.memory_of, arguments.pairs, arguments.width))
        return
    rows = measure(arguments)
    print(table(rows) if arguments.dry else write(rows, arguments))


if __name__ == "__main__":
    main()
