"""What a step of each method costs against a plain contrastive step: same model, same batch, interleaved.

    vlscale bench step [--rounds 5] [--batch 64] [--write]

The engine is the real one (one process, ZeRO-0, AdamW); teachers' embeddings come ready, as from a teacher cache. A
round takes one step of every method in a shuffled order; a method's figure is the median over rounds of its time
divided by that of the plain step of the same round. `--write` keeps the page, dated, in benchmarks/results/.

`matching` adds a fusion encoder of FUSED layers on top of the same towers, over three pairs for each pair of the batch
(itself, and two hard negatives). What it should cost, counted before it was measured, in d^2 multiply-adds of a pair
with d the width of both towers, S tokens of the picture (65) and L of the caption (32):
    vision   12 layers of 12 S + 2 S^2 / d, and the patches: 9,752
    text      6 layers of 12 L + 2 L^2 / d: 2,336
    fusion    6 layers of 14 L + 2 S + 2 L^2 / d + 2 L S / d: 3,565, three times: 10,694
1 + 10,694 / 12,088 = 1.88 times the plain step; backward passes cost twice the forward in both.
"""

import argparse
import json
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "setup.py").is_file():
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))

from common import RESULTS, provenance, today  # noqa: E402

from vlscale.config import validate  # noqa: E402
from vlscale.data.batch import Batch  # noqa: E402
from vlscale.data.images import ImageSpec, normalise  # noqa: E402
from vlscale.models.dual_encoder import build_dual_encoder  # noqa: E402
from vlscale.models.teacher_heads import TeacherHeads  # noqa: E402
from vlscale.train.engine import Engine, start_ranks  # noqa: E402
from vlscale.train.inputs import Inputs  # noqa: E402
from vlscale.train.step import StepParts  # noqa: E402
from vlscale.train.steps import STEPS  # noqa: E402

PLAIN = "contrastive"
METHODS = {  # name: (objective, meta, the bound that the project holds itself to)
    PLAIN: ({"name": "contrastive"}, {}, None),
    "joint": ({"name": "covlr"}, {}, 1.1),
    "rvlr": ({"name": "rvlr"}, {}, 1.1),
    "heads": ({"name": "covlr"}, {"mode": "heads"}, 1.15),
    "heads, next batch": ({"name": "covlr"}, {"mode": "heads", "test_batch": "next"}, 2.2),
    "first_order": ({"name": "covlr"}, {"mode": "first_order"}, 2.1),
    "finite_difference": ({"name": "covlr"}, {"mode": "finite_difference"}, 4.2),
    "matching": ({"name": "contrastive"}, {}, 2.2),
}
SIDE, TOKENS, TEACHER, FUSED = 128, 32, 384, 6
VISION = {"model_type": "vit", "image_size": SIDE, "patch_size": 16, "hidden_size": 384, "num_hidden_layers": 12,
          "num_attention_heads": 6, "intermediate_size": 1536}  # fmt: skip
TEXT = {"model_type": "bert", "vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6 + FUSED,
        "num_attention_heads": 6, "intermediate_size": 1536}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    towers = {"vision": {"config": VISION}, "text": {"config": TEXT}, "fusion": {"source": "text", "layers": FUSED}}
    config = validate(
        {
            "model": {"embed_dim": 256, "dropout": 0.0, **towers},
            "engine": {"zero_stage": 0, "threads": given.threads},
            "train": {"global_batch_size": given.batch},
        },
        "step",
    )
    ranks = start_ranks(config.engine)
    model = build_dual_encoder(config.model)
    parts = {"vision": model.vision_model, "text": model.text_model, "fusion": model.fusion}
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    model.teacher_heads = TeacherHeads(TEACHER, TEACHER, config.model.embed_dim)
    spec = ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3, 3)
    model.normalise = partial(normalise, spec=spec)
    engine = Engine(model, config, ranks)
    inputs = {fuses: Inputs(spec, None, None, ranks.device, TOKENS, fuses=fuses) for fuses in (False, True)}
    batches = [_batch(given.batch, seed) for seed in range(2)]

    def step(name: str) -> float:
        objective, meta, _ = METHODS[name]
        own = validate({"objective": objective, "meta": meta, "teacher": {"source": "frozen_copy"}}, name)
        parts = StepParts(engine, inputs[name == "matching"], own.objective, own.meta, ranks, None)
        started = time.perf_counter()
        engine.set_rates(1e-6, 1)
        STEPS[own.meta_mode](parts, batches[0], batches["next" in name])
        return time.perf_counter() - started

    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for name in METHODS:
        step(name)  # first calls build what later ones reuse
    for turn in range(given.rounds):
        order = random.Random(turn).sample(list(METHODS), len(METHODS))
        for name in order:
            taken[name].append(step(name))
        print(f"round {turn + 1} of {given.rounds}", file=sys.stderr)
    page, rows = _page(taken, millions, given)
    print(page)
    if given.write:
        (RESULTS / f"{today()}-step.md").write_text(page)
        (RESULTS / f"{today()}-step.json").write_text(json.dumps(rows, indent=1) + "\n")


def _batch(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    teachers = [torch.nn.functional.normalize(torch.randn(count, TEACHER, generator=generator)) for _ in range(2)]
    return Batch(
        keys=[str(place) for place in range(count)],
        captions=[""] * count,
        positions=torch.arange(count),
        pair_id=torch.arange(count),
        images=torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        input_ids=torch.randint(5, 30_000, (count, TOKENS), generator=generator),
        attention_mask=torch.ones(count, TOKENS, dtype=torch.int64),
        second_images=None,
        second_input_ids=None,
        second_attention_mask=None,
        state=None,
        epoch=0.0,
        skipped=0,
        teacher_image=teachers[0],
        teacher_text=teachers[1],
    )


def _page(taken: dict[str, list[float]], millions: dict[str, float], given: argparse.Namespace) -> tuple[str, list]:
    rows = []
    for name, (_, _, bound) in METHODS.items():
        ratios = [own / plain for own, plain in zip(taken[name], taken[PLAIN], strict=True)]
        rows.append(
            {"method": name, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
             "seconds": statistics.median(taken[name]), "bound": bound}
        )  # fmt: skip
    lines = [
        f"# Cost of a step, {today()}",
        "",
        provenance(f"vlscale bench step --rounds {given.rounds} --batch {given.batch} --write"),
        "",
        f"Towers: ViT 384 x 12 at {SIDE} px ({millions['vision']:.1f} M parameters) and BERT 384 x 6, {TOKENS} tokens "
        f"({millions['text']:.1f} M), for matching a fusion encoder 384 x {FUSED} ({millions['fusion']:.1f} M) too; "
        f"batch {given.batch}, fp32, {torch.get_num_threads()} threads, one process, "
        "ZeRO-0, teachers' embeddings ready. Ratio to the plain step of the same round: median, and range over rounds.",
        "",
        "| step | times plain | range | asked | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        asked = f"{row['bound']:.2f}" if row["bound"] else ""
        lines.append(
            f"| {row['method']} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {asked} | "
            f"{row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n", rows


if __name__ == "__main__":
    main()
