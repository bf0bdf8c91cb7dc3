"""Batches larger than memory: peak memory and time a pair from a batch of 256 to 8,192, by chunks of fixed size.

    vlscale bench large-batch [--batches 256 512 1024 2048 4096 8192] [--chunk 64] [--write]

About ten minutes on two CPU cores. The real engine (ZeRO-0, AdamW), contrastive loss. Memory is the largest resident
set beyond that of the process once its model, optimizer and input batch are there, in a process of its own for every
batch and with a malloc that gives freed blocks back, so that it is what is in use. Time is taken in one process: plain
steps (all activations kept) of the smallest batch before and after every step by chunks, and the ratio of the two, a
pair; the median of the rounds, which are as many as see some thousand pairs. `--write` keeps page, numbers and plot,
dated, in benchmarks/results/.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(HERE.parent))

SIDE, TOKENS, DIM = 64, 32, 256
VISION = {"model_type": "vit", "image_size": SIDE, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 6,
          "num_attention_heads": 3, "intermediate_size": 768}  # fmt: skip
TEXT = {"model_type": "bert", "vocab_size": 8_000, "hidden_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 3, "intermediate_size": 768}  # fmt: skip
ENOUGH = 4096  # pairs that the rounds of one batch see
BESIDE = 1024  # pairs of the plain steps on either side of a step by chunks
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # bytes from which glibc gives every freed block back
PREDICTED, ASKED = 1.34, 1.45  # time a pair against the plain pass: the second forward; and the bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory", type=int, nargs=2, metavar=("BATCH", "CHUNK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(memory(*given.memory))
        return
    smallest = min(given.batches)
    points = [{"batch": smallest, "chunk": 0}, *({"batch": batch, "chunk": given.chunk} for batch in given.batches)]
    for point in points:
        command = [sys.executable, str(HERE), "--memory", str(point["batch"]), str(point["chunk"])]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | RETURNED)
        if done.returncode:
            raise SystemExit(f"batch {point['batch']}, chunk {point['chunk']}: {done.stderr[-2000:]}")
        point["megabytes"] = float(done.stdout.splitlines()[-1])
        print(point, file=sys.stderr)
    job = Job(max(given.batches), given.chunk)
    for point in points[1:]:
        point |= against_plain(job, smallest, point["batch"])
        print(point, file=sys.stderr)
    page = report(points, given)
    print(page)
    if given.write:
        from common import RESULTS, today

        stem = f"{today()}-large-batch"
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(json.dumps(points, indent=1) + "\n")
        plot(points, RESULTS / f"{stem}.png")


class Job:
    """A model, its engine and a batch whose first pairs are the smaller batches."""

    def __init__(self, batch: int, chunk: int):
        import torch

        from vlscale.config import validate
        from vlscale.data.images import ImageSpec, normalise
        from vlscale.models.dual_encoder import build_dual_encoder
        from vlscale.train.engine import Engine, start_ranks

        values = {
            "model": {"embed_dim": DIM, "dropout": 0.0, "vision": {"config": VISION}, "text": {"config": TEXT}},
            "engine": {"zero_stage": 0},
            "train": {"global_batch_size": batch, "chunk_size": chunk or None},
        }
        config = validate(values, "large batch")
        self.ranks, self.chunk = start_ranks(config.engine), chunk or None
        model = build_dual_encoder(config.model)
        model.normalise = partial(normalise, spec=ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3))
        self.engine = Engine(model, config, self.ranks)
        self.everything = {
            "pixels": torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8),
            "input_ids": torch.randint(5, 7_000, (batch, TOKENS)),
            "attention_mask": torch.ones(batch, TOKENS, dtype=torch.int64),
        }
        self.step(8)  # the optimizer's states and the libraries' own memory are there from now on

    def step(self, rows: int, *, plain: bool = False) -> float:
        """Seconds of one."""
        import torch

        from vlscale.objectives.contrastive import contrastive

        inputs = {name: value[:rows] for name, value in self.everything.items()}
        started = time.perf_counter()
        out = self.engine(**inputs, chunk_size=None if plain else self.chunk)
        ids = torch.arange(rows)
        loss, _ = contrastive(out.image, out.text, out.logit_scale, None, ids, self.ranks, comm="auto", impl="auto")
        self.engine.set_rates(1e-5, 1)
        self.engine.backward(loss)
        self.engine.step()
        return time.perf_counter() - started


def memory(batch: int, chunk: int) -> float:
    """Megabytes of one step beyond what stands before it."""
    job = Job(batch, chunk)
    before = _resident()
    job.step(batch)
    return (_resident() - before) / 1e6


def against_plain(job: Job, smallest: int, batch: int) -> dict[str, float | list[float]]:
    """Seconds of a step by chunks, and its time a pair over that of the plain steps around it: median and range."""
    ratios, seconds = [], []
    beside = max(1, min(batch, BESIDE) // smallest)
    job.step(smallest, plain=True)
    for _ in range(max(3, ENOUGH // batch) if batch < ENOUGH else 1):
        around = [job.step(smallest, plain=True) for _ in range(beside)]
        seconds.append(job.step(batch))
        around += [job.step(smallest, plain=True) for _ in range(beside)]
        ratios.append(seconds[-1] / batch / (statistics.mean(around) / smallest))
    middle = statistics.median(ratios)
    return {"seconds": statistics.median(seconds), "ratio": middle, "range": [min(ratios), max(ratios)]}


def _resident() -> int:
    """Bytes: the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(points: list[dict], given: argparse.Namespace) -> str:
    from common import provenance, today

    lines = [
        f"# Batches larger than memory, {today()}",
        "",
        provenance(f"vlscale bench large-batch --chunk {given.chunk} --write"),
        "",
        f"ViT 192 x 6 at {SIDE} px and BERT 192 x 3 with {TOKENS} tokens, fp32, one process. Time a pair against plain "
        f"steps of {min(given.batches)} before and after, median of the rounds (their range): predicted {PREDICTED} "
        f"(the second forward), asked {ASKED} at most. Memory with freed blocks given back. Embeddings: of both "
        "modalities and their gradients, float32.",
        "",
        "| batch | chunk | beyond inputs and model | embeddings alone | time a pair, times plain | seconds a step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in points:
        own = 4 * p["batch"] * DIM * 4 / 1e6
        start = f"| {p['batch']:,} | {p['chunk'] or 'all'} | {p['megabytes']:,.0f} MB | {own:,.0f} MB |"
        if not p["chunk"]:
            lines.append(f"{start} 1 | |")
            continue
        low, high = p["range"]
        spread = f" ({low:.2f} to {high:.2f})" if low < high else ""
        lines.append(f"{start} {p['ratio']:.2f}{spread} | {p['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chunked = [p for p in points if p["chunk"]]
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    batches = [p["batch"] for p in chunked]
    axis.plot(batches, [p["megabytes"] for p in chunked], "o-", label=f"chunks of {chunked[0]['chunk']}")
    plain = next(p for p in points if not p["chunk"])
    axis.plot(batches, [plain["megabytes"] * b / plain["batch"] for b in batches], ":", label="all at once (scaled up)")
    axis.plot(plain["batch"], plain["megabytes"], "s", color="C1", label="all at once, measured")
    axis.set(xscale="log", yscale="log", xlabel="pairs in the batch", ylabel="MB beyond inputs and model")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
