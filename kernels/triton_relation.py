"""Relations in Triton: one tile of logits of either kind, and the way back from blocks of gradient weights.

The counterpart of chunked_relation, same letters: K segments of an embedding with one weight each,

    cosine      l_ij = sum_k w_k z^k_i . z^k_j
    euclidean   l_ij = -sum_k w_k d^k_ij,  d^2 = |z_i|^2 + |z_j|^2 - 2 z_i . z_j, 0 where rounding cannot tell it from 0

and H = dL/dl + its transpose. For cosine relations a kernel stores H itself, dz_i = w o sum_j H_ij z_j; for euclidean
ones C^k = w_k H / d^k (0 at distance 0), dz^k_i = sum_j C_ij z^k_j - z^k_i sum_j C_ij, in float32: slopes at small
distances leave float16's range.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import HALF, row_blocks, spans
from .chunked_relation import Sweep, Tile
from .triton_gradient import Centred, add_product, stored_dtype
from .triton_passes import finished_gradient, own_products
from .triton_tiles import exponential, product_tile, some_left_out

NOISE = tl.constexpr(4 * 2.0**-23)  # of the squared norms' sum: what a squared distance may be by rounding alone


@dataclass(frozen=True)
class Operand:
    """One side: rows (b, F) against columns (n, F); K segments from `starts` (K + 1,) int32 on, weights (K,) float32.

    `starts` are there for several segments only, squared norms (b, K) and (n, K) float32 for euclidean relations only.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    widths: list[int]
    kind: str
    starts: Tensor | None
    row_norms: Tensor | None
    column_norms: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, weights: Tensor, widths: list[int], kind: str) -> "Operand":
        """Embeddings of 16 bits stay as they are, everything else is float32."""
        dtype = rows.dtype if rows.dtype == columns.dtype and rows.dtype in HALF else weights.dtype
        square = columns is rows
        rows = rows.to(dtype).contiguous()
        columns = rows if square else columns.to(dtype).contiguous()
        starts = row_norms = column_norms = None
        if len(widths) > 1:  # filled one by one on the device: copying a list would wait for it
            ends = accumulate(widths, initial=0)
            starts = torch.stack([torch.full((), end, dtype=torch.int32, device=rows.device) for end in ends])
        if kind == "euclidean":
            row_norms = _squared_norms(rows, widths, weights.dtype)
            column_norms = row_norms if square else _squared_norms(columns, widths, weights.dtype)
        return cls(rows, columns, weights, widths, kind, starts, row_norms, column_norms)

    @property
    def segments(self) -> list[slice]:
        ends = accumulate(self.widths)
        return [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]

    def pointers(self) -> tuple[Tensor | None, ...]:
        """As the kernels take one side."""
        return self.rows, self.columns, self.row_norms, self.column_norms, self.weights, self.starts

    def bound(self) -> Tensor:
        """An upper bound of all logits, 0-d."""
        if self.kind == "euclidean":
            reach = self.row_norms.amax(0).sqrt() + self.column_norms.amax(0).sqrt()
            return ((-self.weights).clamp_min(0) * reach).sum()
        rows = self._largest_square(self.rows)
        columns = rows if self.columns is self.rows else self._largest_square(self.columns)
        return (rows * columns).sqrt()

    def _largest_square(self, emb: Tensor) -> Tensor:
        """Over rows of emb the largest sum of squares, each feature times its weight's size."""
        if len(self.widths) == 1:
            return own_products(emb, emb)[1][0].amax() * self.weights[0].abs()
        spread = self.spread().abs()
        blocks = [(emb[i].to(spread.dtype).square() * spread).sum(1).amax() for i in row_blocks(*emb.shape)]
        return torch.stack(blocks).amax()

    def spread(self) -> Tensor:
        """Each feature's weight, (F,)."""
        return torch.cat([w.expand(width) for w, width in zip(self.weights, self.widths, strict=True)])

    def stored_dtype(self) -> torch.dtype:
        """Of a block of gradient weights."""
        return self.weights.dtype if self.kind == "euclidean" else stored_dtype(self.rows, self.weights.dtype)


def _squared_norms(emb: Tensor, widths: list[int], dtype: torch.dtype) -> Tensor:
    norms = torch.empty(len(emb), len(widths), dtype=dtype, device=emb.device)
    for i in row_blocks(*emb.shape):
        norms[i] = torch.stack([part.to(dtype).square().sum(1) for part in emb[i].split(widths, 1)], 1)
    return norms


def sizes(student: Operand, teacher: Operand, offset: int | None) -> tuple[int, int, int, int, int]:
    """(offset, b, n, D, F); blocks without a common row get an offset that no column reaches."""
    b, n = len(student.rows), len(student.columns)
    return n if offset is None else offset, b, n, student.rows.shape[1], teacher.rows.shape[1]


def waves(sweep: Sweep, rows: int, columns: int, height: int, width: int) -> Iterator[Tile]:
    """The sweep cut into blocks of at most height x max(height, width)."""
    for i in spans(0, rows, height):
        if sweep is Sweep.TRIANGLE:
            yield Tile(i, i, False)
        for j in spans(i[1] if sweep is Sweep.TRIANGLE else 0, columns, width):
            yield Tile(i, j, sweep is not Sweep.ROWS)


@triton.jit
def distances(
    product, row_norms_ptr, column_norms_ptr, first_row, first_column, row_end, column_end, k, K: tl.constexpr
):
    """One segment's distances from its dot products; a NaN stays one."""
    rows = first_row + tl.arange(0, product.shape[0])
    columns = first_column + tl.arange(0, product.shape[1])
    row_norms = tl.load(row_norms_ptr + rows.to(tl.int64) * K + k, mask=rows < row_end, other=0.0)
    column_norms = tl.load(column_norms_ptr + columns.to(tl.int64) * K + k, mask=columns < column_end, other=0.0)
    norms = row_norms[:, None] + column_norms[None, :]
    squared = norms - 2.0 * product
    return tl.sqrt(tl.where(squared <= norms * NOISE, 0.0, squared))


@triton.jit
def segment_tile(
    rows_ptr, columns_ptr, row_norms_ptr, column_norms_ptr, starts_ptr, k,
    first_row, first_column, row_end, column_end, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Segment k's relation without its weight: dot products or negative distances."""
    if K == 1:
        start, width = 0, F
    else:
        start = tl.load(starts_ptr + k)
        width = tl.load(starts_ptr + k + 1) - start
    product = product_tile(
        rows_ptr + start, columns_ptr + start, first_row, first_column, row_end, column_end, width, F, F,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if EUCLIDEAN:
        return -distances(product, row_norms_ptr, column_norms_ptr, first_row, first_column, row_end, column_end, k, K)
    return product


@triton.jit
def relation_tile(
    rows_ptr, columns_ptr, row_norms_ptr, column_norms_ptr, weight_ptr, starts_ptr,
    first_row, first_column, row_end, column_end, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of logits."""
    if K == 1:
        return tl.load(weight_ptr) * segment_tile(
            rows_ptr, columns_ptr, row_norms_ptr, column_norms_ptr, starts_ptr, 0,
            first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K):
        total += tl.load(weight_ptr + k) * segment_tile(
            rows_ptr, columns_ptr, row_norms_ptr, column_norms_ptr, starts_ptr, k,
            first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return total


@triton.jit
def exponentials(
    s, t, s_ref, t_ref, first_row, first_column, row_end, column_end, offset,
    NARROW: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(e_s, e_t, d, e_s - e_t) of one tile; the exponentials are 0 where a pair does not count.

    Near d = 0 the difference is -(e_s + e_t) tanh(d / 2), by a polynomial to the last bits.
    """
    s = s - s_ref
    t = t - t_ref
    e_s, e_t, d = exponential(s, NARROW), exponential(t, NARROW), t - s
    if not WHOLE:
        if some_left_out(first_row, first_column, row_end, column_end, offset, BLOCK_M, BLOCK_N):
            rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
            counted = (rows < row_end)[:, None] & (columns < column_end)[None, :]
            counted = counted & ((rows + offset)[:, None] != columns[None, :])
            e_s = tl.where(counted, e_s, 0.0)
            e_t = tl.where(counted, e_t, 0.0)
    h = 0.5 * d
    q = h * h
    tanh = h * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    return e_s, e_t, d, tl.where(tl.abs(h) < 0.25, -(e_s + e_t) * tanh, e_s - e_t)


class OperandWeights:
    """Collects the gradient of one side's weights alone."""

    def __init__(self, operand: Operand):
        self.operand = operand
        self.along: Tensor | None = None

    def add_along(self, sums: Tensor) -> None:
        """A block's share (K,) float64, where a kernel has summed <H, relation without its weight>."""
        self.along = sums if self.along is None else self.along + sums

    def finish(
        self, mean: Tensor | float | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(None, None, weights), as of one whose embeddings learn."""
        weights = self.along if mean is None else self.along * mean
        return None, None, weights.to(self.operand.weights.dtype)


class OperandGradient(OperandWeights):
    """Collects the gradient of one side from blocks of gradient weights, as RelationGradient does from tiles of H.

    Blocks come in the order of `waves`: what begins at 0 meets its rows, or its columns, first.
    """

    def __init__(self, operand: Operand, sweep: Sweep, stored: torch.dtype):
        super().__init__(operand)
        dtype = operand.weights.dtype
        self.sweep = sweep
        self.rows = torch.empty(operand.rows.shape, dtype=dtype, device=operand.rows.device)
        self.columns = self.rows if sweep is Sweep.TRIANGLE else None
        if sweep is Sweep.PAIR:
            self.columns = torch.empty(operand.columns.shape, dtype=dtype, device=operand.rows.device)
        self.right = self.left = Centred(operand.columns, dtype, stored)
        self.there = self.here = self.right.whole()
        if operand.columns is not operand.rows:
            self.left = Centred(operand.rows, dtype, stored)
            self.here = self.left.whole()
        self.row_totals = self.column_totals = None  # (1, .), of weights over embeddings apart from their mean
        if operand.kind == "cosine" and self.right.mean is not None:
            self.row_totals = self.column_totals = self.rows.new_empty(1, len(operand.rows))
            if sweep is Sweep.PAIR:
                self.column_totals = self.rows.new_empty(1, len(operand.columns))

    def sums_of(self, place: Tile, planes: int) -> tuple[Tensor | None, Tensor | None]:
        """Where the weights' sums over a block's columns and rows belong: (planes, rows) and (planes, columns)."""
        if self.operand.kind == "cosine":
            if self.row_totals is None:
                return None, None
            columns = self.column_totals[:, slice(*place.columns)] if place.mirrored else None
            return self.row_totals[:, slice(*place.rows)], columns
        return tuple(self.rows.new_empty(planes, size) for size in place.shape)

    def add(self, blocks: Tensor, place: Tile, row_sums: Tensor | None, column_sums: Tensor | None) -> None:
        """blocks (1 or K, rows, columns); for euclidean relations one a segment, and `sums_of` before they were stored.

        One block serves all segments of a cosine relation, whose sums are collected where `sums_of` says.
        """
        i, j = slice(*place.rows), slice(*place.columns)
        first, column_first = place.columns[0] == 0, place.rows[0] == 0
        if self.operand.kind == "cosine":
            add_product(self.rows[i], blocks[0], self.there[j], first=first)
            if place.mirrored:
                add_product(self.columns[j], blocks[0].T, self.here[i], first=column_first)
            return
        for k, segment in enumerate(self.operand.segments):
            here, there = self.here[i, segment], self.there[j, segment]
            _add(self.rows[i, segment], (blocks[k] @ there).addcmul_(here, row_sums[k, :, None], value=-1), first)
            if place.mirrored:
                back = (blocks[k].T @ here).addcmul_(there, column_sums[k, :, None], value=-1)
                _add(self.columns[j, segment], back, column_first)

    def finish(
        self, mean: Tensor | float | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(rows, columns or None, weights), as RelationGradient.finish; without `along` from <rows' gradient, rows>.

        All of it times `mean` and the rows in `dtype`, where these are given.
        """
        rows, columns = self.rows, self.columns if self.sweep is Sweep.PAIR else None
        plain, weights = self.operand.kind == "euclidean", self.along
        factor = None  # with which products are finished at once
        if len(self.operand.weights) == 1 and weights is not None and not plain:
            factor = self.operand.weights if mean is None else self.operand.weights * mean
        if not plain:
            rows = self._finished(rows, self.row_totals, self.right, factor, dtype)
            if columns is not None:
                columns = self._finished(columns, self.column_totals, self.left, factor, None)
        if weights is None:
            emb = self.operand.rows
            blocks = [(rows[i] * emb[i]).sum(0, dtype=torch.float64) for i in row_blocks(*emb.shape)]
            along = torch.stack(blocks).sum(0).split(self.operand.widths)
            weights = torch.stack([part.sum() for part in along]) * (1.0 if self.sweep is Sweep.PAIR else 0.5)
        weights = weights if mean is None else weights * mean
        if factor is None:
            spread = None if plain else self.operand.spread()
            rows, columns = (_scaled(part, spread, mean) for part in (rows, columns))
        rows = rows if dtype is None else rows.to(dtype)
        return rows, columns, weights.to(self.operand.weights.dtype)

    @staticmethod
    def _finished(
        sums: Tensor, totals: Tensor | None, factor: Centred, scale: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        """From products with centred embeddings to those with the embeddings times `scale`; in place unless that asks
        for another `dtype`."""
        if factor.mean is None and scale is None:
            return sums
        out = sums if scale is None or dtype in (None, sums.dtype) else torch.empty_like(sums, dtype=dtype)
        finished_gradient(sums, totals, factor.mean, factor.reach, None, None, 0, scale, 0, out)
        return out


def _add(sums: Tensor, more: Tensor, first: bool) -> None:
    sums.copy_(more) if first else sums.add_(more)


def _scaled(rows: Tensor | None, *factors: Tensor | float | None) -> Tensor | None:
    """In place."""
    for factor in factors:
        if rows is not None and factor is not None:
            rows.mul_(factor)
    return rows
