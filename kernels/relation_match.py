"""`relation_match_loss`: match a student's relations to a weighted mixture of teachers' relations, element by element.

    s_ij = x_i . x_j / temperature,   t_ij = sum_k w_k z^k_i . z^k_j / temperature,   i != j
    mae mean |s - t|;   mse mean (s - t)^2;   wasserstein mean over rows of the mean |difference| of sorted values

mae and wasserstein make their gradients in the forward pass and are differentiable once; mse is plain algebra on an
(F, F) matrix and differentiable any number of times. Triton kernels serve mae in float32 and below. The others are the
same PyTorch code for `triton` and `chunked`: mse has no tiles to fuse, and wasserstein is sorting, whole rows of N at a
time. On a GPU torch.sort takes such rows through global memory a few times, O(N) each; a kernel that kept its logits to
itself would have to sort them by a network of O(log^2 N) steps, in registers and for some thousand columns at most.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import chunked_relation_match as tiles
from . import reference
from .checks import (
    as_autocast,
    as_logit_weights,
    as_scalar,
    as_teachers,
    check_choice,
    check_embeddings,
    choose_impl,
    compute_dtype,
    join_teachers,
)
from .chunked import full_precision, refuse_tangents, without_autocast
from .chunked_relation import Relation, RelationGradient, Sweep
from .once import scale_saved

if TYPE_CHECKING:
    from .triton_relation import OperandGradient


@torch.library.custom_op("vlscale::relation_match_forward", mutates_args=())
@full_precision
def forward_op(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    weights: Tensor,
    widths: list[int],
    metric: str,
    want_student: bool,
    want_teacher: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, then the gradients of student, student_weight (1,), teacher (N, sum of widths), weights (K,)).

    A side that is not wanted comes back empty.
    """
    n = len(student)
    pairs = n * (n - 1)
    if impl == "triton" and metric == "mae" and weights.dtype == torch.float32:
        from .triton_relation import Operand
        from .triton_relation_match import relation_mae_sweep

        sides = (
            Operand.of(student, student, student_weight, [student.shape[1]], "cosine"),
            Operand.of(teacher, teacher, -weights, widths, "cosine"),
        )
        total, of_student, of_teacher = relation_mae_sweep(
            *sides, Sweep.TRIANGLE, 0, want_student=want_student, want_teacher=want_teacher
        )
        grads = [*_finish(of_student, weights, 1 / pairs), *_finish(of_teacher, weights, 1 / pairs)]
        grads[3] = -grads[3] if want_teacher else grads[3]
        return (total / pairs).to(weights.dtype), *grads
    x, z = student.to(weights.dtype), teacher.to(weights.dtype)
    alone = Relation(x, x, student_weight, [x.shape[1]], "cosine")
    if metric == "mae":
        both = torch.cat([x, z], 1)
        difference = Relation(both, both, torch.cat([student_weight, -weights]), [x.shape[1], *widths], "cosine")
        negated = Relation(z, z, -weights, widths, "cosine")
        toward = {(True, True): difference, (True, False): alone, (False, True): negated}
        total, gradient = tiles.relation_mae_sweep(
            difference, toward.get((want_student, want_teacher)), Sweep.TRIANGLE, 0
        )
        grads = _split(gradient, x.shape[1], want_student, want_teacher, weights)
    else:
        mixed = Relation(z, z, weights, widths, "cosine")
        total, of_student, of_teacher = tiles.relation_wasserstein_sweep(
            alone, mixed, 0, Sweep.TRIANGLE, want_student=want_student, want_teacher=want_teacher
        )
        grads = [part for g in (of_student, of_teacher) for part in _finish(g, weights)]
    return (total / pairs).to(weights.dtype), *(g / pairs for g in grads)


def _finish(gradient: "RelationGradient | OperandGradient | None", like: Tensor, *mean: float) -> list[Tensor]:
    if gradient is None:
        return [like.new_empty(0), like.new_empty(0)]
    rows, _, of_weights = gradient.finish(*mean)
    return [rows, of_weights]


def _split(
    gradient: RelationGradient | None, width: int, want_student: bool, want_teacher: bool, like: Tensor
) -> list[Tensor]:
    """The gradient of the sides that are wanted, of both at once their concatenation's, as [student, its weight,
    teacher, weights]."""
    nothing = [like.new_empty(0), like.new_empty(0)]
    rows, of_weights = _finish(gradient, like)
    if want_student and want_teacher:
        return [rows[:, :width], of_weights[:1], rows[:, width:], -of_weights[1:]]
    return [*nothing, rows, -of_weights] if want_teacher else [rows, of_weights, *nothing]


@forward_op.register_fake
def _(student, student_weight, teacher, weights, widths, metric, want_student, want_teacher, impl):
    def like(t: Tensor, wanted: bool) -> Tensor:
        return weights.new_empty(tuple(t.shape) if wanted else (0,))

    return (
        weights.new_empty(()),
        like(student, want_student),
        like(student_weight, want_student),
        like(teacher, want_teacher),
        like(weights, want_teacher),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what comes with the loss
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: checkpointing unpacks what was saved a single time
    return *scale_saved(grad, saved[4:], saved[:4], ctx.needs_input_grad), *[None] * 5


forward_op.register_autograd(_backward, setup_context=_save)


def _mse(emb: list[Tensor], weights: Tensor, widths: list[int]) -> Tensor:
    n = emb[0].shape[0]
    joined = torch.cat([e.double() for e in emb], 1)
    spread = torch.cat([w.expand(width) for w, width in zip(weights.double(), widths, strict=True)])
    total = tiles.relation_mse_total(joined, spread, tiles.relation_gram(joined))
    return (total.clamp_min(0) / (n * (n - 1))).to(weights.dtype)


def relation_match_loss(
    student_emb: Tensor,
    teacher_embs: Tensor | list[Tensor],
    teacher_weights: Tensor | list[float] | None = None,
    *,
    temperature: float | Tensor,
    metric: str = "mae",
    impl: str = "auto",
) -> Tensor:
    """Distance between the student's relations and the teachers' weighted ones, without their diagonals, 0-d.

    student_emb (N, D); teacher_embs a list of K tensors (N, D_k); teacher_weights (K,), any sign; metric mae, mse or
    wasserstein. Differentiable in every float argument, in O(N) memory (`reference`: O(N^2)). A single row has nothing
    to compare: the loss is 0.
    """
    check_embeddings("student_emb", student_emb)
    teachers = as_teachers(student_emb, teacher_embs)
    check_choice("metric", metric, ("mae", "mse", "wasserstein"))
    dtype = compute_dtype(student_emb, *teachers)
    tau = as_scalar("temperature", temperature, student_emb, dtype, positive=True)
    student_weight, weights = tau.reciprocal().reshape(1), as_logit_weights(teacher_weights, teachers, tau)
    impl = choose_impl(impl, student_emb.device)
    if student_emb.shape[0] == 1:
        parts = [student_emb, *teachers, student_weight, weights]
        return torch.stack([0 * part.to(dtype).sum() for part in parts]).sum()
    widths = [t.shape[1] for t in teachers]
    if impl == "reference":
        with without_autocast(student_emb.device):
            teachers = [t.to(dtype) for t in teachers]
            return reference.relation_match_loss(student_emb.to(dtype), student_weight, teachers, weights, metric)
    if metric == "mse":
        with without_autocast(student_emb.device):
            embs = [student_emb, *teachers]
            return _mse(embs, torch.cat([student_weight, -weights]), [student_emb.shape[1], *widths])
    refuse_tangents(impl, student_emb, *teachers, student_weight, weights)
    if metric == "mae":
        student_emb, *teachers = as_autocast(impl, student_emb, *teachers)
    teacher = join_teachers(teachers, dtype)
    recording = torch.is_grad_enabled()
    want_student = recording and (student_emb.requires_grad or student_weight.requires_grad)
    want_teacher = recording and (teacher.requires_grad or weights.requires_grad)
    wanted = want_student, want_teacher
    return forward_op(student_emb, student_weight, teacher, weights, widths, metric, *wanted, impl)[0]
