"""Contrastive loss in Triton: the rectangular primitives of chunked_contrastive, same letters, same results.

Forward: one product and one exponential an element; a program owns a row tile and a share of the columns, keeps its
rows' sums in registers and writes its columns' sums to partial[row tile, N], which are added in fixed order: no
atomics, bitwise repeatable. Rows go in waves, so that the partial sums stay small. 2 N^2 D operations, 8 N^2 D in all.

Backward of narrow embeddings without ids: triton_contrastive_fused; of others: triton_contrastive_waves. Tiles without
own pairs and ends, nearly all, are made without masks.

The fixed reference is checked on the device. Where a sum is unsound a flag is set, and the kernels compiled for vector
references, which are always launched and return at once while it is clear, do the work instead: nothing waits.
"""

# ruff: noqa: SIM102, SIM108 (Triton prunes plain branches on constexprs, and only those)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import spans
from .chunked_contrastive import Positives, Weights
from .triton_contrastive_fused import fused_gradients
from .triton_contrastive_passes import PairWeights, Sides, references_of
from .triton_contrastive_waves import Waves
from .triton_gradient import Centred, OwnPairs, SideGradient, stored_dtype
from .triton_passes import add_several, own_products
from .triton_tiles import (
    LEFT_OUT,
    Config,
    Work,
    choose_config,
    exponential,
    fused_config,
    product_tile,
    same_pair,
    side_by_side,
    some_left_out,
    some_positive,
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
def exponentials(s, row_ref, column_ref_ptr, columns, n, SHARED: tl.constexpr, NARROW: tl.constexpr):
    """Of logits, over the rows' references and over the columns'; one and the same where they are SHARED."""
    e = exponential(s - row_ref, NARROW)
    if SHARED:
        e_column = e
    else:
        column_ref = tl.load(column_ref_ptr + columns, mask=columns < n, other=0.0)[None, :]
        e_column = exponential(s - column_ref, NARROW)
    return e, e_column


@triton.jit
def positives_part(
    s, scale, row_ref, column_ref_ptr, row_ids_ptr, column_ids_ptr, out, plane,
    first_row, first_column, b, n,
    SHARED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Stores pos, off and target of the columns of a tile's products s that may hold positives; returns its rows'."""
    rows = first_row + tl.arange(0, s.shape[0])
    columns = first_column + tl.arange(0, s.shape[1])
    row_ok, column_ok = rows < b, columns < n
    inside = row_ok[:, None] & column_ok[None, :]
    positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, b, n, 0, True)
    chosen, negative = inside & positive, inside & (positive == 0)
    s = scale * s
    e, e_column = exponentials(s, row_ref, column_ref_ptr, columns, n, SHARED, NARROW)
    s = tl.where(chosen, s, 0.0)
    tl.store(out + columns, tl.sum(tl.where(chosen, e_column, 0.0), 0), mask=column_ok)
    tl.store(out + plane + columns, tl.sum(tl.where(negative, e_column, 0.0), 0), mask=column_ok)
    tl.store(out + 2 * plane + columns, tl.sum(s, 0), mask=column_ok)
    return tl.sum(tl.where(chosen, e, 0.0), 1), tl.sum(tl.where(negative, e, 0.0), 1), tl.sum(s, 1)


@triton.jit
def keep_part(s, kept_ptr, unit_ptr, first_row, first_column, b, n, offset):
    """Stores products in whole units, LEFT_OUT for own pairs."""
    row, column = tl.arange(0, s.shape[0]), tl.arange(0, s.shape[1])
    whole = tl.clamp(tl.floor(s * (1.0 / tl.load(unit_ptr)) + 0.5), -32767.0, 32767.0).to(tl.int16)
    own = (first_row + row + offset)[:, None] == (first_column + column)[None, :]
    whole = tl.where(own, tl.full(s.shape, LEFT_OUT, tl.int16), whole)
    corner = kept_ptr + tl.cast(first_row, tl.int64) * n + first_column
    inside = (first_row + row < b)[:, None] & (first_column + column < n)[None, :]
    tl.store(corner + row[:, None] * n + column[None, :], whole, mask=inside)


@triton.jit
def statistics_kernel(
    x_ptr, y_ptr, scale_ptr, flag_ptr, row_ref_ptr, column_ref_ptr, row_ids_ptr, column_ids_ptr, row_out_ptr,
    column_out_ptr, kept_ptr, unit_ptr, row_start, b, n, D, stride_x, stride_y, offset,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Sums of one wave: off, or with ids pos, off and the sum of positives' logits, the slowest axis of both outputs.

    row_out (1 or 3, splits, wave rows), column_out (1 or 3, row tiles, n). By ids nearly all tiles hold no positives.
    KEPT, without ids: kept (b, n) are the products in whole units, LEFT_OUT at own pairs.
    """
    if not SHARED:
        if tl.load(flag_ptr) == 0:
            return
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_start + tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr)
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    WIDTH: tl.constexpr = BLOCK_N // 4  # of a tile with positives, or to keep, what is worked on at once
    off = tl.zeros((BLOCK_M,), tl.float32)
    pos = tl.zeros((BLOCK_M,), tl.float32)
    target = tl.zeros((BLOCK_M,), tl.float32)
    if SHARED:
        row_ref = tl.load(row_ref_ptr)
    else:
        row_ref = tl.load(row_ref_ptr + rows, mask=rows < b, other=0.0)[:, None]
    plane = tl.num_programs(0).to(tl.int64) * n
    out = column_out_ptr + tile.to(tl.int64) * n
    for first in range(split * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = product_tile(x_ptr, y_ptr, first_row, first, b, n, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K)
        if HAS_IDS:
            apart = some_positive(row_ids_ptr, column_ids_ptr, first_row, first, b, n, BLOCK_M, BLOCK_N)
            if WHOLE:  # which takes for granted that there are none, but not the question
                target += apart.to(tl.float32)
                apart = False
            if apart:
                parts = side_by_side(s, WIDTH)
                for part in tl.static_range(BLOCK_N // WIDTH):
                    more_pos, more_off, more_target = positives_part(
                        parts[part], scale, row_ref, column_ref_ptr, row_ids_ptr, column_ids_ptr, out, plane,
                        first_row, first + part * WIDTH, b, n, SHARED, NARROW,
                    )  # fmt: skip
                    pos += more_pos
                    off += more_off
                    target += more_target
            else:
                e, e_column = exponentials(scale * s, row_ref, column_ref_ptr, columns, n, SHARED, NARROW)
                tl.store(out + columns, tl.zeros((BLOCK_N,), tl.float32), mask=columns < n)
                tl.store(out + plane + columns, tl.sum(e_column, 0), mask=columns < n)
                tl.store(out + 2 * plane + columns, tl.zeros((BLOCK_N,), tl.float32), mask=columns < n)
                off += tl.sum(e, 1)
        else:
            if KEPT:
                parts = side_by_side(s, WIDTH)
                for part in tl.static_range(BLOCK_N // WIDTH):
                    keep_part(parts[part], kept_ptr, unit_ptr, first_row, first + part * WIDTH, b, n, offset)
            e, e_column = exponentials(scale * s, row_ref, column_ref_ptr, columns, n, SHARED, NARROW)
            if not WHOLE:
                if some_left_out(first_row, first, b, n, offset, BLOCK_M, BLOCK_N):
                    others = (rows + offset)[:, None] != columns[None, :]
                    negative = (rows < b)[:, None] & (columns < n)[None, :] & others
                    e = tl.where(negative, e, 0.0)
                    if SHARED:
                        e_column = e
                    else:
                        e_column = tl.where(negative, e_column, 0.0)
            tl.store(out + columns, tl.sum(e_column, 0), mask=columns < n)
            off += tl.sum(e, 1)
    wave = tl.num_programs(0).to(tl.int64) * BLOCK_M
    out = row_out_ptr + split * wave + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_IDS:
        plane = tl.num_programs(1) * wave
        tl.store(out, pos)
        tl.store(out + 2 * plane, target)
        out += plane
    tl.store(out, off)


def _ids(positives: Positives) -> tuple[Tensor | None, Tensor | None, bool]:
    return positives.row_ids, positives.col_ids, positives.row_ids is not None


def contrastive_maxima(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    flag: Tensor,
    config: Config | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Row (b,) and column (N,) maxima of the logits, only while `flag` is set (otherwise `out` as it was)."""
    config = config or choose_config(x, Work.LIGHT)
    b, n = len(x), len(y)
    rows, cols = out or (scale.new_zeros(b), scale.new_zeros(n))
    for i in spans(0, b, config.wave_rows):
        tiles = triton.cdiv(i[1] - i[0], config.block_m)
        splits = min(config.splits, triton.cdiv(n, config.block_n))
        row_out, column_out = scale.new_empty(splits, tiles * config.block_m), scale.new_empty(tiles, n)
        maxima_kernel[tiles, splits](
            x, y, scale, flag, row_out, column_out, i[0], b, n, x.shape[1], x.stride(0), y.stride(0), **config.launch()
        )
        parts = (row_out, rows[slice(*i)], True), (column_out, cols, i[0] == 0)
        add_several(*parts, flag=flag, maximum=True)
        del row_out, column_out  # before the next wave's are there
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

    Vector references run only while `flag` is set (the sums hold anything otherwise).
    """
    has_ids = positives.row_ids is not None
    config = config or _config(x, has_ids=has_ids, shared=row_ref.dim() == 0)
    own = None if has_ids else own_products(x, y[positives.offset : positives.offset + len(x)])[0]
    sums = scale.new_empty(3, len(x)), scale.new_empty(3, len(y))
    sides = Sides(*sums, own, scale, positives, list(spans(0, len(x), config.wave_rows)))
    _fill(sides, x, y, (row_ref, col_ref), flag, config)
    return sums


def _config(x: Tensor, *, has_ids: bool, shared: bool) -> Config:
    return choose_config(x, "contrastive_forward" if shared and not has_ids else Work.FULL)


def _fill(
    sides: Sides,
    x: Tensor,
    y: Tensor,
    references: tuple[Tensor, Tensor],
    flag: Tensor | None,
    config: Config,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The sums of `sides`, wave after wave, and products to keep; over vector references only while `flag` is set."""
    row_ids, col_ids, has_ids = _ids(sides.positives)
    shared, n = references[0].dim() == 0, len(y)
    guard = None if shared else flag
    for wave, (start, stop) in enumerate(sides.waves):
        tiles = triton.cdiv(stop - start, config.block_m)
        splits = min(config.splits, triton.cdiv(n, config.block_n))
        row_out = sides.rows.new_empty(3 if has_ids else 1, splits, tiles * config.block_m)
        column_out = row_out.new_empty(len(row_out), tiles, n)
        statistics_kernel[tiles, splits](
            x, y, sides.scale, flag, *references, row_ids, col_ids, row_out, column_out, *(kept or (None, None)),
            start, len(x), n, x.shape[1], x.stride(0), y.stride(0), sides.positives.offset,
            SHARED=shared, HAS_IDS=has_ids, KEPT=kept is not None, **config.launch(),
        )  # fmt: skip
        sides.add(row_out, column_out, references, wave, guard)
        del row_out, column_out  # before the next wave's are there


def contrastive_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positives: Positives,
    config: Config | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One process's (sum of all loss terms in float64, statistics (8, N): row_ref, col_ref, row sums, column sums).

    Whichever reference turns out sound; no value is read on the host. kept, (N, N) in int16 and 0-d, takes the
    products in units of the second.
    """
    has_ids = positives.row_ids is not None
    vectors = config or _config(x, has_ids=has_ids, shared=False)
    shared = config or _config(x, has_ids=has_ids, shared=kept is None)
    own, largest = own_products(x, y)
    statistics = scale.new_empty(8, len(x))
    references_of(largest, scale, statistics[:2])
    if kept is not None:
        torch.div(largest.amax(1).sqrt().prod(), 32767, out=kept[1])
    ref = statistics[0, 0]
    waves = list(spans(0, len(x), shared.wave_rows))
    sides = Sides.with_losses(statistics[2:], None if has_ids else own, scale, positives, waves)
    _fill(sides, x, y, (ref, ref), None, shared, kept)
    flag = sides.unsound.amax()
    maxima = contrastive_maxima(x, y, scale, flag, config, out=(statistics[0], statistics[1]))
    _fill(sides, x, y, maxima, flag, vectors)
    return sides.terms.sum(), statistics


def contrastive_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weights: Weights,
    flag: Tensor | None,
    config: Config | None = None,
    *,
    want_x: bool = True,
    want_y: bool = True,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(G y (b, D) complete, G^T x (N, D) and <G, S> partial over these rows), float32; None where not wanted.

    `weights` hold vector references; with a clear `flag` all their entries are the one constant (None: one process's
    are looked at). <G, S> is summed where G is still float32: from a float16 G, as <G y, x>, it is percents wrong on
    cone-shaped embeddings. Narrow embeddings with one positive each are served by the fused kernel, unless `config`
    asks for waves of its sizes. Both gradients come times `factor` (0-d) and in `dtype` where these are given: last
    steps of a caller that needs no partial sums. kept: contrastive_forward's, no product is computed again.
    """
    prepared = PairWeights.of(weights, flag)
    has_ids, pairs = prepared.own is None, (None, None)
    if not has_ids:
        pairs = OwnPairs.of_sides(prepared.own, x, y, weights.positives.offset)
    stored = stored_dtype(x, scale.dtype)
    left, right = Centred.both(x, y, scale.dtype, stored)
    dx, dy = (
        SideGradient(rows, others, dtype or scale.dtype, of_side, factor) if want else None
        for rows, others, of_side, want in ((x, right, pairs[0], want_x), (y, left, pairs[1], want_y))
    )
    narrow = config is None and kept is None and not has_ids and fused_config(x) is not None
    if narrow and (want_x or want_y):
        along = fused_gradients(x, y, scale, prepared, dx, dy)
    else:
        along = Waves(x, y, scale, prepared, config, (left, right), kept).sweep(dx, dy)
    along = along if has_ids else along + prepared.along
    return None if dx is None else dx.result(), None if dy is None else dy.result(), along
