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
from .triton_passes import add_parts, finished_gradient, pair_products
from .triton_tiles import exponential, product_tile, some_left_out

NOISE = tl.constexpr(4 * 2.0**-23)  # of the squared norms' sum: what a squared distance may be by rounding alone


@dataclass(frozen=True)
class Operand:
    """One side: rows (b, F) against columns (n, F); K segments from `starts` (K + 1,) int32 on, weights (K,) float32.

    Squared norms, (b, K) and (n, K) float32, are there for euclidean relations only.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    widths: list[int]
    kind: str
    starts: Tensor
    row_norms: Tensor | None
    column_norms: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, weights: Tensor, widths: list[int], kind: str) -> "Operand":
        """Embeddings of 16 bits stay as they are, everything else is float32."""
        dtype = rows.dtype if rows.dtype == columns.dtype and rows.dtype in HALF else weights.dtype
        square = columns is rows
        rows = rows.to(dtype).contiguous()
        columns = rows if square else columns.to(dtype).contiguous()
        ends = accumulate(widths, initial=0)  # filled one by one on the device: copying a list would wait for it
        starts = torch.stack([torch.full((), end, dtype=torch.int32, device=rows.device) for end in ends])
        row_norms = column_norms = None
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
            return pair_products(emb, emb)[0].amax() * self.weights[0].abs()
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


@dataclass(frozen=True)
class WeightSums:
    """A block's sums of weights over its columns and its rows, and <weights, relation> a row; P planes."""

    rows: Tensor  # (P, rows)
    columns: Tensor  # (P, columns)
    along: Tensor  # (P, rows) float64

    @classmethod
    def of(cls, place: Tile, planes: int, like: Tensor) -> "WeightSums":
        rows, columns = (like.new_empty(planes, size) for size in place.shape)
        return cls(rows, columns, torch.empty(rows.shape, dtype=torch.float64, device=like.device))

    def parts(self, tiles: int, parts: int) -> tuple[Tensor, Tensor]:
        """Room for what a launch of that grid writes."""
        planes, height = self.rows.shape
        return self.rows.new_empty(2, planes, parts, height), self.rows.new_empty(planes, tiles, self.columns.shape[1])

    def take(self, by_row: Tensor, by_column: Tensor, flag: Tensor | None) -> None:
        """The sums of a launch's parts, only while its flag is set."""
        add_parts(by_row[0], self.rows, first=True, flag=flag)
        add_parts(by_column, self.columns, first=True, flag=flag)
        self.take_along(by_row, flag)

    def take_along(self, by_row: Tensor, flag: Tensor | None) -> None:
        """Of them <weights, relation> alone."""
        add_parts(by_row[1], self.along, first=True, flag=flag)


class OperandWeights:
    """Collects the gradient of one side's weights alone."""

    def __init__(self, operand: Operand):
        self.operand = operand
        self.along: Tensor | None = None

    def add_along(self, sums: Tensor, place: Tile) -> None:
        """sums (K,) float64: <H, relation without its weight> of a block, where a kernel has summed it."""
        sums = sums * (1.0 if place.mirrored else 0.5)
        self.along = sums if self.along is None else self.along + sums

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(None, None, weights), as of one whose embeddings learn."""
        return None, None, self.along.to(self.operand.weights.dtype)


class OperandGradient(OperandWeights):
    """Collects the gradient of one side from blocks of gradient weights, as RelationGradient does from tiles of H."""

    def __init__(self, operand: Operand, sweep: Sweep, stored: torch.dtype):
        super().__init__(operand)
        dtype = operand.weights.dtype
        self.sweep = sweep
        self.rows = torch.zeros(operand.rows.shape, dtype=dtype, device=operand.rows.device)
        self.columns = self.rows if sweep is Sweep.TRIANGLE else None
        self.row_totals = self.column_totals = self.rows.new_zeros(len(operand.rows))
        if sweep is Sweep.PAIR:
            self.columns = torch.zeros(operand.columns.shape, dtype=dtype, device=operand.rows.device)
            self.column_totals = self.rows.new_zeros(len(operand.columns))
        self.row_totals = torch.zeros(len(operand.rows), dtype=dtype, device=operand.rows.device)
        self.column_totals = (
            self.row_totals if sweep is Sweep.TRIANGLE else self.row_totals.new_zeros(len(operand.columns))
        )
        self.right = self.left = Centred(operand.columns, dtype, stored)
        self.there = self.here = self.right.whole()
        if operand.columns is not operand.rows:
            self.left = Centred(operand.rows, dtype, stored)
            self.here = self.left.whole()

    def add(self, blocks: Tensor, place: Tile, row_sums: Tensor, column_sums: Tensor) -> None:
        """blocks (1 or K, rows, columns) and their sums before they were stored, (1 or K, rows) and (1 or K, columns).

        One block serves all segments of a cosine relation; euclidean ones have one each.
        """
        i, j = slice(*place.rows), slice(*place.columns)
        if self.operand.kind == "cosine":
            add_product(self.rows[i], blocks[0], self.there[j], first=False)
            if self.right.mean is not None:
                self.row_totals[i] += row_sums[0]
            if place.mirrored:
                add_product(self.columns[j], blocks[0].T, self.here[i], first=False)
                if self.left.mean is not None:
                    self.column_totals[j] += column_sums[0]
            return
        for k, segment in enumerate(self.operand.segments):
            here, there = self.here[i, segment], self.there[j, segment]
            self.rows[i, segment] += (blocks[k] @ there).addcmul_(here, row_sums[k, :, None], value=-1)
            if place.mirrored:
                self.columns[j, segment] += (blocks[k].T @ here).addcmul_(there, column_sums[k, :, None], value=-1)

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """(rows, columns or None, weights), as RelationGradient.finish; without `along` from <rows' gradient, rows>."""
        columns = self.columns if self.sweep is Sweep.PAIR else None
        if self.operand.kind == "cosine":
            self._finish_products(self.rows, self.row_totals, self.right)
            if columns is not None:
                self._finish_products(columns, self.column_totals, self.left)
        weights = self.along
        if weights is None:
            emb = self.operand.rows
            blocks = [(self.rows[i] * emb[i]).sum(0, dtype=torch.float64) for i in row_blocks(*emb.shape)]
            along = torch.stack(blocks).sum(0).split(self.operand.widths)
            weights = torch.stack([part.sum() for part in along]) * (1.0 if self.sweep is Sweep.PAIR else 0.5)
        weights = weights.to(self.rows.dtype)
        if self.operand.kind == "euclidean":
            return self.rows, columns, weights
        spread = self.operand.spread()
        return self.rows.mul_(spread), None if columns is None else columns.mul_(spread), weights

    @staticmethod
    def _finish_products(sums: Tensor, totals: Tensor, factor: Centred) -> None:
        """In place: from products with centred embeddings to those with the embeddings."""
        if factor.mean is not None:
            finished_gradient(sums, totals, factor.mean, factor.reach, None, None, 0, None, 0, sums)
