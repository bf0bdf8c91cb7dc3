"""Continuing at another ZeRO stage, saving by minutes, the stop file and the best model: whole runs, one rank."""

import json
import shutil
from pathlib import Path

import pytest

from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.sections import TrainConfig
from vlscale.train.best import Best
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

SGD = ["optim={name: sgd, lr: 0.05, weight_decay: 0}"]


def train(config: Path, out: Path, *overrides: str, resume: bool = False) -> list[dict]:
    train_plan(load_plan(config, ["log.progress=false", *overrides]), out, resume=resume)
    return read_metrics(out / "metrics.jsonl")


def back_to(out: Path, step: int) -> None:
    """As if the run had been killed right after that checkpoint."""
    shutil.rmtree(out / "final")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("optim", [[], SGD], ids=["adamw", "sgd"])
def test_stage_2_to_3_to_0_follows_the_undisturbed_run(tiny_config, tmp_path, optim):
    common = ["train.elastic=true", "train.keep_checkpoints=9", *optim]
    expected = train(tiny_config, tmp_path / "run", *common)
    for stage, step in ((3, 2), (0, 4), (1, 4)):
        back_to(tmp_path / "run", step)
        lines = train(tiny_config, tmp_path / "run", *common, f"engine.zero_stage={stage}", resume=True)
        assert [line["keys"] for line in lines] == [line["keys"] for line in expected]
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
        manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-6" / "manifest.json").read_text())
        assert manifest["layout"]["zero_stage"] == stage


def test_another_stage_without_the_elastic_form_names_the_key(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "run", "train.max_steps=2")
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(ValueError, match=r"made with zero_stage 2, got 3; .* train\.elastic=true continue at any"):
        train(tiny_config, tmp_path / "run", "train.max_steps=3", "engine.zero_stage=3", resume=True)


def test_minutes_save_between_the_steps_that_do(tiny_config, tmp_path):
    keys = ["train.checkpoint_every=100", "train.keep_checkpoints=9", "train.max_steps=3"]
    train(tiny_config, tmp_path / "run", *keys, "train.checkpoint_minutes=0.0000001")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]


def test_a_stop_file_saves_and_ends_with_75_and_is_gone(caplog, tiny_config, tmp_path):
    caplog.set_level("INFO")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    with pytest.raises(SystemExit) as ended:
        train(tiny_config, tmp_path / "run")
    assert ended.value.code == 75 and "stopped by the file stop after step 1" in caplog.text
    assert not (tmp_path / "run" / "stop").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_the_best_model_is_kept_as_a_folder_like_final(tiny_config, corpus, tmp_path):
    keys = [f"data.val=['{corpus}/val-*.tar']", "eval.every=1", "train.max_steps=3", "train.keep_best=rsum"]
    train(tiny_config, tmp_path / "run", *keys)
    measured = read_metrics(tmp_path / "run" / "eval.jsonl")
    highest = max(measured, key=lambda line: line["rsum"])
    best = tmp_path / "run" / "best"
    expected = {"metric": "rsum", "value": highest["rsum"], "step": highest["step"]}
    assert json.loads((best / "best.json").read_text()) == expected
    assert {path.name for path in best.iterdir()} == {path.name for path in (tmp_path / "run" / "final").iterdir()} | {
        "best.json"
    }
    assert not list((tmp_path / "run").glob(".*best*"))


def test_a_measure_that_the_evaluation_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"train\.keep_best=sum: no such measure; this evaluation has: rsum, i2t/r@1"):
        best = Best(Path("nowhere"), TrainConfig(keep_best="sum"), Ranks(), 0)
        best.consider(1, {"rsum": 1.0, "i2t/r@1": 2.0}, print)


def test_the_best_needs_evaluations(tiny_config):
    with pytest.raises(ValueError, match=r"train\.keep_best=rsum needs evaluations, and data\.val is not set"):
        load_plan(tiny_config, ["train.keep_best=rsum"])


def test_ranks_are_best_small_and_an_interrupted_replacement_is_put_back(tmp_path):
    def write(folder: Path) -> None:
        folder.mkdir()

    wanted = TrainConfig(keep_best="i2t/mean_rank")
    best = Best(tmp_path, wanted, Ranks(), 0)
    for step, value in enumerate([5.0, 7.0, 3.0], 1):
        best.consider(step, {"i2t/mean_rank": value}, write)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 3
    (tmp_path / "best").rename(tmp_path / ".best.before")
    Best(tmp_path, wanted, Ranks(), 3).consider(4, {"i2t/mean_rank": 4.0}, write)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 3
    Best(tmp_path, wanted, Ranks(), 2).consider(3, {"i2t/mean_rank": 4.0}, write)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["value"] == 4.0
