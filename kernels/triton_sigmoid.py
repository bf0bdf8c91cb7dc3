"""Sigmoid loss in Triton: the rectangular primitive of chunked_sigmoid, loss and gradients in one pass.

A block of n (the derivative by the logit) is made by waves, stored in float32 or float16, and two ordinary products
take it to dx and dy: 6 N^2 D operations. Without ids own pairs are left out of the kernel and added in float32. Loss,
sum n and <n, S> are summed from float32 values, a column tile each, in fixed order.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .chunked_contrastive import Positives
from .triton_gradient import Centred, OwnPairs, SideGradient, add_product, stored_dtype
from .triton_passes import add_several, own_products
from .triton_tiles import (
    INTERPRETING,
    Config,
    Work,
    choose_config,
    exponential,
    product_tile,
    same_pair,
    side_by_side,
    some_left_out,
    some_positive,
    store_weights,
)

PART = tl.constexpr(16 if INTERPRETING else 32)  # columns of a tile that are worked on at once


# log(1 + u) / u over [0, 1] from u^9 down to 1: minimax by relative error, 5e-9, and 1.6e-7 in float32
LOG1P = tl.constexpr((
    -0.0032440212, 0.0198514443, -0.0569594987, 0.1060365140, -0.1530559063,
    0.1967593879, -0.2495413423, 0.3332996368, -0.4999990165, 1.0,
))  # fmt: skip


@triton.jit
def sigmoid_part(
    s, scale_ptr, bias_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr,
    local_column, row_start, row_end, column_start, column_end, stride_g, offset, apart,
    HAS_IDS: tl.constexpr, GRADIENT: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores n of the products s and the sums of its columns; returns each row's loss, sum n and <n, S>, float32.

    With u = exp(-|z|) the loss is max(z, 0) + log(1 + u), and n is 1 / (1 + u), times u where z < 0. `apart`: whether
    the tile may hold positives or reaches over an end.
    """
    BLOCK_M: tl.constexpr = s.shape[0]
    BLOCK_N: tl.constexpr = s.shape[1]
    rows = row_start + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = local_column + tl.arange(0, BLOCK_N)
    columns = column_start + column
    row_ok, column_ok = rows < row_end, columns < column_end
    z = tl.load(scale_ptr) * s + tl.load(bias_ptr)
    if HAS_IDS:
        if not WHOLE:
            if apart:
                positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS)
                z = tl.where(positive, -z, z)
    u = exponential(-tl.abs(z), NARROW)
    ratio = tl.full((BLOCK_M, BLOCK_N), LOG1P[0], tl.float32)
    for place in tl.static_range(1, 10):
        ratio = ratio * u + LOG1P[place]
    loss = tl.maximum(z, 0.0) + u * ratio
    n = 1.0 / (1.0 + u)
    n = tl.where(z < 0.0, u * n, n)
    if not WHOLE:
        if apart:
            positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS)
            inside = row_ok[:, None] & column_ok[None, :]
            if HAS_IDS:
                n = tl.where(positive, -n, n)
            else:
                inside = inside & (positive == 0)
            loss, n = tl.where(inside, loss, 0.0), tl.where(inside, n, 0.0)
    if GRADIENT:
        by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + column
        tl.store(column_total_ptr + by_column, tl.sum(n, 0), mask=column_ok)
        corner = g_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * stride_g + local_column
        whole = row_ok[:, None] & column_ok[None, :]
        store_weights(corner, n, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), stride_g, whole)
    return tl.sum(loss, 1), tl.sum(n, 1), tl.sum(n * s, 1)


@triton.jit
def sigmoid_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, row_ids_ptr, column_ids_ptr, g_ptr, row_sums_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset,
    HAS_IDS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """One block of n; row_sums (loss, sum n, <n, S>; column tiles; rows), column_total (row tiles, columns)."""
    first_row, local_column = row_start + tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    first_column = column_start + local_column
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    WIDTH: tl.constexpr = min(BLOCK_N, PART)
    products = product_tile(
        x_ptr, y_ptr, first_row, first_column, row_end, column_end, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K
    )
    parts = side_by_side(products, WIDTH)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_IDS:
        apart = some_positive(
            row_ids_ptr, column_ids_ptr, first_row, first_column, row_end, column_end, BLOCK_M, BLOCK_N
        )
        if WHOLE:  # which takes for granted that there are none, but not the question
            loss += apart.to(tl.float32)
    else:
        apart = some_left_out(first_row, first_column, row_end, column_end, offset, BLOCK_M, BLOCK_N)
    for part in tl.static_range(BLOCK_N // WIDTH):
        more_loss, more_total, more_along = sigmoid_part(
            parts[part], scale_ptr, bias_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr,
            local_column + part * WIDTH, row_start, row_end, column_start, column_end, stride_g, offset, apart,
            HAS_IDS, GRADIENT, NARROW, WHOLE,
        )  # fmt: skip
        loss += more_loss
        total += more_total
        along += more_along
    rows = first_row + tl.arange(0, BLOCK_M)
    height = row_end - row_start
    out = row_sums_ptr + tl.program_id(1).to(tl.int64) * height + rows - row_start
    plane = tl.num_programs(1).to(tl.int64) * height
    tl.store(out, loss, mask=rows < row_end)
    if GRADIENT:
        tl.store(out + plane, total, mask=rows < row_end)
        tl.store(out + 2 * plane, along, mask=rows < row_end)


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
    config = config or choose_config(x, Work.FULL if has_ids else "sigmoid")
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
