"""`objective.conflict` in a run: the same trajectory with parameters whole and sharded, and at once or in chunks."""

import pytest

from vlscale.config import load_plan
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

GIVEN = ["objective.name=covlr", "objective.conflict=project", "objective.relation_weight=2", "train.max_steps=8",
         "teacher.source=frozen_copy", "log.progress=false"]  # fmt: skip


def test_every_stage_and_chunks_train_alike(tiny_config, tmp_path):
    ways = {
        "whole": ["engine.zero_stage=0"],
        "sharded": ["engine.zero_stage=3"],
        "chunks": ["engine.zero_stage=2", "train.chunk_size=8"],
        "kept": ["engine.zero_stage=0", "objective.conflict=keep"],
    }
    lines = {}
    for name, own in ways.items():
        train_plan(load_plan(tiny_config, [*GIVEN, *own]), tmp_path / name, resume=False)
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    for name in ("sharded", "chunks"):
        for own, whole in zip(lines[name], lines["whole"], strict=True):
            for key in ("loss", "grad_norm", "conflict_image", "conflict_text"):
                assert own[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-5), (name, own["step"], key)
    assert "conflict_image" not in lines["kept"][0]
    assert min(line["conflict_text"] for line in lines["whole"]) < 0  # the rule had something to do
    assert lines["kept"][-1]["grad_norm"] != pytest.approx(lines["whole"][-1]["grad_norm"], rel=1e-4)
