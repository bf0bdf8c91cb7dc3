"""Gradient of the contrastive gradient in Triton: chunked_contrastive_double's two passes, same letters.

Everything is float32: the gradient weights at the positives carry the result where the loss is nearly converged. A tile
costs three products' worth of work (S over D features, A over 2 D); its exponentials use the vector references, which
hold the one constant where that was sound. Sums of columns are written per row tile and added in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .chunked_contrastive import Weights
from .triton_tiles import Config, Work, choose_config, product_tile, same_pair, store_weights


@triton.jit
def probabilities(
    s, rows, columns, row_end, column_end, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr
):  # fmt: skip
    """(P_row, P_col) of one tile; 0 past the ends, where the inverses are read as 0."""
    row_ref = tl.load(row_ref_ptr + rows, mask=rows < row_end, other=float("inf"))[:, None]
    column_ref = tl.load(column_ref_ptr + columns, mask=columns < column_end, other=float("inf"))[None, :]
    row_inverse = tl.load(row_inverse_ptr + rows, mask=rows < row_end, other=0.0)[:, None]
    column_inverse = tl.load(column_inverse_ptr + columns, mask=columns < column_end, other=0.0)[None, :]
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    row = tl.where(inside, tl.exp(s - row_ref) * row_inverse, 0.0)
    return row, tl.where(inside, tl.exp(s - column_ref) * column_inverse, 0.0)


@triton.jit
def double_statistics_kernel(
    x_ptr, y_ptr, left_ptr, right_ptr, scale_ptr, w_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr,
    column_inverse_ptr, own_row_ptr, own_column_ptr, row_out_ptr, column_out_ptr, row_start, b, n, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rowsum(P_row o (M - own_row)) (splits, wave rows) and colsum(P_col o (M - own_col)) (row tiles, n)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    scale, w = tl.load(scale_ptr), tl.load(w_ptr)
    own_row = tl.load(own_row_ptr + rows, mask=rows < b, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = product_tile(x_ptr, y_ptr, first_row, first, b, n, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K)
        a = product_tile(left_ptr, right_ptr, first_row, first, b, n, 2 * D, 2 * D, 2 * D, BLOCK_M, BLOCK_N, BLOCK_K)
        m = scale * a + w * s
        row, column = probabilities(
            scale * s, rows, columns, b, n, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr
        )
        own_column = tl.load(own_column_ptr + columns, mask=columns < n, other=0.0)[None, :]
        total += tl.sum(row * (m - own_row), 1)
        out = column_out_ptr + tile.to(tl.int64) * n + columns
        tl.store(out, tl.sum(column * (m - own_column), 0), mask=columns < n)
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    tl.store(row_out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M), total)


@triton.jit
def double_weights_kernel(
    x_ptr, y_ptr, left_ptr, right_ptr, scale_ptr, w_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr,
    column_inverse_ptr, row_shift_ptr, column_shift_ptr, row_miss_ptr, column_miss_ptr, count_ptr, row_ids_ptr,
    column_ids_ptr, toward_ptr, g_ptr, scalars_ptr, row_start, row_end, column_start, column_end, D, stride_g, offset,
    HAS_IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of scale Gb + w G and of scale G, and each row's <Gb, S> + <G, A> and <G, M>, a column tile each."""
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    scale, w = tl.load(scale_ptr), tl.load(w_ptr)
    s = product_tile(x_ptr, y_ptr, first_row, first_column, row_end, column_end, D, D, D, BLOCK_M, BLOCK_N, BLOCK_K)
    a = product_tile(
        left_ptr,
        right_ptr,
        first_row,
        first_column,
        row_end,
        column_end,
        2 * D,
        2 * D,
        2 * D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    m = scale * a + w * s
    row, column = probabilities(
        scale * s, rows, columns, row_end, column_end, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr
    )
    miss = tl.load(row_miss_ptr + rows, mask=row_ok, other=0.0)[:, None]
    miss += tl.load(column_miss_ptr + columns, mask=column_ok, other=0.0)[None, :]
    inside = row_ok[:, None] & column_ok[None, :]
    positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS) & inside
    if HAS_IDS:
        count = tl.load(count_ptr + rows, mask=row_ok, other=1).to(tl.float32)[:, None]
        g = tl.where(positive, tl.where(count == 1.0, -miss, row + column - 2.0 / count), row + column)
    else:
        g = tl.where(positive, -miss, row + column)
    row_shift = tl.load(row_shift_ptr + rows, mask=row_ok, other=0.0)[:, None]
    column_shift = tl.load(column_shift_ptr + columns, mask=column_ok, other=0.0)[None, :]
    gb = row * (m - row_shift) + column * (m - column_shift)
    store_weights(toward_ptr, scale * gb + w * g, rows - row_start, columns - column_start, stride_g, inside)
    store_weights(g_ptr, scale * g, rows - row_start, columns - column_start, stride_g, inside)
    height = row_end - row_start
    out = scalars_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    tl.store(out, tl.sum(gb * s + g * a, 1), mask=row_ok)
    tl.store(out + tl.num_programs(1).to(tl.int64) * height, tl.sum(g * m, 1), mask=row_ok)


def _sides(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([u, x], 1), torch.cat([y, v], 1)


def contrastive_double_statistics(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor, weights: Weights, own: tuple[Tensor, Tensor],
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in chunked_contrastive_double, for float32 tensors and vector references; columns partial."""
    config = config or choose_config(x, Work.DOUBLE)
    x, y = x.contiguous(), y.contiguous()
    left, right = _sides(x, y, u, v)
    b, n = len(x), len(y)
    rows, cols = x.new_zeros(b), x.new_zeros(n)
    for i in spans(0, b, config.wave_rows):
        tiles = triton.cdiv(i[1] - i[0], config.block_m)
        splits = min(config.splits, triton.cdiv(n, config.block_n))
        row_out, column_out = x.new_zeros(splits, tiles * config.block_m), x.new_zeros(tiles, n)
        double_statistics_kernel[tiles, splits](
            x, y, left, right, scale, w, weights.row_ref, weights.col_ref, weights.row_inverse, weights.col_inverse,
            own[0], own[1], row_out, column_out, i[0], b, n, x.shape[1], **config.launch(),
        )  # fmt: skip
        rows[slice(*i)] = row_out.sum(0)[: i[1] - i[0]]
        cols += column_out.sum(0)
    return rows, cols


def contrastive_double_gradients(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor, weights: Weights, own: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor], config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As in chunked_contrastive_double, for float32 tensors and vector references."""
    config = config or choose_config(x, Work.DOUBLE)
    x, y, positives = x.contiguous(), y.contiguous(), weights.positives
    left, right = _sides(x, y, u, v)
    xb, yb, scalars = torch.zeros_like(x), torch.zeros_like(y), x.new_zeros(2, dtype=torch.float64)
    row_shift, column_shift = own[0] + sums[0], own[1] + sums[1]
    height, width = min(len(x), config.wave_rows), min(len(y), config.wave_columns)
    blocks = x.new_empty(2, height, width)
    for i in spans(0, len(x), height):
        for j in spans(0, len(y), width):
            toward, g = blocks[:, : i[1] - i[0], : j[1] - j[0]]
            grid = triton.cdiv(g.shape[0], config.block_m), triton.cdiv(g.shape[1], config.block_n)
            part = x.new_empty(2, grid[1], g.shape[0])
            double_weights_kernel[grid](
                x, y, left, right, scale, w, weights.row_ref, weights.col_ref, weights.row_inverse,
                weights.col_inverse, row_shift, column_shift, weights.row_miss, weights.col_miss,
                positives.row_count, positives.row_ids, positives.col_ids, toward, g, part, i[0], i[1], j[0], j[1],
                x.shape[1], width, positives.offset, HAS_IDS=positives.row_ids is not None, **config.launch(),
            )  # fmt: skip
            scalars += part.sum((1, 2), dtype=torch.float64)
            xb[slice(*i)].addmm_(toward, y[slice(*j)]).addmm_(g, v[slice(*j)])
            yb[slice(*j)].addmm_(toward.T, x[slice(*i)]).addmm_(g.T, u[slice(*i)])
    scale_bar, along = scalars.to(x.dtype)
    return xb, yb, scale_bar, along
