"""Batches larger than memory: peak memory and time a pair from a batch of 256 to 8,192, by chunks of fixed size.

    vlscale bench large-batch [--batches 256 512 1024 2048 4096 8192] [--chunk 64] [--rounds 3] [--write]

About twenty minutes on one CPU core; `--small`, tiny towers, tries the command in half a minute. The real engine
(ZeRO-0, AdamW, one thread), contrastive loss. Memory is the largest resident set beyond that of the process once its
model, optimizer and input batch are there, in a process of its own for every batch and with a malloc that gives freed
blocks back, so that it is what is in use. Time is taken in one process: plain steps (all activations kept) of the
smallest batch before and after every step by chunks, and the ratio of the two, a pair; the median of the rounds, at
least --rounds and as many as see some thousand pairs. `--write` keeps page, numbers and plot, dated, in
benchmarks/results/ or --out.

What a pair adds: 4 D numbers of both embeddings and their gradients, and its part of the graph of its chunk, which
holds no activations but the nodes and empty places that autograd keeps until the chunk is computed again: a constant a
chunk, so that its part of a pair halves with chunks twice as large. It is measured as what a forward leaves beside the
embeddings.
"""

import argparse
import ctypes
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
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
ENOUGH = 2048  # pairs that the rounds of one batch see
BESIDE = 1024  # pairs of the plain steps on either side of a step by chunks
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # bytes from which glibc gives every freed block back
PREDICTED, ASKED = 1.34, 1.45  # time a pair against the plain pass: the second forward; and the bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of every batch, at least")
    parser.add_argument("--small", action="store_true", help="tiny towers")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder that --write writes to")
    parser.add_argument("--memory", type=int, nargs=2, metavar=("BATCH", "CHUNK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(memory(*given.memory, given.small)))
        return
    smallest = min(given.batches)
    several = (batch for batch in given.batches if batch > given.chunk)  # of one chunk a step is a plain one
    points = [{"batch": smallest, "chunk": 0}, *({"batch": batch, "chunk": given.chunk} for batch in several)]
    for point in points:
        command = [sys.executable, str(HERE), "--memory", str(point["batch"]), str(point["chunk"])]
        command += ["--small"] * given.small
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | RETURNED)
        if done.returncode:
            raise SystemExit(f"batch {point['batch']}, chunk {point['chunk']}: {done.stderr[-2000:]}")
        point |= json.loads(done.stdout.splitlines()[-1])
        print(point, file=sys.stderr)
    job = Job(max(given.batches), given.chunk, given.small)
    for point in points[1:]:
        point |= against_plain(job, smallest, point["batch"], given.rounds)
        print(point, file=sys.stderr)
    page = report(points, given)
    print(page)
    if given.write:
        from common import today

        stem = f"{today()}-large-batch"
        (given.out / f"{stem}.md").write_text(page)
        (given.out / f"{stem}.json").write_text(json.dumps(points, indent=1) + "\n")
        plot(points, given.out / f"{stem}.png")


class Job:
    """A model, its engine and a batch whose first pairs are the smaller batches."""

    def __init__(self, batch: int, chunk: int, small: bool = False):
        import torch

        from vlscale.config import validate
        from vlscale.data.images import ImageSpec, normalise
        from vlscale.models.dual_encoder import build_dual_encoder
        from vlscale.train.engine import Engine, start_ranks

        vision, text = (tower | (SMALL if small else {}) for tower in (VISION, TEXT))
        values = {
            "model": {"embed_dim": DIM, "dropout": 0.0, "vision": {"config": vision}, "text": {"config": text}},
            "engine": {"zero_stage": 0, "threads": 1},
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
        started = time.perf_counter()
        self.learn(self.embed(rows, plain=plain))
        return time.perf_counter() - started

    def embed(self, rows: int, *, plain: bool = False):
        inputs = {name: value[:rows] for name, value in self.everything.items()}
        return self.engine(**inputs, chunk_size=None if plain else self.chunk)

    def learn(self, out) -> None:
        import torch

        from vlscale.objectives.contrastive import contrastive

        ids = torch.arange(len(out.image))
        loss, _ = contrastive(out.image, out.text, out.logit_scale, None, ids, self.ranks, comm="auto", impl="auto")
        self.engine.set_rates(1e-5, 1)
        self.engine.backward(loss)
        self.engine.step()


def memory(batch: int, chunk: int, small: bool = False) -> dict[str, float]:
    """Megabytes of one step beyond what stands before it, and of them those of the chunks' graphs."""
    job = Job(batch, chunk, small)
    before, held = _resident(), _in_use()
    out = job.embed(batch)
    graphs = _in_use() - held - 2 * batch * DIM * 4
    job.learn(out)
    return {"megabytes": (_resident() - before) / 1e6} | ({"graphs": graphs / 1e6} if chunk else {})


def against_plain(job: Job, smallest: int, batch: int, rounds: int) -> dict[str, float | list[float]]:
    """Seconds of a step by chunks, and its time a pair over that of the plain steps around it: median and range."""
    ratios, seconds = [], []
    beside = max(1, min(batch, BESIDE) // smallest)
    job.step(smallest, plain=True)
    for _ in range(max(rounds, ENOUGH // batch)):
        around = [job.step(smallest, plain=True) for _ in range(beside)]
        seconds.append(job.step(batch))
        around += [job.step(smallest, plain=True) for _ in range(beside)]
        ratios.append(seconds[-1] / batch / (statistics.mean(around) / smallest))
    middle = statistics.median(ratios)
    spread = {"range": [min(ratios), max(ratios)], "rounds": len(ratios)}
    return {"seconds": statistics.median(seconds), "ratio": middle} | spread


def slope(points: list[dict], key: str) -> float:
    """Bytes that a pair adds, from the smallest batch by chunks to the largest."""
    first, last = (pick((p for p in points if p["chunk"]), key=lambda p: p["batch"]) for pick in (min, max))
    return 1e6 * (last[key] - first[key]) / max(1, last["batch"] - first["batch"])


def _in_use() -> int:
    """Bytes: the resident set now, once malloc has given back all that is free."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _resident() -> int:
    """Bytes: the largest resident set of this program so far. getrusage's is also that of who started it, if larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def report(points: list[dict], given: argparse.Namespace) -> str:
    from common import provenance, today

    towers = "Tiny towers" if given.small else f"ViT 192 x 6 at {SIDE} px and BERT 192 x 3"
    command = f"vlscale bench large-batch --chunk {given.chunk} --rounds {given.rounds} --write"
    own = 4 * DIM * 4
    lines = [
        f"# Batches larger than memory, {today()}",
        "",
        provenance(command + " --small" * given.small),
        "",
        f"{towers} with {TOKENS} tokens, fp32, one process and thread. Time a pair against plain "
        f"steps of {min(given.batches)} before and after, median of the rounds (their range): predicted {PREDICTED} "
        f"(the second forward), asked {ASKED} at most. Memory with freed blocks given back. Embeddings: of both "
        "modalities and their gradients, float32.",
        "",
        f"A pair adds {slope(points, 'megabytes') / 1e3:.1f} KB: {own / 1e3:.1f} of embeddings and "
        f"{slope(points, 'graphs') / 1e3:.1f} of the graph of its chunk, which holds no activations but what autograd "
        "keeps to compute the chunk again: as many nodes and empty places for tensors a chunk, whatever its pairs. "
        "Chunks twice as large have half of it a pair.",
        "",
        "| batch | chunk | beyond inputs and model | embeddings alone | graphs of the chunks | time a pair, times "
        "plain | rounds | seconds a step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in points:
        start = (
            f"| {p['batch']:,} | {p['chunk'] or 'all'} | {p['megabytes']:,.0f} MB | {own * p['batch'] / 1e6:,.0f} MB |"
        )
        if not p["chunk"]:
            lines.append(f"{start} | 1 | | |")
            continue
        low, high = p["range"]
        times = f"{p['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{start} {p['graphs']:,.0f} MB | {times} | {p['rounds']} | {p['seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path) -> None:
    """Memory of a step, with that of the embeddings alone; beside it the time a pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    chunked = [p for p in points if p["chunk"]]
    plain = next(p for p in points if not p["chunk"])
    batches = [p["batch"] for p in chunked]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(batches, [plain["megabytes"] * b / plain["batch"] for b in batches], ":", label="all at once (scaled up)")
    left.plot(plain["batch"], plain["megabytes"], "s", color="C0", label="all at once, measured")
    left.plot(batches, [p["megabytes"] for p in chunked], "o-", color="C1", label=f"chunks of {chunked[0]['chunk']}")
    left.plot(batches, [4 * b * DIM * 4 / 1e6 for b in batches], "--", color="C2", label="embeddings alone")
    left.set(yscale="log", ylabel="MB beyond inputs and model")
    below, above = ([abs(p["range"][end] - p["ratio"]) for p in chunked] for end in (0, 1))
    ratios = [p["ratio"] for p in chunked]
    right.errorbar(batches, ratios, [below, above], fmt="o-", color="C1", capsize=3, label="median and range")
    right.axhline(PREDICTED, color="0.6", ls="--", label=f"second forward: {PREDICTED}")
    right.axhline(ASKED, color="0.6", ls=":", label=f"bound: {ASKED}")
    right.set(ylabel="time a pair, times plain", ylim=(1, max(1.6, 1.05 * max(p["range"][1] for p in chunked))))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="pairs in the batch")
        axis.set_xticks(batches, [f"{b:,}" for b in batches])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(frameon=False, fontsize="small")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
