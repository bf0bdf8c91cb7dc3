"""Contrastive loss in Triton: the rectangular primitives of chunked_contrastive, same letters, same results.

Forward: one product and one exponential an element; a program owns a row tile and a share of the columns, keeps its
rows' sums in registers and writes its columns' sums to partial[row tile, N], which are added in fixed order: no
atomics, bitwise repeatable. Rows go in waves, so that the partial sums stay small. 2 N^2 D operations, 8 N^2 D in all.

Backward of narrow embeddings without ids: triton_contrastive_fused. Of others by G-waves: a block of G = P_row + P_col
(own pairs 0) is recomputed and stored in float32 or float16, then two ordinary products take it to dx and dy in
float32. Own pairs' -(off_i/r_i + off_j/q_j) is added apart in float32. With ids, G holds all positives.

The fixed reference is checked on the device. Where a sum is unsound a flag is set, and the kernels compiled for vector
references, which are always launched and return at once while it is clear, do the work instead: nothing waits.
"""

# ruff: noqa: SIM102, SIM108 (Triton prunes plain branches on constexprs, and only those)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import SUM_BITS, fixed_reference, spans
from .chunked_contrastive import Positives, Weights, contrastive_bound
from .triton_contrastive_fused import fused_gradients
from .triton_gradient import OwnPairs, SideGradient, own_products
from .triton_tiles import (
    Centred,
    Config,
    Work,
    choose_config,
    fused_config,
    product_tile,
    same_pair,
    store_weights,
    stored_dtype,
)


@triton.jit
def maxima_kernel(
    x_ptr, y_ptr, scale_ptr, flag_ptr, row_out_ptr, column_out_ptr,
    row_start, b, n, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maxima of one wave's logits: row_out (splits, wave rows), column_out (row tiles, n)."""
    if tl.load(flag_ptr) == 0:
        return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = scale * product_tile(x_ptr, y_ptr, first_row, first, b, n, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K)
        inside = (rows < b)[:, None] & (columns < n)[None, :]
        s = tl.where(inside, s, float("-inf"))
        best = tl.maximum(best, tl.max(s, 1))
        tl.store(column_out_ptr + tile.to(tl.int64) * n + columns, tl.max(s, 0), mask=columns < n)
    wave = tl.num_programs(0) * BLOCK_M
    tl.store(row_out_ptr + split.to(tl.int64) * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M), best)


@triton.jit
def statistics_kernel(
    x_ptr, y_ptr, scale_ptr, flag_ptr, row_ref_ptr, column_ref_ptr, row_ids_ptr, column_ids_ptr, row_out_ptr,
    column_out_ptr, row_start, b, n, D, stride_x, stride_y, offset,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of one wave: off, and with ids pos and the sum of positives' logits, the slowest axis of both outputs.

    row_out (1 or 3, splits, wave rows), column_out (1 or 3, row tiles, n).
    """
    if not SHARED:
        if tl.load(flag_ptr) == 0:
            return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    off = tl.zeros((BLOCK_M,), tl.float32)
    pos = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.zeros((BLOCK_M,), tl.float32)
    if SHARED:
        row_ref = tl.load(row_ref_ptr)
    else:
        row_ref = tl.load(row_ref_ptr + rows, mask=rows < b, other=0.0)[:, None]
    plane = tl.num_programs(0).to(tl.int64) * n
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = scale * product_tile(x_ptr, y_ptr, first_row, first, b, n, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K)
        inside = (rows < b)[:, None] & (columns < n)[None, :]
        positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, b, n, offset, HAS_IDS)
        e = tl.exp(s - row_ref)
        if SHARED:
            e_column = e
        else:
            e_column = tl.exp(s - tl.load(column_ref_ptr + columns, mask=columns < n, other=0.0)[None, :])
        negative = inside & (positive == 0)
        out = column_out_ptr + tile.to(tl.int64) * n + columns
        off += tl.sum(tl.where(negative, e, 0.0), 1)
        tl.store(out, tl.sum(tl.where(negative, e_column, 0.0), 0), mask=columns < n)
        if HAS_IDS:
            chosen = inside & positive
            pos += tl.sum(tl.where(chosen, e, 0.0), 1)
            target += tl.sum(tl.where(chosen, s, 0.0), 1)
            tl.store(out + plane, tl.sum(tl.where(chosen, e_column, 0.0), 0), mask=columns < n)
            tl.store(out + 2 * plane, tl.sum(tl.where(chosen, s, 0.0), 0), mask=columns < n)
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    out = row_out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(out, off)
    if HAS_IDS:
        plane = tl.num_programs(1) * wave
        tl.store(out + plane, pos)
        tl.store(out + 2 * plane, target)


@triton.jit
def weights_kernel(
    x_ptr, y_ptr, scale_ptr, flag_ptr, row_ref_ptr, column_ref_ptr, row_inverse_ptr, column_inverse_ptr,
    row_miss_ptr, column_miss_ptr, count_ptr, row_ids_ptr, column_ids_ptr, g_ptr, along_ptr,
    row_total_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, D, stride_x, stride_y, stride_g, offset,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of G; from its float32 values also each row's <G, S> and the rows' and columns' sums, a tile each.

    Own pairs are left 0 unless there are ids. (A sum to one scalar breaks triton 3.7's sm_100 build.)
    """
    if tl.load(flag_ptr) == SHARED:
        return
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tl.program_id(1) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    s = tl.load(scale_ptr) * product_tile(
        x_ptr, y_ptr, first_row, first_column, row_end, column_end, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K
    )
    row_inverse = tl.load(row_inverse_ptr + rows, mask=row_ok, other=0.0)[:, None]
    column_inverse = tl.load(column_inverse_ptr + columns, mask=column_ok, other=0.0)[None, :]
    if SHARED:
        g = tl.exp(s - tl.load(row_ref_ptr)) * (row_inverse + column_inverse)
    else:
        row_ref = tl.load(row_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        column_ref = tl.load(column_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        g = tl.exp(s - row_ref) * row_inverse + tl.exp(s - column_ref) * column_inverse
    positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS)
    if HAS_IDS:
        miss = tl.load(row_miss_ptr + rows, mask=row_ok, other=0.0)[:, None]
        miss += tl.load(column_miss_ptr + columns, mask=column_ok, other=0.0)[None, :]
        count = tl.load(count_ptr + rows, mask=row_ok, other=1).to(tl.float32)[:, None]
        g = tl.where(positive, tl.where(count == 1.0, -miss, g - 2.0 / count), g)
    else:
        g = tl.where(positive, 0.0, g)
    inside = row_ok[:, None] & column_ok[None, :]
    store_weights(g_ptr, g, rows - row_start, columns - column_start, stride_g, inside)
    g = tl.where(inside, g, 0.0)
    by_row = tl.program_id(1).to(tl.int64) * (row_end - row_start) + rows - row_start
    tl.store(along_ptr + by_row, tl.sum(g * s, 1), mask=row_ok)
    tl.store(row_total_ptr + by_row, tl.sum(g, 1), mask=row_ok)
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + columns - column_start
    tl.store(column_total_ptr + by_column, tl.sum(g, 0), mask=column_ok)


def _ids(positives: Positives) -> tuple[Tensor | None, Tensor | None, bool]:
    return positives.row_ids, positives.col_ids, positives.row_ids is not None


def contrastive_maxima(
    x: Tensor, y: Tensor, scale: Tensor, flag: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Row (b,) and column (N,) maxima of the logits, only while `flag` is set (anything otherwise)."""
    config = config or choose_config(x, Work.LIGHT)
    b, n = len(x), len(y)
    rows, cols = scale.new_zeros(b), scale.new_full((n,), -torch.inf)
    for i in spans(0, b, config.wave_rows):
        tiles = triton.cdiv(i[1] - i[0], config.block_m)
        splits = min(config.splits, triton.cdiv(n, config.block_n))
        row_out = scale.new_full((splits, tiles * config.block_m), -torch.inf)
        column_out = scale.new_full((tiles, n), -torch.inf)
        maxima_kernel[tiles, splits](
            x, y, scale, flag, row_out, column_out, i[0], b, n, x.shape[1], x.stride(0), y.stride(0), **config.launch()
        )
        rows[slice(*i)] = row_out.amax(0)[: i[1] - i[0]]
        cols = torch.maximum(cols, column_out.amax(0))
    return rows, cols


def contrastive_statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ref: Tensor,
    col_ref: Tensor,
    positives: Positives,
    flag: Tensor,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(3, b) row sums and (3, N) column sums, as in chunked_contrastive; columns partial over these rows.

    Vector references run only while `flag` is set.
    """
    has_ids = positives.row_ids is not None
    shared = row_ref.dim() == 0
    config = config or choose_config(x, Work.NARROW if has_ids else Work.LIGHT if shared else Work.FULL)
    rows, cols = scale.new_zeros(3, len(x)), scale.new_zeros(3, len(y))
    for i in spans(0, len(x), config.wave_rows):
        _add_wave(rows, cols, x, y, scale, flag, row_ref, col_ref, positives, i, config)
    if has_ids:
        rows[2] /= positives.row_count
        cols[2] /= positives.col_count
    else:
        _add_own_pairs(x, y, scale, row_ref, col_ref, positives.offset, rows, cols)
    return rows, cols


def _add_wave(rows, cols, x, y, scale, flag, row_ref, col_ref, positives: Positives, i, config: Config) -> None:
    """One wave's sums into the rows' place and on top of the columns'; its partial sums are gone afterwards."""
    b, n = len(x), len(y)
    row_ids, col_ids, has_ids = _ids(positives)
    sums = 3 if has_ids else 1
    tiles = triton.cdiv(i[1] - i[0], config.block_m)
    splits = min(config.splits, triton.cdiv(n, config.block_n))
    row_out = scale.new_zeros(sums, splits, tiles * config.block_m)
    column_out = scale.new_zeros(sums, tiles, n)
    statistics_kernel[tiles, splits](
        x, y, scale, flag, row_ref, col_ref, row_ids, col_ids, row_out, column_out,
        i[0], b, n, x.shape[1], x.stride(0), y.stride(0), positives.offset,
        SHARED=row_ref.dim() == 0, HAS_IDS=has_ids, **config.launch(),
    )  # fmt: skip
    places = (1, 0, 2)[:sums]  # of the kernel's off, pos, target; a list as an index would be copied to the device
    for place, of_rows, of_cols in zip(places, row_out.sum(1), column_out.sum(1), strict=True):
        rows[place, slice(*i)] = of_rows[: i[1] - i[0]]
        cols[place] += of_cols


def _add_own_pairs(x, y, scale, row_ref, col_ref, offset: int, rows: Tensor, cols: Tensor) -> None:
    mine = slice(offset, offset + len(x))
    own = scale * own_products(x, y, offset, scale.dtype)
    rows[0], rows[2], cols[2, mine] = (own - row_ref).exp(), own, own
    cols[0, mine] = (own - (col_ref if col_ref.dim() == 0 else col_ref[mine])).exp()


def contrastive_references(
    x: Tensor, y: Tensor, scale: Tensor, positives: Positives, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One process's (row_ref (N,), col_ref (N,), rows, cols, flag), whichever reference turns out sound.

    `flag` is 1 where the maxima were needed; no value is read on the host.
    """
    ref = fixed_reference(contrastive_bound(x, y, scale), scale.dtype)
    idle = torch.ones((), dtype=torch.int32, device=x.device)
    rows, cols = contrastive_statistics(x, y, scale, ref, ref, positives, idle, config)
    sums = torch.cat([rows[0] + rows[1], cols[0] + cols[1]])
    floor = len(y) * 2.0 ** -SUM_BITS[scale.dtype]
    flag = (~((sums >= floor) & (sums < torch.inf)).all()).to(torch.int32)
    row_max, col_max = contrastive_maxima(x, y, scale, flag, config)
    more_rows, more_cols = contrastive_statistics(x, y, scale, row_max, col_max, positives, flag, config)
    unsound = flag.bool()
    return (
        torch.where(unsound, row_max, ref),
        torch.where(unsound, col_max, ref),
        torch.where(unsound, more_rows, rows),
        torch.where(unsound, more_cols, cols),
        flag,
    )


def contrastive_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weights: Weights,
    flag: Tensor,
    config: Config | None = None,
    *,
    want_x: bool = True,
    want_y: bool = True,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(G y (b, D) complete, G^T x (N, D) and <G, S> partial over these rows), float32; None where not wanted.

    `weights` hold vector references; with a clear `flag` all their entries are the one constant. <G, S> is summed where
    G is still float32: from a float16 G, as <G y, x>, it is percents wrong on cone-shaped embeddings. Narrow embeddings
    with one positive each are served by the fused kernel, unless `config` asks for waves of its sizes. Both gradients
    come times `factor` (0-d) and in `dtype` where these are given: last steps of a caller that needs no partial sums.
    """
    positives = weights.positives
    has_ids = positives.row_ids is not None
    own, pairs = None, (None, None)
    if not has_ids:
        offset = positives.offset
        miss = weights.row_miss + weights.col_miss[offset : offset + len(x)]
        own = (scale * own_products(x, y, offset, scale.dtype) * miss).sum(dtype=torch.float64)
        pairs = OwnPairs.of_sides(-miss, x, y, offset)
    dx, dy = (
        SideGradient(rows, dtype or scale.dtype, of_side, factor) if want else None
        for rows, of_side, want in ((x, pairs[0], want_x), (y, pairs[1], want_y))
    )
    narrow = config is None and not has_ids and fused_config(x) is not None
    if narrow and (want_x or want_y):
        along = fused_gradients(x, y, scale, weights, flag, dx, dy)
    else:
        along = _gradients_by_waves(x, y, scale, weights, flag, config, dx, dy)
    along = along if own is None else along - own
    return None if dx is None else dx.result(), None if dy is None else dy.result(), along


def _gradients_by_waves(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weights: Weights,
    flag: Tensor,
    config: Config | None,
    dx: SideGradient | None,
    dy: SideGradient | None,
) -> Tensor:
    """<G, S> without lone positives' terms; fills dx and dy. The rows' sums are the one float32 (b, D) that is held."""
    waves = _Waves(x, y, scale, weights, flag, config)
    row_sums = None if dx is None else dx.new_sums(scale.dtype)
    along = torch.zeros((), dtype=torch.float64, device=x.device)
    for j in spans(0, len(y), waves.width):
        along += waves.add_columns(j, row_sums, dy)
    return along


class _Waves:
    """Blocks of G, height x width, one after another in the same memory."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, weights: Weights, flag: Tensor, config: Config | None):
        self.x, self.y, self.scale, self.weights, self.flag = x, y, scale, weights, flag
        has_ids = weights.positives.row_ids is not None
        self.tiles = {
            shared: config or choose_config(x, Work.FULL if shared and not has_ids else Work.NARROW)
            for shared in (True, False)
        }
        stored = stored_dtype(x, scale.dtype)
        self.left, self.right = Centred(x, scale.dtype, stored), Centred(y, scale.dtype, stored)
        self.height = min(len(x), self.tiles[True].wave_rows)
        self.width = min(len(y), self.tiles[True].wave_columns)
        self.block = torch.empty(self.height, self.width, dtype=stored, device=x.device)

    def add_columns(self, j: tuple[int, int], row_sums: Tensor | None, dy: SideGradient | None) -> Tensor:
        """All rows against columns j: adds to the rows' sums, finishes the columns' part of dy, returns <G, S>."""
        there = None if row_sums is None else self.right.part(slice(*j))
        column_sums = None if dy is None else self.scale.new_zeros(j[1] - j[0], self.y.shape[1])
        along = torch.zeros((), dtype=torch.float64, device=self.x.device)
        for i in spans(0, len(self.x), self.height):
            g = self.block[: i[1] - i[0], : j[1] - j[0]]
            part, row_totals, column_totals = self.fill(g, i, j)
            along += part
            if row_sums is not None:
                row_sums[slice(*i)] += self.right.weighted(g, there, row_totals)
            if column_sums is not None:
                column_sums += self.left.weighted(g.T, self.left.part(slice(*i)), column_totals)
        if dy is not None:
            dy.finish(j[0], column_sums)
        return along

    def fill(self, g: Tensor, i: tuple[int, int], j: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """G of rows i and columns j into g; <G, S> in float64 and the sums of G's rows and columns."""
        x, y, scale, weights, positives = self.x, self.y, self.scale, self.weights, self.weights.positives
        row_ids, col_ids, has_ids = _ids(positives)
        along = torch.zeros((), dtype=torch.float64, device=x.device)
        row_totals, column_totals = scale.new_zeros(len(g)), scale.new_zeros(g.shape[1])
        for shared, tile in self.tiles.items():
            grid = triton.cdiv(g.shape[0], tile.block_m), triton.cdiv(g.shape[1], tile.block_n)
            part = scale.new_zeros(grid[1], len(g))
            by_row, by_col = scale.new_zeros(grid[1], len(g)), scale.new_zeros(grid[0], g.shape[1])
            weights_kernel[grid](
                x, y, scale, self.flag, weights.row_ref, weights.col_ref, weights.row_inverse, weights.col_inverse,
                weights.row_miss, weights.col_miss, positives.row_count, row_ids, col_ids, g, part, by_row, by_col,
                i[0], i[1], j[0], j[1], x.shape[1], x.stride(0), y.stride(0), g.stride(0), positives.offset,
                SHARED=shared, HAS_IDS=has_ids, **tile.launch(),
            )  # fmt: skip
            along += part.sum(dtype=torch.float64)
            row_totals += by_row.sum(0)
            column_totals += by_col.sum(0)
        return along, row_totals, column_totals
