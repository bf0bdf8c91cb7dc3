"""Batches larger than memory: peak memory and time a pair from a batch of 256 to 8,192, by chunks of fixed size.

    vlscale bench large-batch [--batches 256 512 1024 2048 4096 8192] [--chunk 64] [--steps 3] [--write]

About four minutes on two CPU cores. Every point is a process of its own: the real engine (ZeRO-0, AdamW), contrastive
loss. Memory is the largest resident set beyond that of the process once its model, optimizer and input batch are there.
Time is the median of `--steps` steps, of fewer once they have seen 4,096 pairs, and is compared with a plain pass (all
activations kept) of the smallest batch. `--write` keeps page, numbers and plot, dated, in benchmarks/results/.
"""

import argparse
import json
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
ENOUGH = 4096  # pairs of one point
PREDICTED, ASKED = 1.34, 1.45  # time a pair against the plain pass: the second forward; and the bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--point", type=int, nargs=2, metavar=("BATCH", "CHUNK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(*given.point, given.steps)))
        return
    smallest = min(given.batches)
    wanted = [(smallest, 0), *((batch, given.chunk) for batch in given.batches), (smallest, 0)]
    points = []
    for batch, chunk in wanted:
        command = [sys.executable, str(HERE), "--steps", str(given.steps), "--point", str(batch), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"batch {batch}, chunk {chunk}: {done.stderr[-2000:]}")
        points.append({"batch": batch, "chunk": chunk} | json.loads(done.stdout.splitlines()[-1]))
        print(points[-1], file=sys.stderr)
    page = report(points, given)
    print(page)
    if given.write:
        from common import RESULTS, today

        stem = f"{today()}-large-batch"
        (RESULTS / f"{stem}.md").write_text(page)
        (RESULTS / f"{stem}.json").write_text(json.dumps(points, indent=1) + "\n")
        plot(points, RESULTS / f"{stem}.png")


def measure(batch: int, chunk: int, steps: int) -> dict[str, float]:
    """Seconds a step (median) and megabytes beyond what stands before the first step."""
    import torch

    from vlscale.config import validate
    from vlscale.data.images import ImageSpec, normalise
    from vlscale.models.dual_encoder import build_dual_encoder
    from vlscale.objectives.contrastive import contrastive
    from vlscale.train.engine import Engine, start_ranks

    values = {
        "model": {"embed_dim": DIM, "dropout": 0.0, "vision": {"config": VISION}, "text": {"config": TEXT}},
        "engine": {"zero_stage": 0},
        "train": {"global_batch_size": batch, "chunk_size": chunk or None},
    }
    config = validate(values, "large batch")
    ranks = start_ranks(config.engine)
    model = build_dual_encoder(config.model)
    model.normalise = partial(normalise, spec=ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3))
    engine = Engine(model, config, ranks)

    def step(rows: int) -> float:
        inputs = {name: value[:rows] for name, value in everything.items()}
        started = time.perf_counter()
        out = engine(**inputs, chunk_size=chunk or None)
        loss, _ = contrastive(
            out.image, out.text, out.logit_scale, None, torch.arange(rows), ranks, comm="auto", impl="auto"
        )
        engine.set_rates(1e-5, 1)
        engine.backward(loss)
        engine.step()
        return time.perf_counter() - started

    everything = {
        "pixels": torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8),
        "input_ids": torch.randint(5, 7_000, (batch, TOKENS)),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.int64),
    }
    step(8)  # the optimizer's states and the libraries' own memory are there from now on
    before = _resident()
    seconds = statistics.median([step(batch) for _ in range(max(1, min(steps, ENOUGH // batch)))])
    return {"seconds": seconds, "megabytes": (_resident() - before) / 1e6}


def _resident() -> int:
    """Bytes: the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(points: list[dict], given: argparse.Namespace) -> str:
    from common import provenance, today

    plain = min(p["seconds"] / p["batch"] for p in points if not p["chunk"])
    lines = [
        f"# Batches larger than memory, {today()}",
        "",
        provenance(f"vlscale bench large-batch --chunk {given.chunk} --steps {given.steps} --write"),
        "",
        f"ViT 192 x 6 at {SIDE} px and BERT 192 x 3 with {TOKENS} tokens, fp32, one process. Time a pair against the "
        f"plain pass: predicted {PREDICTED} (the second forward), asked {ASKED} at most. Embeddings: both modalities "
        "and their gradients, float32.",
        "",
        "| batch | chunk | beyond inputs and model | embeddings alone | time a pair, times plain | seconds a step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in points:
        own = 4 * p["batch"] * DIM * 4 / 1e6
        ratio = p["seconds"] / p["batch"] / plain
        lines.append(
            f"| {p['batch']:,} | {p['chunk'] or 'all'} | {p['megabytes']:,.0f} MB | {own:,.0f} MB | {ratio:.2f} | "
            f"{p['seconds']:.2f} |"
        )
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
