"""Whether matching learns: small towers and a fusion encoder on synthetic scenes, from scratch, in one process.

    vlscale bench matching [--rounds 3] [--steps 6000] [--pairs 16000] [--out DIR] [--write]

Each round starts from the model of the one before and goes through the whole schedule of the learning rate again, about
half an hour of one CPU core. With `--out` the same command goes on where it was stopped. Accuracy over every pair of
held-out scenes and its two hard negatives, which the model's own similarities choose from its batch; answering no to
everything is right in two cases of three. Then recall among the held-out scenes, by the dual encoder and re-ranked.
`--write` keeps the page, dated, in benchmarks/results/.
"""

import argparse
import tempfile
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path

import torch
from common import RESULTS, provenance, today

from vlscale.config import PlannedRun, validate
from vlscale.data.synth import make_corpus, synth_config
from vlscale.distributed import Ranks
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.objectives.matching import matching
from vlscale.sections import Config
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts, embed

BATCH, HELD_OUT, RERANKED = 64, 512, 16
# BERT's own initializer_range, 0.02, is for a width of 768: about width ** -0.5.
WIDTH = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192, "initializer_range": 0.1}
VISION = WIDTH | {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
TEXT = WIDTH | {"model_type": "bert", "num_hidden_layers": 4}
RECALLS = ("rsum", "i2t/r@1", "i2t/r@5", "i2t/r@10", "t2i/r@1", "t2i/r@5", "t2i/r@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6000, help="of a round")
    parser.add_argument("--pairs", type=int, default=16_000)
    parser.add_argument("--out", type=Path, help="keeps scenes and run")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with nullcontext(given.out) if given.out else tempfile.TemporaryDirectory() as folder:
        scenes, runs = Path(folder) / "scenes", [Path(folder) / f"round-{n + 1}" for n in range(given.rounds)]
        if not scenes.is_dir():
            make_corpus(scenes, synth_config(pairs=given.pairs, val_pairs=HELD_OUT, shard_size=1000), progress=False)
        for number, run in enumerate(runs):
            config = recipe(scenes, given.steps, number, runs[number - 1] if number else None)
            train_plan([PlannedRun("", config)], run, resume=True)
        lines = [
            line | {"step": line["step"] + number * given.steps}
            for number, run in enumerate(runs)
            for line in read_metrics(run / "metrics.jsonl")
        ]
        hard, drawn = held_out(config, scenes, run)
        _, result = evaluate_model(EvalRequest(str(run), [f"{scenes}/val-*.tar"], rerank=RERANKED))
    seconds = sum(line["seconds"] for line in lines)
    sizes = f"--rounds {given.rounds} --steps {given.steps} --pairs {given.pairs}"
    command = f"vlscale bench matching {sizes} --write"
    page = "\n".join(
        [
            f"# Matching on synthetic scenes, {today()}",
            "",
            provenance(command),
            "",
            f"{given.rounds} rounds of {given.steps} steps of batch {BATCH} in {seconds:.0f} s. Held-out scenes: "
            f"**{100 * hard:.1f} %** of pairs and hard negatives told right, {100 * drawn:.1f} % with negatives drawn "
            "from the batch at random (66.7 % by always saying no).",
            "",
            f"Recall among {HELD_OUT} held-out scenes, the nearest {RERANKED} re-ranked:",
            "",
            "| | " + " | ".join(RECALLS) + " |",
            "| --- |" + " ---: |" * len(RECALLS),
            *(
                f"| {name} | " + " | ".join(f"{result[start + key].value:.1f}" for key in RECALLS) + " |"
                for name, start in (("dual encoder", ""), ("re-ranked", "reranked:"))
            ),
            "",
            "| step | itm | itm_accuracy, training | contrastive |",
            "| ---: | ---: | ---: | ---: |",
            *(
                f"| {line['step']} | {line['itm']:.3f} | {line['itm_accuracy']:.3f} | {line['contrastive']:.3f} |"
                for line in lines[:: max(1, len(lines) // 10)] + lines[-1:]
            ),
            "",
        ]
    )
    print(page)
    if given.write:
        (RESULTS / f"{today()}-matching.md").write_text(page)


def recipe(scenes: Path, steps: int, number: int, before: Path | None) -> Config:
    return validate(
        {
            "data": {"caption_key": "json:captions", "train": [f"{scenes}/train-*.tar"]},
            "model": {
                "init_from": before and str(before),
                "embed_dim": 96,
                "dropout": 0.0,
                "vision": {"config": VISION},
                "text": {"config": TEXT, "max_length": 32, "vocab_size": 512},
                "fusion": {"source": "text"},
            },
            "optim": {"lr": 1e-3, "weight_decay": 0.05, "warmup_steps": min(100, steps - 1)},
            "engine": {"zero_stage": 0, "threads": 1},
            "train": {"global_batch_size": BATCH, "max_steps": steps, "checkpoint_every": 500, "seed": number},
            "log": {"every": 50},
        },
        "matching",
    )


@torch.no_grad()
def held_out(config: Config, scenes: Path, run: Path) -> tuple[float, float]:
    """One pass each over the held-out scenes, a caption a scene, by batches as training has them; negatives by the
    model's similarities, and with all of them alike."""
    data = config.data.model_copy(update={"train": [f"{scenes}/val-*.tar"]})
    model = config.model.model_copy(update={"init_from": str(run)})
    config, ranks = config.model_copy(update={"data": data, "model": model}), Ranks()
    parts = build_parts(config, run / "none", ranks)
    parts.model.eval()
    own = StepParts(None, parts.inputs, config.objective, config.meta, ranks, None)
    found = []
    for scale in (parts.model.logit_scale, torch.full((1,), -20.0)):  # the logarithm
        parts.model.logit_scale.copy_(scale)
        with closing(iter(build_stream(config, parts, ranks, None))) as batches:
            accuracies = [
                matching(embed(parts.model, own.at(0, number), batch).matching, ranks)[1]["itm_accuracy"]
                for number, batch in enumerate(islice(batches, HELD_OUT // BATCH))
            ]
        found.append(float(torch.stack(accuracies).mean()))
    return found[0], found[1]


if __name__ == "__main__":
    main()
