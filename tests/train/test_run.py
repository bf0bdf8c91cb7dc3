"""Whole runs in this process, one rank: what they leave behind, resuming after kill -9, bad input.

The runs share one undisturbed run of the same recipe; a second process is started only to be killed.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forked import run_command
from vlscale.cli import main
from vlscale.config import load_plan
from vlscale.models.hf_folder import new_image_processor
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

STEPS = 6


def train(config: Path, out: Path, *overrides: str, resume: bool = False) -> None:
    train_plan(load_plan(config, ["log.progress=false", *overrides]), out, resume=resume)


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(tiny_config, out)
    return out


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def without_seconds(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


def test_pictures_made_on_the_device_train_the_same(undisturbed, tiny_config, tmp_path):
    train(tiny_config, tmp_path / "run", "data.decode=device")
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "run", undisturbed))
    assert [line["keys"] for line in found] == [line["keys"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_resize_that_the_device_does_not_know_is_refused(tiny_config, tmp_path, monkeypatch):
    processor = new_image_processor(32, (0.5,) * 3, (0.5,) * 3)
    processor.resample = 1  # Lanczos
    monkeypatch.setattr("vlscale.train.setup.new_image_processor", lambda *given: processor)
    with pytest.raises(ValueError, match=r"data\.decode=device resizes bilinearly or bicubically.*resample=1"):
        train(tiny_config, tmp_path / "run", "data.decode=device")
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_config_metrics_checkpoints_and_model(undisturbed):
    found = {path.name for path in undisturbed.iterdir()}
    assert found == {"config.yaml", "data.json", "metrics.jsonl", "checkpoints", "final", "tokenizer"}
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[0]) >= {
        "step",
        "loss",
        "contrastive",
        "lr",
        "samples",
        "seconds",
        "keys",
        "grad_norm",
        "logit_scale",
    }
    assert lines[-1]["samples"] == STEPS * 32 and len({line["keys"] for line in lines}) == STEPS
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_same_recipe_gives_the_same_weights(undisturbed, tiny_config, tmp_path):
    train(tiny_config, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(undisturbed)
    train(tiny_config, tmp_path / "other", "train.seed=1")
    assert weights(tmp_path / "other") != weights(undisturbed)


def test_resume_ends_with_the_same_bytes_and_no_doubled_steps(undisturbed, tiny_config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-6")
    train(tiny_config, out, resume=True)
    assert weights(out) == weights(undisturbed)
    assert without_seconds(out) == without_seconds(undisturbed)


KILLED_AT = {  # a function that training calls, and the call of it in which the process ends
    "mid-step": ("vlscale.train.step.total_loss", 4),
    "mid-save": ("vlscale.train.checkpoint.commit", 3),
}
VICTIM = """
import os, signal
from unittest.mock import patch
from {module} import {name} as real
calls = []
def killer(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
patch("{module}.{name}", killer).start()
"""


@pytest.mark.parametrize("moment", KILLED_AT)
def test_kill_9_then_resume_ends_with_the_same_bytes(undisturbed, tiny_config, tmp_path, moment):
    out, (function, call) = tmp_path / "run", KILLED_AT[moment]
    module, name = function.rsplit(".", 1)
    waits = ["train.checkpoint_every=1", "train.checkpoint_async=false"]
    arguments = ["train", str(tiny_config), "--out", str(out), *waits]
    victim = run_command(arguments, before=VICTIM.format(module=module, name=name, call=call))
    assert victim.returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3] and not (out / "final").exists()
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert left == (["step-2", "step-3"] if moment == "mid-step" else [".step-3.partial", "step-1", "step-2"])
    train(tiny_config, out, *waits, resume=True)
    assert weights(out) == weights(undisturbed)
    assert without_seconds(out) == without_seconds(undisturbed)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-5", "step-6"]


def test_a_signal_saves_at_the_step_boundary_and_ends_with_75(undisturbed, tiny_config, tmp_path):
    out = tmp_path / "run"
    script = VICTIM.replace("SIGKILL", "SIGTERM").format(module="vlscale.train.step", name="total_loss", call=3)
    arguments = ["train", str(tiny_config), "--out", str(out), "train.checkpoint_every=100"]
    stopped = run_command(arguments, before=script)
    assert stopped.returncode == 75 and "stopped by a signal after step 3; continue with --resume" in stopped.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    train(tiny_config, out, "train.checkpoint_every=100", resume=True)
    assert weights(out) == weights(undisturbed)


def test_resume_of_a_complete_run_changes_nothing_and_of_none_starts(undisturbed, tiny_config, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    train(tiny_config, undisturbed, resume=True)
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before
    train(tiny_config, tmp_path / "fresh", resume=True)
    assert weights(tmp_path / "fresh") == weights(undisturbed)


def test_more_steps_of_a_complete_run_are_told_where_to_go(tiny_config, tmp_path, caplog):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("train: {max_steps: 6}")
    train(tiny_config, run, resume=True)
    assert caplog.messages[-1] == "run: complete, nothing to do"
    train(tiny_config, run, "train.max_steps=9", resume=True)
    assert (
        f"ended after 6 steps, and train.max_steps=9 takes another run, with --out elsewhere and model.init_from={run}"
        in (caplog.messages[-1])
    )


def test_plain_transformers_loads_the_model_without_vlscale(undisturbed, tmp_path):
    code = (
        "import sys; sys.modules['vlscale'] = None\n"
        "from transformers import AutoProcessor, VisionTextDualEncoderModel as M\n"
        f"model = M.from_pretrained({str(undisturbed / 'final')!r})\n"
        f"print(type(model).__name__, type(AutoProcessor.from_pretrained({str(undisturbed / 'final')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["VisionTextDualEncoderModel", "VisionTextDualEncoderProcessor"], done.stderr


def test_stages_feed_each_other_and_every_objective_trains(undisturbed, tiny_config, corpus, tmp_path):
    """Teachers by view and caption contrast, then relations to them, a sigmoid loss, a locked tower, validation."""
    recipe = tmp_path / "story.yaml"
    recipe.write_text(
        f"base: {tiny_config}\n"
        "train: {max_steps: 2}\n"
        "stages:\n"
        "  teachers: {objective: {name: contrastive, contrastive_weight: 0, view_weight: 1, caption_weight: 1}}\n"
        "variants:\n"
        "  relations:\n"
        f"    data: {{val: ['{corpus}/val-*.tar']}}\n"
        "    model: {init_from: 'stage:teachers', locked: [vision]}\n"
        "    teacher: {source: hf, image: 'stage:teachers', text: 'stage:teachers'}\n"
        "    objective: {name: covlr, loss: sigmoid, relation_weight: 0.5}\n"
        f"  copy:\n    model: {{init_from: '{undisturbed}'}}\n"
        "    teacher: {source: frozen_copy}\n    objective: {name: covlr}\n"
    )
    train(recipe, tmp_path / "out")
    first = {
        name: read_metrics(tmp_path / "out" / name / "metrics.jsonl")[0] for name in ("teachers", "relations", "copy")
    }
    assert {"view", "caption"} <= set(first["teachers"]) and "contrastive" not in first["teachers"]
    assert {"contrastive", "relation_image", "relation_text"} <= set(first["relations"])
    assert first["copy"]["relation_image"] < 1e-6, "a student that equals its teacher has the same relations"
    measured = json.loads((tmp_path / "out" / "relations" / "eval.json").read_text())
    assert measured["step"] == 2 and measured["protocol"] == "synthetic" and measured["images"] == 63
    start = load_file(tmp_path / "out" / "teachers" / "final" / "model.safetensors")
    end = load_file(tmp_path / "out" / "relations" / "final" / "model.safetensors")
    moved = {name.split(".")[0] for name in start if not start[name].equal(end[name])}
    assert "vision_model" not in moved and {"text_model", "visual_projection"} <= moved


def refused(capsys, *arguments: str) -> str:
    """The one line that a command prints before it exits with 2."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train=null", "data.train is not set: give the training shards"),
        ("data.train=nowhere/*.tar", "nowhere"),
        ("train.global_batch_size=512", "512 is larger than the corpus of 256"),
        ("model.init_from=./nowhere", "./nowhere does not exist"),
        ("model.init_from=stage:warm", "stage:warm: no earlier stage has that name"),
        ("data.lanes=3", "3"),
        ("train.chunk_size=5", "5 does not divide a rank's 32 pairs"),
        ("engine.deepspeed={gradient_clipping: 1}", "gradient_clipping is derived"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tiny_config, tmp_path, override, said):
    assert said in refused(capsys, "train", str(tiny_config), "--out", str(tmp_path / "run"), override)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(capsys, undisturbed, tiny_config):
    before = weights(undisturbed)
    assert "already holds a run; continue it with --resume" in refused(
        capsys, "train", str(tiny_config), "--out", str(undisturbed)
    )
    assert weights(undisturbed) == before


def test_a_world_size_that_does_not_divide_the_batch_is_refused(capsys, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = refused(capsys, "train", str(tiny_config), "--out", str(tmp_path / "run"))
    assert "32 cannot be divided by the world size 3; nearest that can: 30, 33" in said


def test_a_shard_that_is_no_tar_is_refused(capsys, tiny_config, tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"this is not a tar archive at all" * 64)
    said = refused(
        capsys, "train", str(tiny_config), "--out", str(tmp_path / "run"), f"data.train={tmp_path}/broken.tar"
    )
    assert "broken.tar" in said


def test_evaluation_of_too_few_scenes_is_refused(capsys, undisturbed, tmp_path):
    from vlscale.data.synth import make_corpus, synth_config

    make_corpus(tmp_path / "few", synth_config(pairs=1, val_pairs=4), processes=1, progress=False)
    said = refused(
        capsys, "eval", str(undisturbed), "--data", f"{tmp_path}/few/val-*.tar", "--json", str(tmp_path / "e.json")
    )
    assert "got 4" in said and not (tmp_path / "e.json").exists()


def test_eval_of_a_run_prints_the_table_and_equals_its_final_folder(capsys, undisturbed, corpus, tmp_path):
    results = []
    for model in (undisturbed, undisturbed / "final"):
        main_returns(["eval", str(model), "--data", f"{corpus}/val-*.tar", "--json", str(tmp_path / "e.json")])
        results.append(json.loads((tmp_path / "e.json").read_text())["metrics"])
    assert results[0] == results[1] and {"rsum", "i2i/ndcg@10_norm", "t2it/ndcg@10_paper"} <= set(results[0])
    assert "rsum" in capsys.readouterr().out


def main_returns(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0


def test_resume_on_changed_shards_is_refused(capsys, undisturbed, tiny_config, corpus, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "final")
    said = refused(
        capsys, "train", str(tiny_config), "--out", str(out), "--resume", f"data.train={corpus}/train-00000[01].tar"
    )
    assert "the shards (their manifest) changed" in said and not (out / "final").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_start_anew_on_other_shards(
    capsys, undisturbed, tiny_config, corpus, tmp_path
):
    out, given = tmp_path / "run", f"data.train={corpus}/train-00000[01].tar"
    shutil.copytree(undisturbed, out)
    for name in ("final", "checkpoints"):
        shutil.rmtree(out / name)
    before = (out / "metrics.jsonl").read_bytes()
    said = refused(capsys, "train", str(tiny_config), "--out", str(out), "--resume", given)
    assert re.search(r"began with \d shards and \d+ samples, this run has 2 and \d+; put them back", said)
    assert (out / "metrics.jsonl").read_bytes() == before and not (out / "checkpoints").exists()
    main_returns(["train", str(tiny_config), "--out", str(out), "--resume", given, "data.changed_shards=next_epoch"])
    assert json.loads((out / "data.json").read_text())["shards"] == 2 and (out / "final").is_dir()
