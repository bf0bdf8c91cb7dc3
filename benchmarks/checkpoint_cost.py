"""What saving costs a step: with the write beside training, with training waiting for it, and what looking for bad
numbers costs.

    vlscale bench checkpoint [--saves 3] [--block 4] [--write]

The engine is the real one (one process, ZeRO-1, AdamW) over the towers of `vlscale bench step`. A block is so many
plain steps (`plain`), the same with one save after the first of them (`async`, `sync`), or the same without the look
for bad numbers (`unguarded`); rounds take one block of each kind in a shuffled order. A save's cost is what its block
took more than the plain one of its round, the write that ends in later steps included; over 200 steps it is divided by
200 plain steps. That division is the only extrapolation. Before it measures, it predicts: bytes over the speeds of
copying, hashing and writing here, measured at the size of the weights.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))

from common import RESULTS, provenance, today  # noqa: E402
from step import SIDE, TOKENS, VISION, _batch  # noqa: E402
from step import TEXT as FUSED_TEXT  # noqa: E402

from vlscale.config import validate  # noqa: E402
from vlscale.data.images import ImageSpec, normalise  # noqa: E402
from vlscale.models.dual_encoder import build_dual_encoder  # noqa: E402
from vlscale.objectives.total import total_loss  # noqa: E402
from vlscale.sections import TrainConfig  # noqa: E402
from vlscale.train.bad_numbers import BadSteps  # noqa: E402
from vlscale.train.checkpoint import Checkpoints, Layout  # noqa: E402
from vlscale.train.engine import Engine, start_ranks  # noqa: E402
from vlscale.train.inputs import Inputs  # noqa: E402
from vlscale.train.step import StepParts, embed, joint_step  # noqa: E402

EVERY, BOUND = 200, 0.02  # steps between saves, and the share of a step's time that the project allows
TEXT = FUSED_TEXT | {"num_hidden_layers": 6}  # the text tower alone
KINDS = ("plain", "async", "sync", "unguarded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=3, help="of each kind")
    parser.add_argument("--block", type=int, default=4, help="steps in a block; a write has to end within")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; by default a temporary folder")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        page, rows = measure(given, Path(folder))
    print(page)
    if given.write:
        (RESULTS / f"{today()}-checkpoint-cost.md").write_text(page)
        (RESULTS / f"{today()}-checkpoint-cost.json").write_text(json.dumps(rows, indent=1) + "\n")


def measure(given: argparse.Namespace, folder: Path) -> tuple[str, dict]:
    config = validate(
        {
            "model": {"embed_dim": 256, "dropout": 0.0, "vision": {"config": VISION}, "text": {"config": TEXT}},
            "engine": {"zero_stage": 1, "threads": given.threads},
            "train": {"global_batch_size": given.batch},
        },
        "checkpoint",
    )
    ranks = start_ranks(config.engine)
    model = build_dual_encoder(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    spec = ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3, 3)
    model.normalise = partial(normalise, spec=spec)
    engine = Engine(model, config, ranks)
    inputs = Inputs(spec, None, None, ranks.device, TOKENS)
    parts = StepParts(engine, inputs, config.objective, config.meta, ranks, None)
    batch = _batch(given.batch, 0)
    layout = Layout(ranks.size, config.engine.zero_stage, config.engine.dtype)
    saving = {}
    for kind in ("async", "sync"):
        (folder / kind).mkdir()
        own = TrainConfig(checkpoint_async=kind == "async", keep_checkpoints=1)
        saving[kind] = Checkpoints(folder / kind, layout, engine, ranks, own)
    speeds = _speeds(parameters * 4, folder)
    step, stood = 0, {"async": [], "sync": []}  # seconds that training stood still in a save

    def block(kind: str) -> float:
        nonlocal step
        started = time.perf_counter()
        for place in range(given.block):
            step += 1
            engine.set_rates(1e-6, step)
            if kind == "unguarded":
                rows = embed(engine, parts, batch)
                loss, _ = total_loss(rows, config.objective, ranks)
                engine._engine.backward(loss)  # DeepSpeed's own, which takes no norms on the way
                engine._engine.step()
                float(loss.detach())
            else:
                joint_step(parts, batch, batch)
            if kind in saving:
                if place == 0:
                    before = time.perf_counter()
                    saving[kind].save(step, None, BadSteps())
                    stood[kind].append(time.perf_counter() - before)
                saving[kind].poll(busy_anywhere=saving[kind].busy)
        if kind in saving:
            saving[kind].wait()
        return time.perf_counter() - started

    for kind in KINDS:
        block(kind)  # the first of each builds what later ones reuse: the buffers of the copy too
    size = sum(path.stat().st_size for path in (folder / "async").rglob("*") if path.is_file())
    stood = {kind: [] for kind in stood}
    taken = {kind: [] for kind in KINDS}
    for turn in range(given.saves):
        for kind in random.Random(turn).sample(KINDS, len(KINDS)):
            taken[kind].append(block(kind))
        print(f"round {turn + 1} of {given.saves}", file=sys.stderr)
    engine.close()
    return _page(given, parameters, size, speeds, taken, stood)


def _speeds(count: int, folder: Path) -> dict[str, float]:
    """Bytes a second of one thread, the better of two: into memory used before, SHA-256, to the disk and flushed."""
    source, target = torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
    view = memoryview(target.numpy())

    def write() -> None:
        with (folder / "speed").open("wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())

    works = {"copy": lambda: target.copy_(source), "hash": lambda: hashlib.sha256(view).digest(), "write": write}
    found = {}
    for name, work in works.items():
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        found[name] = count / min(seconds)
    (folder / "speed").unlink()
    return found


def _page(
    given: argparse.Namespace,
    parameters: int,
    size: int,
    speeds: dict[str, float],
    taken: dict[str, list[float]],
    stood: dict[str, list[float]],
) -> tuple[str, dict]:
    step = statistics.median(taken["plain"]) / given.block
    more = {
        kind: sorted(own - plain for own, plain in zip(taken[kind], taken["plain"], strict=True)) for kind in KINDS[1:]
    }
    cores = torch.get_num_threads()
    write = size / speeds["hash"] + size / speeds["write"]
    predicted = {"async": size / speeds["copy"] + write / cores, "sync": write}
    rows = {
        kind: {
            "predicted_seconds": predicted[kind],
            "seconds": statistics.median(more[kind]),
            "low": more[kind][0],
            "high": more[kind][-1],
            "stood_still": statistics.median(stood[kind]),
            "share_of_step": statistics.median(more[kind]) / (EVERY * step),
            "predicted_share": predicted[kind] / (EVERY * step),
        }
        for kind in ("async", "sync")
    }
    ratios = [own / plain for own, plain in zip(taken["plain"], taken["unguarded"], strict=True)]
    rows |= {
        "step_seconds": step,
        "bytes": size,
        "speeds": speeds,
        "guard": {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "plain_spread": (max(taken["plain"]) - min(taken["plain"])) / statistics.median(taken["plain"]),
    }
    lines = [
        f"# Cost of checkpoints, {today()}",
        "",
        provenance(
            f"vlscale bench checkpoint --saves {given.saves} --block {given.block} --batch {given.batch} --write"
        ),
        "",
        f"{parameters / 1e6:.1f} M parameters (ViT 384 x 12 at {SIDE} px, BERT 384 x 6), AdamW, ZeRO-1, fp32, one "
        f"process, {cores} threads, batch {given.batch}: a plain step takes {step:.2f} s. A checkpoint has "
        f"{size / 1e6:.0f} MB. One thread here copies {speeds['copy'] / 1e9:.2f} GB/s, hashes "
        f"{speeds['hash'] / 1e9:.2f}, writes and flushes {speeds['write'] / 1e9:.2f}.",
        "",
        f"A save's cost is what a block of {given.block} steps with one save took more than the plain block of its "
        f"round (median, range of {given.saves}). Predicted before: `sync` hashes and writes; `async` copies, then "
        f"takes those seconds of one of {cores} threads. The share is cost / ({EVERY} plain steps): so many were not "
        "run.",
        "",
        f"| save | predicted s | measured s | range | stood still s | of step time at one in {EVERY} | asked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in ("async", "sync"):
        row, asked = rows[kind], f"< {BOUND:.0%}" if kind == "async" else ""
        lines.append(
            f"| {kind} | {row['predicted_seconds']:.2f} | {row['seconds']:.2f} | {row['low']:.2f} to {row['high']:.2f} "
            f"| {row['stood_still']:.2f} | {row['share_of_step']:.2%} | {asked} |"
        )
    guard = rows["guard"]
    lines += [
        "",
        f"The look for bad numbers: a block with it takes {guard['ratio']:.3f} times one without ({guard['low']:.3f} "
        f"to {guard['high']:.3f}); plain blocks differ among themselves by {rows['plain_spread']:.1%}.",
    ]
    return "\n".join(lines) + "\n", rows


if __name__ == "__main__":
    main()
