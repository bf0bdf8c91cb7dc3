"""The real launcher: two gloo ranks under `deepspeed`, every ZeRO stage in one launch, against one process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.launcher import launch
from vlscale.config import load_plan
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

RUNS = {
    "zero0": "engine: {zero_stage: 0}",
    "zero1": "engine: {zero_stage: 1}",
    "zero2": "engine: {zero_stage: 2}",
    "zero3": "engine: {zero_stage: 3}",
    "chunks": "engine: {zero_stage: 2}, train: {chunk_size: 4}",
    "chunks-zero3": "engine: {zero_stage: 3}, train: {chunk_size: 4}",
    "bf16": "engine: {zero_stage: 2, dtype: bf16}",
}


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    """Contrast and relations to a frozen copy of the start, from a single run of a teacher stage."""
    path = tmp_path_factory.mktemp("recipe") / "stages.yaml"
    variants = "".join(f"  {name}: {{{own}}}\n" for name, own in RUNS.items())
    path.write_text(
        f"base: {tiny_config}\n"
        "teacher: {source: frozen_copy}\n"
        "objective: {name: covlr, relation_weight: 0.5}\n"
        "train: {max_steps: 4, checkpoint_every: 4}\n"
        f"variants:\n{variants}"
    )
    return path


@pytest.fixture(scope="module")
def launched(recipe, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("launched") / "out"
    done = launch(recipe, out, f"data.val=['{corpus}/val-*.tar']", "eval.batch_size=31")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    train_plan(load_plan(recipe, ["log.progress=false"]), out, resume=False)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_follow_one_process(launched, alone, name):
    """The same batches in the same order, the same losses and gradient norms, the same distance moved."""
    two, one = (read_metrics(out / name / "metrics.jsonl") for out in (launched, alone))
    assert [line["keys"] for line in two] == [line["keys"] for line in one]
    loose = name == "bf16"
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2 if loose else 1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1 if loose else 1e-4)
    if loose:
        return
    weights = [load_file(out / name / "final" / "model.safetensors") for out in (launched, alone)]
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key].float(), weights[1][key].float(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_validation_over_ranks_equals_evaluation_of_the_final_model(launched, corpus, name):
    """63 samples by batches of 31: one rank has one batch and the other two."""
    during = json.loads((launched / name / "eval.json").read_text())
    _, alone = evaluate_model(EvalRequest(str(launched / name), [f"{corpus}/val-*.tar"]))
    assert during["images"] == alone.images == 63 and during["captions"] == alone.captions
    for measure in ("rsum", "i2i/ndcg@10", "t2t/ndcg@10", "t2it/ndcg@10_paper", "i2t/mean_rank"):
        assert during["metrics"][measure]["value"] == pytest.approx(alone[measure].value, rel=1e-4)


def test_a_wrong_config_is_said_once_and_ends_with_2(tiny_config, tmp_path):
    done = launch(tiny_config, tmp_path / "out", "train.global_batch_size=33")
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "33 cannot be divided by the world size 2" in said[0]
    assert not (tmp_path / "out").exists()


def test_the_training_benchmark_runs_on_a_cpu(tmp_path):
    """Two runs under the launcher see the same batches: their curves are the same to rounding."""
    command = [sys.executable, "-m", "vlscale", "bench", "training", "--small", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (apart,) = re.findall(r"at most (\S+) of the loss apart", done.stdout)
    assert float(apart) < 1e-5
    assert re.search(r"^\| chunked \| [\d,]+ \| [\d.]+ \| [\d.]+ ms \| [\d.]+% \|", done.stdout, flags=re.M)
    refused = subprocess.run([*command[:5], "--ranks", "64"], capture_output=True, text=True)
    assert refused.returncode == 2 and "give fewer ranks, or --small" in refused.stderr
