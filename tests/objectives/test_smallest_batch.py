"""Global batches over which a term says nothing: refused, and the losses there are what the refusals say."""

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from vlscale.cli import app
from vlscale.config import validate
from vlscale.kernels import contrastive_loss, relation_kl_loss, relation_match_loss

OFF = {"contrastive_weight": 0}
RVLR = {"name": "rvlr", **OFF, "iic_weight": 0, "ttc_weight": 0}
FUSION = {"fusion": {"source": "text"}}
SMALLEST = [  # objective, model, pairs that it takes, and what the refusal of one fewer names
    ({}, {}, 2, "objective.contrastive_weight tells a pair"),
    ({"loss": "sigmoid"}, {}, 2, "objective.contrastive_weight tells a pair"),
    (OFF | {"view_weight": 1}, {}, 2, "objective.view_weight tells a pair"),
    (OFF | {"caption_weight": 1}, {}, 2, "objective.caption_weight tells a pair"),
    ({"name": "covlr"}, {}, 3, "or objective.relation_weight=0"),
    ({"name": "covlr", "relation_weight_image": 0}, {}, 3, "or objective.relation_weight=0"),
    ({"name": "covlr", "relation_weight": 0}, {}, 2, "objective.contrastive_weight tells a pair"),
    (RVLR | {"iic_weight": 1, "kd_weight": 0}, {}, 2, "objective.iic_weight tells a pair"),
    (RVLR, {}, 2, "kd_text_weight"),
    (RVLR | {"relation_distance": "wasserstein"}, {}, 2, "kd_text_weight"),
    (RVLR | {"relation_distance": "kl"}, {}, 3, "objective.relation_distance=mae with 2"),
    (OFF | {"itm_weight": 1}, FUSION, 2, "or objective.itm_weight=0"),
]


def check(objective: dict, model: dict, pairs: int) -> None:
    sections = {"objective": objective, "model": model, "train": {"global_batch_size": pairs}}
    validate(sections | {"teacher": {"source": "frozen_copy"}}, "test")


@pytest.mark.parametrize(("objective", "model", "least", "said"), SMALLEST)
def test_fewer_pairs_than_say_something_are_refused(objective, model, least, said):
    check(objective, model, least)
    with pytest.raises(
        ValueError, match=f"train.global_batch_size={least - 1}: .*expected at least {least}"
    ) as refused:
        check(objective, model, least - 1)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_masked_words_need_no_other_pair():
    check(OFF | {"itm_weight": 0, "mlm_weight": 1}, FUSION, 1)


def test_the_command_ends_with_one_line(tiny_config, tmp_path):
    command = ["train", str(tiny_config), "--out", str(tmp_path / "run"), "train.global_batch_size=1"]
    failed = CliRunner().invoke(app, command).exception
    assert isinstance(failed, ValueError) and "objective.contrastive_weight tells a pair" in str(failed)
    assert not (tmp_path / "run").exists()


def largest_gradient(loss: torch.Tensor, rows: torch.Tensor) -> float:
    return float(torch.autograd.grad(loss, rows)[0].abs().max())


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_relations_of_two_rows_say_nothing_by_kl(scope, relation):
    for pairs, silent in ((1, True), (2, True), (3, False)):
        rows = F.normalize(torch.randn(2, pairs, 4, generator=torch.Generator().manual_seed(0)).double(), dim=2)
        student = rows[0].requires_grad_()
        how = {"student_temperature": 0.1, "teacher_temperature": 0.1, "scope": scope, "relation": relation}
        loss = relation_kl_loss(student, rows[1], **how)
        assert (abs(float(loss.detach())) < 1e-12 and largest_gradient(loss, student) < 1e-12) == silent


def test_one_pair_says_nothing_in_a_contrast_and_two_rows_do_by_mae():
    rows = F.normalize(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    image = rows[0, :1].requires_grad_()
    loss = contrastive_loss(image, rows[1, :1], 10.0)
    assert float(loss.detach()) == 0 and largest_gradient(loss, image) == 0
    student = rows[0].detach().requires_grad_()
    loss = relation_match_loss(student, [rows[1]], torch.ones(1), temperature=0.1)
    assert float(loss.detach()) > 0.1 and largest_gradient(loss, student) > 0.1
