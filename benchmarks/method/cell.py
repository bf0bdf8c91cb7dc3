"""One cell of the method study: a corpus, its teachers, and every method from the same start, in this process.

    python benchmarks/method/cell.py JOB.json

The job says where to work, what to train (name to overrides) and which split to measure; the result is written beside
the job, complete or not at all, with the job's settings and the commit. A cell that was cut off goes on where it
stopped.
"""

import fcntl
import json
import os
import random
import shutil
import sys
from glob import glob
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import commit
from kept import refuse_other_towers, settings
from outside import outside
from theta_prime import save_at_theta_prime

from vlscale.config import load_plan
from vlscale.data.synth import make_corpus, synth_config
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

TEST_SEEDS = 10_000  # the test split of a seed is the held-out split of another corpus, of seed + this
PRETRAINING_SEEDS = 20_000  # the corpus that towers and teachers of a seed come from, where it is another
HELD_OUT_SHARDS = 2
RERANKED = 32  # nearest of each query that a fusion encoder scores
ENDPOINTS = {
    "i2i": "i2i/ndcg@10_norm",
    "t2t": "t2t/ndcg@10_norm",
    "i2it": "i2it/ndcg@10_norm",
    "t2it": "t2it/ndcg@10_norm",
}


def run_cell(job: dict) -> dict[str, dict[str, float]]:
    """Endpoints by method, and `teachers` themselves."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    data = (
        split_emoji(job["emoji"], job["seed"])
        if job["level"].get("recipe") == "emoji"
        else _scenes(job, folder / "data")
    )
    runs = folder / "runs"
    begun = _pretrained(job) if "pretrained" in job["recipe"] else None
    with outside(job.get("outside", {})):
        _train(plan_of(job, data["train"], begun), folder / "plan.yaml")
    recipe, measured = job["recipe"].get("eval", {}), {}
    for name in job.get("theta_prime", []):
        save_at_theta_prime(runs / name, runs / f"{name}'")
    for name in ("teachers", *job["runs"], *(f"{name}'" for name in job.get("theta_prime", []))):
        matches = job["recipe"]["model"].get("fusion") and name != "teachers" and _matches(job["runs"][name])
        request = EvalRequest(
            begun if begun and name == "teachers" else str(runs / name),
            data[job["split"]],
            recipe.get("protocol", "auto"),
            recipe.get("labels", []),
            rerank=RERANKED if matches else None,
        )
        _, result = evaluate_model(request)
        labelled = recipe["labels"][0] + ":" if recipe else ""
        measured[name] = {"rsum": result["rsum"].value} | {
            name: result[labelled + key].value for name, key in ENDPOINTS.items()
        }
        measured[name]["reranked"] = result["reranked:rsum" if matches else "rsum"].value
        measured[name]["single"] = (measured[name]["i2i"] + measured[name]["t2t"]) / 2
        measured[name] |= _mixture(runs / name / "metrics.jsonl")
    return measured


def _mixture(metrics: Path) -> dict[str, float]:
    """The weight of the text that RVLR learned, as its last step had it; nothing of other methods."""
    steps = read_metrics(metrics) if metrics.exists() else []
    shares = [line["mixture_text"] for line in steps if "mixture_text" in line]
    return {"mixture_text": shares[-1]} if shares else {}


def _matches(overrides: dict) -> bool:
    """Whether a method trains matching, which it does unless its weight is 0."""
    return overrides.get("objective", {}).get("itm_weight", 1) > 0


def _scenes(job: dict, folder: Path) -> dict[str, list[str]]:
    """Training and validation of one corpus, the test split of another of the same kind."""
    preset, pairs, held_out, seed = job["level"]["preset"], job["pairs"], job["held_out"], job["seed"]
    own = job["level"].get("knobs", {})
    for name, knobs in {
        "train": {"pairs": pairs, "val_pairs": held_out, "seed": seed},
        "test": {"pairs": 1, "val_pairs": held_out, "seed": seed + TEST_SEEDS},
    }.items():
        if not (folder / name).exists():
            make_corpus(folder / name, synth_config(preset, **own, **knobs), processes=1, progress=False)
    return {
        "train": [f"{folder}/train/train-*.tar"],
        "val": [f"{folder}/train/val-*.tar"],
        "test": [f"{folder}/test/val-*.tar"],
    }


def split_emoji(folder: str | Path, seed: int) -> dict[str, list[str]]:
    """All shards in an order drawn from the seed: the first ones test, the next ones validate, the rest train."""
    shards = sorted(glob(f"{folder}/*.tar"))
    random.Random(seed).shuffle(shards)
    return {
        "test": shards[:HELD_OUT_SHARDS],
        "val": shards[HELD_OUT_SHARDS : 2 * HELD_OUT_SHARDS],
        "train": shards[2 * HELD_OUT_SHARDS :],
    }


def _pretrained(job: dict) -> str:
    """The run that towers and teachers of a seed come from: of a corpus of its own, trained once for all levels."""
    folder, (plan, corpus) = Path(job["pretrained"]), pretraining_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuse_other_towers(folder, plan, corpus, "this cell")  # another level's recipe may have come first
        if not (folder / "runs" / "final").is_dir():
            (folder / "corpus.json").write_text(json.dumps(corpus))
            if not (folder / "data").exists():
                make_corpus(folder / "data", synth_config(**corpus), processes=1, progress=False)
            _train(plan, folder / "plan.yaml")
            shutil.rmtree(folder / "data")
    return str(folder / "runs")


def pretraining_of(job: dict) -> tuple[dict, dict]:
    """The plan and the corpus of a seed's pre-training."""
    folder, own = Path(job["pretrained"]), job["recipe"]["pretrained"]
    common = _common(job, [f"{folder}/data/train-*.tar"], folder)
    given = {key: value for key, value in own.items() if key != "corpus"}
    plan = {key: {**common.get(key, {}), **given.get(key, {})} for key in common | given}
    return plan, own["corpus"] | {"val_pairs": 1, "seed": job["seed"] + PRETRAINING_SEEDS}


def _train(plan: dict, path: Path) -> None:
    """A plan, kept at `path`, into `runs` beside it; goes on where it was."""
    path.write_text(yaml.safe_dump(plan, sort_keys=False))  # stages stand in order
    train_plan(load_plan(path), path.parent / "runs", resume=True)


def _common(job: dict, train: list[str], folder: Path) -> dict:
    """What all runs of a cell share."""
    recipe = {key: value for key, value in job["recipe"].items() if key not in ("teachers", "matching", "pretrained")}
    own = recipe.get("train", {})
    recipe["data"] = recipe["data"] | {"train": train, "manifest_dir": f"{folder}/manifests"}
    recipe["train"] = own | {"seed": job["seed"], "checkpoint_every": 10_000, "keep_checkpoints": 1}
    return recipe | {"engine": {"zero_stage": 0, "threads": job["threads"]}, "log": {"progress": False}}


def plan_of(job: dict, train: list[str], begun: str | None) -> dict:
    """Teachers, and every method from their weights; or every method from a run that has `begun`."""
    stages, start = {}, begun
    if begun is None:
        alone = {"name": "contrastive", "contrastive_weight": 0, "view_weight": 1, "caption_weight": 1}
        stages, start = {"teachers": job["recipe"]["teachers"] | {"objective": alone}}, "stage:teachers"
    teachers = {"source": "hf", "image": start, "text": start}
    if "matching" in job["recipe"]:  # a first stage of contrast and matching, as RVLR trains
        stages["teachers"]["objective"]["itm_weight"] = 0
        stages["matching"], start = job["recipe"]["matching"] | {"model": {"init_from": start}}, "stage:matching"
    given = {"model": {"init_from": start}, "teacher": teachers}
    variants = {name: given | overrides for name, overrides in job["runs"].items()}
    return _common(job, train, Path(job["folder"])) | ({"stages": stages} if stages else {}) | {"variants": variants}


def commits(folder: Path) -> str:
    """What the cell is trained at: more than one commit where it was cut off and goes on at another."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "commits"
    before = told.read_text().split() if told.exists() else []
    told.write_text("\n".join(dict.fromkeys([*before, commit()])))
    return told.read_text().replace("\n", ", ")


def clear(folder: Path) -> None:
    """Away at once: what is left of a removal that was cut off is not taken for a cell that was."""
    removed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)


def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    trained_at = commits(Path(job["folder"]))  # what was loaded, whatever happens to the checkout meanwhile
    result = {"name": job["name"], **settings(job), "commit": trained_at, "measured": run_cell(job)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, job["result"])
    clear(Path(job["folder"]))


if __name__ == "__main__":
    main()
