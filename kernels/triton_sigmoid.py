"""Sigmoid loss in Triton: the rectangular primitive of chunked_sigmoid, loss and gradients in one pass.

A block of n (the derivative by the logit) is made by waves, stored in float32 or float16, and two ordinary products
take it to dx and dy: 6 N^2 D operations. Without ids own pairs are left out of the kernel and added in float32. Loss,
sum n and <n, S> are summed from float32 values, a column tile each, in fixed order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .chunked_contrastive import Positives
from .triton_gradient import Centred, OwnPairs, SideGradient, add_product, stored_dtype
from .triton_passes import add_several, own_products
from .triton_tiles import Config, Work, choose_config, product_tile, same_pair, store_weights


@triton.jit
def softplus(z):
    """log(1 + exp(z)) to the last bits: log(w) u / (w - 1), w = 1 + u, is log1p(u)."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u
    small = w == 1.0
    return tl.maximum(z, 0.0) + tl.where(small, u, tl.log(w) * u / tl.where(small, 1.0, w - 1.0))


@triton.jit
def sigmoid_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, row_ids_ptr, column_ids_ptr, g_ptr, row_sums_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset,
    HAS_IDS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of n; row_sums (loss, sum n, <n, S>; column tiles; rows), column_total (row tiles, columns)."""
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    s = product_tile(
        x_ptr, y_ptr, first_row, first_column, row_end, column_end, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K
    )
    z = tl.load(scale_ptr) * s + tl.load(bias_ptr)
    positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS)
    inside = row_ok[:, None] & column_ok[None, :]
    if HAS_IDS:
        z = tl.where(positive, -z, z)
    else:
        inside = inside & (positive == 0)
    height = row_end - row_start
    out = row_sums_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    plane = tl.num_programs(1).to(tl.int64) * height
    tl.store(out, tl.sum(tl.where(inside, softplus(z), 0.0), 1), mask=row_ok)
    if GRADIENT:
        n = 1.0 / (1.0 + tl.exp(-z))
        if HAS_IDS:
            n = tl.where(positive, -n, n)
        n = tl.where(inside, n, 0.0)
        tl.store(out + plane, tl.sum(n, 1), mask=row_ok)
        tl.store(out + 2 * plane, tl.sum(n * s, 1), mask=row_ok)
        by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + columns - column_start
        tl.store(column_total_ptr + by_column, tl.sum(n, 0), mask=column_ok)
        whole = row_ok[:, None] & column_ok[None, :]
        store_weights(g_ptr, n, rows - row_start, columns - column_start, stride_g, whole)


def sigmoid_sweep(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: Positives,
    *,
    want_x: bool,
    want_y: bool,
    want_scalars: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """(loss sum, n y (b, D), n^T x (N, D), sum n, <n, S>); all but n y are partial over these rows."""
    dtype, has_ids = scale.dtype, positives.row_ids is not None
    config = config or choose_config(x, Work.NARROW if has_ids else Work.FULL)
    stored = stored_dtype(x, dtype)
    gradient = want_x or want_y or want_scalars
    left, right = Centred.both(x, y, dtype, stored) if want_x or want_y else (None, None)
    own, pairs = (None, (None, None)) if has_ids else _own_pairs(x, y, scale, bias, positives.offset)
    dx, dy = (
        SideGradient(rows, others, dtype, of_side) if want else None
        for rows, others, of_side, want in ((x, right, pairs[0], want_x), (y, left, pairs[1], want_y))
    )
    row_sums, row_totals = (None, scale.new_empty(len(x))) if dx is None else dx.new_sums()
    height, width = min(len(x), config.wave_rows), min(len(y), config.wave_columns)
    block = torch.empty((height, width) if gradient else (1, 1), dtype=stored, device=x.device)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for j in spans(0, len(y), width):
        there = None if dx is None else right.part(slice(*j))
        column_sums = None if dy is None else scale.new_empty(j[1] - j[0], y.shape[1])
        column_totals = scale.new_empty(j[1] - j[0])
        for i in spans(0, len(x), height):
            shape = i[1] - i[0], j[1] - j[0]
            g, mine = block[: shape[0], : shape[1]], slice(*i)
            grid = triton.cdiv(shape[0], config.block_m), triton.cdiv(shape[1], config.block_n)
            by_row, by_col = scale.new_zeros(3, grid[1], shape[0]), scale.new_empty(grid[0], shape[1])
            sigmoid_kernel[grid](
                x, y, scale, bias, positives.row_ids, positives.col_ids, g, by_row, by_col,
                i[0], i[1], j[0], j[1], x.shape[1], x.stride(0), y.stride(0), g.stride(0), positives.offset,
                HAS_IDS=has_ids, GRADIENT=gradient, **config.launch(),
            )  # fmt: skip
            sums += by_row.sum((1, 2), dtype=torch.float64)
            rows_first, columns_first = j[0] == 0, i[0] == 0
            if want_x or want_y:
                add_several((by_row[1], row_totals[mine], rows_first), (by_col, column_totals, columns_first))
            if row_sums is not None:
                add_product(row_sums[mine], g, there, first=rows_first)
            if column_sums is not None:
                add_product(column_sums, g.T, left.part(mine), first=columns_first)
        if dy is not None:
            dy.finish(j[0], column_sums, column_totals)
    sums = sums if own is None else sums + own
    return sums[0], None if dx is None else dx.result(), None if dy is None else dy.result(), sums[1], sums[2]


def _own_pairs(x, y, scale, bias, offset: int) -> tuple[Tensor, tuple[OwnPairs, OwnPairs]]:
    """What own pairs add to (loss, sum n, <n, S>), and to the gradients of both sides."""
    own = own_products(x, y[offset : offset + len(x)])[0]
    z = -(scale * own + bias)
    n = -z.sigmoid()
    sums = torch.stack([-F.logsigmoid(-z).sum(), n.sum(), (n * own).sum()])
    return sums, OwnPairs.of_sides(n, x, y, offset)
