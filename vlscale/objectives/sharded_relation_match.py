"""Relation match of a global batch over ranks: each rank its own rows x all columns, or each pair of blocks once.

Legend: W ranks, b rows a rank, N = W b, D_s and D_t the widths of student and teachers, F = D_s + D_t, e bytes an
element; equations are those of vlscale.kernels.primitives, gradients over ranks those of vlscale.objectives.sharded.

mae          one pass. Bytes a rank receives: gather and ring (W-1)/W N F e; half_ring N/2 (F e + 4 D_s), about
mse          no row travels: an (F, F) matrix of float64 is added over ranks; differentiable any number of times
wasserstein  sorting needs whole rows, so columns are always gathered, and their gradient comes by reduce_scatter
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlscale.distributed import COMMS, Agreement, Ranks, all_reduce, choose_comm, gather_rows, sum_over_ranks
from vlscale.kernels import primitives as p
from vlscale.kernels import relation_match_loss
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
from vlscale.objectives.relation_blocks import (
    Collected,
    Side,
    collect,
    describe_relation,
    on_triton,
)
from vlscale.objectives.sharded import Computed, gathered_bytes, made_in_forward, make_blocks


def sharded_relation_match_loss(
    student_emb: Tensor,
    teacher_embs: Tensor | list[Tensor],
    teacher_weights: Tensor | list[float] | None = None,
    *,
    temperature: float | Tensor,
    metric: str = "mae",
    ranks: Ranks,
    comm: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """`relation_match_loss` of all ranks' rows, 0-d and the same on every rank.

    student_emb (b, D) and teacher_embs (b, D_k) are this rank's, b the same on every rank. comm as in
    `sharded_relation_kl_loss`; mse and wasserstein have one way each. mae and wasserstein are differentiable once.
    Triton serves mae, as in `relation_match_loss`; impl `reference` gathers everything and is dense, whole on each
    rank.
    """
    if ranks.size == 1:
        check_choice("comm", comm, COMMS)
        return relation_match_loss(
            student_emb, teacher_embs, teacher_weights, temperature=temperature, metric=metric, impl=impl
        )
    with Agreement("relation match loss", ranks) as agreement:
        check_embeddings("student_emb", student_emb)
        teachers = as_teachers(student_emb, teacher_embs)
        check_choice("metric", metric, ("mae", "mse", "wasserstein"))
        dtype = compute_dtype(student_emb, *teachers)
        tau = as_scalar("temperature", temperature, student_emb, dtype, positive=True)
        weights = as_weights(teacher_weights, teachers, dtype)
        impl = choose_impl(impl, student_emb.device)
        comm = choose_comm(comm, gathered_bytes(ranks, student_emb, *teachers), relation=True)
        agreement.offer(len(student_emb), (*describe_relation(student_emb, teachers), metric, comm, impl))
    widths, teacher = [t.shape[1] for t in teachers], join_teachers(teachers, dtype)
    if impl == "reference":
        everyone = [gather_rows(t, ranks) for t in (student_emb, *teachers)]
        return relation_match_loss(everyone[0], everyone[1:], weights, temperature=tau, metric=metric, impl=impl)
    inputs = student_emb, (1 / tau).reshape(1), teacher, weights / tau
    if metric == "mse":
        with torch.autocast(device_type=student_emb.device.type, enabled=False):
            return _mse(*inputs, widths, ranks)
    recording = torch.is_grad_enabled()
    want = tuple(recording and any(t.requires_grad for t in pair) for pair in (inputs[:2], inputs[2:]))
    triton = metric == "mae" and on_triton(impl, dtype)
    compute = _wasserstein if metric == "wasserstein" else _mae_in_triton if triton else _mae
    comm = comm if metric == "mae" else "gather"

    def parts():
        student, student_weight, teacher, weights = (t.detach() for t in inputs)
        first = Side(student, student_weight, [student.shape[1]], "cosine", triton)
        sides = first, Side(teacher, weights, widths, "cosine", triton)
        total, gradients = compute(sides, want, comm, ranks)
        n = ranks.size * len(student)
        loss = all_reduce(total, ranks) / (n * (n - 1))
        return loss.to(weights.dtype), [None if g is None else g / (n * (n - 1)) for g in gradients]

    return made_in_forward(parts, inputs, ranks)


def _mae(sides: tuple[Side, Side], want: tuple[bool, bool], comm: str, ranks: Ranks) -> Computed:
    """s - t is one relation of the joined embeddings, with the teachers' weights negated."""
    student, teacher = sides
    joined = Side(
        torch.cat([side.rows.to(side.weights.dtype) for side in sides], 1),
        torch.cat([student.weights, -teacher.weights]),
        [*student.widths, *teacher.widths],
        "cosine",
        False,
    )
    negated = replace(teacher, weights=-teacher.weights)
    toward = joined if all(want) else student if want[0] else negated
    collected = [Collected(toward)] if any(want) else []
    total = student.weights.new_zeros((), dtype=torch.float64)
    blocks = make_blocks(comm, ranks)

    def visit(block):
        columns = torch.cat([part.to(student.weights.dtype) for part in block.held], 1)
        difference = joined.against(columns, block)
        target = None
        if any(want):
            target = difference if all(want) else toward.against(block.held[want[1]], block)
        part, gradient = p.relation_mae_sweep(difference, target, p.Sweep(block.role), block.offset)
        total.add_(part)
        return collected[0].add(gradient, block) if collected else []

    collect(blocks, blocks.hold(student.rows, teacher.rows), [], visit, collected)
    return total, _split(collected, student.rows.shape[1], want)


def _mae_in_triton(sides: tuple[Side, Side], want: tuple[bool, bool], comm: str, ranks: Ranks) -> Computed:
    """s - t is the sum of the two sides' logits, with the teachers' weights negated."""
    from vlscale.kernels.triton_relation_match import relation_mae_sweep

    student, negated = sides[0], replace(sides[1], weights=-sides[1].weights)
    collected = [Collected(side) for side, asked in zip((student, negated), want, strict=True) if asked]
    total = student.weights.new_zeros((), dtype=torch.float64)
    blocks = make_blocks(comm, ranks)

    def visit(block):
        pair = (side.against(c, block) for side, c in zip((student, negated), block.held, strict=True))
        part, *gradients = relation_mae_sweep(
            *pair, p.Sweep(block.role), block.offset, want_student=want[0], want_teacher=want[1]
        )
        total.add_(part)
        done = [g for g in gradients if g is not None]
        return [rows for c, g in zip(collected, done, strict=True) for rows in c.add(g, block)]

    collect(blocks, blocks.hold(student.rows, negated.rows), [], visit, collected)
    found = iter(collected)
    of_student, of_teacher = (next(found) if asked else None for asked in want)
    first = [None, None] if of_student is None else [of_student.rows, of_student.weights]
    return total, [*first, *([None, None] if of_teacher is None else [of_teacher.rows, -of_teacher.weights])]


def _split(collected: Sequence[Collected], width: int, want: tuple[bool, bool]) -> list[Tensor | None]:
    """The gradient of the sides that are wanted, of both at once the joined embeddings', as those of student, its
    weight, teacher, weights."""
    if not collected:
        return [None] * 4
    rows, weights = collected[0].rows, collected[0].weights
    if all(want):
        return [rows[:, :width], weights[:1], rows[:, width:], -weights[1:]]
    return [rows, weights, None, None] if want[0] else [None, None, rows, -weights]


def _wasserstein(sides: tuple[Side, Side], want: tuple[bool, bool], comm: str, ranks: Ranks) -> Computed:
    blocks = make_blocks(comm, ranks)
    collected = [Collected(side) if asked else None for side, asked in zip(sides, want, strict=True)]
    wanted = [c for c in collected if c is not None]
    total = sides[0].weights.new_zeros((), dtype=torch.float64)

    def visit(block):
        student, teacher = (side.against(c, block) for side, c in zip(sides, block.held, strict=True))
        part, *gradients = p.relation_wasserstein_sweep(
            student, teacher, block.offset, p.Sweep.PAIR, want_student=want[0], want_teacher=want[1]
        )
        total.add_(part)
        done = [g for g in gradients if g is not None]
        return [part for c, g in zip(wanted, done, strict=True) for part in c.add(g, block)]

    collect(blocks, blocks.hold(*(side.rows for side in sides)), [], visit, wanted)
    return total, [part for c in collected for part in ((None, None) if c is None else (c.rows, c.weights))]


def _mse(
    student: Tensor, student_weight: Tensor, teacher: Tensor, weights: Tensor, widths: list[int], ranks: Ranks
) -> Tensor:
    """sum (s - t)^2 from the (F, F) product of all ranks' rows; each rank subtracts its own rows' diagonal."""
    joined = torch.cat([student.double(), teacher.double()], 1)
    factors = torch.cat([student_weight, -weights]).double()
    places = torch.tensor([student.shape[1], *widths], device=factors.device)
    spread = factors.repeat_interleave(places, output_size=joined.shape[1])
    gram = sum_over_ranks(p.relation_gram(joined), ranks)
    nothing = torch.zeros_like(gram)
    whole = p.relation_mse_total(joined[:0], spread, gram)
    total = whole + sum_over_ranks(p.relation_mse_total(joined, spread, nothing), ranks)
    n = ranks.size * len(student)
    return (total.clamp_min(0) / (n * (n - 1))).to(weights.dtype)
