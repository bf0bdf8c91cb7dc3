"""The recipes, run as a user runs them: the quick demo through DeepSpeed's launcher, the emoji twin on real data, those
of checkpoints unchanged on small folders of the same names, and their twins."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.export.towers import save_clip, save_dinov2, save_minilm
from tests.forked import run_command
from vlscale.config import load_plan
from vlscale.data.samples import read_samples
from vlscale.data.tokens import train_tokenizer
from vlscale.sections import DataConfig
from vlscale.train.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TWINS = {
    "demo": "demo-quick",
    "emoji": "emoji-cpu",
    "rvlr-official": "rvlr-official-cpu",
    "clip-finetune": "clip-finetune-cpu",
    "lit": "lit-cpu",
}


def vlscale(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return run_command(list(arguments), cwd)


def test_every_recipe_has_a_cheap_twin_without_dropout():
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes == set(TWINS) | set(TWINS.values())
    for twin in TWINS.values():
        plan = load_plan(ROOT / "configs" / f"{twin}.yaml")
        assert {run.config.model.dropout for run in plan} == {0.0}
        assert any(run.config.teacher.source != "none" for run in plan)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = vlscale("demo", "--quick", cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "runs" / "demo", done.stdout


def test_the_demo_ends_with_a_table_and_a_report(demo):
    folder, said = demo
    for name in (
        "contrastive only",
        "relations, jointly",
        "RVLR",
        "CoVLR, meta step",
        "rsum",
        "i2i",
        "t2t",
        "i2it",
        "t2it",
    ):
        assert name in said
    report = (folder / "report.html").read_text()
    assert f"report: {folder / 'report.html'}" in said and "<svg" in report and "data:image/" in report


def test_the_demos_fine_tuning_differs_in_the_method_alone(demo):
    folder, _ = demo
    names = ("contrastive", "joint", "covlr", "rvlr")
    runs = {name: read_metrics(folder / "runs" / name / "metrics.jsonl") for name in names}
    assert len({tuple(line["keys"] for line in lines) for lines in runs.values()}) == 1
    own = {name: set(lines[1]) - set(runs["contrastive"][1]) for name, lines in runs.items()}
    assert own["joint"] == {"relation_image", "relation_text"}
    assert own["covlr"] == own["joint"] | {"inner_lr", "inner_grad_norm"}
    assert own["rvlr"] == {"iic", "ttc", "kd", "kd_image", "kd_text", "mixture_text"}
    assert -1 <= runs["covlr"][0]["probe_gradient_cosine"] <= 1
    assert 0 < runs["joint"][0]["probe_teacher_entropy_text"] < 1


def test_demo_results_hold_every_measure_of_every_run(demo):
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == 6
    for result in results.values():
        assert {"rsum", "i2i/ndcg@10_norm", "t2t/ndcg@10_norm", "i2it/ndcg@10", "t2it/ndcg@10_paper"} <= set(
            result["metrics"]
        )


@pytest.mark.parametrize("objective", ["contrastive", "covlr", "rvlr"])
def test_a_recipe_trains_under_any_objective(real_data, tmp_path, objective):
    shards = real_data / "emoji"
    arguments = [f"data.train={shards}/emoji-train-*.tar", f"objective.name={objective}", "meta.mode=heads"]
    recipe = tmp_path / "short.yaml"
    short = "train: {max_steps: 6}, eval: {every: null}, optim: {warmup_steps: 2}, engine: {threads: 1}"
    teachers = "stages: {teachers: {train: {max_steps: 6}}, matching: {train: {max_steps: 6}}}"
    recipe.write_text(f"{{base: {ROOT / 'configs/rvlr-official-cpu.yaml'}, {short}, {teachers}}}\n")
    done = vlscale("train", str(recipe), "--out", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 6 and ("kd" in lines[0]) == (objective == "rvlr") and all(line["itm"] > 0 for line in lines)


def test_the_emoji_twin_trains_and_evaluates_by_its_labels(real_data, tmp_path):
    shards = real_data / "emoji"
    arguments = [f"data.train={shards}/emoji-train-*.tar", f"data.val={shards}/emoji-val-*.tar", "engine.threads=1"]
    done = vlscale("train", str(ROOT / "configs/emoji-cpu.yaml"), "--out", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["skipped"] == 0
    measured = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert measured["images"] == 505 and measured["labels"] == ["concept", "subgroup"]
    assert measured["metrics"]["subgroup:i2i/r@10"]["value"] > measured["metrics"]["subgroup:i2i/r@10"]["chance"]


def test_the_emoji_recipe_asks_for_its_data(tmp_path):
    done = vlscale("train", str(ROOT / "configs/emoji-cpu.yaml"), "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "data.train is not set: give the training shards" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory, corpus) -> Path:
    """A folder in which the names that the recipes give are small models of the same kinds."""
    place = tmp_path_factory.mktemp("hub")
    scenes = read_samples([f"{corpus}/train-*.tar"], DataConfig(caption_key="json:captions"))
    tokenizer = train_tokenizer((c for sample in scenes for c in sample.captions), vocab_size=200, max_length=77)
    save_clip(place / "openai" / "clip-vit-base-patch32", tokenizer)
    save_dinov2(place / "facebook" / "dinov2-base")
    save_minilm(place / "sentence-transformers" / "all-MiniLM-L6-v2", tokenizer, initializer_range=0.3)
    return place


SHORT = ["optim.warmup_steps=1", "train.max_steps=4", "train.global_batch_size=16", "eval.every=null", "data.workers=0"]
SHORT += ["engine.dtype=fp32", "engine.threads=1", "log.diagnostics_every=null", "data.caption_key=json:captions"]
UNLOCKED = ["model.locked=[]", "optim.unlock_after={vision: 2}", "optim.layer_decay=0.75"]
UNLOCKED += ["objective.relation_weight_image=0.1"]  # as lit.yaml's head says


@pytest.mark.parametrize(
    ("recipe", "changes", "learns"),
    [
        ("clip-finetune", [], {"vision": True, "text": True}),
        ("lit", [], {"vision": False, "text": True}),
        ("lit", UNLOCKED, {"vision": True, "text": True}),
    ],
    ids=["clip-finetune", "lit", "lit, unlocked"],
)
def test_a_recipe_starts_from_the_checkpoints_it_names(hub, corpus, tmp_path, recipe, changes, learns):
    config = ROOT / "configs" / f"{recipe}.yaml"
    arguments = [f"data.train={corpus}/train-*.tar", *SHORT, *changes]
    done = vlscale("train", str(config), "--out", str(tmp_path / "run"), *arguments, cwd=hub)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ("relation_image" in lines[0]) == learns["vision"] and "relation_text" in lines[0]
    if recipe == "clip-finetune":  # no dropout: the copy is the model as it starts
        assert max(lines[0]["relation_image"], lines[0]["relation_text"]) < 1e-6
    (plan,) = load_plan(config, arguments)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for tower, source in (("vision", plan.config.model.vision.source), ("text", plan.config.model.text.source)):
        given = load_file(hub / source / "model.safetensors")
        given = {name.removeprefix(f"{tower}_model."): value for name, value in given.items()}
        parts = {key: key.removeprefix(f"{tower}_model.") for key in final if key.startswith(f"{tower}_model.")}
        furthest = max((final[key] - given[part]).abs().max().item() for key, part in parts.items())
        assert (0 < furthest < 5 * plan.config.optim.lr) if learns[tower] else furthest == 0, tower


def test_the_copy_of_lit_may_be_embedded_beforehand(hub, corpus, tmp_path):
    """As lit.yaml's head says: the first step then has the relations that it has with the frozen copy itself."""
    shards, names = f"{corpus}/train-*.tar", {"image": "facebook/dinov2-base"}
    names["text"] = "sentence-transformers/all-MiniLM-L6-v2"
    teach = [word for side, name in names.items() for word in (f"--teacher-{side}", name)]
    made = vlscale("data", "teach", shards, str(tmp_path / "copy"), *teach, "--caption-key", "json:captions", cwd=hub)
    assert made.returncode == 0, made.stderr[-4000:]
    relations = []
    for name, source in (("live", []), ("cached", ["teacher.source=cache", f"teacher.cache={tmp_path / 'copy'}"])):
        arguments = [f"data.train={shards}", *SHORT, "model.dropout=0", *source]
        config = str(ROOT / "configs" / "lit.yaml")
        done = vlscale("train", config, "--out", str(tmp_path / name), *arguments, cwd=hub)
        assert done.returncode == 0, done.stderr[-4000:]
        relations.append(read_metrics(tmp_path / name / "metrics.jsonl")[0]["relation_text"])
    assert relations[0] > 0 and relations[1] == pytest.approx(relations[0], rel=0.02)


@pytest.mark.parametrize(("twin", "stage"), [("clip-finetune-cpu", "checkpoint"), ("lit-cpu", "towers")])
def test_the_twins_of_checkpoints_learn_from_what_their_first_stage_made(tmp_path, twin, stage):
    scenes = tmp_path / "scenes"
    made = vlscale("data", "synth", str(scenes), "--pairs", "2000", "--val-pairs", "200", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    arguments = [f"data.train={scenes}/train-*.tar", f"data.val={scenes}/val-*.tar"]
    arguments += ["engine.threads=1"]
    done = vlscale("train", str(ROOT / "configs" / f"{twin}.yaml"), "--out", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "run"
    before, after = (json.loads((folder / "eval.json").read_text())["metrics"] for folder in (run / stage, run))
    assert (
        after["rsum"]["low"] > before["rsum"]["high"]
        if twin == "lit-cpu"
        else after["rsum"]["value"] > before["rsum"]["value"]
    )
    towers = [load_file(folder / "final" / "model.safetensors") for folder in (run / stage, run)]
    same = {name: bool((towers[0][name] == towers[1][name]).all()) for name in towers[1] if "layers.0" in name}
    locked = {name for name, equal in same.items() if equal}
    assert locked == ({name for name in same if name.startswith("vision_model.")} if twin == "lit-cpu" else set())
