"""Mean absolute difference of relations in Triton: loss and gradients in one pass over the triangle.

sign(s - t) is known where the difference is made, so a block of H = 2 sign(s - t) (exact in float16) is stored by
waves and ordinary products take it to dX, both sides of a block: N^2 (D_s + D_t) operations and 2 N^2 D_s, plus the
diagonal squares' second halves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .triton_relation_kl import Operand, mixed_tile
from .triton_tiles import Centred, Config, Work, choose_config, store_weights, stored_dtype


@triton.jit
def relation_mae_kernel(
    x_ptr, xw_ptr, x_starts_ptr, z_ptr, zw_ptr, z_starts_ptr, h_ptr, row_sums_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, D, F, stride_h,
    K: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of H; row_sums (|s - t|, sum H, <H, S>; column tiles; rows), column_total (row tiles, columns)."""
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    inside = row_ok[:, None] & column_ok[None, :]
    s = mixed_tile(
        x_ptr, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D, 1, BLOCK_M, BLOCK_N, BLOCK_K
    )
    t = mixed_tile(
        z_ptr, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F, K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    difference = tl.where(inside & (rows[:, None] != columns[None, :]), s - t, 0.0)
    height = row_end - row_start
    out = row_sums_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    plane = tl.num_programs(1).to(tl.int64) * height
    tl.store(out, tl.sum(tl.abs(difference), 1), mask=row_ok)
    if GRADIENT:
        h = tl.where(difference > 0, 2.0, tl.where(difference < 0, -2.0, difference))  # 0 stays 0, NaN stays NaN
        store_weights(h_ptr, h, rows - row_start, columns - column_start, stride_h, inside)
        tl.store(out + plane, tl.sum(h, 1), mask=row_ok)
        tl.store(out + 2 * plane, tl.sum(h * s, 1), mask=row_ok)
        by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + columns - column_start
        tl.store(column_total_ptr + by_column, tl.sum(h, 0), mask=column_ok)


def relation_mae(
    student: Operand, teacher: Operand, *, want_student: bool, want_teacher: bool, config: Config | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """(sum over i != j of |s - t|, its gradients of student, its weight, teacher, weights; None where not wanted)."""
    config = config or choose_config(student.emb, Work.DOUBLE)
    n, dtype = len(student.emb), student.weights.dtype
    gradient = want_student or want_teacher
    stored = stored_dtype(student.emb, dtype)
    sides = [
        (Centred(operand.emb, dtype, stored), torch.zeros(operand.emb.shape, dtype=dtype, device=operand.emb.device))
        for operand, want in ((student, want_student), (teacher, want_teacher))
        if want
    ]
    height, width = min(n, config.wave_rows), min(n, config.wave_columns)
    block = torch.empty((height, max(height, width)) if gradient else (1, 1), dtype=stored, device=student.emb.device)
    total, along = torch.zeros(2, dtype=torch.float64, device=student.emb.device)
    for i in spans(0, n, height):
        for j in [i, *spans(i[1], n, width)]:
            shape = i[1] - i[0], j[1] - j[0]
            h = block[: shape[0], : shape[1]]
            grid = triton.cdiv(shape[0], config.block_m), triton.cdiv(shape[1], config.block_n)
            by_row = student.weights.new_zeros(3, grid[1], shape[0])
            by_col = by_row.new_zeros(grid[0], shape[1])
            relation_mae_kernel[grid](
                student.emb, student.weights, student.starts, teacher.emb, teacher.weights, teacher.starts, h, by_row,
                by_col, i[0], i[1], j[0], j[1], student.emb.shape[1], teacher.emb.shape[1], block.stride(0),
                K=len(teacher.weights), GRADIENT=gradient, **config.launch(),
            )  # fmt: skip
            mirrored = j[0] >= i[1]
            total += by_row[0].sum(dtype=torch.float64) * (2 if mirrored else 1)
            along += by_row[2].sum(dtype=torch.float64) * (1.0 if mirrored else 0.5)
            for emb, grad in sides:
                grad[slice(*i)] += emb.weighted(h, slice(*j), by_row[1].sum(0))
                if mirrored:
                    grad[slice(*j)] += emb.weighted(h.T, slice(*i), by_col.sum(0))
    grads: list[Tensor | None] = [None] * 4
    if want_student:
        grads[:2] = [sides[0][1] * student.weights, (along / student.weights).to(dtype)]
    if want_teacher:
        raw = sides[-1][1]
        weights = teacher.by_segment((raw * teacher.emb.to(dtype)).sum(0, dtype=torch.float64)) / -2
        grads[2:] = [raw * -teacher.spread(), weights.to(dtype)]
    return total, grads
