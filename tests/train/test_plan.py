"""The plan of a run: its one model held to measured peaks, its counts to formulas, and what the command prints."""

import gc
import json
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from typer.testing import CliRunner

from vlscale.cli import app
from vlscale.config import PlannedRun, load_plan, parse_overrides, validate
from vlscale.data.images import ImageSpec, normalise
from vlscale.distributed import Ranks
from vlscale.models.checkpointing import checkpoint_blocks
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder
from vlscale.models.masked_head import MaskedHead
from vlscale.models.rows import unit
from vlscale.models.teacher_heads import TeacherHeads
from vlscale.objectives.masked_language import Words
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import Config
from vlscale.train.checkpoint_files import Files, HostBuffers
from vlscale.train.engine import Engine, start_ranks
from vlscale.train.fusing import Draws
from vlscale.train.memory_plan import RunPlan, plan_run
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS

TOWER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}
PAIRS, SIDE, LENGTH = 64, 32, 16
# Of a trace, which is a hundred megabytes of JSON: when, how many bytes and where.
CHANGE = re.compile(r'"name": "\[memory\]"[^{]*"ts": ([\d.]+)[^{]*\{[^}]*"Bytes": (-?\d+)[^}]*"Addr": (\d+)')
BERT = {"model_type": "bert", "vocab_size": 500, "max_position_embeddings": LENGTH + 2}  # as a run fits it


def config_of(*overrides: str) -> Config:
    model = {
        "embed_dim": 64,
        "dropout": 0.0,
        "vision": {"config": TOWER | {"model_type": "vit", "image_size": SIDE, "patch_size": 8}},
        "text": {"max_length": LENGTH, "vocab_size": 500, "config": TOWER | BERT},
    }
    buckets = {"zero_optimization": {"reduce_bucket_size": 2_000_000}}
    base = [f"model={json.dumps(model)}", f"engine={{threads: 1, deepspeed: {json.dumps(buckets)}}}"]
    train = [f"train.global_batch_size={PAIRS}", "train.max_steps=3"]
    return validate(parse_overrides([*base, *train, *overrides]), "test")


def planned(config: Config, world_size: int = 1) -> RunPlan:
    run = PlannedRun("", config)
    return plan_run(run, [run], world_size)


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(config_of().engine)


def measured_peak(config: Config, ranks: Ranks, trace) -> int:
    """Bytes that the CPU allocator held at most, from before the model is built through two steps; at stage 3, where a
    busy machine decides how many gathered parameters meet, through four.

    No garbage is collected meanwhile (steps leave none that holds tensors): a collection may begin on any thread of the
    test runner's, and what is freed on one that the profiler does not watch would stay in the sum.
    """
    gc.collect()
    gc.disable()
    try:
        return _peak_of_steps(config, ranks, trace)
    finally:
        gc.enable()


def _peak_of_steps(config: Config, ranks: Ranks, trace) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.manual_seed(0)
        model = build_model(config)
        if config.engine.activation_checkpointing:
            checkpoint_blocks(model)
        engine = Engine(model, config, ranks)
        for _ in range((4 if config.engine.zero_stage == 3 else 2) * config.train.accumulate_losses):
            if config.meta.mode != "joint":
                meta_step(engine, config, ranks)
                continue
            backward(engine, config, ranks)
            engine.step()
    engine.close()
    profiler.export_chrome_trace(str(trace))
    found = [(float(time), int(at), int(size)) for time, size, at in CHANGE.findall(trace.read_text())]
    return peak_of((at, size) for _, at, size in sorted(found, key=lambda change: change[0]))


def peak_of(changes: Iterable[tuple[int, int]]) -> int:
    """The most that was there at once, of (address, bytes; below 0 where freed). Frees on threads that the profiler
    does not watch are missing from its own total; an address that is given out again was free."""
    there: dict[int, int] = {}
    now = most = 0
    for address, size in changes:
        now += max(size, 0) - there.pop(address, 0)
        if size > 0:
            there[address] = size
        most = max(most, now)
    return most


def build_model(config: Config) -> DualEncoder:
    model = build_dual_encoder(config.model)
    if config.objective.mlm_weight > 0:
        model.masked_head = MaskedHead(model.fusion.width, 500)
    if config.objective.name == "rvlr":
        model.teacher_heads = TeacherHeads(64, 64, 64)
    model.normalise = partial(normalise, spec=ImageSpec(SIDE, (0.5,) * 3, (0.5,) * 3))
    return model


def backward(engine: Engine, config: Config, ranks: Ranks) -> None:
    local = PAIRS // ranks.size
    ids = torch.ones(local, LENGTH, dtype=torch.long)
    pixels = torch.zeros(local, 3, SIDE, SIDE, dtype=torch.uint8)
    pair_id = torch.arange(local) + local * ranks.rank
    given = {"pixels": pixels, "input_ids": ids, "attention_mask": ids.clone(), "chunk_size": config.train.chunk_size}
    if config.model.fusion is not None:
        batch = SimpleNamespace(
            keys=range(local), pair_id=pair_id, positions=pair_id, input_ids=ids, attention_mask=ids
        )
        given = Draws().fusing(batch, given, Words(500, 2, np.array([0])), config.objective, ranks)
    teachers = {}
    if config.teacher.source != "none":
        dtype = next(engine.module.parameters()).dtype
        teachers = {name: unit(torch.randn(local, 64)).to(dtype) for name in ("teacher_image", "teacher_text")}
    if config.objective.name == "rvlr":
        given |= teachers
    out = engine(**given)
    rows = Embedded(out.image, out.text, out.logit_scale, out.logit_bias, pair_id, **teachers)
    if out.teacher:
        projected = {"projected_teacher_image": out.teacher.image, "projected_teacher_text": out.teacher.text}
        rows = replace(rows, text_share=out.teacher.text_share, **projected)
    if out.fused:
        rows = replace(rows, fused=out.fused.cls, matching=out.fused.matching, masked=out.fused.masked)
    engine.backward(total_loss(rows, config.objective, ranks, config.engine.comm)[0])


class Given:
    """Inputs of a meta step: blank pictures, random teachers."""

    fuses = False

    def student(self, batch: SimpleNamespace) -> dict[str, torch.Tensor]:
        ids = torch.ones(PAIRS, LENGTH, dtype=torch.long)
        pixels = torch.zeros(PAIRS, 3, SIDE, SIDE, dtype=torch.uint8)
        return {"pixels": pixels, "input_ids": ids, "attention_mask": ids.clone()}

    def teacher_rows(self, batch: SimpleNamespace, seen: tuple[bool, bool]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(PAIRS, 64), torch.randn(PAIRS, 64)


def meta_step(engine: Engine, config: Config, ranks: Ranks) -> None:
    batch = SimpleNamespace(keys=range(PAIRS), pair_id=torch.arange(PAIRS))
    parts = StepParts(engine, Given(), config.objective, config.meta, ranks, config.train.chunk_size)
    STEPS[config.meta.mode](parts, batch, copy(batch) if config.meta.test_batch == "next" else batch)


FUSION = "model.fusion={source: text}"
RVLR_ALONE = ["objective.name=rvlr", "objective.itm_weight=0", "teacher.source=cache", "teacher.cache=none"]
COVLR = ["objective.name=covlr", "teacher.source=cache", "teacher.cache=none"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=0", *COVLR, "meta.mode=heads"],
        ["engine.zero_stage=0", *COVLR, "meta.mode=heads", "meta.test_batch=next"],
        ["engine.zero_stage=2", *COVLR, "meta.mode=first_order"],
        ["engine.zero_stage=0", *COVLR, "meta.mode=first_order", "train.chunk_size=16"],
        ["engine.zero_stage=0", *COVLR, "meta.mode=finite_difference"],
        ["engine.zero_stage=2", *COVLR, "meta.mode=finite_difference", "train.chunk_size=16"],
        ["engine.zero_stage=0"],
        ["engine.zero_stage=2"],
        ["engine.zero_stage=3"],
        ["engine.zero_stage=2", "engine.dtype=bf16"],
        ["engine.zero_stage=0", "train.chunk_size=16"],
        ["engine.zero_stage=2", "train.chunk_size=16"],
        ["engine.zero_stage=2", "model.locked=[vision]"],
        ["engine.zero_stage=0", "train.accumulate_losses=2"],
        ["engine.zero_stage=1", "train.accumulate_losses=2"],
        ["engine.zero_stage=2", "engine.activation_checkpointing=true"],
        ["engine.zero_stage=0", FUSION],
        ["engine.zero_stage=0", FUSION, "train.chunk_size=16"],
        ["engine.zero_stage=2", FUSION, "objective.mlm_weight=1"],
        ["engine.zero_stage=3", FUSION, "objective.mlm_weight=1", "train.chunk_size=16"],
        ["engine.zero_stage=2", FUSION, "engine.dtype=bf16"],
        ["engine.zero_stage=2", *RVLR_ALONE],
        ["engine.zero_stage=0", *RVLR_ALONE, "objective.relation_distance=kl", "train.chunk_size=16"],
        ["engine.zero_stage=2", *RVLR_ALONE, "objective.relation_distance=mse", "engine.dtype=bf16"],
        ["engine.zero_stage=0", *RVLR_ALONE, FUSION, "objective.itm_weight=1"],
        ["engine.zero_stage=2", FUSION, "engine.activation_checkpointing=true"],
    ],
    ids=lambda overrides: " ".join(o.split(".", 1)[1] for o in overrides if "teacher" not in o),
)
def test_the_peak_is_within_15_percent_of_the_measured_one(ranks, tmp_path, overrides):
    config = config_of(*overrides)
    plan, measured = planned(config), measured_peak(config, ranks, tmp_path / "trace.json")
    assert plan.peak == pytest.approx(measured, rel=0.15), (plan.memory, plan.moments)


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=0"],
        ["engine.zero_stage=1", "optim.name=sgd"],
        ["engine.zero_stage=2", "engine.dtype=bf16", "train.elastic=true"],
        ["engine.zero_stage=3", "model.locked=[vision]"],
    ],
    ids=" ".join,
)
def test_the_copy_that_a_checkpoint_is_written_from_is_counted(ranks, tmp_path, overrides):
    config = config_of(*overrides)
    engine = Engine(build_model(config), config, ranks)
    backward(engine, config, ranks)
    engine.step()
    buffers = HostBuffers()
    files = Files(buffers)
    engine.save(tmp_path / "checkpoint", files)
    if config.train.elastic:
        engine.save_full(files)
    engine.close()
    copied = sum(tensor.nbytes for tensor in buffers._used)
    assert planned(config).host_memory["checkpoint on its way"] == pytest.approx(copied, rel=0.02)
    at_once = planned(config_of(*overrides, "train.checkpoint_async=false"))
    assert "checkpoint on its way" not in at_once.host_memory


def test_a_fusion_encoder_is_counted_with_what_towers_do_for_it():
    alone, with_words = planned(config_of()), planned(config_of(FUSION, "objective.mlm_weight=1"))
    model, dual = build_model(config_of(FUSION, "objective.mlm_weight=1")), build_model(config_of())
    counts = [sum(p.numel() for p in own.parameters()) for own in (model, dual)]
    assert with_words.parameters - alone.parameters == counts[0] - counts[1]
    matching, distilling = planned(config_of(FUSION)), planned(config_of(FUSION, *RVLR_ALONE))
    assert with_words.parameters - matching.parameters == sum(p.numel() for p in model.masked_head.parameters())
    towers = [plan.operations["towers"] for plan in (alone, distilling, matching, with_words)]
    # one text layer of three moves to the fusion encoder and gets cross-attention; then it sees 3 and 4 times the pairs
    assert towers[0] < towers[1] < towers[2] < towers[3]
    assert (towers[2] - towers[1]) / 2 == pytest.approx(_fusion_operations(), rel=0.05)
    by_chunks = planned(config_of(FUSION, "train.chunk_size=16"))
    assert by_chunks.operations["towers"] > 1.9 * towers[2]  # towers see negatives too, twice, and choose before
    assert by_chunks.peak < 0.6 * matching.peak
    assert "fusion" not in " ".join(with_words.notes)


def _fusion_operations() -> int:
    """Forward and backward of the one layer on PAIRS pairs: queries, keys, values and outputs of both attentions, the
    two products of each, and the two of the feed-forward part."""
    width, inner, words, patches = TOWER["hidden_size"], TOWER["intermediate_size"], LENGTH, (SIDE // 8) ** 2 + 1
    projections = width**2 * (4 * words + 2 * words + 2 * patches)
    attention = 2 * words * width * (words + patches)
    return 3 * 2 * PAIRS * (projections + attention + 2 * words * width * inner)


@pytest.mark.parametrize(
    ("meta", "towers", "losses"),
    [
        ("heads", 1, (1, 1)),
        ("heads, test_batch: next", 2, (1, 1)),
        ("first_order", 2, (1, 1)),
        ("finite_difference", 4, (3, 1)),
    ],
)
def test_a_meta_step_is_counted_by_its_passes(meta, towers, losses):
    plain, joint = planned(config_of(), 4), planned(config_of(*COVLR), 4)
    plan = planned(config_of(*COVLR, f"meta={{mode: {meta}}}"), 4)
    assert plan.operations["towers"] == towers * joint.operations["towers"]
    contrast, relations = plain.operations["losses"], joint.operations["losses"] - plain.operations["losses"]
    assert plan.operations["losses"] == losses[0] * contrast + losses[1] * relations
    kept = {"first_order": 1, "finite_difference": 3}.get(meta, 0)
    assert plan.memory.get("meta step", 0) == (4 * plan.learned * (kept + 1) if kept else 0)
    more = plan.traffic["gradients"] - joint.traffic["gradients"]
    assert more == pytest.approx(0.75 * 8 * kept * plan.learned, abs=1)


def test_rvlr_is_counted_by_its_terms():
    """Contrasts itc, iic, ttc; relations of pictures and of captions to both teachers' mixture, and of each teacher to
    it, where only the mixture learns; the projections of both teachers and the mixture's weight."""
    plain, plan = planned(config_of()), planned(config_of(*RVLR_ALONE))
    heads = TeacherHeads(64, 64, 64)
    assert plan.learned - plain.learned == sum(p.numel() for p in heads.parameters()) == 2 * 64 * 64 + 1
    match = 2 * (2 * PAIRS**2 * (192 + 192)) + 2 * (2 * PAIRS**2 * (192 + 128))
    assert plan.operations["losses"] == 3 * plain.operations["losses"] + match
    projections = 2 * (2 * PAIRS * 64 * 64)
    assert plan.operations["teachers"] == 2 * projections  # forward, and the weights' gradient
    by_kl = planned(config_of(*RVLR_ALONE, "objective.relation_distance=kl"))
    assert by_kl.operations["losses"] - plan.operations["losses"] == 4 * PAIRS**2 * (2 * 192 + 128 - 2 * 128)
    # both sides once more, and of the teachers' gradients what their weights take
    crossed = planned(config_of(*RVLR_ALONE, "objective.cross_modal_relation=true"))
    assert crossed.operations["losses"] - plan.operations["losses"] == 2 * PAIRS**2 * (256 + 256)
    assert not any("rvlr" in note for note in plan.notes)


def test_operations_are_those_of_the_layers():
    """Two operations a multiply-add: 12 h^2 weights a block and token, twice s h for scores and values."""
    plan = planned(config_of())
    tokens, width = {"vision": (SIDE // 8) ** 2 + 1, "text": LENGTH}, TOWER["hidden_size"]
    forward = sum(PAIRS * s * 3 * 2 * (12 * width**2 + 2 * s * width) for s in tokens.values())
    assert plan.operations["towers"] == pytest.approx(3 * forward, rel=0.1)
    assert plan.operations["losses"] == 8 * PAIRS**2 * 64
    by_chunks = planned(config_of("train.chunk_size=16"))
    assert by_chunks.operations["towers"] == pytest.approx(4 / 3 * plan.operations["towers"], rel=0.01)
    assert by_chunks.memory["activations"] < 0.3 * plan.memory["activations"]


@pytest.mark.parametrize(
    ("stage", "share"), [(0, (1, 1, 1)), (1, (1, 1, 1 / 4)), (2, (1, 1 / 4, 1 / 4)), (3, (1 / 4,) * 3)]
)
def test_stages_divide_what_they_say(stage, share):
    """Weights, gradients, optimizer states over four ranks."""
    plan = planned(config_of(f"engine.zero_stage={stage}"), 4)
    whole = 4 * plan.learned
    expected = [whole * share[0], whole * share[1], 2 * whole * share[2]]
    found = [plan.memory[name] for name in ("weights", "gradients", "optimizer states")]
    assert found == pytest.approx(expected, rel=1e-3)


def test_traffic_follows_the_formulas():
    """W = 4, e = 2: a contrast brings (W-1)/W N (D e + 4 D + 8 + 20) bytes, ZeRO-2 (W-1)/W P e of gradients and
    weights."""
    plan = planned(config_of("engine.dtype=bf16", "engine.zero_stage=2"), 4)
    assert plan.traffic["losses"] == int(0.75 * PAIRS * (64 * 2 + 4 * 64 + 8 + 20))
    assert plan.traffic["gradients"] == int(0.75 * plan.learned * 2)
    assert plan.traffic["weights"] == int(0.75 * plan.parameters * 2)
    assert planned(config_of("engine.zero_stage=0"), 4).traffic["gradients"] == int(1.5 * plan.learned * 4)
    assert planned(config_of()).traffic == {}


@pytest.mark.parametrize(("comm", "factor"), [("gather", 1.0), ("ring", 0.2)])
def test_a_large_gallery_is_counted_by_the_way_it_comes(comm, factor, monkeypatch):
    """By ring a rank holds three blocks, not all columns."""
    monkeypatch.setattr("vlscale.train.comm.choose_comm", lambda *args, **kwargs: comm)
    plan = planned(config_of("train.global_batch_size=8192", "train.chunk_size=8", "objective.impl=chunked"), 64)
    tiles = 128 * 2048 * 4 * 4
    gathered = 8192 * 64 * 8
    assert plan.memory["loss"] - tiles == pytest.approx(factor * gathered, rel=0.6 if comm == "ring" else 0.15)


def test_a_teacher_costs_its_weights_and_its_forward():
    plain = planned(config_of())
    plan = planned(config_of("teacher.source=frozen_copy", "objective={name: covlr, relation_weight: 0.2}"))
    assert plan.memory["teacher weights"] == pytest.approx(plain.memory["weights"], rel=0.01)
    assert plan.operations["teachers"] == pytest.approx(plain.operations["towers"] / 3, rel=0.01)
    relations = 2 * PAIRS**2 * (4 * (64 + 128) + 2 * 64)
    assert plan.operations["losses"] == plain.operations["losses"] + relations


@pytest.mark.parametrize(
    ("overrides", "world_size", "said"),
    [
        (["train.global_batch_size=33"], 2, "33 cannot be divided by the world size 2"),
        (["train.chunk_size=24"], 1, "chunk_size=24 does not divide a rank's 64 pairs"),
        (["model.vision={source: null, config: null}"], 1, "exactly one of model.vision.source and"),
    ],
)
def test_what_cannot_run_cannot_be_planned(overrides, world_size, said):
    with pytest.raises(ValueError, match=said):
        planned(config_of(*overrides), world_size)


def test_the_command_plans_every_run_and_starts_none(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stages.yaml"
    path.write_text(
        f"base: {tiny_config}\nstages: {{teachers: {{}}}}\nobjective: {{name: covlr}}\n"
        "teacher: {source: hf, image: 'stage:teachers', text: 'stage:teachers'}\n"
    )
    path.write_text(
        path.read_text().replace(
            "{teachers: {}}", "{teachers: {teacher: {source: none}, objective: {name: contrastive}}}"
        )
    )
    assert len(load_plan(path)) == 2
    done = CliRunner().invoke(app, ["train", str(path), "--plan", "--world-size", "2"])
    assert done.exit_code == 0, done.output
    for line in (
        "teachers: 2 ranks, 16 pairs a rank, ZeRO-2, fp32",
        "teacher weights",
        "time of a step: not estimated",
    ):
        assert line in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["stages.yaml"]
    timed = ["--tflops", "0.1", "--gigabytes", "2"]
    said = CliRunner().invoke(app, ["train", str(path), "--plan", "--world-size", "2", *timed]).output
    assert "from the given 0.1 TFLOP/s and 2 GB/s, nothing overlapped" in said


def test_training_asks_for_a_folder_and_takes_no_world_size(tiny_config):
    for arguments, said in (([], "--out is not given"), (["--world-size", "2"], "belong to --plan")):
        failed = CliRunner().invoke(app, ["train", str(tiny_config), *arguments]).exception
        assert isinstance(failed, ValueError) and said in str(failed)


def test_a_pretrained_tower_is_planned_from_its_config_alone(tmp_path):
    """A folder without weights, as the hub's config.json would be."""
    AutoConfig.for_model("vit", **TOWER, image_size=SIDE, patch_size=8).save_pretrained(tmp_path)
    plan = planned(config_of(f"model.vision={{source: {tmp_path}, config: null}}"))
    assert plan.memory == planned(config_of()).memory


def test_pictures_that_the_device_makes_are_floats():
    plain, plan = planned(config_of()), planned(config_of("data.decode=device"))
    pictures = PAIRS * 3 * SIDE**2
    assert plan.memory["inputs"] - plain.memory["inputs"] == 3 * pictures
    assert any("decoded pictures, of any sizes, are not counted" in note for note in plan.notes)
