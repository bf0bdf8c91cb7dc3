"""Relation KL of a global batch over ranks: each rank its own rows x all columns, or each pair of blocks once.

Legend: W ranks, b rows a rank, N = W b, D_s and D_t the widths of student and teachers, e bytes an element; equations
are those of vlscale.kernels.primitives, gradients over ranks those of vlscale.objectives.sharded.

A rank's rows get their whole gradient from the rows' coefficients and everyone's, so with gather and ring none travels.
Products, of 2 N^2 D: gather and ring 5/W, half_ring 3/W. Bytes a rank receives:
gather     (W-1)/W N ((D_s + D_t) e + 12)                      the columns once, their coefficients in the backward
ring       (W-1)/W N (2 (D_s + D_t) e + 12)                    the columns again in the backward
half_ring  N/2 (2 (D_s + D_t) e + 32 + 4 D_s) at most          sums and the student's gradient return to their owner
Matrix scope needs no coefficients of others; a teacher that learns takes 8 more, and 4 D_t to return, which weights
that learn alone do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.distributed import (
    COMMS,
    Agreement,
    Blocks,
    HalfRing,
    Ranks,
    Ring,
    all_reduce,
    choose_comm,
    gather_rows,
)
from vlscale.kernels import primitives as p
from vlscale.kernels import relation_kl_loss
from vlscale.kernels.checks import (
    as_scalar,
    as_teachers,
    as_weights,
    check_choice,
    check_embeddings,
    choose_impl,
    compute_dtype,
    join_teachers,
)
from vlscale.kernels.chunked import full_precision
from vlscale.objectives.relation_blocks import (
    Collected,
    Side,
    collect,
    describe_relation,
    kl_sweeps,
    on_triton,
)
from vlscale.objectives.sharded import gathered_bytes, make_blocks


@dataclass(frozen=True)
class Problem:
    """What is no tensor to differentiate by."""

    ranks: Ranks
    blocks: Blocks
    widths: list[int]
    matrix: bool
    kind: str
    triton: bool

    @property
    def sweeps(self) -> ModuleType:
        return kl_sweeps(self.triton)

    def sides(self, student: Tensor, student_weight: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Side, Side]:
        first = Side(student, student_weight, [student.shape[1]], self.kind, self.triton)
        return first, Side(teacher, weights, self.widths, self.kind, self.triton)


@dataclass(frozen=True)
class Statistics:
    """References and sums (5, b) of this rank's rows; for matrix scope sums are the total of all rows, (5, 1)."""

    references: p.References
    sums: Tensor
    blocks: Blocks  # that serve these references


def sharded_relation_kl_loss(
    student_emb: Tensor,
    teacher_embs: Tensor | list[Tensor],
    *,
    teacher_weights: Tensor | list[float] | None = None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    scope: str = "row",
    relation: str = "cosine",
    ranks: Ranks,
    comm: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """`relation_kl_loss` of all ranks' rows, 0-d and the same on every rank.

    student_emb (b, D) and teacher_embs (b, D_k) are this rank's, b the same on every rank. comm: gather, ring,
    half_ring or auto (`choose_comm`). Differentiable once. impl `reference` gathers everything and is dense and whole
    on each rank, differentiable any number of times. The guard of the reference is read on the host.
    """
    settings = {"scope": scope, "relation": relation}
    if ranks.size == 1:
        check_choice("comm", comm, COMMS)
        return relation_kl_loss(
            student_emb,
            teacher_embs,
            teacher_weights=teacher_weights,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            impl=impl,
            **settings,
        )
    with Agreement("relation KL loss", ranks, numbers=2) as agreement:
        check_embeddings("student_emb", student_emb)
        teachers = as_teachers(student_emb, teacher_embs)
        check_choice("scope", scope, ("row", "matrix"))
        check_choice("relation", relation, ("cosine", "euclidean"))
        dtype = compute_dtype(student_emb, *teachers)
        student_tau = as_scalar("student_temperature", student_temperature, student_emb, dtype, positive=True)
        teacher_tau = as_scalar("teacher_temperature", teacher_temperature, student_emb, dtype, positive=True)
        weights = as_weights(teacher_weights, teachers, dtype)
        impl = choose_impl(impl, student_emb.device)
        comm = choose_comm(comm, gathered_bytes(ranks, student_emb, *teachers), relation=True)
        widths = [teacher.shape[1] for teacher in teachers]
        blocks, triton = make_blocks(comm, ranks), on_triton(impl, dtype)
        problem = Problem(ranks, blocks, widths, scope == "matrix", relation, triton)
        operands = student_emb, (1 / student_tau).reshape(1), join_teachers(teachers, dtype), weights / teacher_tau
        details = *describe_relation(student_emb, teachers), scope, relation, comm, impl
        agreement.offer(len(student_emb), details, _bounds(*operands, problem))
    if impl == "reference" or ranks.size * len(student_emb) <= 2:
        return relation_kl_loss(
            gather_rows(student_emb, ranks),
            [gather_rows(t, ranks) for t in teachers],
            teacher_weights=weights,
            student_temperature=student_tau,
            teacher_temperature=teacher_tau,
            impl=impl,
            **settings,
        )
    return _Loss.apply(*operands, agreement.largest.to(dtype), problem)


@full_precision
def _bounds(student: Tensor, student_weight: Tensor, teacher: Tensor, weights: Tensor, problem: Problem) -> Tensor:
    """(2,) bounds of this rank's own logits; the ranks' largest bound the logits between ranks as well."""
    sides = problem.sides(*(t.detach() for t in (student, student_weight, teacher, weights)))
    return torch.stack([side.alone().bound() for side in sides])


def _statistics(sides: tuple[Side, Side], held: Sequence[Tensor], largest: Tensor, problem: Problem) -> Statistics:
    """Sums over the one reference, or over the maxima where any rank's are unsound."""
    dtype = sides[0].weights.dtype
    constant = p.fixed_reference(largest.amax(), dtype, p.REACH[dtype])
    found = _sums(sides, held, p.References(constant, constant), problem.blocks, problem)
    sound = p.sums_are_sound(problem.ranks.size * len(sides[0].rows), found.sums[:2].to(dtype))
    sound = sound or not torch.isfinite(constant)  # maxima do not help against NaN
    if not all_reduce(constant.new_tensor(not sound), problem.ranks, largest=True):
        return found
    return _sums(sides, held, *_maxima(sides, held, problem), problem)


def _sums(
    sides: tuple[Side, Side], held: Sequence[Tensor], references: p.References, blocks: Blocks, problem: Problem
) -> Statistics:
    sums = sides[0].weights.new_zeros(5, len(sides[0].rows))

    def visit(block):
        student, teacher = (side.against(c, block) for side, c in zip(sides, block.held, strict=True))
        rows, columns = problem.sweeps.relation_kl_statistics(
            student, teacher, references, p.Sweep(block.role), block.offset
        )
        sums[:, block.rows] += rows
        return [] if columns is None else [columns.T.contiguous()]

    for returned in blocks.sweep(held, [], visit):
        sums += returned.T
    if problem.matrix:
        sums = all_reduce(sums.double().sum(1, keepdim=True), problem.ranks)
    return Statistics(references, sums, blocks)


def _maxima(sides: tuple[Side, Side], held: Sequence[Tensor], problem: Problem) -> tuple[p.References, Blocks]:
    """The rows' maxima as references, which serve rows alone: a half ring falls back to a ring."""
    blocks = Ring(problem.ranks) if isinstance(problem.blocks, HalfRing) else problem.blocks
    maxima = sides[0].weights.new_full((2, len(sides[0].rows)), -torch.inf)

    def visit(block):
        relations = [side.against(c, block) for side, c in zip(sides, block.held, strict=True)]
        torch.maximum(maxima, torch.stack(problem.sweeps.relation_maxima(*relations, block.offset)), out=maxima)
        return []

    blocks.sweep(held, [], visit)
    if problem.matrix:
        s, t = all_reduce(maxima.amax(1), problem.ranks, largest=True)
        return p.References(s, t), problem.blocks
    return p.References(*maxima), blocks


class _Loss(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, student, student_weight, teacher, weights, largest: Tensor, problem: Problem) -> Tensor:
        held = problem.blocks.hold(student, teacher)
        found = _statistics(problem.sides(student, student_weight, teacher, weights), held, largest, problem)
        ctx.problem, ctx.statistics = problem, found
        ctx.save_for_backward(student, student_weight, teacher, weights, *held)
        terms = p.relation_kl_terms(found.sums)
        if problem.matrix:
            return terms.mean().to(weights.dtype)
        return (all_reduce(terms.sum(), problem.ranks) / (problem.ranks.size * len(student))).to(weights.dtype)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx, grad: Tensor):
        *inputs, held_student, held_teacher = ctx.saved_tensors
        problem, needed = ctx.problem, ctx.needs_input_grad[:4]
        want = any(needed[:2]), needed[2], needed[3]
        sides = problem.sides(*inputs)
        found = _gradients(sides, [held_student, held_teacher], ctx.statistics, want, problem)
        mean = all_reduce(grad, problem.ranks)
        if not problem.matrix:
            mean = mean / (problem.ranks.size * len(inputs[0]))
        parts = zip(found, inputs, needed, strict=True)
        return *((part * mean).to(of.dtype) if asked else None for part, of, asked in parts), None, None


def _gradients(
    sides: tuple[Side, Side],
    held: Sequence[Tensor],
    statistics: Statistics,
    want: tuple[bool, bool, bool],
    problem: Problem,
) -> list[Tensor | None]:
    """Of student (b, D_s), its weight, teacher (b, D_t), weights; this rank's part of the weights', not yet over N.

    `want`: the student's, the teacher's, its weights alone.
    """
    dtype, b = sides[0].weights.dtype, len(sides[0].rows)
    own = p.relation_kl_coefficients(statistics.sums).to(dtype)
    riding = (
        [] if problem.matrix else [own[: 5 if any(want[1:]) else 3].T.contiguous()]
    )  # the student's are the first three
    refs = statistics.references
    if not refs.shared:
        riding += [refs.student, refs.teacher]
    own = own.expand(-1, b)
    collected = [Collected(side) for side in sides]
    asked = want[0], any(want[1:])
    wanted = [c for c, does in zip(collected, asked, strict=True) if does]

    def visit(block):
        student, teacher = (side.against(c, block) for side, c in zip(sides, block.held, strict=True))
        width = len(student.columns)
        columns = own[:, :1].expand(-1, width) if problem.matrix else block.riding[0].T.contiguous()
        references = refs if refs.shared else p.References(refs.student, refs.teacher, *block.riding[1:])
        gradients = problem.sweeps.relation_kl_gradients(
            student,
            teacher,
            references,
            own[:, block.rows],
            columns,
            p.Sweep(block.role),
            block.offset,
            want_student=want[0],
            want_teacher=want[1],
            want_weights=want[2],
        )
        done = [g for g in gradients if g is not None]
        return [part for c, g in zip(wanted, done, strict=True) for part in c.add(g, block)]

    returning = [c for c, does in zip(collected, want[:2], strict=True) if does]
    collect(statistics.blocks, held, riding, visit, returning)
    return [
        part
        for c, does in zip(collected, asked, strict=True)
        for part in ((c.rows, c.weights) if does else 2 * (None,))
    ]
