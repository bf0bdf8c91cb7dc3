"""Relation KL in Triton: the rectangular primitives of chunked_relation_kl, same letters, same signatures.

Rows go in waves. In a triangle a wave visits the columns from its own first row on: the square on the diagonal serves
its rows, the rest serves rows and columns, whose sums are written per row tile and added in fixed order. So each pair
of waves is computed once: N^2 (D_s + D_t) operations forward, the same again and 2 N^2 D_s backward, plus the squares'
second halves. Backward makes blocks of H and takes them to dX with ordinary products, both sides of a block.

One process checks the constant reference on the device: where a sum is unsound, kernels that are always launched and
return at once while their flag is clear compute maxima and start over (row scope with one reference a row and no
mirroring, matrix scope with the exact maximum as the constant). Over ranks the caller decides, and says so by the
references that it gives.
"""

import torch
import triton
from torch import Tensor

from .chunked import SUM_BITS, fixed_reference, spans
from .chunked_relation import Sweep
from .chunked_relation_kl import REACH, SUMS, References
from .triton_passes import add_parts
from .triton_relation import Operand, OperandGradient, OperandWeights, WeightSums, sizes, waves
from .triton_relation_statistics import relation_maxima_kernel, relation_statistics_kernel
from .triton_relation_weights import relation_weights_kernel
from .triton_tiles import Config, Work, choose_config


def _constants(student: Operand, teacher: Operand, config: Config) -> dict:
    return {"K": len(teacher.weights), "EUCLIDEAN": student.kind == "euclidean", **config.launch()}


def _config(student: Operand, teacher: Operand, *, plain: bool = True) -> Config:
    """One reference leaves room for larger tiles, one teacher for the largest."""
    if plain and len(teacher.weights) == 1:
        return choose_config(student.rows, Work.PARTS)
    return choose_config(student.rows, Work.DOUBLE if plain and teacher.kind == "cosine" else Work.CROWDED)


def _always(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.int32, device=like.device)


def relation_maxima(
    student: Operand, teacher: Operand, offset: int | None, run: Tensor | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Row maxima of both logits without own pairs, (b,) each; only while `run` is set, where it is given."""
    config = config or choose_config(student.rows, Work.DOUBLE if len(teacher.weights) == 1 else Work.CROWDED)
    run = _always(student.weights) if run is None else run
    extent = sizes(student, teacher, offset)
    b, n = extent[1:3]
    maxima = student.weights.new_zeros(2, b)
    for i in spans(0, b, config.wave_rows):
        grid = triton.cdiv(i[1] - i[0], config.block_m), min(config.splits, triton.cdiv(n, config.block_n))
        out = maxima.new_empty(2, grid[1], grid[0] * config.block_m)
        relation_maxima_kernel[grid](
            run, *student.pointers(), *teacher.pointers(), out, i[0], *extent, **_constants(student, teacher, config)
        )
        add_parts(out, maxima[:, slice(*i)], first=True, flag=run, maximum=True)
    return maxima[0], maxima[1]


def relation_kl_statistics(
    student: Operand,
    teacher: Operand,
    references: References,
    sweep: Sweep,
    offset: int | None,
    run: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(5, b) sums of the rows, and (5, n) of the columns in a pair sweep; only while `run` is set, if given."""
    config = config or _config(student, teacher, plain=references.shared)
    guard, run = run, _always(student.weights) if run is None else run
    extent = sizes(student, teacher, offset)
    b, n = extent[1:3]
    sums = student.weights.new_zeros(SUMS, b)
    columns = sums.new_zeros(SUMS, n) if sweep is Sweep.PAIR else None
    for place in waves(sweep, b, n, min(b, config.wave_rows), min(n, config.wave_columns)):
        tiles, parts = triton.cdiv(place.shape[0], config.block_m), triton.cdiv(place.shape[1], config.block_n)
        programs = parts if references.shared else min(parts, config.splits)
        row_out = sums.new_empty(SUMS, programs, place.shape[0])
        column_out = sums.new_empty(SUMS, tiles, place.shape[1] if place.mirrored else 0)
        relation_statistics_kernel[tiles, programs](
            run, *student.pointers(), *teacher.pointers(), references.student, references.teacher, row_out, column_out,
            *place.rows, *place.columns, parts, int(place.mirrored), extent[0], *extent[3:], SHARED=references.shared,
            **_constants(student, teacher, config),
        )  # fmt: skip
        add_parts(row_out, sums[:, slice(*place.rows)], first=False, flag=guard)
        if place.mirrored:
            mirrored = sums if columns is None else columns
            add_parts(column_out, mirrored[:, slice(*place.columns)], first=False, flag=guard)
    return sums, columns


def relation_kl_sums(
    student: Operand, teacher: Operand, *, matrix: bool, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(student's references (N,), teacher's, sums (5, N)), from whichever are sound; nothing is read on the host."""
    n, dtype = len(student.rows), student.weights.dtype
    constant = fixed_reference(torch.maximum(student.bound(), teacher.bound()), dtype, REACH[dtype])
    sums, _ = relation_kl_statistics(student, teacher, References(constant, constant), Sweep.TRIANGLE, 0, config=config)
    checked = sums[:2].sum(1) if matrix else sums[:2]
    floor = n * 2.0 ** -SUM_BITS[dtype]
    unsound = ~((checked >= floor) & (checked < torch.inf)).all()
    run = unsound.to(torch.int32)
    s_ref, t_ref = relation_maxima(student, teacher, 0, run, config)
    if matrix:
        s_ref, t_ref = s_ref.amax(), t_ref.amax()
    sweep = Sweep.TRIANGLE if matrix else Sweep.ROWS
    more, _ = relation_kl_statistics(student, teacher, References(s_ref, t_ref), sweep, 0, run, config)
    references = (torch.where(unsound, ref, constant).expand(n) for ref in (s_ref, t_ref))
    return *references, torch.where(unsound, more, sums)


def launches_of(s_ref: Tensor, t_ref: Tensor, *, matrix: bool) -> list[tuple[References, Tensor]]:
    """One process's references (N,) as the kernels to launch: row scope launches those for one constant and those for a
    reference a row, of which one returns at once."""
    constant = ((s_ref == s_ref[0]) & (t_ref == t_ref[0])).all()
    shared, vectors = References(s_ref[0], t_ref[0]), References(s_ref, t_ref, s_ref, t_ref)
    if matrix:
        return [(shared, _always(s_ref))]
    return [(shared, constant.to(torch.int32)), (vectors, (~constant).to(torch.int32))]


def relation_kl_gradients(
    student: Operand,
    teacher: Operand,
    references: References | None,
    coefficients: Tensor,
    column_coefficients: Tensor,
    sweep: Sweep,
    offset: int | None,
    *,
    want_student: bool = True,
    want_teacher: bool = False,
    want_weights: bool = False,
    launches: list[tuple[References, Tensor]] | None = None,
    config: Config | None = None,
) -> tuple[OperandGradient | None, OperandWeights | None]:
    """Gradients of the sum of `relation_kl_terms` through both sides, None where not wanted.

    Coefficients (5, b) and (5, n) are finished ones; `launches` stand in for `references` where the device decides.
    `want_weights` is of the teacher's weights, without its embeddings unless `want_teacher`.
    """
    launches = launches or [(references, _always(student.weights))]
    coefficients, column_coefficients = coefficients.contiguous(), column_coefficients.contiguous()
    waved = config or _config(student, teacher)
    extent, dtype = sizes(student, teacher, offset), student.weights.dtype
    stored, euclidean = student.stored_dtype(), student.kind == "euclidean"
    gradient = OperandGradient(student, sweep, stored) if want_student else None
    teacher_gradient = OperandGradient(teacher, sweep, dtype) if want_teacher else OperandWeights(teacher)
    of_teacher = 1 if want_teacher else 2 if want_weights else 0
    segments = len(teacher.weights)
    planes = segments if euclidean and want_teacher else 1
    height, width = min(extent[1], waved.wave_rows), min(extent[2], max(1, waved.wave_columns // planes))
    block = torch.empty(1, height, max(height, width), dtype=stored, device=coefficients.device)
    teacher_block = block.new_empty(planes, *block.shape[1:], dtype=dtype) if want_teacher else None
    for place in waves(sweep, *extent[1:3], height, width):
        sums, teacher_sums = (WeightSums.of(place, count, coefficients) for count in (1, segments))
        for refs, run in launches:
            tile = config or _config(student, teacher, plain=refs.shared and not of_teacher)
            tiles, parts = triton.cdiv(place.shape[0], tile.block_m), triton.cdiv(place.shape[1], tile.block_n)
            out = sums.parts(tiles, parts)
            teacher_out = teacher_sums.parts(tiles, parts) if of_teacher else (None, None)
            relation_weights_kernel[tiles, parts if refs.shared else min(parts, tile.splits)](
                run, *student.pointers(), *teacher.pointers(), refs.student, refs.teacher, refs.student_columns,
                refs.teacher_columns, coefficients, column_coefficients, block, *out, teacher_block, *teacher_out,
                *place.rows, *place.columns, parts, *extent, block.stride(1), block.stride(0),
                SHARED=refs.shared, TEACHER=of_teacher, **_constants(student, teacher, tile),
            )  # fmt: skip
            guard = run if len(launches) > 1 else None
            sums.take(*out, guard)
            if want_teacher and euclidean:  # other relations' teachers have no sums to be kept
                teacher_sums.take(*teacher_out, guard)
            elif of_teacher == 2:
                teacher_sums.take_along(teacher_out[0], guard)
        here = slice(place.shape[0]), slice(place.shape[1])
        if want_student:
            gradient.add(block[:, *here], place, sums.rows, sums.columns)
            gradient.add_along(sums.along.sum(1) / student.weights, place)
        if want_teacher:
            teacher_gradient.add(teacher_block[:, *here], place, teacher_sums.rows, teacher_sums.columns)
        if of_teacher == 2 or (want_teacher and euclidean):
            teacher_gradient.add_along(teacher_sums.along.sum(1), place)
    return gradient, teacher_gradient if of_teacher else None
