"""Gradient of the contrastive gradient in Triton: chunked_contrastive_double's two passes, same letters.

Either pass costs three products a tile (S over D features, A over 2 D), the second four more (eight of bfloat16
operands): 20 N^2 D operations for float32 operands, 28 for bfloat16 ones, which tensor cores take as they are. Those
products are exact before they are added up in float32, as the logits' own were in the forward pass. Gradient weights
are stored as two bfloat16 numbers each, 16 bits of precision: their rows and columns add up to almost nothing, and near
convergence the smallest of them carry the result. Exponentials use the vector references, which hold the one constant
where that was sound. Sums of columns are written per row tile and added in fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .chunked_contrastive import Weights
from .triton_tiles import INTERPRETING, Config, Work, choose_config, same_pair


@triton.jit
def products(
    x_ptr, y_ptr, u_ptr, v_ptr, first_row, first_column, row_end, column_end, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(x y^T, u y^T + x v^T) of one tile in float32, each operand read once; as triton_tiles.product_tile does."""
    k = tl.arange(0, BLOCK_K)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = tl.cast(first_row, tl.int64) * D + (row[:, None] * D + k[None, :])
    columns = tl.cast(first_column, tl.int64) * D + (column[None, :] * D + k[:, None])
    row_mask, column_mask = (row < row_end - first_row)[:, None], (column < column_end - first_column)[None, :]
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        left, right = row_mask & (k < D - start)[None, :], column_mask & (k < D - start)[:, None]
        x, u = tl.load(x_ptr + rows + start, left, 0.0), tl.load(u_ptr + rows + start, left, 0.0)
        y, v = tl.load(y_ptr + columns + start, right, 0.0), tl.load(v_ptr + columns + start, right, 0.0)
        if INTERPRETING:
            x, y, u, v = x.to(tl.float32), y.to(tl.float32), u.to(tl.float32), v.to(tl.float32)
        s = tl.dot(x, y, s, input_precision="ieee")
        a = tl.dot(u, y, a, input_precision="ieee")
        a = tl.dot(x, v, a, input_precision="ieee")
    return s, a


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
def direction(s, a, scale, w, rows, columns, own_row, offset):
    """M of one tile; own pairs have the bits that it is taken relative to, (BLOCK_M, 1)."""
    own = (rows + offset)[:, None] == columns[None, :]
    return tl.where(own, own_row, scale * a + w * s)


@triton.jit
def store_split(pointer, plane, place, value, mask):
    """Store float32 values: as they are, or as the sum of two bfloat16 numbers, `plane` elements apart."""
    if pointer.dtype.element_ty == tl.bfloat16:
        high = value.to(tl.bfloat16)
        tl.store(pointer + place, high, mask=mask)
        tl.store(pointer + plane + place, (value - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer + place, value, mask=mask)


@triton.jit
def double_statistics_kernel(
    x_ptr, y_ptr, u_ptr, v_ptr, scale_ptr, w_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr,
    column_inverse_ptr, own_row_ptr, own_column_ptr, row_out_ptr, column_out_ptr, row_start, b, n, D, offset,
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
        s, a = products(x_ptr, y_ptr, u_ptr, v_ptr, first_row, first, b, n, D, BLOCK_M, BLOCK_N, BLOCK_K)
        m = direction(s, a, scale, w, rows, columns, own_row, offset)
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
    x_ptr, y_ptr, u_ptr, v_ptr, scale_ptr, w_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr,
    column_inverse_ptr, own_row_ptr, own_column_ptr, row_sum_ptr, column_sum_ptr, row_miss_ptr, column_miss_ptr,
    count_ptr, row_ids_ptr, column_ids_ptr, toward_ptr, g_ptr, scalars_ptr, row_start, row_end, column_start,
    column_end, D, stride_g, plane, offset,
    HAS_IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of scale Gb + w G and of scale G, and each row's <Gb, S> + <G, A> and <G, M>, a column tile each."""
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    scale, w = tl.load(scale_ptr), tl.load(w_ptr)
    s, a = products(
        x_ptr, y_ptr, u_ptr, v_ptr, first_row, first_column, row_end, column_end, D, BLOCK_M, BLOCK_N, BLOCK_K
    )
    own_row = tl.load(own_row_ptr + rows, mask=row_ok, other=0.0)[:, None]
    m = direction(s, a, scale, w, rows, columns, own_row, offset)
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
    own_column = tl.load(own_column_ptr + columns, mask=column_ok, other=0.0)[None, :]
    row_sum = tl.load(row_sum_ptr + rows, mask=row_ok, other=0.0)[:, None]
    column_sum = tl.load(column_sum_ptr + columns, mask=column_ok, other=0.0)[None, :]
    # sums may be far under the rounding of own: taken off one after the other, they are left where M is own
    gb = row * (m - own_row - row_sum) + column * (m - own_column - column_sum)
    place = (rows - row_start)[:, None] * stride_g + (columns - column_start)[None, :]
    store_split(toward_ptr, plane, place, scale * gb + w * g, inside)
    store_split(g_ptr, plane, place, scale * g, inside)
    height = row_end - row_start
    out = scalars_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    tl.store(out, tl.sum(gb * s + g * a, 1), mask=row_ok)
    tl.store(out + tl.num_programs(1).to(tl.int64) * height, tl.sum(g * m, 1), mask=row_ok)


def contrastive_double_statistics(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor, weights: Weights, own: tuple[Tensor, Tensor],
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in chunked_contrastive_double, for vector references; x, y, u, v all bfloat16 or all float32."""
    config = config or choose_config(x, Work.DOUBLE)
    x, y, u, v = (rows.contiguous() for rows in (x, y, u, v))
    b, n = len(x), len(y)
    rows, cols = scale.new_zeros(b), scale.new_zeros(n)
    for i in spans(0, b, config.wave_rows):
        tiles = triton.cdiv(i[1] - i[0], config.block_m)
        splits = min(config.splits, triton.cdiv(n, config.block_n))
        row_out, column_out = scale.new_zeros(splits, tiles * config.block_m), scale.new_zeros(tiles, n)
        double_statistics_kernel[tiles, splits](
            x, y, u, v, scale, w, weights.row_ref, weights.col_ref, weights.row_inverse, weights.col_inverse,
            own[0], own[1], row_out, column_out, i[0], b, n, x.shape[1], weights.positives.offset, **config.launch(),
        )  # fmt: skip
        rows[slice(*i)] = row_out.sum(0)[: i[1] - i[0]]
        cols += column_out.sum(0)
    return rows, cols


def contrastive_double_gradients(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor, weights: Weights, own: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor], config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As in chunked_contrastive_double, in float32, for vector references; x, y, u, v all bfloat16 or all float32."""
    config = config or choose_config(x, Work.CROWDED)
    x, y, u, v = (rows.contiguous() for rows in (x, y, u, v))
    positives = weights.positives
    xb, yb = (torch.zeros_like(side, dtype=scale.dtype) for side in (x, y))
    scalars = scale.new_zeros(2, dtype=torch.float64)
    height, width = min(len(x), config.wave_rows), min(len(y), config.wave_columns)
    planes = 1 if x.dtype == torch.float32 else 2
    blocks = x.new_empty(2, planes, height, width)
    for i in spans(0, len(x), height):
        for j in spans(0, len(y), width):
            toward, g = blocks[:, :, : i[1] - i[0], : j[1] - j[0]]
            grid = triton.cdiv(i[1] - i[0], config.block_m), triton.cdiv(j[1] - j[0], config.block_n)
            part = scale.new_empty(2, grid[1], i[1] - i[0])
            double_weights_kernel[grid](
                x, y, u, v, scale, w, weights.row_ref, weights.col_ref, weights.row_inverse,
                weights.col_inverse, *own, *sums, weights.row_miss, weights.col_miss, positives.row_count,
                positives.row_ids, positives.col_ids, toward, g, part, i[0], i[1], j[0], j[1], x.shape[1], width,
                height * width, positives.offset, HAS_IDS=positives.row_ids is not None, **config.launch(),
            )  # fmt: skip
            scalars += part.sum((1, 2), dtype=torch.float64)
            xb[slice(*i)] += _product(toward, y[slice(*j)]).add_(_product(g, v[slice(*j)]))
            yb[slice(*j)] += _product(toward.mT, x[slice(*i)]).add_(_product(g.mT, u[slice(*i)]))
    scale_bar, along = scalars.to(scale.dtype)
    return xb, yb, scale_bar, along


def _product(planes: Tensor, right: Tensor) -> Tensor:
    """The sum of `planes` (P, m, n) times `right` (n, D), in float32."""
    if planes.dtype == torch.float32:
        return planes[0] @ right
    if planes.device.type == "cpu":
        return planes.float().sum(0) @ right.float()
    return sum(torch.mm(plane, right, out_dtype=torch.float32) for plane in planes)
