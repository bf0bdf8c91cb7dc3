"""Real runs under the deepspeed launcher: pairs a second, the loss's share of a step, peak memory beside the plan's,
and the loss curve of Triton's kernels against that of `chunked`.

    vlscale bench training [--batch 4096] [--steps 60] [--ranks 1] [--out FOLDER] [--write]
    vlscale bench training --small     # the same by CPU ranks: small towers, fp32, `chunked` against `reference`

ViT-B/32 and a text tower of 12 layers from random weights, bf16, ZeRO-2, NCCL; scenes at 224 pixels, made here once,
decoded by workers and resized on the device. Both runs have the same seed, so they see the same batches from the same
weights. Time is the median step of the second half. The loss's share is its forward and backward alone, on random
embeddings of the same shape, over that median (one rank only). `--write` keeps page, numbers and plot, dated, in
benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(HERE.parent))

from common import RESULTS, provenance, today  # noqa: E402

from vlscale.cli.launcher import free_port  # noqa: E402
from vlscale.data.synth import make_corpus, synth_config  # noqa: E402
from vlscale.resources import launch_folder  # noqa: E402

SCALE = 14.3  # of the logits, where the loss is timed alone
REPEATS = 20  # of the loss alone


@dataclass(frozen=True)
class Size:
    """What a run is made of."""

    impls: tuple[str, str]  # the one that is asked about, and what it is held to
    dtype: str
    side: int
    tower: dict
    patch: int
    text: dict
    embed_dim: int
    words: int
    pairs: int
    decode: str


LARGE = Size(
    impls=("triton", "chunked"),
    dtype="bf16",
    side=224,
    tower={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    patch=32,
    text={"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
    embed_dim=512,
    words=64,
    pairs=32_768,
    decode="device",
)
SMALL = Size(
    impls=("chunked", "reference"),
    dtype="fp32",
    side=32,
    tower={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    patch=8,
    text={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    embed_dim=32,
    words=32,
    pairs=400,
    decode="fast",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="pairs of the global batch; by default 4,096, or 32 with --small")
    parser.add_argument("--steps", type=int, help="by default 60, or 6 with --small")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--workers", type=int, help="that decode; by default what this machine's cores leave")
    parser.add_argument("--out", type=Path, help="folder for corpus and runs; by default a temporary one")
    parser.add_argument("--small", action="store_true", help="on the CPU, to try the command")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    size = SMALL if given.small else LARGE
    given.batch = given.batch or (32 if given.small else 4096)
    given.steps = given.steps or (6 if given.small else 60)
    if given.workers is None:
        given.workers = 0 if given.small else max(1, (os.cpu_count() or 1) // given.ranks - 1)
    import torch

    if not given.small and torch.cuda.device_count() < given.ranks:
        parser.error(
            f"--ranks {given.ranks}: this machine has {torch.cuda.device_count()} CUDA devices; give fewer ranks, or "
            "--small to try the command on the CPU"
        )
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "corpus").exists():
            knobs = {"pairs": size.pairs, "val_pairs": 1, "resolution": size.side}
            make_corpus(out / "corpus", synth_config("clean", **knobs))
        runs = {impl: run(impl, size, given, out) for impl in size.impls}
        alone = loss_seconds(size, given.batch) if given.ranks == 1 else None
        found = {"batch": given.batch, "ranks": given.ranks, "runs": runs, "loss alone": alone}
    page = report(found, size, given)
    print(page)
    if given.write:
        stem = f"{today()}-training{'-small' if given.small else ''}"
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(runs, RESULTS / f"{stem}.png")


def run(impl: str, size: Size, given: argparse.Namespace, out: Path) -> dict:
    """Loss and seconds of every step, the peak of memory (bytes; None on a CPU) and the plan's, of a run that is made
    or was complete."""
    from vlscale.config import load_plan
    from vlscale.train.memory_plan import plan_runs

    vision = {"model_type": "vit", "image_size": size.side, "patch_size": size.patch, **size.tower}
    config = {
        "data": {"train": [f"{out}/corpus/train-*.tar"], "caption_key": "json:captions", "decode": size.decode},
        "model": {
            "embed_dim": size.embed_dim,
            "dropout": 0.0,
            "vision": {"config": vision},
            "text": {"max_length": size.words, "vocab_size": 1_000, "config": {"model_type": "bert", **size.text}},
        },
        "engine": {"zero_stage": 2, "dtype": size.dtype},
        "objective": {"impl": impl},
        "optim": {"lr": 5.0e-4, "warmup_steps": max(1, given.steps // 6)},
        "train": {"global_batch_size": given.batch, "max_steps": given.steps, "checkpoint_every": 1_000_000},
        "log": {"progress": False},
    }
    config["data"]["workers"] = given.workers
    path, folder = out / f"{impl}.yaml", out / impl
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(given.ranks)]
    command += ["--master_port", str(free_port()), str(launch_folder() / "train.py"), str(path), "--out", str(folder)]
    small = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (small if given.small else {})
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run with impl={impl} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [line["loss"] for line in lines],
        "seconds": [line["seconds"] for line in lines],
        "memory": lines[-1].get("peak_memory"),
        "planned": plan_runs(load_plan(path), given.ranks)[0].peak,
    }


def loss_seconds(size: Size, batch: int) -> dict[str, float]:
    """Seconds of the loss's forward and backward alone, by implementation."""
    import torch

    from vlscale.kernels import contrastive_loss

    cuda = size is LARGE
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(batch, size.embed_dim, device=device), dim=1) for _ in range(2)]
    image, text = (part.to(dtype).requires_grad_() for part in rows)
    ids, found = torch.arange(batch, device=device), {}
    for impl in size.impls:
        taken = []
        for _ in range(REPEATS + 3):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            torch.autograd.grad(contrastive_loss(image, text, SCALE, pair_id=ids, impl=impl), (image, text))
            if cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        found[impl] = statistics.median(taken[3:])
    return found


def report(found: dict, size: Size, given: argparse.Namespace) -> str:
    first, second = size.impls
    runs = found["runs"]
    apart = max(abs(a - b) / abs(b) for a, b in zip(runs[first]["loss"], runs[second]["loss"], strict=True))
    arguments = f" --batch {given.batch} --steps {given.steps} --ranks {given.ranks}" + " --small" * given.small
    head = "impl | pairs a second | seconds a step | the loss alone | its share | memory | planned | first loss | last"
    lines = [
        f"# Training, {today()}",
        "",
        provenance(f"vlscale bench training{arguments} --write"),
        "",
        _device(given),
        "",
        f"{size.dtype}, ZeRO-2 under the deepspeed launcher, {given.batch:,} pairs, ranks: {given.ranks}, pictures of "
        f"{size.side}, {given.workers} workers a rank; {len(runs[first]['loss'])} steps, time the median of the "
        "second half. Memory: the most that tensors took on rank 0's device, and what `vlscale train --plan` said.",
        "",
        f"| {head} |",
        "| --- |" + " ---: |" * head.count("|"),
    ]
    for impl, own in runs.items():
        step = statistics.median(own["seconds"][len(own["seconds"]) // 2 :])
        alone = found["loss alone"] and found["loss alone"][impl]
        cells = [impl, f"{given.batch / step:,.0f}", f"{step:.4f}"]
        cells += [f"{alone * 1e3:.2f} ms", f"{alone / step:.1%}"] if alone else ["", ""]
        cells += [f"{own['memory'] / 1e9:.2f} GB" if own["memory"] else "", f"{own['planned'] / 1e9:.2f} GB"]
        cells += [f"{own['loss'][0]:.4f}", f"{own['loss'][-1]:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"The two curves are at most {apart:.1e} of the loss apart."]
    return "\n".join(lines) + "\n"


def _device(given: argparse.Namespace) -> str:
    if given.small:
        return "On the CPU, to try the command: none of this is a figure of a GPU."
    import torch
    from kernels_bench_report import driver

    return f"{torch.cuda.get_device_name()}; driver, clocks, power limit: {driver()}"


def plot(runs: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (impl, own), line in zip(runs.items(), ("-", ":"), strict=True):
        axis.plot(range(1, len(own["loss"]) + 1), own["loss"], line, label=impl)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
