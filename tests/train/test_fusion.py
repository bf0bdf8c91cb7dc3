"""Runs with a fusion encoder in this process: resume, two stages, what is logged and refused."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.train.meta_reference import reference_loss
from tests.train.plain_engine import PlainEngine
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.train.memory_plan import plan_runs
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS

BERT = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
FUSED = [f"model.text.config={{{BERT}, initializer_range: 0.3}}", "model.fusion={source: text}"]
WITHOUT = [FUSED[0], "train.max_steps=2", "train.checkpoint_every=2"]


def train(config: Path, out: Path, *overrides: str, resume: bool = False) -> None:
    train_plan(load_plan(config, ["log.progress=false", *overrides]), out, resume=resume)


def files(run: Path) -> list[bytes]:
    return [(run / "final" / name).read_bytes() for name in ("model.safetensors", "fusion/model.safetensors")]


@pytest.fixture(scope="module")
def first(tiny_config, tmp_path_factory) -> Path:
    """Six steps of contrast, matching and masked words."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train(tiny_config, out, *FUSED, "objective.mlm_weight=0.5", "log.diagnostics_every=3")
    return out


def test_matching_and_masked_words_are_part_of_the_loss(first):
    for line in read_metrics(first / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(line["contrastive"] + line["itm"] + 0.5 * line["mlm"], rel=1e-5)
        assert 0 < line["itm_accuracy"] < 1


def test_resume_ends_with_the_same_bytes(first, tiny_config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(first, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-6")
    train(tiny_config, out, *FUSED, "objective.mlm_weight=0.5", "log.diagnostics_every=3", resume=True)
    assert files(out) == files(first)
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]
             for run in (out, first)]  # fmt: skip
    assert lines[0] == lines[1]


def test_the_second_stage_starts_from_the_first_ones_fusion_encoder(first, tiny_config, tmp_path):
    """Without anything to learn from it, it ends as it began."""
    idle = ["objective.itm_weight=0", "train.max_steps=1", "optim.weight_decay=0"]
    train(tiny_config, tmp_path / "second", *FUSED, f"model.init_from={first}", *idle)
    started, ended = (load_file(run / "final/fusion/model.safetensors") for run in (first, tmp_path / "second"))
    assert all(torch.equal(started[name], ended[name]) for name in started)


def test_a_run_without_a_fusion_encoder_lends_its_upper_layers(tiny_config, tmp_path, caplog):
    train(tiny_config, tmp_path / "teachers", *WITHOUT)
    (run,) = load_plan(tiny_config, [*FUSED, f"model.init_from={tmp_path / 'teachers'}"])
    parts = build_parts(run.config, tmp_path / "none", Ranks())
    whole = load_file(tmp_path / "teachers/final/model.safetensors")
    lent = {k: v for k, v in whole.items() if k.startswith("text_model.encoder.layer.1.")}
    own = parts.model.state_dict()
    assert len(lent) == 16 and parts.model.text_model.config.num_hidden_layers == 1
    for name, value in lent.items():
        inside = name.removeprefix("text_model.encoder.layer.1.")
        assert torch.equal(own[f"fusion.body.encoder.layer.0.{inside}"], value)
    assert "this one starts from the upper layers of its text model" in caplog.text


@pytest.mark.parametrize("mode", ["joint", "heads", "first_order", "finite_difference"])
def test_a_meta_steps_gradient_is_autograds(tiny_config, tmp_path, mode):
    """Consistency includes matching and masked words; negatives are those of theta in every pass."""
    covlr = ["objective.name=covlr", "objective.relation_weight=0.5", "objective.mlm_weight=0.5"]
    meta = [f"meta.mode={mode}", "meta.inner_lr=0.02", "meta.epsilon=1e-5"]
    given = [*FUSED, *covlr, *meta, "teacher.source=frozen_copy", "train.global_batch_size=16"]
    (run,) = load_plan(tiny_config, given)
    parts = build_parts(run.config, tmp_path / "none", Ranks())
    parts.model.double()
    for teacher in (parts.teachers.image, parts.teachers.text):
        teacher.to(torch.device("cpu"), torch.float64)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter += 0.2 * parameter.std(correction=0) * torch.randn_like(parameter)
    with closing(iter(build_stream(run.config, parts, Ranks(), None))) as batches:
        batch = next(batches)
    engine = PlainEngine(parts.model, torch.float64)
    at = StepParts(engine, parts.inputs, run.config.objective, run.config.meta, Ranks(), None).at(0, 4)
    with sdpa_kernel(SDPBackend.MATH):
        STEPS[mode](at, batch, batch)
    loss, learned = reference_loss(parts.model, at, batch, batch, mode)
    exact = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    flat = torch.cat([torch.zeros_like(p).ravel() if g is None else g.ravel()
                      for p, g in zip(learned.values(), exact, strict=True)])  # fmt: skip
    error = (engine.flat_gradient() - flat).norm() / flat.norm()
    assert error <= (1e-6 if mode == "finite_difference" else 1e-8)


@pytest.mark.parametrize(
    ("mode", "more", "trains"),
    [
        ("heads", [], "heads"),
        ("heads", FUSED, "joint"),
        ("first_order", FUSED, "first_order"),
        ("joint", FUSED, "joint"),
    ],
)
def test_heads_moves_nothing_that_relations_of_fused_pairs_see_and_the_run_says_so(
    tiny_config, tmp_path, caplog, mode, more, trains
):
    (run,) = load_plan(tiny_config, ["objective.name=rvlr", "teacher.source=frozen_copy", *more, f"meta.mode={mode}"])
    assert run.config.meta_mode == trains
    build_parts(run.config, tmp_path / "none", Ranks())
    said = [line for line in caplog.messages if "trains as joint" in line]
    assert len(said) == (mode != trains)
    for line in said:
        assert line.startswith("meta.mode=heads trains as joint: it shifts the projections") and "\n" not in line
        assert line.endswith("set meta.mode=first_order for a meta step, or joint")


def test_its_plan_counts_the_layers_that_moved_and_their_cross_attention(tiny_config):
    plans = [plan_runs(load_plan(tiny_config, more), 1)[0] for more in (WITHOUT, FUSED)]
    assert plans[1].parameters > plans[0].parameters and plans[1].notes == plans[0].notes
    assert plans[1].operations["towers"] > plans[0].operations["towers"] and plans[1].peak > plans[0].peak


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.itm_weight=2"], "objective.itm_weight=2 needs a fusion encoder.* set objective.itm_weight=0"),
        (["objective.mlm_weight=0.5"], "objective.mlm_weight=0.5 needs a fusion encoder"),
        (["objective.contrastive_weight=0"], "every objective weight is 0"),
        (
            [*FUSED, "objective.name=rvlr", "teacher.source=frozen_copy", "objective.cross_modal_relation=true"],
            "set objective.cross_modal_relation=false",
        ),
    ],
)
def test_what_cannot_be_is_said(tiny_config, overrides, said):
    with pytest.raises(ValueError, match=said):
        load_plan(tiny_config, overrides)


def test_a_batch_of_one_id_ends_the_run_with_one_line(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="all 32 pairs of the batch share the id"):
        train(tiny_config, tmp_path / "run", *FUSED, "data.pair_id=json:preset", "train.max_steps=1")
