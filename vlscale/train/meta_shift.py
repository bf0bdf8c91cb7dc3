"""CoVLR's meta step over all parameters: first order, and second order by finite differences (arXiv 2304.07567).

    g = grad L_c(theta);  theta' = theta - a g;  v = grad L_r(theta')
    first_order         grad L_c(theta) + v
    finite_difference   grad L_c(theta) + v - a H v,   H v = (grad L_c(theta + e v) - grad L_c(theta - e v)) / 2e

g, v and H v are those of the global batch: inner gradients are averaged over ranks before they move anything. The
last of a step's passes goes through the engine, whose backward is handed the other terms; so the engine reduces, clips
and updates once. Each gradient that is kept costs the memory of the learned parameters on every rank, at every ZeRO
stage: one for first_order, three for finite_difference, and a copy of the parameters while they are moved.

meta.epsilon is e |v| / |theta|. The error of H v falls as its square until rounding shows. In bf16, e v is shorter than
the spacing of most weights: its two shifts are dithered (`gradients.moving`), and tests/train/test_meta_launch.py holds
the whole gradient's cosine with the exact one at 0.999. `heads` is exact to second order.
"""

import torch

from vlscale.data.batch import Batch
from vlscale.objectives.total import Embedded, consistency_loss, relations_loss
from vlscale.train.engine import Gradients
from vlscale.train.inner_rate import inner_rate
from vlscale.train.step import StepParts, embed, finish

EPSILON = {torch.float32: 2e-5, torch.bfloat16: 5e-4}  # default of meta.epsilon, see the docstring
LEAST_COSINE = 0.9  # below, what was looked at is not theta'


def first_order_step(parts: StepParts, batch: Batch, test_batch: Batch) -> dict[str, float]:
    """`meta.mode=first_order`: the gradient of the relations is taken at theta' and used at theta."""
    engine = parts.engine
    rows, consistency, metrics, inner, _ = _meta_train(parts, batch)
    with engine.moving() as move:
        cosine = move(inner, -metrics["inner_lr"])
        moved = embed(engine, parts, test_batch)
        relations, more = relations_loss(moved, parts.objective, parts.ranks, parts.comm)
        engine.backward(relations + _reach(moved), lambda index, grad: grad + inner[index])
    return _finish(parts, consistency + relations, metrics | more | {"shift_cosine": cosine}, rows)


def finite_difference_step(parts: StepParts, batch: Batch, test_batch: Batch) -> dict[str, float]:
    """`meta.mode=finite_difference`: four passes. The three over consistency draw the same dropout."""
    engine = parts.engine
    before = _random_state(parts)
    rows, consistency, metrics, inner, parameter_norm = _meta_train(parts, batch)
    length = (parts.meta.epsilon or EPSILON[engine.dtype]) * parameter_norm
    with engine.moving() as move:
        cosine = move(inner, -metrics["inner_lr"])
        moved = embed(engine.plain, parts, test_batch)
        relations, more = relations_loss(moved, parts.objective, parts.ranks, parts.comm)
        outer = engine.gradients(relations + _reach(moved))
        after = _random_state(parts)
        step = length / outer.norm().clamp(min=torch.finfo(torch.float32).tiny)
        move(outer, step, dither=True)
        _restore(parts, before)
        ahead = engine.gradients(_consistency(parts, embed(engine.plain, parts, batch)))
        curvature = metrics["inner_lr"] / (2 * step)
        move(outer, -step, dither=True)
        _restore(parts, before)
        behind = embed(engine, parts, batch)
        total = inner.add_(outer).add_(ahead, -curvature)  # all but the term of the pass that runs now
        engine.backward(
            _consistency(parts, behind), lambda index, grad: torch.addcmul(total[index], grad, curvature.to(grad.dtype))
        )
    _restore(parts, after)
    return _finish(parts, consistency + relations, metrics | more | {"shift_cosine": cosine}, rows)


def _finish(parts: StepParts, loss: torch.Tensor, metrics: dict[str, torch.Tensor], rows: Embedded) -> dict[str, float]:
    values = finish(parts, loss, metrics, rows)
    if values["shift_cosine"] < LEAST_COSINE:
        parts.warn_once(
            "the meta step's shift is lost in rounding: cosine %.2f between the intended and the realised one "
            f"(expected {LEAST_COSINE} at least); raise meta.inner_lr, or set engine.dtype=fp32 or meta.mode=heads",
            values["shift_cosine"],
        )
    return values


def _meta_train(
    parts: StepParts, batch: Batch
) -> tuple[Embedded, torch.Tensor, dict[str, torch.Tensor], Gradients, torch.Tensor]:
    """Rows, consistency at theta, the inner rate among the metrics, its averaged gradient, and |theta|."""
    rows = embed(parts.engine.plain, parts, batch)
    consistency, metrics = consistency_loss(rows, parts.objective, parts.ranks, parts.comm)
    inner = parts.engine.gradients(consistency + _reach(rows))
    norm, parameter_norm = inner.norm(), parts.engine.parameter_norm()
    rate = inner_rate(parts.meta, parameter_norm, norm)
    return rows, consistency.detach(), metrics | {"inner_lr": rate, "inner_grad_norm": norm}, inner, parameter_norm


def _consistency(parts: StepParts, rows: Embedded) -> torch.Tensor:
    return consistency_loss(rows, parts.objective, parts.ranks, parts.comm)[0] + _reach(rows)


def _reach(rows: Embedded) -> torch.Tensor:
    """Zero, with every output in its graph: a backward then reaches every parameter, whatever the terms look at."""
    found = (rows.image, rows.text, rows.logit_scale, rows.logit_bias, rows.text_share)
    found = (*found, rows.projected_teacher_image, rows.projected_teacher_text, rows.fused, rows.matching, rows.masked)
    return sum((value.sum() * 0 for value in found if value is not None), rows.logit_scale * 0)


def _random_state(parts: StepParts) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = parts.ranks.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(parts: StepParts, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], parts.ranks.device)
