"""`relation_kl_loss`: keep the relations inside one modality as a frozen teacher sees them, without N x N matrices.

    s_ij = relation(x_i, x_j) / student_temperature,   t_ij = sum_k w_k relation(z^k_i, z^k_j) / teacher_temperature
    row scope     mean_i KL(softmax_j t_ij || softmax_j s_ij), j != i
    matrix scope  KL(softmax_ij t || softmax_ij s), i != j

Temperatures and teacher weights enter the op as one weight a segment, 1 / student_temperature and
w_k / teacher_temperature, so their gradients follow from the weights' by the chain rule. Differentiable once.
"""

import torch
from torch import Tensor

from . import chunked_relation_kl as tiles
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
from .chunked_relation import Relation, Sweep

STATISTICS = 2 + tiles.SUMS  # the two references, then each row's sums, or coefficients that the kernels made of them


def _relations(
    student: Tensor, student_weight: Tensor, teacher: Tensor, weights: Tensor, widths: list[int], relation: str
) -> tuple[Relation, Relation]:
    x, z = student.to(weights.dtype), teacher.to(weights.dtype)
    return Relation(x, x, student_weight, [x.shape[1]], relation), Relation(z, z, weights, widths, relation)


def _on_triton(weights: Tensor, impl: str) -> bool:
    """Whether the Triton kernels serve this; float64 is the chunked tiles' on every impl."""
    return impl == "triton" and weights.dtype == torch.float32


def _operands(
    student: Tensor, student_weight: Tensor, teacher: Tensor, weights: Tensor, widths: list[int], relation: str
):
    from .triton_relation import Operand

    alone = Operand.of(student, student, student_weight, [student.shape[1]], relation)
    return alone, Operand.of(teacher, teacher, weights, widths, relation)


@torch.library.custom_op("vlscale::relation_kl_forward", mutates_args=())
@full_precision
def forward_op(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    weights: Tensor,
    widths: list[int],
    relation: str,
    matrix: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(loss, statistics); student_weight (1,), teacher (N, sum of widths), weights (K,)."""
    if _on_triton(weights, impl):
        from . import triton_relation_kl as kernels

        operands = _operands(student, student_weight, teacher, weights, widths, relation)
        loss, statistics = kernels.relation_kl_forward(*operands, matrix=matrix)
        return loss.to(weights.dtype), statistics
    s, t = _relations(student, student_weight, teacher, weights, widths, relation)
    found, sums = tiles.relation_kl_sums(s, t, matrix=matrix)
    references = [found.student.expand(len(student)), found.teacher.expand(len(student))]
    loss = tiles.relation_kl_terms(sums.double().sum(1, keepdim=True) if matrix else sums).mean()
    rows = torch.stack(references)
    return loss.to(weights.dtype), torch.cat([rows, sums])


@forward_op.register_fake
def _(student, student_weight, teacher, weights, widths, relation, matrix, impl):
    rows = STATISTICS + _on_triton(weights, impl)  # the kernels' flags are one more
    return weights.new_empty(()), weights.new_empty(rows, student.shape[0])


def _references(statistics: Tensor, *, matrix: bool) -> tiles.References:
    s, t = statistics[0], statistics[1]
    if matrix or (statistics.device.type == "cpu" and bool((s == s[0]).all() & (t == t[0]).all())):
        return tiles.References(s[0], t[0])
    return tiles.References(s, t, s, t)


@torch.library.custom_op("vlscale::relation_kl_backward", mutates_args=())
@full_precision
def backward_op(
    grad: Tensor,
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    weights: Tensor,
    widths: list[int],
    relation: str,
    matrix: bool,
    impl: str,
    statistics: Tensor,
    want_student: bool,
    want_teacher: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors; empty (0,) for what is not wanted: the student's two, the teacher, its weights."""
    mean = grad if matrix else grad / len(student)
    want = {"want_student": want_student, "want_teacher": want_teacher, "want_weights": want_weights}
    wanted = (want_student, want_student, want_teacher, want_weights)
    inputs = (student, student_weight, teacher, weights)
    if _on_triton(weights, impl):
        from . import triton_relation_kl as kernels

        operands = _operands(student, student_weight, teacher, weights, widths, relation)
        launches, coefficients = kernels.launches_of(statistics, matrix=matrix), statistics[2:STATISTICS]
        sides = kernels.relation_kl_gradients(
            *operands, None, coefficients, coefficients, Sweep.TRIANGLE, 0, launches=launches, **want
        )
        both = zip(sides, (student.dtype, teacher.dtype), strict=True)
        found = [part for g, dtype in both for part in ((None, None) if g is None else g.finish(mean, dtype)[::2])]
    else:
        sums = statistics[2:]
        if matrix:
            sums = sums.double().sum(1, keepdim=True).expand(-1, len(student))
        coefficients = tiles.relation_kl_coefficients(sums).to(weights.dtype)
        s, t = _relations(student, student_weight, teacher, weights, widths, relation)
        references = _references(statistics, matrix=matrix)
        sides = tiles.relation_kl_gradients(s, t, references, coefficients, coefficients, Sweep.TRIANGLE, 0, **want)
        found = [part for g in sides for part in ((None, None) if g is None else g.finish()[::2])]
        pairs = zip(found, inputs, wanted, strict=True)
        found = [part.mul_(mean).to(of.dtype) if want else None for part, of, want in pairs]
    return tuple(part if want else of.new_empty(0) for part, of, want in zip(found, inputs, wanted, strict=True))


@backward_op.register_fake
def _(
    grad,
    student,
    student_weight,
    teacher,
    weights,
    widths,
    relation,
    matrix,
    impl,
    statistics,
    want_student,
    want_teacher,
    want_weights,
):
    def like(t: Tensor, wanted: bool) -> Tensor:
        return t.new_empty(tuple(t.shape) if wanted else (0,))

    return (
        like(student, want_student),
        like(student_weight, want_student),
        like(teacher, want_teacher),
        like(weights, want_weights),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what comes with the loss
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.settings = inputs[4:]


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    *tensors, statistics = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    grads = backward_op(grad, *tensors, *ctx.settings, statistics, needed[0] or needed[1], *needed[2:])
    return *(g if want else None for g, want in zip(grads, needed, strict=True)), *[None] * 4


forward_op.register_autograd(_backward, setup_context=_save)


def relation_kl_loss(
    student_emb: Tensor,
    teacher_embs: Tensor | list[Tensor],
    *,
    teacher_weights: Tensor | list[float] | None = None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    scope: str = "row",
    relation: str = "cosine",
    impl: str = "auto",
) -> Tensor:
    """KL(teacher || student) between softmaxed relation matrices without their diagonals, 0-d.

    student_emb (N, D); teacher_embs (N, D_t) or a list of K tensors (N, D_k), mixed on logits by teacher_weights (K,).
    scope: row (softmax a row, mean over rows) or matrix (one softmax). relation: cosine (dot products) or euclidean
    (negative distances, slope 0 at distance 0). Differentiable once in every float argument, in O(N) memory
    (`reference`: any order, O(N^2)). With one or two rows there is nothing to compare: the loss is 0.
    """
    check_embeddings("student_emb", student_emb)
    teachers = as_teachers(student_emb, teacher_embs)
    check_choice("scope", scope, ("row", "matrix"))
    check_choice("relation", relation, ("cosine", "euclidean"))
    dtype = compute_dtype(student_emb, *teachers)
    student_tau = as_scalar("student_temperature", student_temperature, student_emb, dtype, positive=True)
    teacher_tau = as_scalar("teacher_temperature", teacher_temperature, student_emb, dtype, positive=True)
    student_weight, weights = student_tau.reciprocal(), as_logit_weights(teacher_weights, teachers, teacher_tau)
    impl = choose_impl(impl, student_emb.device)
    if student_emb.shape[0] <= 2:
        parts = [student_emb, *teachers, student_weight, weights]
        return torch.stack([0 * part.to(dtype).sum() for part in parts]).sum()
    if impl == "reference":
        with without_autocast(student_emb.device):
            teachers = [t.to(dtype) for t in teachers]
            return reference.relation_kl_loss(student_emb.to(dtype), student_weight, teachers, weights, scope, relation)
    refuse_tangents(impl, student_emb, *teachers, student_weight, weights)
    widths = [t.shape[1] for t in teachers]
    student_emb, *teachers = as_autocast(impl, student_emb, *teachers)
    teacher = join_teachers(teachers, dtype)
    return forward_op(
        student_emb, student_weight.reshape(1), teacher, weights, widths, relation, scope == "matrix", impl
    )[0]
