"""RVLR's loss against the paper's sum (arXiv 2412.10761), written densely, with every weight another and w off its
middle; the official recipe's weights; and what a run without a fusion encoder says.

    L = itc + itm_w itm + iic_w iic + ttc_w ttc + kd_w kd + kd_image_w kd_image + kd_text_w kd_text
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.models.teacher_heads import TeacherHeads
from vlscale.objectives.total import Embedded, relations_loss, total_loss
from vlscale.sections import ObjectiveConfig
from vlscale.train.comm import Comm
from vlscale.train.setup import build_parts, gathered_anyway

ROOT = Path(__file__).resolve().parents[2]
N, D = 12, 6
IDS = torch.arange(N).clamp(max=N - 2)  # the last two pairs are positives of each other
WEIGHTS = {"contrastive": 0.7, "itm": 1.7, "iic": 0.3, "ttc": 0.5, "kd": 1.1, "kd_image": 0.9, "kd_text": 1.3}
KINDS = ["mae", "mse", "kl", "wasserstein"]
Leaves = dict[str, torch.Tensor]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, width: int) -> torch.Tensor:
    return F.normalize(drawn(seed, width), dim=1)


TEACHER_IMAGE, TEACHER_TEXT = unit(3, 5), unit(4, 7)


def given(fused: bool = False, logit: float = 0.8) -> tuple[Leaves, Embedded]:
    """All that the loss is differentiated by, and what the package makes of it; w = 0.69."""
    torch.manual_seed(0)
    heads = TeacherHeads(5, 7, D).double()
    heads.mixture.data.fill_(logit)
    own = {"image": unit(1, D), "text": unit(2, D), "scale": torch.tensor(9.0, dtype=torch.float64)}
    own |= {"fused": unit(5, 9), "matching": drawn(6, 3, 2)} if fused else {}
    own = {name: leaf.requires_grad_() for name, leaf in own.items()} | dict(heads.named_parameters())
    near = heads(TEACHER_IMAGE, TEACHER_TEXT)
    return own, Embedded(
        own["image"], own["text"], own["scale"], None, IDS, teacher_image=TEACHER_IMAGE, teacher_text=TEACHER_TEXT,
        projected_teacher_image=near.image, projected_teacher_text=near.text, text_share=near.text_share,
        fused=own.get("fused"), matching=own.get("matching"),
    )  # fmt: skip


def contrast(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in both directions; pairs of one id share the target."""
    logits, target = scale * first @ second.T, (IDS[:, None] == IDS).double()
    target = target / target.sum(1, keepdim=True)
    return -((target * logits.log_softmax(1)).sum() + (target * logits.T.log_softmax(1)).sum()) / (2 * N)


def distance(relations: torch.Tensor, mixture: torch.Tensor, kind: str, taus: tuple[float, float]) -> torch.Tensor:
    """Of the two (N, N) matrices without their diagonals, each over its temperature."""
    off = ~torch.eye(N, dtype=torch.bool)
    s, e = (matrix[off].view(N, N - 1) / tau for matrix, tau in zip((relations, mixture), taus, strict=True))
    if kind == "kl":
        return (e.softmax(1) * (e.log_softmax(1) - s.log_softmax(1))).sum() / N
    if kind == "wasserstein":
        s, e = s.sort(1).values, e.sort(1).values
    return ((s - e) ** 2 if kind == "mse" else (s - e).abs()).mean()


def papers_terms(own: Leaves, kind: str, cross: bool, taus: tuple[float, float]) -> Leaves:
    image, text, scale = own["image"], own["text"], own["scale"]
    w = 1 / (1 + torch.exp(-own["mixture"][0]))
    of_image, of_text = TEACHER_IMAGE @ TEACHER_IMAGE.T, TEACHER_TEXT @ TEACHER_TEXT.T
    mixture = w * of_text + (1 - w) * of_image
    students = [image @ image.T, text @ text.T] + ([(image @ text.T + text @ image.T) / 2] if cross else [])
    students = [own["fused"] @ own["fused"].T] if "fused" in own else students
    found = {
        "contrastive": contrast(image, text, scale),
        "iic": contrast(image, F.normalize(TEACHER_IMAGE @ own["image_projection.weight"].T, dim=1), scale),
        "ttc": contrast(text, F.normalize(TEACHER_TEXT @ own["text_projection.weight"].T, dim=1), scale),
        "kd": sum(distance(student, mixture, kind, taus) for student in students) / len(students),
        "kd_image": distance(of_image, mixture, kind, taus[1:] * 2),  # at one temperature: 0 where they are the same
        "kd_text": distance(of_text, mixture, kind, taus[1:] * 2),
    }
    if "matching" in own:  # of each pair index 1 says that it matches, of its two negatives index 0
        logs = own["matching"].log_softmax(2)
        found["itm"] = -(logs[:, 0, 1] + logs[:, 1, 0] + logs[:, 2, 0]).sum() / (3 * N)
    return found


def objective_of(kind: str, weights: dict[str, float], cross: bool = False, teacher: float = 0.2) -> ObjectiveConfig:
    named = {f"{name}_weight": weight for name, weight in weights.items()}
    named |= {"relation_distance": kind, "cross_modal_relation": cross}
    return ObjectiveConfig(name="rvlr", student_temperature=0.2, teacher_temperature=teacher, **named)


CASES = [(kind, False, fused, WEIGHTS, 0.2) for kind in KINDS for fused in (False, True)]
CASES += [(kind, True, False, WEIGHTS, 0.2) for kind in ("mae", "mse")]
CASES += [("kl", False, False, WEIGHTS, 0.13)]  # the mixture at its own temperature


@pytest.mark.parametrize(("kind", "cross", "fused", "weights", "tau"), CASES)
def test_the_loss_and_its_gradient_are_the_papers(kind, cross, fused, weights, tau):
    own, rows = given(fused)
    found, parts = total_loss(rows, objective_of(kind, weights, cross, tau), Ranks())
    exact = papers_terms(own, kind, cross, (0.2, tau))
    loss = sum(weights[name] * term for name, term in exact.items())
    torch.testing.assert_close(found, loss, rtol=1e-11, atol=0)
    for name in exact:
        torch.testing.assert_close(parts[name], exact[name].detach(), rtol=1e-11, atol=1e-14)
    got, expected = (torch.autograd.grad(value, list(own.values())) for value in (found, loss))
    for name, first, second in zip(own, got, expected, strict=True):
        assert (first - second).norm() <= 1e-10 * second.norm(), name
        assert second.norm() > 1e-4, name


def test_by_mae_at_equal_weights_both_teachers_terms_leave_the_mixture_alone():
    """|a - b| w + |a - b| (1 - w) is |a - b|: kd_image + kd_text is then constant in w."""
    for kind, image, text, constant in (("mae", 1, 1, True), ("mae", 1, 2, False), ("mse", 1, 1, False)):
        weights = {"contrastive": 0, "iic": 0, "ttc": 0, "kd": 0, "kd_image": image, "kd_text": text}
        values = []
        for logit in (-2.0, 0.3, 1.5):
            own, rows = given(logit=logit)
            loss, _ = relations_loss(rows, objective_of(kind, weights), Ranks())
            (slope,) = torch.autograd.grad(loss, own["mixture"])
            assert (abs(float(slope)) < 1e-12) == constant
            values.append(float(loss.detach()))
        assert (max(values) - min(values) < 1e-12) == constant


@pytest.mark.parametrize("name", ["rvlr-official", "rvlr-official-cpu"])
def test_the_official_recipe_has_the_papers_weights(name):
    objective = load_plan(ROOT / "configs" / f"{name}.yaml")[-1].config.objective
    assert (objective.name, objective.relation_distance) == ("rvlr", "mae")
    assert (objective.contrastive_weight, objective.matching_weight) == (1, 2)
    for term, weight in {"iic": 1, "ttc": 2, "kd": 2, "kd_image": 1, "kd_text": 1}.items():
        assert getattr(objective, f"{term}_weight") == weight
        assert getattr(ObjectiveConfig(name="rvlr"), f"{term}_weight") == pytest.approx(weight / 10)  # the default


def test_without_a_fusion_encoder_a_run_says_that_matching_has_no_weight(tiny_config, tmp_path, caplog):
    line = "objective.itm_weight is 0: matching needs a fusion encoder, and the model has none"
    bert = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
    fusion = [f"model.text.config={{{bert}, initializer_range: 0.3}}", "model.fusion={source: text}"]
    rvlr = ["objective.name=rvlr", "teacher.source=frozen_copy"]
    for overrides, says in ((rvlr, True), ([*rvlr, *fusion], False), ([], False)):
        caplog.clear()
        (run,) = load_plan(tiny_config, overrides)
        build_parts(run.config, tmp_path / "none", Ranks())
        assert (line in caplog.messages) == says


def test_what_a_ring_cannot_bring_is_named(tiny_config):
    """Sorting and drawing take all rows at once: who asks for a ring is told."""
    bert = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
    keys = ["objective={name: rvlr, relation_distance: wasserstein}", "teacher.source=frozen_copy"]
    fusion = [f"model.text.config={{{bert}, initializer_range: 0.3}}", "model.fusion={source: text}"]
    sorts, draws = "objective.relation_distance=wasserstein", "objective.itm_weight"
    for overrides, expected in (
        (["engine.comm=ring", *keys], [sorts]),
        (["engine.comm=half_ring", *keys, *fusion], [sorts, draws]),
        (["engine.comm=ring", *keys, *fusion, "objective.relation_distance=mae"], [draws]),
        (["engine.comm=ring", *keys, *fusion, "objective.relation_distance=kl", "objective.itm_weight=0"], []),
        (["engine.comm=gather", *keys, *fusion], []),
        (keys, []),
    ):
        (run,) = load_plan(tiny_config, overrides)
        way = Comm(run.config.engine.comm, gathered=0, memory=0).way
        assert [line.split()[0] for line in gathered_anyway(run.config, way)] == expected
    by_memory = Comm("auto", gathered=1 << 40, memory=1 << 40).way
    assert [line.split()[0] for line in gathered_anyway(run.config, by_memory)] == [sorts]
