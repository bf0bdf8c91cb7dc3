"""Gradient of the contrastive loss in Triton by blocks of gradient weights, G-waves.

A block of G = P_row + P_col (own pairs 0) is recomputed and stored in float32 or float16, then two ordinary products
take it to dx and dy in float32. Own pairs' -(off_i/r_i + off_j/q_j) is added apart in float32. With ids, G holds all
positives.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .triton_contrastive_passes import PairWeights, kept_weights_kernel
from .triton_gradient import Centred, SideGradient, add_product
from .triton_passes import add_several
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

# Columns of a tile that are worked on at once; interpreted tiles are smaller.
PART = tl.constexpr(32 if INTERPRETING else 64)


@triton.jit
def weights_part(
    s, scale_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr,
    row_miss_ptr, column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr,
    local_column, row_start, row_end, column_start, column_end, stride_g, offset, apart,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores G of the products s and the sums of its columns; returns each row's <G, S> and sum of G, float32.

    `apart`: by ids, whether the tile may hold positives.
    """
    BLOCK_M: tl.constexpr = s.shape[0]
    BLOCK_N: tl.constexpr = s.shape[1]
    first_column = column_start + local_column
    first_row = row_start + tl.program_id(0) * BLOCK_M
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    inside = row_ok[:, None] & column_ok[None, :]
    scale = tl.load(scale_ptr)
    row_inverse = tl.load(row_inverse_ptr + rows, mask=row_ok, other=0.0)[:, None]
    column_inverse = tl.load(column_inverse_ptr + columns, mask=column_ok, other=0.0)[None, :]
    if SHARED:
        g = exponential(scale * s - tl.load(row_ref_ptr), NARROW) * (row_inverse + column_inverse)
    else:
        row_ref = tl.load(row_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        column_ref = tl.load(column_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        g = exponential(scale * s - row_ref, NARROW) * row_inverse
        g += exponential(scale * s - column_ref, NARROW) * column_inverse
    if HAS_IDS:
        if not WHOLE:
            if apart:
                positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS)
                miss = tl.load(row_miss_ptr + rows, mask=row_ok, other=0.0)[:, None]
                miss += tl.load(column_miss_ptr + columns, mask=column_ok, other=0.0)[None, :]
                count = tl.load(count_ptr + rows, mask=row_ok, other=1).to(tl.float32)[:, None]
                g = tl.where(positive, tl.where(count == 1.0, -miss, g - 2.0 / count), g)
                g = tl.where(inside, g, 0.0)
    else:
        if not WHOLE:
            if some_left_out(first_row, first_column, row_end, column_end, offset, BLOCK_M, BLOCK_N):
                g = tl.where(inside & ((rows + offset)[:, None] != columns[None, :]), g, 0.0)
    along, total = tl.sum(g * s, 1), tl.sum(g, 1)
    column = local_column + tl.arange(0, BLOCK_N)
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + column
    tl.store(column_total_ptr + by_column, tl.sum(g, 0), mask=column_ok)
    corner = g_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * stride_g + local_column
    store_weights(corner, g, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), stride_g, inside)
    return along, total


@triton.jit
def weights_tile(
    x_ptr, y_ptr, scale_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr,
    row_miss_ptr, column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr,
    local_column, row_start, row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """weights_part of a tile, part after part; each row's <G, S> and sum of G."""
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    WIDTH: tl.constexpr = min(BLOCK_N, PART)
    products = product_tile(
        x_ptr, y_ptr, row_start + tl.program_id(0) * BLOCK_M, column_start + local_column, row_end, column_end,
        D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = side_by_side(products, WIDTH)
    along = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    apart = False
    if HAS_IDS:
        first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + local_column
        apart = some_positive(
            row_ids_ptr, column_ids_ptr, first_row, first_column, row_end, column_end, BLOCK_M, BLOCK_N
        )
        if WHOLE:  # which takes for granted that there are none, but not the question
            total += apart.to(tl.float32)
    for part in tl.static_range(BLOCK_N // WIDTH):
        more_along, more = weights_part(
            parts[part], scale_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr, row_miss_ptr,
            column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr,
            local_column + part * WIDTH, row_start, row_end, column_start, column_end, stride_g, offset, apart,
            SHARED, HAS_IDS, NARROW, WHOLE,
        )  # fmt: skip
        along += more_along
        total += more
    return tl.load(scale_ptr) * along, total


@triton.jit
def weights_kernel(
    x_ptr, y_ptr, scale_ptr, flag_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr,
    row_miss_ptr, column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, along_ptr,
    row_total_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, parts, D, stride_x, stride_y, stride_g, offset,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """One block of G; from its float32 values also each row's <G, S> and the rows' and columns' sums.

    along and row_total (parts, rows), column_total (row tiles, columns). A program takes one tile; those for vector
    references, which rarely run, are fewer and walk, and zero the parts that they have no programs for. Own pairs are
    left 0 unless there are ids. (A sum to one scalar breaks triton 3.7's sm_100 build.)
    """
    if tl.load(flag_ptr) == SHARED:
        return
    part = tl.program_id(1)
    rows = row_start + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    height = tl.cast(row_end - row_start, tl.int64)
    if SHARED:
        along, total = weights_tile(
            x_ptr, y_ptr, scale_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr, row_miss_ptr,
            column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr, part * BLOCK_N, row_start,
            row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset, SHARED, HAS_IDS,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
        )  # fmt: skip
    else:
        along = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(part * BLOCK_N, column_end - column_start, tl.num_programs(1) * BLOCK_N):
            more_along, more = weights_tile(
                x_ptr, y_ptr, scale_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr, row_miss_ptr,
                column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, column_total_ptr, first, row_start,
                row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset, SHARED, HAS_IDS,
                BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
            )  # fmt: skip
            along += more_along
            total += more
        for other in range(part + tl.num_programs(1), parts, tl.num_programs(1)):
            by_row = other * height + rows - row_start
            tl.store(along_ptr + by_row, tl.zeros((BLOCK_M,), tl.float32), mask=rows < row_end)
            tl.store(row_total_ptr + by_row, tl.zeros((BLOCK_M,), tl.float32), mask=rows < row_end)
    by_row = part * height + rows - row_start
    tl.store(along_ptr + by_row, along, mask=rows < row_end)
    tl.store(row_total_ptr + by_row, total, mask=rows < row_end)


class Waves:
    """Blocks of G, height x width, one after another in the same memory."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        weights: PairWeights,
        config: Config | None,
        factors: tuple[Centred, Centred],
        kept: tuple[Tensor, Tensor] | None = None,
    ):
        self.kept = kept
        self.x, self.y, self.scale, self.weights = x, y, scale, weights
        has_ids = weights.positives.row_ids is not None
        self.tiles = {shared: config or choose_config(x, self._work(has_ids, shared)) for shared in (True, False)}
        # Both fill the same sums of columns, one a row of tiles.
        self.tiles[False] = replace(self.tiles[False], block_m=self.tiles[True].block_m)
        self.left, self.right = factors
        self.height = min(len(x), self.tiles[True].wave_rows)
        self.width = min(len(y), self.tiles[True].wave_columns)
        self.block = torch.empty(self.height, self.width, dtype=self.left.stored, device=x.device)

    def _work(self, has_ids: bool, shared: bool) -> Work | str:
        return Work.FULL if has_ids else "contrastive_backward" if shared and self.kept is None else Work.NARROW

    def sweep(self, dx: SideGradient | None, dy: SideGradient | None) -> Tensor:
        """<G, S> without lone positives' terms; fills dx and dy. The rows' sums are the one float32 (b, D) held."""
        row_sums, row_totals = (None, self.scale.new_empty(len(self.x))) if dx is None else dx.new_sums()
        along = torch.empty(len(self.x), dtype=torch.float64, device=self.x.device)
        for j in spans(0, len(self.y), self.width):
            self.add_columns(j, row_sums, row_totals, along, dy)
        return along.sum()

    def add_columns(
        self, j: tuple[int, int], row_sums: Tensor | None, row_totals: Tensor, along: Tensor, dy: SideGradient | None
    ) -> None:
        """All rows against columns j: adds to the rows' sums, totals and <G, S>, finishes the columns' part of dy."""
        there = None if row_sums is None else self.right.part(slice(*j))
        column_totals = self.scale.new_empty(j[1] - j[0])
        column_sums = None if dy is None else self.scale.new_empty(len(column_totals), self.y.shape[1])
        for i in spans(0, len(self.x), self.height):
            g, mine = self.block[: i[1] - i[0], : j[1] - j[0]], slice(*i)
            part, total, by_column = self.fill(g, i, j)
            first = j[0] == 0
            by_row = (part, along[mine], first), (total, row_totals[mine], first)
            add_several(*by_row, (by_column, column_totals, i[0] == 0))
            if row_sums is not None:
                add_product(row_sums[mine], g, there, first=j[0] == 0)
            if column_sums is not None:
                add_product(column_sums, g.T, self.left.part(mine), first=i[0] == 0)
        if dy is not None:
            dy.finish(j[0], column_sums, column_totals)

    def fill(self, g: Tensor, i: tuple[int, int], j: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """G of rows i and columns j into g; partial <G, S> and sums of G's rows, (parts, rows), and columns'."""
        x, y, scale, weights, positives = self.x, self.y, self.scale, self.weights, self.weights.positives
        row_ids, col_ids = positives.row_ids, positives.col_ids
        height, width = g.shape
        parts = triton.cdiv(width, self.tiles[True].block_n)
        along, by_row = scale.new_empty(2, parts, height)
        by_column = scale.new_empty(triton.cdiv(height, self.tiles[True].block_m), width)
        for shared, tile in self.tiles.items():  # the one whose flag it is not leaves the outputs alone
            if shared and self.kept is not None:
                kept_weights_kernel[len(by_column), parts](
                    *self.kept, scale, weights.flag, weights.row_ref, weights.row_inverse, weights.col_inverse,
                    g, along, by_row, by_column, *i, *j, len(self.y), g.stride(0),
                    BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps,
                )  # fmt: skip
                continue
            grid = len(by_column), parts if shared else min(parts, tile.splits)
            weights_kernel[grid](
                x, y, scale, weights.flag, weights.row_ref, weights.col_ref, weights.row_inverse, weights.col_inverse,
                weights.row_miss, weights.col_miss, positives.row_count, row_ids, col_ids, g, along, by_row, by_column,
                i[0], i[1], j[0], j[1], parts, x.shape[1], x.stride(0), y.stride(0), g.stride(0), positives.offset,
                SHARED=shared, HAS_IDS=row_ids is not None, **tile.launch(),
            )  # fmt: skip
        return along, by_row, by_column
