"""Mean absolute difference of relations in Triton: loss and gradients in one pass, of any of the three sweeps.

The teacher's weights are given negated, so the difference s - t is the sum of the two sides' logits. Its sign is known
where it is made, so a block of H = 2 sign(s - t) (exact in float16) is stored by waves and ordinary products take it to
dX; over a triangle both sides of a block: N^2 (D_s + D_t) operations and 2 N^2 D_s, plus the diagonal squares' second
halves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked_relation import Sweep
from .triton_relation import Operand, OperandGradient, relation_tile, sizes, waves
from .triton_relation_passes import add_weight_sums
from .triton_tiles import Config, Work, choose_config, side_by_side, store_weights

PART = tl.constexpr(32)  # columns of a tile that are worked on at once


@triton.jit
def relation_mae_kernel(
    x_ptr, xc_ptr, xw_ptr, x_starts_ptr, z_ptr, zc_ptr, zw_ptr, z_starts_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
    row_start, row_end, column_start, column_end, offset, D, F, stride_h,
    K: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of H; row_sums (sum H, <H, S>, |difference|; column tiles; rows), column_sums (row tiles, columns)."""
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    WIDTH: tl.constexpr = min(BLOCK_N, PART)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < row_end
    s = relation_tile(
        x_ptr, xc_ptr, None, None, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D,
        1, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = relation_tile(
        z_ptr, zc_ptr, None, None, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F,
        K, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    s_parts, t_parts = side_by_side(s, WIDTH), side_by_side(t, WIDTH)
    distance = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(BLOCK_N // WIDTH):
        first = first_column + part * WIDTH
        columns = first + tl.arange(0, WIDTH)
        column_ok = columns < column_end
        inside = row_ok[:, None] & column_ok[None, :]
        s = s_parts[part]
        difference = tl.where(inside & ((rows + offset)[:, None] != columns[None, :]), s + t_parts[part], 0.0)
        distance += tl.sum(tl.abs(difference), 1)
        if GRADIENT:
            h = tl.where(difference > 0, 2.0, tl.where(difference < 0, -2.0, difference))  # 0 stays 0, NaN stays NaN
            total += tl.sum(h, 1)
            along += tl.sum(h * s, 1)
            by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + columns - column_start
            tl.store(column_sums_ptr + by_column, tl.sum(h, 0), mask=column_ok)
            corner = h_ptr + tl.cast(first_row - row_start, tl.int64) * stride_h + first - column_start
            store_weights(corner, h, tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), stride_h, inside)
    height = row_end - row_start
    out = row_sums_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    plane = tl.num_programs(1).to(tl.int64) * height
    tl.store(out + 2 * plane, distance, mask=row_ok)
    if GRADIENT:
        tl.store(out, total, mask=row_ok)
        tl.store(out + plane, along, mask=row_ok)


def relation_mae_sweep(
    student: Operand,
    negated: Operand,
    sweep: Sweep,
    offset: int | None,
    *,
    want_student: bool,
    want_teacher: bool,
    config: Config | None = None,
) -> tuple[Tensor, OperandGradient | None, OperandGradient | None]:
    """(sum |s - t| partial over these tiles, its gradients in both sides; None where not wanted).

    `negated` is the teacher with its weights negated, and so is its weights' gradient. A sum over ordered pairs i != j,
    except that a pair sweep counts each of its unordered pairs once for both orders.
    """
    config = config or choose_config(student.rows, "relation_mae" if len(negated.weights) == 1 else Work.DOUBLE)
    offset, b, n, width_s, width_t = sizes(student, negated, offset)
    stored, wanted = student.stored_dtype(), (want_student, want_teacher)
    gradients = [
        OperandGradient(operand, sweep, stored) if want else None
        for operand, want in zip((student, negated), wanted, strict=True)
    ]
    height, width = min(b, config.wave_rows), min(n, config.wave_columns)
    shape = (1, height, max(height, width)) if any(wanted) else (1, 1, 1)
    block = torch.empty(shape, dtype=stored, device=student.rows.device)
    total = None
    for place in waves(sweep, b, n, height, width):
        grid = triton.cdiv(place.shape[0], config.block_m), triton.cdiv(place.shape[1], config.block_n)
        by_row = student.weights.new_empty(3, 1, grid[1], place.shape[0])
        by_column = by_row.new_empty(1, grid[0], place.shape[1])
        relation_mae_kernel[grid](
            student.rows, student.columns, student.weights, student.starts, negated.rows, negated.columns,
            negated.weights, negated.starts, block, by_row, by_column, *place.rows, *place.columns, offset, width_s,
            width_t, block.stride(1), K=len(negated.weights), GRADIENT=any(wanted), **config.launch(),
        )  # fmt: skip
        distance = by_row[2].sum(dtype=torch.float64)
        distance = 2 * distance if place.mirrored else distance
        total = distance if total is None else total + distance
        h = block[:, : place.shape[0], : place.shape[1]]
        for gradient in gradients:
            if gradient is None:
                continue
            sums = gradient.sums_of(place, 1)
            if gradient is gradients[0]:
                gradient.add_along(add_weight_sums(by_row, by_column, [grid], None, place, *sums, student.weights))
            elif sums[0] is not None:
                add_weight_sums(by_row, by_column, [grid], None, place, *sums)
            gradient.add(h, place, *sums)
    return total, *gradients
