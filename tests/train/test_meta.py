"""The meta steps in float64 against autograd's create_graph over the whole model, on one process."""

from contextlib import closing, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.train.meta_reference import reference_loss
from tests.train.plain_engine import PlainEngine
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS

RVLR = ["objective.name=rvlr", "objective.relation_distance=mse", "objective.cross_modal_relation=true"]
ANY = ["teacher.source=frozen_copy", "train.global_batch_size=16", "objective.relation_weight=0.5"]


@pytest.fixture
def build(tiny_config, tmp_path):
    """Step parts over a model, in float64 unless said, whose relations differ from its teacher's, and two batches."""

    def make(*overrides: str, dtype: torch.dtype = torch.float64) -> tuple[StepParts, object, object]:
        (run,) = load_plan(tiny_config, [*ANY, "objective.name=covlr", *overrides])
        config, ranks = run.config, Ranks()
        parts = build_parts(config, tmp_path / "run", ranks)
        parts.model.to(dtype)
        for teacher in (parts.teachers.image, parts.teachers.text) if parts.teachers else ():
            teacher.to(ranks.device, dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter += 0.3 * parameter.std(correction=0) * noise
        with closing(iter(build_stream(config, parts, ranks, None))) as batches:
            pair = next(batches), next(batches)
        engine = PlainEngine(parts.model, dtype)
        return StepParts(engine, parts.inputs, config.objective, config.meta, ranks, config.train.chunk_size), *pair

    return make


def gradient_of(parts: StepParts, mode: str, batch, test_batch) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        STEPS[mode](parts, batch, test_batch)
    return parts.engine.flat_gradient()


def reference_gradient(parts: StepParts, mode: str, batch, test_batch) -> torch.Tensor:
    loss, learned = reference_loss(parts.engine.module, parts, batch, test_batch, mode)
    found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).ravel() if g is None else g.ravel() for p, g in zip(learned.values(), found, strict=True)]
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("objective", [[], RVLR, ["objective.loss=sigmoid"]], ids=["covlr", "rvlr", "sigmoid"])
@pytest.mark.parametrize("mode", ["joint", "heads", "first_order"])
def test_the_gradient_is_autograds(build, mode, objective):
    parts, batch, _ = build(f"meta.mode={mode}", "meta.inner_lr=0.05", *objective)
    found = gradient_of(parts, mode, batch, batch)
    assert error(found, reference_gradient(parts, mode, batch, batch)) <= 1e-8


def test_rvlr_whose_teachers_have_no_weight_is_the_contrastive_run(build):
    weights = [f"objective.{name}_weight=0" for name in ("iic", "ttc", "kd", "kd_image", "kd_text")]
    gradients = []
    for objective in (["objective.name=rvlr", *weights], ["objective.name=contrastive"]):
        parts, batch, _ = build("meta.mode=joint", *objective)
        gradients.append(gradient_of(parts, "joint", batch, batch))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.mark.parametrize("mode", ["heads", "first_order"])
@pytest.mark.parametrize("unit", ["absolute", "gradient", "parameter"])
def test_on_the_next_batch_in_every_unit_and_by_chunks(build, mode, unit):
    parts, batch, following = build(
        f"meta.mode={mode}", f"meta.inner_lr_unit={unit}", "meta.inner_lr=0.03", "train.chunk_size=4"
    )
    found = gradient_of(parts, mode, batch, following)
    assert error(found, reference_gradient(parts, mode, batch, following)) <= 1e-8
    assert error(found, reference_gradient(parts, mode, batch, batch)) > 1e-4  # the batch matters


def test_second_order_matters_at_this_rate(build):
    parts, batch, _ = build("meta.mode=heads", "meta.inner_lr=0.05")
    exact = reference_gradient(parts, "finite_difference", batch, batch)
    assert error(reference_gradient(parts, "first_order", batch, batch), exact) > 1e-3


def test_finite_differences_fall_as_epsilon_squared(build):
    parts, batch, _ = build("meta.mode=finite_difference", "meta.inner_lr=0.02")
    exact = reference_gradient(parts, "finite_difference", batch, batch)
    errors = {}
    for epsilon in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        at = replace(parts, meta=parts.meta.model_copy(update={"epsilon": epsilon}))
        errors[epsilon] = error(gradient_of(at, "finite_difference", batch, batch), exact)
    assert errors[1e-4] < 0.02 * errors[1e-3], errors  # 0.01 in exact arithmetic
    assert min(errors.values()) <= 1e-8, errors


@pytest.mark.parametrize("mode", ["heads", "first_order", "finite_difference"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_rate_of_zero_is_the_joint_step(build, mode, dtype, within):
    parts, batch, _ = build(f"meta.mode={mode}", "meta.inner_lr=0", "meta.epsilon=0.001", dtype=dtype)
    joint = gradient_of(parts, "joint", batch, batch)
    assert error(gradient_of(parts, mode, batch, batch), joint) <= within


@pytest.mark.parametrize("mode", ["first_order", "finite_difference"])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_come_back_bit_for_bit(build, mode, fails, monkeypatch):
    parts, batch, _ = build(f"meta.mode={mode}", "meta.inner_lr=0.05", "meta.epsilon=0.001")
    before = {name: value.clone() for name, value in parts.engine.module.state_dict().items()}
    if fails:
        monkeypatch.setattr("vlscale.train.meta_shift.relations_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        STEPS[mode](parts, batch, batch)
    for name, value in parts.engine.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_locked_tower_is_not_moved(build):
    parts, batch, _ = build("meta.mode=first_order", "meta.inner_lr=0.05", "model.locked=[vision]")
    found = gradient_of(parts, "first_order", batch, batch)
    assert error(found, reference_gradient(parts, "first_order", batch, batch)) <= 1e-8
    assert all(p.grad is None for p in parts.engine.module.vision_model.parameters())


@pytest.mark.parametrize(("mode", "share"), [("heads", 0.02), ("first_order", 0.001), ("finite_difference", 0.001)])
def test_the_shift_of_everything_is_shorter_by_default(build, mode, share):
    parts, batch, _ = build(f"meta.mode={mode}", "meta.epsilon=0.001")
    module = parts.engine.module
    heads = [*module.visual_projection.parameters(), *module.text_projection.parameters()]
    length = sum(p.detach().square().sum() for p in (heads if mode == "heads" else module.parameters())).sqrt()
    values = STEPS[mode](parts, batch, batch)
    assert values["inner_lr"] * values["inner_grad_norm"] == pytest.approx(share * float(length), rel=1e-5)


def test_a_shift_lost_in_rounding_is_said_once(build, caplog):
    parts, batch, _ = build("meta.mode=first_order", "meta.inner_lr=0.000001")
    module = parts.engine.module.bfloat16()
    for teacher in (parts.inputs.teachers.image, parts.inputs.teachers.text):
        teacher.to(parts.ranks.device, torch.bfloat16)
    parts = replace(parts, engine=PlainEngine(module, torch.bfloat16))
    for _ in range(2):
        values = STEPS["first_order"](parts, batch, batch)
    assert values["shift_cosine"] < 0.9
    assert [record.message for record in caplog.records if "lost in rounding" in record.message] != []
    assert sum("lost in rounding" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["meta.mode=heads", "engine.comm=ring"], "set engine.comm=gather"),
        (["meta.test_batch=next"], "set meta.mode=heads"),
        (["meta.mode=heads", "meta.inner_lr_unit=absolute"], "inner_lr_unit=absolute needs meta.inner_lr"),
        (["objective.name=rvlr", "objective.itm_weight=2"], "needs a fusion encoder.*set objective.itm_weight=0"),
        (
            ["objective.name=rvlr", "objective.cross_modal_relation=true", "objective.relation_distance=kl"],
            "mae or mse",
        ),
        (["objective.name=rvlr", "teacher.source=none"], "needs a teacher"),
    ],
)
def test_what_cannot_be_is_said(tiny_config, overrides, said):
    with pytest.raises(ValueError, match=said):
        load_plan(tiny_config, [*ANY, "objective.name=covlr", *overrides])


def test_without_relations_every_mode_is_the_joint_step(tiny_config):
    (run,) = load_plan(tiny_config, [*ANY, "objective.name=contrastive", "meta.mode=heads"])
    assert run.config.meta_mode == "joint" and not run.config.objective.needs_teachers


def test_without_consistency_there_is_nothing_to_shift_by(tiny_config):
    weights = ["objective.name=covlr", "objective.contrastive_weight=0", "meta.mode=heads"]
    (run,) = load_plan(tiny_config, [*ANY, *weights])
    assert run.config.meta_mode == "joint"


def test_consistency_of_one_modality_moves_its_projection_alone(build):
    parts, batch, _ = build("meta.mode=heads", *RVLR, "objective.contrastive_weight=0", "objective.ttc_weight=0")
    assert error(gradient_of(parts, "heads", batch, batch), reference_gradient(parts, "heads", batch, batch)) <= 1e-8
