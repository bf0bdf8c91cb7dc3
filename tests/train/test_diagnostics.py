"""What a run says of its relations: by hand, the same after a resume, and a teacher that says nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.train.forked_ranks import Group, run_groups, said
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.objectives.total import Embedded
from vlscale.sections import ObjectiveConfig
from vlscale.train.diagnostics import gradient_cosine, relation_facts
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.step import StepParts

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
