"""Relation KL's kernels over one block of pairs, forward: maxima of the logits, and the five sums."""

import triton
import triton.language as tl

from .triton_relation import exponentials, relation_tile
from .triton_tiles import INTERPRETING, side_by_side

PART = tl.constexpr(32)  # columns of a tile that are worked on at once


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
def added(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def column_sums(s, t, difference, drift, curved):
    """At once, so that a program's warps wait for each other less often. The interpreter is quicker one by one."""
    if INTERPRETING:
        return tl.sum(s, 0), tl.sum(t, 0), tl.sum(difference, 0), tl.sum(drift, 0), tl.sum(curved, 0)
    else:
        return tl.reduce((s, t, difference, drift, curved), 0, added)


@triton.jit
def relation_statistics_tile(
    first_row, first_column, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref, t_ref, column_out_ptr,
    row_end, column_start, column_end, mirrored, offset, D, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The five sums of one tile's rows; those of its columns, if mirrored, are stored."""
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    WIDTH: tl.constexpr = min(BLOCK_N, PART)
    s = relation_tile(
        x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D,
        1, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = relation_tile(
        z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F,
        K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = tl.zeros((BLOCK_M,), tl.float32)
    sum_difference = tl.zeros((BLOCK_M,), tl.float32)
    sum_drift = tl.zeros((BLOCK_M,), tl.float32)
    sum_curved = tl.zeros((BLOCK_M,), tl.float32)
    s_parts, t_parts = side_by_side(s, WIDTH), side_by_side(t, WIDTH)
    for part in tl.static_range(BLOCK_N // WIDTH):
        first = first_column + part * WIDTH
        e_s, e_t, d, difference = exponentials(
            s_parts[part], t_parts[part], s_ref, t_ref, first_row, first, row_end, column_end, offset,
            NARROW, WHOLE, BLOCK_M, WIDTH,
        )  # fmt: skip
        drift = e_t * d
        curved = difference + drift
        sum_s += tl.sum(e_s, 1)
        sum_t += tl.sum(e_t, 1)
        sum_difference += tl.sum(difference, 1)
        sum_drift += tl.sum(drift, 1)
        sum_curved += tl.sum(curved, 1)
        if mirrored:
            column = first - column_start + tl.arange(0, WIDTH)
            width = tl.cast(column_end - column_start, tl.int64)
            out, plane = column_out_ptr + tl.program_id(0) * width + column, tl.num_programs(0) * width
            by_s, by_t, by_difference, by_drift, by_curved = column_sums(e_s, e_t, difference, drift, curved)
            tl.store(out, by_s, mask=column < width)
            tl.store(out + plane, by_t, mask=column < width)
            tl.store(out + 2 * plane, by_difference, mask=column < width)
            tl.store(out + 3 * plane, by_drift, mask=column < width)
            tl.store(out + 4 * plane, by_curved, mask=column < width)
    return sum_s, sum_t, sum_difference, sum_drift, sum_curved


@triton.jit
def relation_statistics_kernel(
    run_ptr, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, row_out_ptr, column_out_ptr,
    row_start, row_end, column_start, column_end, parts, mirrored, offset, D, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """The five sums of one block: row_out (5, programs a row tile, rows), and if `mirrored` column_out (5, row tiles,
    columns). A program takes one tile; those for a reference a row, which rarely run, are fewer and walk over all
    `parts`: a loop holds on to so many addresses that a tile as large as this one's would spill."""
    if tl.load(run_ptr) == 0:
        return
    first_row = row_start + tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    if SHARED:
        sum_s, sum_t, sum_difference, sum_drift, sum_curved = relation_statistics_tile(
            first_row, column_start + tl.program_id(1) * BLOCK_N, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr,
            x_starts_ptr, z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, tl.load(s_ref_ptr),
            tl.load(t_ref_ptr), column_out_ptr, row_end, column_start, column_end, mirrored, offset, D, F,
            K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
        )  # fmt: skip
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=rows < row_end, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=rows < row_end, other=0.0)[:, None]
        sum_s = tl.zeros((BLOCK_M,), tl.float32)
        sum_t = tl.zeros((BLOCK_M,), tl.float32)
        sum_difference = tl.zeros((BLOCK_M,), tl.float32)
        sum_drift = tl.zeros((BLOCK_M,), tl.float32)
        sum_curved = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(tl.program_id(1), parts, tl.num_programs(1)):
            sums = relation_statistics_tile(
                first_row, column_start + tile * BLOCK_N, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr,
                x_starts_ptr, z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref, t_ref,
                column_out_ptr, row_end, column_start, column_end, mirrored, offset, D, F,
                K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
            )  # fmt: skip
            sum_s += sums[0]
            sum_t += sums[1]
            sum_difference += sums[2]
            sum_drift += sums[3]
            sum_curved += sums[4]
    height = tl.cast(row_end - row_start, tl.int64)
    out, plane = row_out_ptr + tl.program_id(1) * height + rows - row_start, tl.num_programs(1) * height
    tl.store(out, sum_s, mask=rows < row_end)
    tl.store(out + plane, sum_t, mask=rows < row_end)
    tl.store(out + 2 * plane, sum_difference, mask=rows < row_end)
    tl.store(out + 3 * plane, sum_drift, mask=rows < row_end)
    tl.store(out + 4 * plane, sum_curved, mask=rows < row_end)
