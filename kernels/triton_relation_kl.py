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
import triton.language as tl
from torch import Tensor

from .chunked import SUM_BITS, fixed_reference, spans
from .chunked_relation import Sweep
from .chunked_relation_kl import REACH, SUMS, References
from .triton_passes import add_parts
from .triton_relation import (
    Operand,
    OperandGradient,
    OperandWeights,
    WeightSums,
    exponentials,
    relation_tile,
    segment_tile,
    sizes,
    waves,
)
from .triton_tiles import Config, Work, choose_config, store_weights


@triton.jit
def relation_maxima_kernel(
    run_ptr, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, out_ptr, row_start, offset, b, n, D, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row maxima of one wave without its own pairs: (student and teacher, splits, wave rows)."""
    if tl.load(run_ptr) == 0:
        return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    best_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        counted = (columns < n)[None, :] & ((rows + offset)[:, None] != columns[None, :])
        s = relation_tile(
            x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr, first_row, first, b, n, D,
            1, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        best_s = tl.maximum(best_s, tl.max(tl.where(counted, s, float("-inf")), 1))
        t = relation_tile(
            z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, first_row, first, b, n, F,
            K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        best_t = tl.maximum(best_t, tl.max(tl.where(counted, t, float("-inf")), 1))
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    out = out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out, best_s)
    tl.store(out + tl.num_programs(1) * wave, best_t)


@triton.jit
def relation_statistics_kernel(
    run_ptr, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, row_out_ptr, column_out_ptr,
    row_start, column_start, mirror_from, offset, b, n, D, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """The five sums of one wave over the columns from column_start: row_out (5, splits, wave rows), and for the columns
    from mirror_from on column_out (5, row tiles, n)."""
    if tl.load(run_ptr) == 0:
        return
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    if SHARED:
        s_ref, t_ref = tl.load(s_ref_ptr), tl.load(t_ref_ptr)
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=rows < b, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=rows < b, other=0.0)[:, None]
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = tl.zeros((BLOCK_M,), tl.float32)
    sum_difference = tl.zeros((BLOCK_M,), tl.float32)
    sum_drift = tl.zeros((BLOCK_M,), tl.float32)
    sum_curved = tl.zeros((BLOCK_M,), tl.float32)
    plane = tl.num_programs(0).to(tl.int64) * n
    for first in range(column_start + split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = relation_tile(
            x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr, first_row, first, b, n, D,
            1, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        t = relation_tile(
            z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, first_row, first, b, n, F,
            K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        e_s, e_t, d, difference = exponentials(
            s, t, s_ref, t_ref, first_row, first, b, n, offset, NARROW, WHOLE, BLOCK_M, BLOCK_N
        )
        drift = e_t * d
        curved = difference + drift
        sum_s += tl.sum(e_s, 1)
        sum_t += tl.sum(e_t, 1)
        sum_difference += tl.sum(difference, 1)
        sum_drift += tl.sum(drift, 1)
        sum_curved += tl.sum(curved, 1)
        if first + BLOCK_N > mirror_from:
            out = column_out_ptr + tile.to(tl.int64) * n + columns
            mirrored = (columns >= mirror_from) & (columns < n)
            tl.store(out, tl.sum(e_s, 0), mask=mirrored)
            tl.store(out + plane, tl.sum(e_t, 0), mask=mirrored)
            tl.store(out + 2 * plane, tl.sum(difference, 0), mask=mirrored)
            tl.store(out + 3 * plane, tl.sum(drift, 0), mask=mirrored)
            tl.store(out + 4 * plane, tl.sum(curved, 0), mask=mirrored)
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    out = row_out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.num_programs(1) * wave
    tl.store(out, sum_s)
    tl.store(out + plane, sum_t)
    tl.store(out + 2 * plane, sum_difference)
    tl.store(out + 3 * plane, sum_drift)
    tl.store(out + 4 * plane, sum_curved)


@triton.jit
def of_rows(coefficients_ptr, k: tl.constexpr, rows, b):
    return tl.load(coefficients_ptr + k * b + rows, mask=rows < b, other=0.0)[:, None]


@triton.jit
def of_columns(coefficients_ptr, k: tl.constexpr, columns, n):
    return tl.load(coefficients_ptr + k * n + columns, mask=columns < n, other=0.0)[None, :]


@triton.jit
def relation_weights_tile(
    tile, parts,
    x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr, tc_ref_ptr,
    coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
    teacher_ptr, teacher_rows_ptr, teacher_columns_ptr,
    row_start, row_end, column_start, column_end, offset, b, n, D, F, stride_h, plane_h,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """relation_weights_kernel's column tile `tile` of `parts`."""
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tile * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    inside = row_ok[:, None] & column_ok[None, :]
    s = relation_tile(
        x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D,
        1, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = relation_tile(
        z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F,
        K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    r, c = coefficients_ptr, column_coefficients_ptr
    if SHARED:
        e_s, e_t, d, difference = exponentials(
            s, t, tl.load(s_ref_ptr), tl.load(t_ref_ptr), first_row, first_column, row_end, column_end, offset,
            NARROW, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        h = difference * (of_rows(r, 0, rows, b) + of_columns(c, 0, columns, n))
        h += e_s * (of_rows(r, 1, rows, b) + of_columns(c, 1, columns, n))
        h += e_t * (of_rows(r, 2, rows, b) + of_columns(c, 2, columns, n))
        if TEACHER:
            h_t = d * (of_rows(r, 3, rows, b) + of_columns(c, 3, columns, n))
            h_t = e_t * (h_t + of_rows(r, 4, rows, b) + of_columns(c, 4, columns, n))
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        e_s, e_t, d, difference = exponentials(
            s, t, s_ref, t_ref, first_row, first_column, row_end, column_end, offset, NARROW, WHOLE, BLOCK_M, BLOCK_N
        )
        h = difference * of_rows(r, 0, rows, b) + e_s * of_rows(r, 1, rows, b) + e_t * of_rows(r, 2, rows, b)
        if TEACHER:
            h_t = e_t * (d * of_rows(r, 3, rows, b) + of_rows(r, 4, rows, b))
        s_ref = tl.load(sc_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        t_ref = tl.load(tc_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        e_s, e_t, d, difference = exponentials(
            s, t, s_ref, t_ref, first_row, first_column, row_end, column_end, offset, NARROW, WHOLE, BLOCK_M, BLOCK_N
        )
        h += difference * of_columns(c, 0, columns, n) + e_s * of_columns(c, 1, columns, n)
        h += e_t * of_columns(c, 2, columns, n)
        if TEACHER:
            h_t += e_t * (d * of_columns(c, 3, columns, n) + of_columns(c, 4, columns, n))
    height, tiles = row_end - row_start, tl.cast(parts, tl.int64)
    by_row = tl.cast(tile, tl.int64) * height + rows - row_start
    row, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + column
    tl.store(row_sums_ptr + tiles * height + by_row, tl.sum(h * s, 1), mask=row_ok)
    if EUCLIDEAN:
        weight = tl.load(xw_ptr)
        h = tl.where(s == 0.0, 0.0, -h * weight * weight / tl.where(s == 0.0, 1.0, s))  # s is -weight times distance
    tl.store(row_sums_ptr + by_row, tl.sum(h, 1), mask=row_ok)
    tl.store(column_sums_ptr + by_column, tl.sum(h, 0), mask=column_ok)
    store_weights(h_ptr, h, row, column, stride_h, inside)
    if TEACHER == 2:
        for k in range(K):
            raw = segment_tile(
                z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, z_starts_ptr, k,
                first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            out = teacher_rows_ptr + (K + tl.cast(k, tl.int64)) * tiles * height + by_row
            tl.store(out, tl.sum(h_t * raw, 1), mask=row_ok)
    if TEACHER == 1:
        if EUCLIDEAN:
            for k in range(K):
                away = segment_tile(
                    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, z_starts_ptr, k,
                    first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                at = tl.cast(k, tl.int64)
                out = teacher_rows_ptr + at * tiles * height + by_row
                tl.store(out + K * tiles * height, tl.sum(h_t * away, 1), mask=row_ok)
                slope = -h_t * tl.load(zw_ptr + k) / tl.where(away == 0.0, 1.0, away)
                slope = tl.where(away == 0.0, 0.0, slope)
                store_weights(teacher_ptr + at * plane_h, slope, row, column, stride_h, inside)
                tl.store(out, tl.sum(slope, 1), mask=row_ok)
                out = teacher_columns_ptr + at * tl.num_programs(0) * (column_end - column_start) + by_column
                tl.store(out, tl.sum(slope, 0), mask=column_ok)
        else:
            store_weights(teacher_ptr, h_t, row, column, stride_h, inside)


@triton.jit
def relation_weights_kernel(
    run_ptr,
    x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr, tc_ref_ptr,
    coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
    teacher_ptr, teacher_rows_ptr, teacher_columns_ptr,
    row_start, row_end, column_start, column_end, parts, offset, b, n, D, F, stride_h, plane_h,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """One block of H, or of C for euclidean relations, in h and with TEACHER (float32) in teacher, a plane a segment.

    row_sums (sum of what is stored, <H, S>; column tiles; rows), column_sums (row tiles, columns); teacher_rows (the
    same without the weight; K; column tiles; rows), teacher_columns (K, row tiles, columns), for euclidean ones only.
    TEACHER 2 wants its weights alone: the second half of teacher_rows is all that is made for it.
    A program takes one column tile; those for a reference a row, which rarely run, are fewer and walk over all `parts`.
    """
    if tl.load(run_ptr) == 0:
        return
    if SHARED:  # a loop of one round would spill
        relation_weights_tile(
            tl.program_id(1), parts, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
            z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr,
            tc_ref_ptr, coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr, teacher_ptr,
            teacher_rows_ptr, teacher_columns_ptr, row_start, row_end, column_start, column_end, offset, b, n, D, F,
            stride_h, plane_h, K, EUCLIDEAN, SHARED, TEACHER, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(1), parts, tl.num_programs(1)):
            relation_weights_tile(
                tile, parts, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
                z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr,
                tc_ref_ptr, coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
                teacher_ptr, teacher_rows_ptr, teacher_columns_ptr, row_start, row_end, column_start, column_end,
                offset, b, n, D, F, stride_h, plane_h, K, EUCLIDEAN, SHARED, TEACHER, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
            )  # fmt: skip


def _constants(student: Operand, teacher: Operand, config: Config) -> dict:
    return {"K": len(teacher.weights), "EUCLIDEAN": student.kind == "euclidean", **config.launch()}


def _config(student: Operand, teacher: Operand, *, plain: bool = True) -> Config:
    """One teacher and one reference leave room for larger tiles."""
    return choose_config(student.rows, Work.DOUBLE if plain and len(teacher.weights) == 1 else Work.CROWDED)


def _always(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.int32, device=like.device)


def relation_maxima(
    student: Operand, teacher: Operand, offset: int | None, run: Tensor | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Row maxima of both logits without own pairs, (b,) each; only while `run` is set, where it is given."""
    config = config or _config(student, teacher)
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
    for i in spans(0, b, config.wave_rows):
        first = i[0] if sweep is Sweep.TRIANGLE else 0
        mirror_from = {Sweep.TRIANGLE: i[1], Sweep.ROWS: n, Sweep.PAIR: 0}[sweep]
        grid = triton.cdiv(i[1] - i[0], config.block_m), min(config.splits, triton.cdiv(n - first, config.block_n))
        row_out = sums.new_empty(SUMS, grid[1], grid[0] * config.block_m)
        column_out = sums.new_empty(SUMS, grid[0], 1 if sweep is Sweep.ROWS else n)
        relation_statistics_kernel[grid](
            run, *student.pointers(), *teacher.pointers(), references.student, references.teacher, row_out, column_out,
            i[0], first, mirror_from, *extent, SHARED=references.shared, **_constants(student, teacher, config),
        )  # fmt: skip
        add_parts(row_out, sums[:, slice(*i)], first=False, flag=guard)
        if mirror_from < n:
            mirrored = sums if columns is None else columns
            add_parts(column_out[:, :, mirror_from:], mirrored[:, mirror_from:], first=False, flag=guard)
        del row_out, column_out  # before the next wave's are there
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
