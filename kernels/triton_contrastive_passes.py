"""Passes between the contrastive loss's kernels, without products: one launch in place of a dozen of torch's.

At some thousand pairs the host, which starts the kernels, is what takes time. Letters as in chunked_contrastive: b rows
against n columns, sums (3, b) and (3, n) of pos, off and target, r = pos + off. All orders of summation are fixed.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import REACH, SUM_BITS
from .chunked_contrastive import Positives, Weights
from .triton_passes import PARTS, PLACES, sum_of_parts
from .triton_tiles import LEFT_OUT, exponential, store_weights

WIDE = 1024  # places at once, where nothing is added up over parts


@triton.jit
def reference_kernel(largest_ptr, scale_ptr, out_ptr, programs, n, reach, BLOCK_N: tl.constexpr):
    """out (2, n), all of it max(|scale| |x| |y| - reach, 0), from largest (2, programs): maxima of |x|^2 and |y|^2."""
    place = tl.arange(0, BLOCK_N)
    of_x = tl.zeros((BLOCK_N,), tl.float32)
    of_y = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, programs, BLOCK_N):
        here = largest_ptr + first + place
        of_x = tl.maximum(of_x, tl.load(here, mask=first + place < programs, other=0.0))
        of_y = tl.maximum(of_y, tl.load(here + programs, mask=first + place < programs, other=0.0))
    bound = tl.abs(tl.load(scale_ptr)) * (tl.sqrt(tl.max(of_x, 0)) * tl.sqrt(tl.max(of_y, 0)))
    ref = tl.maximum(bound - reach, 0.0) + tl.zeros((BLOCK_N,), tl.float32)
    out = out_ptr + tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + place
    mask = place < n - tl.program_id(0) * BLOCK_N
    tl.store(out, ref, mask=mask)
    tl.store(out + n, ref, mask=mask)


@triton.jit
def one_side(
    part_ptr, sums_ptr, own_ptr, scale_ptr, ref_ptr, count_ptr, term_ptr, unsound_ptr,
    first_place, size, parts, stride_part, plane, pair, b, floor, term,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds up a program's places, `size` from first_place on, whose own pair is `pair`; LAST: and finishes them."""
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = at < size
    place = first_place + at
    pos_out = sums_ptr + place
    off_out = pos_out + plane
    target_out = off_out + plane
    step = tl.cast(parts, tl.int64) * stride_part
    pos = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_IDS:
        pos = sum_of_parts(part_ptr, pos_out, at, ok, parts, stride_part, FIRST, False, BLOCK_M, BLOCK_N)
        off = sum_of_parts(part_ptr + step, off_out, at, ok, parts, stride_part, FIRST, False, BLOCK_M, BLOCK_N)
        target = sum_of_parts(
            part_ptr + 2 * step, target_out, at, ok, parts, stride_part, FIRST, False, BLOCK_M, BLOCK_N
        )
    else:
        off = sum_of_parts(part_ptr, off_out, at, ok, parts, stride_part, FIRST, False, BLOCK_M, BLOCK_N)
    if LAST:
        if SHARED:
            ref = tl.load(ref_ptr) + tl.zeros((BLOCK_N,), tl.float32)
        else:
            ref = tl.load(ref_ptr + place, mask=ok, other=0.0)
        if HAS_IDS:
            count = tl.load(count_ptr + place, mask=ok, other=1).to(tl.float32)
            target = target / count
        else:
            own = ok & (pair + at >= 0) & (pair + at < b)
            target = tl.load(scale_ptr) * tl.load(own_ptr + pair + at, mask=own, other=0.0)
            pos = tl.where(own, tl.exp(target - ref), 0.0)
        if TERMS:
            pos, off = tl.where(ok, pos, 1.0), tl.where(ok, off, 1.0)
            total = pos + off
            sound = (total >= floor) & (total < float("inf"))
            tl.store(unsound_ptr + term, tl.max((ok & (sound == 0)).to(tl.int32), 0))
            positive, others = pos.to(tl.float64), off.to(tl.float64)
            away = ref.to(tl.float64) - target.to(tl.float64)
            close = others < 1000.0 * positive  # there the loss is log1p(others / positive), exact however small it is
            z = tl.where(close, others, 0.0) / tl.where(close, positive, 1.0)
            u = 1.0 + z
            value = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
            if HAS_IDS:
                value += tl.where(close & (count > 1.0), tl.log(tl.where(close, positive, 1.0)) + away, 0.0)
            value = tl.where(close, value, tl.log(tl.where(close, 1.0, positive + others)) + away)
            tl.store(term_ptr + term, tl.sum(tl.where(ok, value, 0.0), 0))
    tl.store(off_out, off, mask=ok)
    if HAS_IDS or LAST:
        tl.store(pos_out, pos, mask=ok)
        tl.store(target_out, target, mask=ok)


@triton.jit
def side_sums_kernel(
    row_part_ptr, column_part_ptr, row_sums_ptr, column_sums_ptr, own_ptr, scale_ptr, row_ref_ptr, column_ref_ptr,
    row_count_ptr, column_count_ptr, flag_ptr, term_ptr, unsound_ptr,
    row_start, rows, n, row_parts, column_parts, stride_row_part, row_plane, column_plane, offset, b, floor,
    row_term, column_term,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A wave's partial sums, off or with ids (pos, off, target), added up for both sides, and finished.

    The wave's rows are finished, and the columns on the LAST wave, which start on the FIRST: own pairs get their terms,
    or with ids targets their mean; each program leaves its places' loss, and whether their sums lost terms or
    overflowed, at row_term or column_term + its number. The second axis is the side.
    """
    if not SHARED:
        if tl.load(flag_ptr) == 0:
            return
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        if program * BLOCK_N < rows:
            one_side(
                row_part_ptr, row_sums_ptr, own_ptr, scale_ptr, row_ref_ptr, row_count_ptr, term_ptr, unsound_ptr,
                row_start, rows, row_parts, stride_row_part, row_plane, row_start, b, floor, row_term + program,
                SHARED, HAS_IDS, TERMS, True, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        if program * BLOCK_N < n:
            one_side(
                column_part_ptr, column_sums_ptr, own_ptr, scale_ptr, column_ref_ptr, column_count_ptr, term_ptr,
                unsound_ptr, 0, n, column_parts, n, column_plane, -offset, b, floor, column_term + program,
                SHARED, HAS_IDS, TERMS, FIRST, LAST, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def pair_weights_kernel(
    row_sums_ptr, column_sums_ptr, row_ref_ptr, column_ref_ptr, row_out_ptr, column_out_ptr, own_ptr, along_ptr,
    differs_ptr, row_plane, column_plane, offset, b, n,
    HAS_IDS: tl.constexpr, CHECKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """row_out (2, b) and column_out (2, n): 1 / r and off / r. Own pairs' weights (b,), and their sum times s.

    CHECKED: differs, a program, whether its references are not all the first one.
    """
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = place < b, place < n
    row_off = tl.load(row_sums_ptr + row_plane + place, mask=row_ok, other=0.0)
    row_total = tl.load(row_sums_ptr + place, mask=row_ok, other=1.0) + row_off
    column_off = tl.load(column_sums_ptr + column_plane + place, mask=column_ok, other=0.0)
    column_total = tl.load(column_sums_ptr + place, mask=column_ok, other=1.0) + column_off
    row_miss = row_off / row_total
    tl.store(row_out_ptr + place, 1.0 / row_total, mask=row_ok)
    tl.store(row_out_ptr + b + place, row_miss, mask=row_ok)
    tl.store(column_out_ptr + place, 1.0 / column_total, mask=column_ok)
    tl.store(column_out_ptr + n + place, column_off / column_total, mask=column_ok)
    if not HAS_IDS:
        own_off = tl.load(column_sums_ptr + column_plane + offset + place, mask=row_ok, other=0.0)
        own_total = tl.load(column_sums_ptr + offset + place, mask=row_ok, other=1.0) + own_off
        weight = -(row_miss + own_off / own_total)
        target = tl.load(row_sums_ptr + 2 * row_plane + place, mask=row_ok, other=0.0)
        tl.store(own_ptr + place, weight, mask=row_ok)
        along = tl.where(row_ok, (target * weight).to(tl.float64), 0.0)
        tl.store(along_ptr + tl.program_id(0), tl.sum(along, 0))
    if CHECKED:
        first = tl.load(row_ref_ptr)
        other = row_ok & (tl.load(row_ref_ptr + place, mask=row_ok, other=0.0) != first)
        other = other | (column_ok & (tl.load(column_ref_ptr + place, mask=column_ok, other=0.0) != first))
        tl.store(differs_ptr + tl.program_id(0), tl.max(other.to(tl.int32), 0))


@triton.jit
def kept_weights_kernel(
    kept_ptr, unit_ptr, scale_ptr, flag_ptr, ref_ptr, row_inverse_ptr, column_inverse_ptr,
    g_ptr, along_ptr, row_total_ptr, column_total_ptr,
    row_start, row_end, column_start, column_end, n, stride_g,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weights_kernel's outputs from kept products (b, n), int16 in units.

    Logits bounded by B are then B / 65,534 off at most. (Exponentials in bfloat16 would be 2^-9 of themselves off: on a
    cone gradients lose four times what dense torch does, and the scale's is lost altogether.)
    """
    if tl.load(flag_ptr) != 0:
        return
    local_column = tl.program_id(1) * BLOCK_N
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + local_column
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_ok, column_ok = first_row + row < row_end, first_column + column < column_end
    inside = row_ok[:, None] & column_ok[None, :]
    corner = kept_ptr + tl.cast(first_row, tl.int64) * n + first_column
    whole = tl.load(corner + row[:, None] * n + column[None, :], mask=inside, other=LEFT_OUT)
    s = tl.load(scale_ptr) * tl.load(unit_ptr) * whole.to(tl.float32)
    row_inverse = tl.load(row_inverse_ptr + first_row + row, mask=row_ok, other=0.0)[:, None]
    column_inverse = tl.load(column_inverse_ptr + first_column + column, mask=column_ok, other=0.0)[None, :]
    g = exponential(s - tl.load(ref_ptr), True) * (row_inverse + column_inverse)
    g = tl.where(whole == LEFT_OUT, 0.0, g)
    by_row = tl.program_id(1).to(tl.int64) * (row_end - row_start) + first_row - row_start + row
    tl.store(along_ptr + by_row, tl.sum(g * s, 1), mask=row_ok)
    tl.store(row_total_ptr + by_row, tl.sum(g, 1), mask=row_ok)
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + local_column + column
    tl.store(column_total_ptr + by_column, tl.sum(g, 0), mask=column_ok)
    corner = g_ptr + tl.program_id(0).to(tl.int64) * BLOCK_M * stride_g + local_column
    store_weights(corner, g, row, column, stride_g, inside)


def references_of(largest: Tensor, scale: Tensor, out: Tensor) -> None:
    """The fixed reference into all of out (2, N), for float32 norms' squares (2, blocks)."""
    n = out.shape[1]
    reference_kernel[(triton.cdiv(n, WIDE),)](
        largest, scale, out, largest.shape[1], n, REACH[torch.float32], BLOCK_N=WIDE
    )


def side_programs(n: int) -> int:
    return triton.cdiv(n, PLACES)


@dataclass(frozen=True)
class Sides:
    """Sums (3, b) and (3, N) that waves of rows add to, and what finishes them."""

    rows: Tensor
    cols: Tensor
    own: Tensor | None  # (b,) products, where there are no ids
    scale: Tensor
    positives: Positives
    waves: list[tuple[int, int]]
    terms: Tensor | None = None  # float64 loss of each program's places, the rows' by waves and then the columns'
    unsound: Tensor | None = None  # int32 likewise: whether sums lost terms or overflowed

    @classmethod
    def with_losses(cls, sums: Tensor, own: Tensor | None, scale: Tensor, positives: Positives, waves) -> "Sides":
        """Of one process, sums (6, N)."""
        programs = sum(side_programs(stop - start) for start, stop in waves) + side_programs(sums.shape[1])
        kinds = torch.float64, torch.int32
        losses = (torch.empty(programs, dtype=kind, device=sums.device) for kind in kinds)
        return cls(sums[:3], sums[3:], own, scale, positives, waves, *losses)

    def add(
        self,
        row_part: Tensor,
        column_part: Tensor,
        references: tuple[Tensor, Tensor],
        wave: int,
        flag: Tensor | None,
    ) -> None:
        """side_sums_kernel over row_part (1 or 3, P, at least the wave) and column_part (1 or 3, Q, N).

        The references are both 0-d, or (b,) and (N,) and nothing is done unless `flag` is set.
        """
        (start, stop), n = self.waves[wave], self.cols.shape[1]
        row_term = sum(side_programs(after - before) for before, after in self.waves[:wave])
        column_term = 0 if self.terms is None else len(self.terms) - side_programs(n)
        side_sums_kernel[side_programs(max(stop - start, n)), 2](
            row_part, column_part, self.rows, self.cols, self.own, self.scale, *references,
            self.positives.row_count, self.positives.col_count, flag, self.terms, self.unsound,
            start, stop - start, n, row_part.shape[1], column_part.shape[1], row_part.stride(1), self.rows.stride(0),
            self.cols.stride(0), self.positives.offset, self.rows.shape[1], n * 2.0 ** -SUM_BITS[torch.float32],
            row_term, column_term, SHARED=references[0].dim() == 0, HAS_IDS=self.own is None,
            TERMS=self.terms is not None, FIRST=wave == 0, LAST=wave == len(self.waves) - 1,
            BLOCK_M=PARTS, BLOCK_N=PLACES,
        )  # fmt: skip


@dataclass(frozen=True)
class PairWeights:
    """What the gradient's kernels read of each row and column, and of own pairs where there are no ids."""

    row_ref: Tensor
    col_ref: Tensor
    row_inverse: Tensor  # 1 / r
    col_inverse: Tensor
    row_miss: Tensor  # off / r
    col_miss: Tensor
    positives: Positives
    flag: Tensor  # 0-d int32: whether the references are vectors
    own: Tensor | None  # (b,) weights of own pairs
    along: Tensor | None  # 0-d float64: sum of those times their logits

    @classmethod
    def of(cls, weights: Weights, flag: Tensor | None) -> "PairWeights":
        """From vector references, (b,) and (N,), and finished sums; without a `flag` one process's are looked at."""
        rows, cols, positives = weights.rows, weights.cols, weights.positives
        b, n, has_ids = rows.shape[1], cols.shape[1], positives.row_ids is not None
        programs = triton.cdiv(max(b, n), WIDE)
        by_row, by_column, own = rows.new_empty(2, b), cols.new_empty(2, n), None if has_ids else rows.new_empty(b)
        along = None if has_ids else rows.new_empty(programs, dtype=torch.float64)
        differs = rows.new_empty(programs, dtype=torch.int32) if flag is None else None
        pair_weights_kernel[(programs,)](
            rows, cols, weights.row_ref, weights.col_ref, by_row, by_column, own, along, differs, rows.stride(0),
            cols.stride(0), positives.offset, b, n, HAS_IDS=has_ids, CHECKED=flag is None, BLOCK_N=WIDE,
        )  # fmt: skip
        flag = differs.amax() if flag is None else flag
        refs = weights.row_ref, weights.col_ref, by_row[0], by_column[0], by_row[1], by_column[1]
        return cls(*refs, positives, flag, own, None if along is None else along.sum())
