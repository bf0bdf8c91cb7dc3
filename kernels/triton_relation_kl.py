"""Relation KL in Triton, cosine relations: chunked_relation_kl's statistics and gradients, same letters.

Rows go in waves. A wave visits the columns from its own first row on: the square on the diagonal serves its rows, the
rest serves rows and columns, whose sums are written per row tile and added in fixed order. So each pair of waves is
computed once: N^2 (D_s + D_t) operations forward, the same again and 2 N^2 D_s backward, plus the
squares' second halves. Backward makes blocks of H and takes them to dX with ordinary products, both sides of a block.

The constant reference is checked on the device: where a sum is unsound, kernels that are always launched and return at
once while the flag is clear compute maxima and start over (row scope with one reference a row and no mirroring, matrix
scope with the exact maximum as the constant).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import SUM_BITS, fixed_reference, spans
from .chunked_relation_kl import REACH, SUMS
from .triton_tiles import Centred, Config, Work, choose_config, product_tile, store_weights, stored_dtype


@dataclass(frozen=True)
class Operand:
    """Embeddings (N, F) of one side: K segments that start at `starts` (K + 1,) int32, one weight each (K,) float32."""

    emb: Tensor
    weights: Tensor
    widths: list[int]
    starts: Tensor

    @classmethod
    def of(cls, emb: Tensor, weights: Tensor, widths: list[int]) -> "Operand":
        """bfloat16 embeddings stay as they are, everything else is float32."""
        emb = emb.contiguous() if emb.dtype == torch.bfloat16 else emb.to(weights.dtype).contiguous()
        ends = accumulate(widths, initial=0)  # filled one by one on the device: copying a list would wait for it
        starts = torch.stack([torch.full((), end, dtype=torch.int32, device=emb.device) for end in ends])
        return cls(emb, weights, widths, starts)

    def bound(self) -> Tensor:
        spread = self.spread().abs()
        return (self.emb.to(spread.dtype).square() * spread).sum(1).amax()

    def spread(self) -> Tensor:
        """Each feature's weight, (F,)."""
        return torch.cat([w.expand(width) for w, width in zip(self.weights, self.widths, strict=True)])

    def by_segment(self, features: Tensor) -> Tensor:
        """(F,) -> (K,) sums."""
        return torch.stack([part.sum() for part in features.split(self.widths)])


@triton.jit
def mixed_tile(
    emb_ptr, weight_ptr, starts_ptr, first_row, first_column, row_end, column_end, D,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_k w_k z^k_i . z^k_j of one tile."""
    if K == 1:
        product = product_tile(
            emb_ptr, emb_ptr, first_row, first_column, row_end, column_end, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K
        )
        return tl.load(weight_ptr) * product
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K):
        start = tl.load(starts_ptr + k)
        width = tl.load(starts_ptr + k + 1) - start
        here = emb_ptr + start
        product = product_tile(
            here, here, first_row, first_column, row_end, column_end, width, D, D, BLOCK_M, BLOCK_N, BLOCK_K
        )
        total += tl.load(weight_ptr + k) * product
    return total


@triton.jit
def minus_tanh_half(d):
    """-tanh(d / 2), to the last bits also near 0: a polynomial there, (1 - t) / (1 + t) elsewhere."""
    h = 0.5 * tl.abs(d)
    q = h * h
    near = h * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    t = tl.exp(-2.0 * h)
    value = tl.where(h < 0.25, near, (1.0 - t) / (1.0 + t))
    return tl.where(d > 0, -value, value)


@triton.jit
def exponentials(s, t, s_ref, t_ref, counted):
    """(e_s, e_t, d, e_s - e_t) of one tile, 0 where a pair does not count."""
    s = s - s_ref
    t = t - t_ref
    e_s = tl.where(counted, tl.exp(s), 0.0)
    e_t = tl.where(counted, tl.exp(t), 0.0)
    d = tl.where(counted, t - s, 0.0)
    return e_s, e_t, d, (e_s + e_t) * minus_tanh_half(d)


@triton.jit
def relation_maxima_kernel(
    run_ptr, x_ptr, xw_ptr, x_starts_ptr, z_ptr, zw_ptr, z_starts_ptr, out_ptr, row_start, n, D, F,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Off-diagonal row maxima of one wave: (student and teacher, splits, wave rows)."""
    if tl.load(run_ptr) == 0:
        return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    best_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_t = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        counted = (columns < n)[None, :] & (rows[:, None] != columns[None, :])
        s = mixed_tile(x_ptr, xw_ptr, x_starts_ptr, first_row, first, n, n, D, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        best_s = tl.maximum(best_s, tl.max(tl.where(counted, s, float("-inf")), 1))
        t = mixed_tile(z_ptr, zw_ptr, z_starts_ptr, first_row, first, n, n, F, K, BLOCK_M, BLOCK_N, BLOCK_K)
        best_t = tl.maximum(best_t, tl.max(tl.where(counted, t, float("-inf")), 1))
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    out = out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out, best_s)
    tl.store(out + tl.num_programs(1) * wave, best_t)


@triton.jit
def relation_statistics_kernel(
    run_ptr, x_ptr, xw_ptr, x_starts_ptr, z_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, row_out_ptr,
    column_out_ptr, row_start, column_start, mirror_from, n, D, F,
    K: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The five sums of one wave over the columns from column_start: row_out (5, splits, wave rows), and for the columns
    from mirror_from on column_out (5, row tiles, n)."""
    if tl.load(run_ptr) == 0:
        return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    if SHARED:
        s_ref, t_ref = tl.load(s_ref_ptr), tl.load(t_ref_ptr)
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=rows < n, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=rows < n, other=0.0)[:, None]
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = tl.zeros((BLOCK_M,), tl.float32)
    sum_difference = tl.zeros((BLOCK_M,), tl.float32)
    sum_drift = tl.zeros((BLOCK_M,), tl.float32)
    sum_curved = tl.zeros((BLOCK_M,), tl.float32)
    plane = tl.num_programs(0).to(tl.int64) * n
    for first in range(column_start + split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        counted = (rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] != columns[None, :])
        s = mixed_tile(x_ptr, xw_ptr, x_starts_ptr, first_row, first, n, n, D, 1, BLOCK_M, BLOCK_N, BLOCK_K)
        t = mixed_tile(z_ptr, zw_ptr, z_starts_ptr, first_row, first, n, n, F, K, BLOCK_M, BLOCK_N, BLOCK_K)
        e_s, e_t, d, difference = exponentials(s, t, s_ref, t_ref, counted)
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
def coefficient(rows_ptr, k: tl.constexpr, rows, columns, n):
    """Coefficient k of the rows, plus the same of the columns."""
    row = tl.load(rows_ptr + k * n + rows, mask=rows < n, other=0.0)[:, None]
    return row + tl.load(rows_ptr + k * n + columns, mask=columns < n, other=0.0)[None, :]


@triton.jit
def side(coefficients_ptr, k: tl.constexpr, index, n):
    return tl.load(coefficients_ptr + k * n + index, mask=index < n, other=0.0)


@triton.jit
def relation_weights_kernel(
    run_ptr, x_ptr, xw_ptr, x_starts_ptr, z_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, coefficients_ptr, h_ptr,
    teacher_ptr, row_sums_ptr, column_total_ptr, row_start, row_end, column_start, column_end, n, D, F, stride_h,
    K: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of H (and of the teacher's, float32); row_sums (sum H, <H, S>; column tiles; rows), column_total."""
    if tl.load(run_ptr) == 0:
        return
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    inside = row_ok[:, None] & column_ok[None, :]
    counted = inside & (rows[:, None] != columns[None, :])
    s = mixed_tile(
        x_ptr, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D, 1, BLOCK_M, BLOCK_N, BLOCK_K
    )
    t = mixed_tile(
        z_ptr, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F, K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    c = coefficients_ptr
    if SHARED:
        e_s, e_t, d, difference = exponentials(s, t, tl.load(s_ref_ptr), tl.load(t_ref_ptr), counted)
        h = difference * coefficient(c, 0, rows, columns, n) + e_s * coefficient(c, 1, rows, columns, n)
        h += e_t * coefficient(c, 2, rows, columns, n)
        if TEACHER:
            h_t = e_t * (d * coefficient(c, 3, rows, columns, n) + coefficient(c, 4, rows, columns, n))
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        e_s, e_t, d, difference = exponentials(s, t, s_ref, t_ref, counted)
        h = difference * side(c, 0, rows, n)[:, None] + e_s * side(c, 1, rows, n)[:, None]
        h += e_t * side(c, 2, rows, n)[:, None]
        if TEACHER:
            h_t = e_t * (d * side(c, 3, rows, n)[:, None] + side(c, 4, rows, n)[:, None])
        s_ref = tl.load(s_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        t_ref = tl.load(t_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        e_s, e_t, d, difference = exponentials(s, t, s_ref, t_ref, counted)
        h += difference * side(c, 0, columns, n)[None, :] + e_s * side(c, 1, columns, n)[None, :]
        h += e_t * side(c, 2, columns, n)[None, :]
        if TEACHER:
            h_t += e_t * (d * side(c, 3, columns, n)[None, :] + side(c, 4, columns, n)[None, :])
    store_weights(h_ptr, h, rows - row_start, columns - column_start, stride_h, inside)
    if TEACHER:
        store_weights(teacher_ptr, h_t, rows - row_start, columns - column_start, stride_h, inside)
    height = row_end - row_start
    out = row_sums_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    tl.store(out, tl.sum(h, 1), mask=row_ok)
    tl.store(out + tl.num_programs(1).to(tl.int64) * height, tl.sum(h * s, 1), mask=row_ok)
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + columns - column_start
    tl.store(column_total_ptr + by_column, tl.sum(h, 0), mask=column_ok)


def _inputs(student: Operand, teacher: Operand) -> tuple[Tensor, ...]:
    return student.emb, student.weights, student.starts, teacher.emb, teacher.weights, teacher.starts


def _sizes(student: Operand, teacher: Operand) -> tuple[int, int, int]:
    return len(student.emb), student.emb.shape[1], teacher.emb.shape[1]


def relation_maxima(
    student: Operand, teacher: Operand, run: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Off-diagonal row maxima of both logits, (N,) each, only while `run` is set."""
    config = config or choose_config(student.emb, Work.DOUBLE)
    n, d, f = _sizes(student, teacher)
    maxima = student.weights.new_zeros(2, n)
    for i in spans(0, n, config.wave_rows):
        grid = triton.cdiv(i[1] - i[0], config.block_m), min(config.splits, triton.cdiv(n, config.block_n))
        out = maxima.new_full((2, grid[1], grid[0] * config.block_m), -torch.inf)
        relation_maxima_kernel[grid](
            run, *_inputs(student, teacher), out, i[0], n, d, f, K=len(teacher.weights), **config.launch()
        )
        maxima[:, slice(*i)] = out.amax(1)[:, : i[1] - i[0]]
    return maxima[0], maxima[1]


def relation_kl_statistics(
    student: Operand, teacher: Operand, s_ref: Tensor, t_ref: Tensor, run: Tensor, config: Config | None = None
) -> Tensor:
    """(5, N) sums, only while `run` is set; 0-d references go by the triangle, (N,) ones over every tile."""
    config = config or choose_config(student.emb, Work.DOUBLE)
    n, d, f = _sizes(student, teacher)
    shared = s_ref.dim() == 0
    sums = student.weights.new_zeros(SUMS, n)
    for i in spans(0, n, config.wave_rows):
        first, mirror_from = (i[0], i[1]) if shared else (0, n)
        grid = triton.cdiv(i[1] - i[0], config.block_m), min(config.splits, triton.cdiv(n - first, config.block_n))
        row_out = sums.new_zeros(SUMS, grid[1], grid[0] * config.block_m)
        column_out = sums.new_zeros(SUMS, grid[0], n if shared else 1)
        relation_statistics_kernel[grid](
            run, *_inputs(student, teacher), s_ref, t_ref, row_out, column_out, i[0], first, mirror_from, n, d, f,
            K=len(teacher.weights), SHARED=shared, **config.launch(),
        )  # fmt: skip
        sums[:, slice(*i)] += row_out.sum(1)[:, : i[1] - i[0]]
        if shared:
            sums += column_out.sum(1)
    return sums


def relation_kl_sums(
    student: Operand, teacher: Operand, *, matrix: bool, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(student's references (N,), teacher's, sums (5, N)), from whichever are sound; nothing is read on the host."""
    n, dtype = len(student.emb), student.weights.dtype
    constant = fixed_reference(torch.maximum(student.bound(), teacher.bound()), dtype, REACH[dtype])
    always = torch.ones((), dtype=torch.int32, device=student.emb.device)
    sums = relation_kl_statistics(student, teacher, constant, constant, always, config)
    checked = sums[:2].sum(1) if matrix else sums[:2]
    floor = n * 2.0 ** -SUM_BITS[dtype]
    unsound = ~((checked >= floor) & (checked < torch.inf)).all()
    run = unsound.to(torch.int32)
    s_ref, t_ref = relation_maxima(student, teacher, run, config)
    if matrix:
        s_ref, t_ref = s_ref.amax(), t_ref.amax()
    more = relation_kl_statistics(student, teacher, s_ref, t_ref, run, config)
    references = (torch.where(unsound, ref, constant).expand(n) for ref in (s_ref, t_ref))
    return *references, torch.where(unsound, more, sums)


def relation_kl_gradients(
    student: Operand,
    teacher: Operand,
    s_ref: Tensor,
    t_ref: Tensor,
    coefficients: Tensor,
    *,
    matrix: bool,
    want_teacher: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of student, its weight, and where wanted teacher and its weights; references (N,), coefficients (5, N).

    Row scope launches the kernels for one constant and those for a reference a row, of which one returns at once.
    """
    config = config or choose_config(student.emb, Work.DOUBLE)
    n, d, f = _sizes(student, teacher)
    dtype = student.weights.dtype
    constant = ((s_ref == s_ref[0]) & (t_ref == t_ref[0])).all()
    runs = [(True, torch.ones_like(constant) if matrix else constant), *([] if matrix else [(False, ~constant)])]
    stored = stored_dtype(student.emb, dtype)
    x, z = Centred(student.emb, dtype, stored), teacher.emb.to(dtype)
    dx, dz = torch.zeros(n, d, dtype=dtype, device=z.device), torch.zeros_like(z) if want_teacher else None
    height, width = min(n, config.wave_rows), min(n, config.wave_columns)
    block = torch.empty(height, max(height, width), dtype=stored, device=z.device)
    teacher_block = torch.empty_like(block, dtype=dtype) if want_teacher else None
    along = torch.zeros((), dtype=torch.float64, device=z.device)
    for i in spans(0, n, height):
        for j in [i, *spans(i[1], n, width)]:
            shape = i[1] - i[0], j[1] - j[0]
            h = block[: shape[0], : shape[1]]
            h_t = None if teacher_block is None else teacher_block[: shape[0], : shape[1]]
            grid = triton.cdiv(shape[0], config.block_m), triton.cdiv(shape[1], config.block_n)
            by_row, by_col = dx.new_zeros(2, grid[1], shape[0]), dx.new_zeros(grid[0], shape[1])
            for shared, run in runs:
                relation_weights_kernel[grid](
                    run.to(torch.int32), *_inputs(student, teacher), s_ref, t_ref, coefficients, h, h_t, by_row,
                    by_col, i[0], i[1], j[0], j[1], n, d, f, block.stride(0),
                    K=len(teacher.weights), SHARED=shared, TEACHER=want_teacher, **config.launch(),
                )  # fmt: skip
            mirrored = j[0] >= i[1]
            along += by_row[1].sum(dtype=torch.float64) * (1.0 if mirrored else 0.5)
            dx[slice(*i)] += x.weighted(h, slice(*j), by_row[0].sum(0))
            if mirrored:
                dx[slice(*j)] += x.weighted(h.T, slice(*i), by_col.sum(0))
            if want_teacher:
                dz[slice(*i)] += h_t @ z[slice(*j)]
                if mirrored:
                    dz[slice(*j)] += h_t.T @ z[slice(*i)]
    d_weight = (along / student.weights).to(dtype)
    dx.mul_(student.weights)
    if not want_teacher:
        return dx, d_weight, None, None
    d_weights = teacher.by_segment((dz * z).sum(0, dtype=torch.float64)) / 2
    return dx, d_weight, dz.mul_(teacher.spread()), d_weights.to(dtype)
