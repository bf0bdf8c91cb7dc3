"""Gradient of the contrastive loss in Triton for narrow embeddings: G never leaves the chip.

A program owns a row tile, keeps its rows' gradient (BLOCK_M, D) in registers and walks over its share of the columns:
a tile of S, one exponential an element, a tile of G = P_row + P_col, and G times the columns' embeddings. Its shares'
sums are added in fixed order: no atomics, bitwise repeatable. The columns' gradient is the same kernel with the two
sides exchanged.

Operations: S and one gradient product a side, 8 N^2 D for both where the waves of triton_contrastive take 6 N^2 D; but
those write a block of G once and read it twice, 6 bytes an element. At R operations and B bytes a second recomputing S
is the cheaper way while 2 D / R < 6 / B (D < 500 at 700 TFLOP/s and 4.2 TB/s), as long as the accumulator fits.

Only for one positive a row, whose term is the caller's. As in the waves, G is float16 times 2^12 for bfloat16
embeddings, against embeddings apart from their mean, whose part takes the float32 sums of G.
"""

# ruff: noqa: SIM108 (Triton prunes plain branches on constexprs, and only those)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .triton_contrastive_passes import PairWeights
from .triton_gradient import SideGradient
from .triton_passes import add_several
from .triton_tiles import INTERPRETING, STORED_SCALE, Config, exponential, fused_config


@triton.jit
def fused_gradient_kernel(
    x_ptr, y_ptr, right_ptr, scale_ptr, flag_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr,
    out_ptr, total_ptr, along_ptr, row_start, row_end, n, D, stride_x, stride_y, stride_right, offset,
    SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """G right of one wave's rows against y (n, D), (splits, rows, D); each row's sum of G and <G, S>, (splits, rows).

    BLOCK_K holds all D features. Own pairs count 0.
    """
    if tl.load(flag_ptr) == SHARED:
        return
    first_row = row_start + tl.program_id(0) * BLOCK_M
    rows, features = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    row_ok, feature_ok = rows < row_end, features < D
    x_place = x_ptr + tl.cast(first_row, tl.int64) * stride_x + tl.arange(0, BLOCK_M)[:, None] * stride_x
    x = tl.load(x_place + features[None, :], mask=row_ok[:, None] & feature_ok[None, :], other=0.0)
    scale = tl.load(scale_ptr)
    row_inverse = tl.load(row_inverse_ptr + rows, mask=row_ok, other=0.0)[:, None]
    if SHARED:
        row_ref = tl.load(row_ref_ptr)
    else:
        row_ref = tl.load(row_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
    gradient = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        column = tl.arange(0, BLOCK_N)
        columns = first + column
        column_ok = columns < n
        loaded = column_ok[:, None] & feature_ok[None, :]
        y_place = y_ptr + tl.cast(first, tl.int64) * stride_y + (column[:, None] * stride_y + features[None, :])
        y = tl.load(y_place, mask=loaded, other=0.0)
        if INTERPRETING:
            s = scale * tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), input_precision="ieee")
        else:
            s = scale * tl.dot(x, tl.trans(y), input_precision="ieee")
        column_inverse = tl.load(column_inverse_ptr + columns, mask=column_ok, other=0.0)[None, :]
        if SHARED:
            g = exponential(s - row_ref, True) * (row_inverse + column_inverse)
        else:
            column_ref = tl.load(column_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
            g = exponential(s - row_ref, True) * row_inverse
            g += exponential(s - column_ref, True) * column_inverse
        # a branch around the masks, as elsewhere, makes triton 3.6 spill here
        counted = row_ok[:, None] & column_ok[None, :] & ((rows + offset)[:, None] != columns[None, :])
        g = tl.where(counted, g, 0.0)
        total += tl.sum(g, 1)
        along += tl.sum(g * s, 1)
        right_place = right_ptr + tl.cast(first, tl.int64) * stride_right
        right_place += column[:, None] * stride_right + features[None, :]
        right = tl.load(right_place, mask=loaded, other=0.0)
        if right_ptr.dtype.element_ty == tl.float16:
            g = g * STORED_SCALE
        gradient = tl.dot(g.to(right_ptr.dtype.element_ty), right, gradient, input_precision="ieee")
    by_row = tl.program_id(1).to(tl.int64) * (row_end - row_start) + rows - row_start
    tl.store(total_ptr + by_row, total, mask=row_ok)
    tl.store(along_ptr + by_row, along, mask=row_ok)
    out = out_ptr + by_row[:, None] * D + features[None, :]
    tl.store(out, gradient, mask=row_ok[:, None] & feature_ok[None, :])


def fused_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weights: PairWeights,
    dx: SideGradient | None,
    dy: SideGradient | None,
    config: Config | None = None,
) -> Tensor:
    """<G, S> over all but own pairs; fills dx with G y (b, D) and dy with G^T x (N, D), at least one of them.

    Arguments as triton_contrastive.contrastive_gradients', for D of at most fused_config's width and no ids.
    """
    of_rows = weights.row_ref, weights.row_inverse
    of_columns = weights.col_ref, weights.col_inverse
    offset, along = weights.positives.offset, None
    if dx is not None:
        along = _one_side(dx, x, y, scale, of_rows, of_columns, offset, weights.flag, config)
    if dy is not None:
        again = _one_side(dy, y, x, scale, of_columns, of_rows, -offset, weights.flag, config)
        along = again if along is None else along
    return along.sum()


def _one_side(
    gradient: SideGradient,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    of_rows: tuple[Tensor, Tensor],
    of_columns: tuple[Tensor, Tensor],
    offset: int,
    flag: Tensor,
    config: Config | None,
) -> Tensor:
    """Each row's <G, S>; fills `gradient` with G columns. of_rows, of_columns: a side's (references, inverse sums)."""
    width = rows.shape[1]
    tile = config or fused_config(rows)
    factor = gradient.right.whole()
    along = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for i in spans(0, len(rows), tile.wave_rows):
        splits = min(tile.splits, triton.cdiv(len(columns), tile.block_n))
        out = scale.new_empty(splits, i[1] - i[0], width)
        totals, part = scale.new_empty(2, splits, i[1] - i[0])
        for shared in (True, False):  # the one whose flag it is not leaves the outputs alone
            fused_gradient_kernel[triton.cdiv(i[1] - i[0], tile.block_m), splits](
                rows, columns, factor, scale, flag, of_rows[0], of_columns[0], of_rows[1], of_columns[1],
                out, totals, part, *i, len(columns), width, rows.stride(0), columns.stride(0), factor.stride(0),
                offset, SHARED=shared, **tile.launch(),
            )  # fmt: skip
        gradient.finish(i[0], out, totals)
        add_several((part, along[slice(*i)], True))
    return along
