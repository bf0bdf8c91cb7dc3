"""What a run says of its relations: by hand, the same after a resume, and a teacher that says nothing."""

import functools
import math
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F

from tests.train.forked_ranks import Group, run_groups, said
from tests.train.plain_engine import PlainEngine
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.objectives.total import Embedded
from vlscale.sections import ObjectiveConfig
from vlscale.train.diagnostics import fused_facts, gradient_cosine, parameter_cosine, relation_facts
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts, joint_step

BERT = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
FUSED = [f"model.text.config={{{BERT}, initializer_range: 0.3}}", "model.fusion={source: text}"]
RVLR = ["objective={name: rvlr, itm_weight: 2, kd_weight: 2}", "teacher.source=frozen_copy", "log.progress=false"]
COVLR = ["objective.name=covlr", "teacher.source=frozen_copy", "log.progress=false"]


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_student_that_is_its_teacher_has_its_relations():
    image, text = rows(20, 8, 0), rows(20, 8, 1)
    facts = relation_facts(image, text, image, text, ObjectiveConfig())
    assert facts["rank_correlation_image"] == pytest.approx(1) and facts["relation_change_text"] == 0
    assert facts["entropy_text"] == pytest.approx(facts["teacher_entropy_text"])
    assert "image_strength" not in facts  # nothing has moved


def test_numbers_by_hand():
    """Four rows on two axes: a row has one relation of 1 and two of 0."""
    image = torch.eye(2).repeat_interleave(2, 0)
    text = -image
    teacher = torch.eye(4)
    facts = relation_facts(image, text, teacher, text, ObjectiveConfig(student_temperature=1.0))
    probabilities = torch.tensor([math.e, 1.0, 1.0]) / (math.e + 2)
    assert facts["entropy_image"] == pytest.approx(float(-(probabilities * probabilities.log()).sum()) / math.log(3))
    assert facts["teacher_entropy_image"] == pytest.approx(1)  # all alike: the maximum
    assert facts["relation_change_image"] == pytest.approx(1 / 3) and facts["relation_change_text"] == 0
    assert facts["image_strength"] == 0  # only the pictures' relations have moved
    assert facts["modality_gap"] == pytest.approx(math.sqrt(2))


def test_the_cosine_of_the_gradients_is_autograds():
    objective = ObjectiveConfig(name="covlr", relation_weight=0.3, impl="reference")
    own = Embedded(
        rows(12, 6, 0), rows(12, 6, 1), torch.tensor(10.0), None, torch.arange(12),
        teacher_image=rows(12, 5, 2), teacher_text=rows(12, 5, 3),
    )  # fmt: skip
    parts = StepParts(None, None, objective, None, Ranks(), None)
    image, text = own.image.clone().requires_grad_(), own.text.clone().requires_grad_()
    labels = torch.arange(12)
    logits = 10 * image @ text.T
    consistency = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    relations = 0.0
    for student, teacher in ((image, own.teacher_image), (text, own.teacher_text)):
        off = ~torch.eye(12, dtype=torch.bool)
        s, t = ((r @ r.T)[off].view(12, 11).div(0.1).log_softmax(1) for r in (student, teacher))
        relations = relations + 0.3 * F.kl_div(s, t, log_target=True, reduction="none").sum(1).mean()
    first, second = (torch.cat(torch.autograd.grad(loss, (image, text))).ravel() for loss in (consistency, relations))
    expected = float(torch.cosine_similarity(first, second, 0))
    assert gradient_cosine(own, parts) == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-3


def test_fused_pairs_have_relations_of_their_own_held_to_the_mixture():
    """Four rows on two axes; the text teacher has other pairs alike, and a quarter of the mixture."""
    fused = torch.eye(2).repeat_interleave(2, 0)
    image, text = fused, torch.eye(2).repeat(2, 1)
    facts = fused_facts(fused, image, text, torch.tensor(0.25), ObjectiveConfig(teacher_temperature=1.0))
    assert set(facts) == {f"{n}_fused" for n in ("entropy", "teacher_entropy", "rank_correlation", "relation_change")}
    assert facts["relation_change_fused"] == pytest.approx((0.25 + 0.25 + 0) / 3)  # of 1, 0, 0 from 0.75, 0.25, 0
    p = torch.tensor([0.75, 0.25, 0.0]).softmax(0)
    assert facts["teacher_entropy_fused"] == pytest.approx(float(-(p * p.log()).sum()) / math.log(3))
    assert facts["rank_correlation_fused"] == pytest.approx(math.sqrt(0.75))  # of 1, 0, 0 with 3, 2, 1


def test_the_cosine_of_fused_pairs_is_of_the_gradients_that_two_trainings_would_have(tiny_config, tmp_path):
    """One by consistency alone, one by relations alone, over towers and fusion encoder."""
    (run,) = load_plan(tiny_config, [*RVLR, *FUSED, "train.global_batch_size=16"])
    parts, both = build_parts(run.config, tmp_path / "none", Ranks()), run.config.objective
    parts.model.double().eval()
    for teacher in (parts.teachers.image, parts.teachers.text):
        teacher.to(torch.device("cpu"), torch.float64)
    with closing(iter(build_stream(run.config, parts, Ranks(), None))) as batches:
        batch = next(batches)
    engine, found = PlainEngine(parts.model, torch.float64), []
    at = functools.partial(StepParts, engine, parts.inputs, meta=run.config.meta, ranks=Ranks(), chunk_size=None)
    relations = ("kd_weight", "kd_image_weight", "kd_text_weight")
    consistency = ("contrastive_weight", "itm_weight", "iic_weight", "ttc_weight")
    for none in (relations, consistency):
        objective = both.model_copy(update=dict.fromkeys(none, 0.0))
        joint_step(at(objective=objective).at(0, 0), batch, batch)
        found.append([])
        for name, parameter in parts.model.named_parameters():
            if name.split(".")[0] in ("vision_model", "text_model", "fusion") and "fusion.matching" not in name:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[-1].append(own.ravel().clone())
            parameter.grad = None
    expected = float(torch.cosine_similarity(*(torch.cat(each) for each in found), 0))
    assert 1e-3 < abs(expected) < 0.9
    assert parameter_cosine(at(objective=both).at(0, 0), batch) == pytest.approx(expected, abs=1e-9)


def test_the_probe_is_the_same_after_a_resume(tiny_config, tmp_path):
    given = [*COVLR, "log.diagnostics_every=2", "train.checkpoint_every=2", "train.keep_checkpoints=5"]
    train_plan(load_plan(tiny_config, given), tmp_path / "whole", resume=False)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in whole if "probe_gradient_cosine" in line] == [1, 2, 4, 6]
    (tmp_path / "whole" / "final").rename(tmp_path / "gone")
    last = tmp_path / "whole" / "checkpoints" / "step-6"
    last.rename(tmp_path / "last")
    train_plan(load_plan(tiny_config, given), tmp_path / "whole", resume=True)
    resumed = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    probes = [{k: v for k, v in lines[-1].items() if k.startswith("probe_")} for lines in (whole, resumed)]
    assert probes[0] == probes[1] and len(probes[0]) >= 10


def test_the_probe_is_the_same_at_any_number_of_ranks(tiny_config, tmp_path):
    """Of 32 pairs 12 are looked at: of four ranks, all of the first's, half of the second's, none of the others'."""
    fewer = "import vlscale.train.diagnostics\nvlscale.train.diagnostics.PROBE = 12"
    given = [*COVLR, "log.diagnostics_every=1", "train.max_steps=1"]
    groups = [Group([str(tiny_config), "--out", str(tmp_path / f"{n}"), *given], n, fewer) for n in (1, 4)]
    codes = run_groups(tmp_path, groups)
    assert codes == [[0], [0] * 4], said(tmp_path, 0) + said(tmp_path, 1)
    alone, together = (
        {name: value for name, value in line.items() if name.startswith("probe_")}
        for n in (1, 4)
        for line in read_metrics(tmp_path / f"{n}" / "metrics.jsonl")
    )
    assert len(alone) == 11 and together == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def fused(tiny_config, tmp_path_factory):
    """The metrics of RVLR with a fusion encoder: by one rank; by two at each ZeRO stage; without a probe; and where w
    learns from the teachers alone."""
    place, probe = tmp_path_factory.mktemp("fused"), ["log.diagnostics_every=1"]
    own = {
        "alone": (1, probe),
        "alone without": (1, []),
        **{f"zero {stage}": (2, [f"engine.zero_stage={stage}", *probe]) for stage in range(4)},
        "zero 3 without": (2, ["engine.zero_stage=3"]),
        "zero 3 chunks": (2, ["engine.zero_stage=3", "train.chunk_size=4", *probe]),
        "teachers alone": (1, ["objective.kd_weight=0", *probe]),
    }
    common = [*RVLR, *FUSED, "train.max_steps=2"]
    groups = [
        Group([str(tiny_config), "--out", str(place / name), *common, *more], n) for name, (n, more) in own.items()
    ]
    codes = run_groups(place, groups)
    assert not any(code for each in codes for code in each), "".join(
        said(place, number) for number in range(len(groups))
    )
    return {name: read_metrics(place / name / "metrics.jsonl") for name in own}


def probed(line: dict) -> dict:
    return {name: value for name, value in line.items() if name.startswith("probe_")}


@pytest.mark.parametrize("name", [*(f"zero {stage}" for stage in range(4)), "zero 3 chunks"])
def test_the_probe_of_fused_pairs_is_the_same_over_ranks_at_every_stage(fused, name):
    """Step 2 follows a probe: what it gathered and freed at stage 3 has not changed the training."""
    for alone, together in zip(fused["alone"], fused[name], strict=True):
        assert probed(together) == pytest.approx(probed(alone), rel=1e-3, abs=1e-5) and len(probed(alone)) == 15
        assert -0.999 < alone["probe_gradient_cosine"] < 0.999 and alone["probe_gradient_cosine"] != 0
        assert 0 < alone["probe_entropy_fused"] < 1 and together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["alone", "zero 3"])
def test_a_probe_of_fused_pairs_leaves_the_training_as_it_is(fused, name):
    for looked, without in zip(fused[name], fused[f"{name} without"], strict=True):
        assert {k: looked[k] for k in ("loss", "grad_norm", "keys")} == {
            k: without[k] for k in ("loss", "grad_norm", "keys")
        }


def test_the_share_of_the_mixture_is_told_wherever_it_learns(fused):
    lines = fused["teachers alone"]
    assert all("kd" not in line and 0 < line["mixture_text"] < 1 for line in lines)
    assert {line["probe_gradient_cosine"] for line in lines} == {0.0}  # no relation of the student is held


def test_a_constant_teacher_stops_the_run_before_anything_is_written(tiny_config, tmp_path):
    """Untrained captions of so small a spread are all alike."""
    given = [*COVLR, "model.text.config.initializer_range=0.0001"]
    with pytest.raises(ValueError, match=r"teacher.text is constant: .* give a trained teacher"):
        train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_no_diagnostics_are_recorded_unless_asked_for(tiny_config, tmp_path):
    train_plan(load_plan(tiny_config, [*COVLR, "train.max_steps=1"]), tmp_path / "run", resume=False)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not [name for name in line if name.startswith("probe_")]


def test_parts_without_a_weight_have_no_gradient_to_compare():
    objective = ObjectiveConfig(name="covlr", contrastive_weight=0, relation_weight=0.3, relation_weight_image=0)
    own = Embedded(
        rows(12, 6, 0), rows(12, 6, 1), torch.tensor(10.0), None, torch.arange(12), teacher_text=rows(12, 5, 3)
    )
    assert gradient_cosine(own, StepParts(None, None, objective, None, Ranks(), None)) == 0


def test_second_views_are_contrasted_with_first_ones():
    """Of the same pictures another view: the gradient is not that of a picture with itself."""
    objective = ObjectiveConfig(name="covlr", contrastive_weight=0, view_weight=1, relation_weight=0.3)
    given = {"teacher_image": rows(12, 5, 2), "teacher_text": rows(12, 5, 3), "second_text": rows(12, 6, 5)}
    parts = StepParts(None, None, objective, None, Ranks(), None)
    first = Embedded(rows(12, 6, 0), rows(12, 6, 1), torch.tensor(10.0), None, torch.arange(12), **given)
    cosines = []
    for seed in (7, 8):
        first.second_image = rows(12, 6, seed)
        cosines.append(gradient_cosine(first, parts))
    assert abs(cosines[0] - cosines[1]) > 1e-3
