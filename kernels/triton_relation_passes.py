"""Passes around the relation kernels: the reference, sums with the loss that follows from them, weights' sums.

One launch where torch would need dozens of operations on vectors of N: each keeps the host longer than the device, and
at some thousand pairs it is the host that takes time. All orders of summation are fixed.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import SUM_BITS
from .chunked_relation import Tile
from .chunked_relation_kl import NEAR, REACH
from .triton_passes import sum_of_parts
from .triton_relation import Operand

ROWS, FEATURES = 32, 128  # at once, of embeddings
PARTS, PLACES = 32, 32  # at once, of sums
MARGIN, CLOSE = tl.constexpr(REACH[torch.float32]), tl.constexpr(NEAR)


@triton.jit
def largest_logit(
    rows_ptr, weight_ptr, starts_ptr, first, b, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """An upper bound of the logits between rows whose norms are at most those of a program's rows."""
    row, feature = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    emb = rows_ptr + tl.cast(first, tl.int64) * F + (row[:, None] * F + feature[None, :])
    bound = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(K):
        if K == 1:
            start, width = 0, F
        else:
            start = tl.load(starts_ptr + k)
            width = tl.load(starts_ptr + k + 1) - start
        square = tl.zeros((BLOCK_M,), tl.float32)
        for at in range(0, width, BLOCK_K):
            ok = (row < b - first)[:, None] & (feature < width - at)[None, :]
            part = tl.load(emb + (start + at), mask=ok, other=0.0).to(tl.float32)
            square += tl.sum(part * part, 1)
        weight = tl.load(weight_ptr + k)
        if EUCLIDEAN:  # a distance is at most both norms together
            bound += 2.0 * tl.maximum(-weight, 0.0) * tl.sqrt(square)
        else:
            bound += tl.abs(weight) * square
    return tl.max(bound, 0)


@triton.jit
def relation_bounds_kernel(
    x_ptr, xw_ptr, x_starts_ptr, z_ptr, zw_ptr, z_starts_ptr, out_ptr, b, D, F,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (student and teacher, programs): the reference that a program's rows ask for."""
    first = tl.program_id(0) * BLOCK_M
    if tl.program_id(1) == 0:
        bound = largest_logit(x_ptr, xw_ptr, x_starts_ptr, first, b, D, 1, EUCLIDEAN, BLOCK_M, BLOCK_K)
    else:
        bound = largest_logit(z_ptr, zw_ptr, z_starts_ptr, first, b, F, K, EUCLIDEAN, BLOCK_M, BLOCK_K)
    out = out_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out, tl.maximum(bound - MARGIN, 0.0))


@triton.jit
def five_sums(part_ptr, parts, n, place, ok, out_ptr, plane_out, FIRST: tl.constexpr, BLOCK_M: tl.constexpr):
    """At (BLOCK_N,) places the sums over parts of (5, parts, n), unless FIRST on top of what is at out (5, .)."""
    part = tl.arange(0, BLOCK_M)
    s = tl.zeros((place.shape[0],), tl.float32)
    t = tl.zeros((place.shape[0],), tl.float32)
    difference = tl.zeros((place.shape[0],), tl.float32)
    drift = tl.zeros((place.shape[0],), tl.float32)
    curved = tl.zeros((place.shape[0],), tl.float32)
    plane = tl.cast(parts, tl.int64) * n
    for first in range(0, parts, BLOCK_M):
        here = part_ptr + place[None, :] + (first + part).to(tl.int64)[:, None] * n
        mask = (first + part < parts)[:, None] & ok[None, :]
        s += tl.sum(tl.load(here, mask=mask, other=0.0), 0)
        t += tl.sum(tl.load(here + plane, mask=mask, other=0.0), 0)
        difference += tl.sum(tl.load(here + 2 * plane, mask=mask, other=0.0), 0)
        drift += tl.sum(tl.load(here + 3 * plane, mask=mask, other=0.0), 0)
        curved += tl.sum(tl.load(here + 4 * plane, mask=mask, other=0.0), 0)
    if not FIRST:
        s += tl.load(out_ptr, mask=ok, other=0.0)
        t += tl.load(out_ptr + plane_out, mask=ok, other=0.0)
        difference += tl.load(out_ptr + 2 * plane_out, mask=ok, other=0.0)
        drift += tl.load(out_ptr + 3 * plane_out, mask=ok, other=0.0)
        curved += tl.load(out_ptr + 4 * plane_out, mask=ok, other=0.0)
    return s, t, difference, drift, curved


@triton.jit
def store_five(out_ptr, plane, ok, a, b, c, d, e):
    tl.store(out_ptr, a, mask=ok)
    tl.store(out_ptr + plane, b, mask=ok)
    tl.store(out_ptr + 2 * plane, c, mask=ok)
    tl.store(out_ptr + 3 * plane, d, mask=ok)
    tl.store(out_ptr + 4 * plane, e, mask=ok)


@triton.jit
def divergences(s, t, difference, drift, curved):
    """relation_kl_terms of float64 sums, and relation_kl_coefficients, which are float32."""
    ratio = difference / t
    near = tl.abs(ratio) < CLOSE
    u = 1.0 + tl.where(near, ratio, 0.0)
    log1p = tl.where(u == 1.0, ratio, tl.log(u) * (ratio / tl.where(u == 1.0, 1.0, u - 1.0)))
    term = tl.where(near, curved / t - (ratio - log1p), drift / t + tl.log(s / t))
    by_s, by_t = 1.0 / s, 1.0 / t
    first, second = tl.where(near, by_s, 0.0).to(tl.float32), tl.where(near, 0.0, by_s).to(tl.float32)
    third = tl.where(near, -ratio / s, -by_t).to(tl.float32)
    return term, first, second, third, by_t.to(tl.float32), (-drift / t / t).to(tl.float32)


@triton.jit
def relation_sums_kernel(
    flag_ptr, by_row_ptr, by_column_ptr, sums_ptr, columns_ptr, ref_ptr, refs_ptr, term_ptr, unsound_ptr,
    row_start, height, row_parts, column_start, width, column_parts, b, n, row_programs, floor,
    ROW_FIRST: tl.constexpr, COLUMN_FIRST: tl.constexpr, TERMS: tl.constexpr, GUARDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block's parts by_row (5, row_parts, height) and by_column (5, column_parts, width) into sums (5, b) of the rows
    and columns (5, n), unless FIRST on top of what these hold; the first `row_programs` programs serve the rows.

    TERMS: these rows are complete. Their sums become coefficients; term takes what each program's rows add to the mean
    loss. Where nothing is GUARDED refs (2, b) take the one reference, and unsound (2, programs of all rows) whether
    some sum lost terms or overflowed, as 1 or 0, and that minus 1.
    """
    if GUARDED:
        if tl.load(flag_ptr) == 0:
            return
    program = tl.program_id(0)
    if program < row_programs:
        place = program * BLOCK_N + tl.arange(0, BLOCK_N)
        ok, plane = place < height, tl.cast(b, tl.int64)
        out = sums_ptr + row_start + place
        s, t, difference, drift, curved = five_sums(
            by_row_ptr, row_parts, height, place, ok, out, plane, ROW_FIRST, BLOCK_M
        )
        if TERMS:
            s, t = tl.where(ok, s, 1.0), tl.where(ok, t, 1.0)
            at = row_start // BLOCK_N + program
            if not GUARDED:
                sound = (s >= floor) & (s < float("inf")) & (t >= floor) & (t < float("inf"))
                unsound = tl.max((ok & (sound == 0)).to(tl.int32), 0)
                tl.store(unsound_ptr + at, unsound)
                tl.store(unsound_ptr + tl.cdiv(b, BLOCK_N) + at, unsound - 1)
                reference = tl.load(ref_ptr) + tl.zeros((BLOCK_N,), tl.float32)
                tl.store(refs_ptr + row_start + place, reference, mask=ok)
                tl.store(refs_ptr + plane + row_start + place, reference, mask=ok)
            term, first, second, third, fourth, fifth = divergences(
                s.to(tl.float64), t.to(tl.float64), difference.to(tl.float64), drift.to(tl.float64),
                curved.to(tl.float64),
            )  # fmt: skip
            tl.store(term_ptr + at, tl.sum(tl.where(ok, term, 0.0), 0) / b)
            store_five(out, plane, ok, first, second, third, fourth, fifth)
        else:
            store_five(out, plane, ok, s, t, difference, drift, curved)
    else:
        place = (program - row_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        ok, plane = place < width, tl.cast(n, tl.int64)
        out = columns_ptr + column_start + place
        s, t, difference, drift, curved = five_sums(
            by_column_ptr, column_parts, width, place, ok, out, plane, COLUMN_FIRST, BLOCK_M
        )
        store_five(out, plane, ok, s, t, difference, drift, curved)


@triton.jit
def weight_sums_kernel(
    flag_ptr, by_row_ptr, by_column_ptr, weight_ptr, row_out_ptr, column_out_ptr, along_out_ptr,
    height, row_parts, other_row_parts, width, column_parts, other_column_parts, row_programs, plane_row, plane_column,
    ROW_FIRST: tl.constexpr, COLUMN_FIRST: tl.constexpr, EITHER: tl.constexpr, SUMMED: tl.constexpr,
    WEIGHTED: tl.constexpr, MIRRORED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block's parts by_row (2, planes, row_parts, height), by_column (planes, column_parts, width) of gradient
    weights into row_out (planes, .) and column_out (planes, .), unless FIRST on top of what these hold; the first
    `row_programs` programs serve the rows. The second half of by_row, <weights, relation>, goes to along_out (planes,
    row_programs), a sum a program, without the weight that it contains if WEIGHTED, and halved where all pairs are met
    twice. EITHER: of two launches that which the flag says has run, and the parts are as many as its are. Unless SUMMED
    along_out is all that is made.
    """
    if EITHER:
        other = (tl.load(flag_ptr) != 0).to(tl.int32)
        row_parts += other * (other_row_parts - row_parts)
        column_parts += other * (other_column_parts - column_parts)
    program, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if program < row_programs:
        place = program * BLOCK_N + tl.arange(0, BLOCK_N)
        ok, plane = place < height, tl.cast(row_parts, tl.int64) * height
        along = by_row_ptr + (tl.num_programs(1) + k) * plane
        along = tl.sum(
            sum_of_parts(along, along_out_ptr, place, ok, row_parts, height, True, False, BLOCK_M, BLOCK_N), 0
        )
        if WEIGHTED:
            along /= tl.load(weight_ptr)
        if not MIRRORED:
            along *= 0.5
        tl.store(along_out_ptr + k * row_programs + program, along)
        if SUMMED:
            out = row_out_ptr + k * plane_row + place
            part = by_row_ptr + k * plane
            total = sum_of_parts(part, out, place, ok, row_parts, height, ROW_FIRST, False, BLOCK_M, BLOCK_N)
            tl.store(out, total, mask=ok)
    else:
        if SUMMED:
            place = (program - row_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
            ok, plane = place < width, tl.cast(column_parts, tl.int64) * width
            out = column_out_ptr + k * plane_column + place
            part = by_column_ptr + k * plane
            total = sum_of_parts(part, out, place, ok, column_parts, width, COLUMN_FIRST, False, BLOCK_M, BLOCK_N)
            tl.store(out, total, mask=ok)


def relation_reference(student: Operand, teacher: Operand) -> Tensor:
    """One constant for student and teacher against themselves, 0-d, as fixed_reference makes it from their bounds."""
    n, width = student.rows.shape
    programs = triton.cdiv(n, ROWS)
    out = torch.empty(2 * programs, dtype=torch.float32, device=student.rows.device)
    relation_bounds_kernel[programs, 2](
        student.rows, student.weights, student.starts, teacher.rows, teacher.weights, teacher.starts, out,
        n, width, teacher.rows.shape[1], K=len(teacher.weights), EUCLIDEAN=student.kind == "euclidean",
        BLOCK_M=ROWS, BLOCK_K=FEATURES,
    )  # fmt: skip
    return out.amax()


@dataclass(frozen=True)
class Losses:
    """What complete rows leave behind: parts of their mean loss, and what says which reference served."""

    refs: Tensor  # (2, b) float32
    terms: Tensor  # (programs,) float64
    unsound: Tensor  # (2, programs) int32

    @classmethod
    def of(cls, refs: Tensor) -> "Losses":
        programs = triton.cdiv(refs.shape[1], PLACES)
        terms = torch.empty(programs, dtype=torch.float64, device=refs.device)
        return cls(refs, terms, torch.empty(2, programs, dtype=torch.int32, device=refs.device))


def add_relation_sums(
    by_row: Tensor,
    by_column: Tensor,
    sums: Tensor,
    columns: Tensor,
    place: Tile,
    *,
    guard: Tensor | None,
    reference: Tensor,
    losses: Losses | None,
) -> None:
    """A block's parts, see relation_sums_kernel, into sums (5, b) and, mirrored, columns (5, n).

    Blocks come in the order of `waves`, so whatever begins at 0 is the first there; with `losses` the last block of
    some rows takes the loss of theirs. With a `guard` only while that is set.
    """
    assert place.rows[0] % PLACES == 0
    b, n = sums.shape[1], columns.shape[1]
    (height, width), last = place.shape, losses is not None and place.columns[1] == n
    row_programs = triton.cdiv(height, PLACES)
    grid = row_programs + (triton.cdiv(width, PLACES) if place.mirrored else 0)
    of_losses = (losses.refs, losses.terms, losses.unsound) if last else (None, None, None)
    relation_sums_kernel[(grid,)](
        guard, by_row, by_column, sums, columns, reference, *of_losses,
        place.rows[0], height, by_row.shape[1], place.columns[0], width, by_column.shape[1], b, n, row_programs,
        n * 2.0 ** -SUM_BITS[torch.float32],
        ROW_FIRST=place.columns[0] == 0, COLUMN_FIRST=place.rows[0] == 0, TERMS=last, GUARDED=guard is not None,
        BLOCK_M=PARTS, BLOCK_N=PLACES,
    )  # fmt: skip


def add_weight_sums(
    by_row: Tensor,
    by_column: Tensor,
    launched: list[tuple[int, int]],
    flag: Tensor | None,
    place: Tile,
    row_out: Tensor | None,
    column_out: Tensor | None,
    weight: Tensor | None = None,
    *,
    anew: bool = False,
) -> Tensor:
    """A block's share in the gradient of a relation's weights, (planes,) float64; the sums of its weights go into
    row_out (planes, height) and column_out (planes, width), where given, on top of earlier blocks' unless `anew`.

    by_row's second plane contains the `weight` (1,), where one is given.
    `launched`: row tiles and column tiles of the launches, one or two, of which the second has run where `flag` is set.
    """
    planes, (height, width) = by_row.shape[1], place.shape
    (tiles, parts), (other_tiles, other_parts) = launched[0], launched[-1]
    row_programs = triton.cdiv(height, PLACES)
    along = torch.empty(planes, row_programs, dtype=torch.float64, device=by_row.device)
    columns = place.mirrored and row_out is not None
    grid = row_programs + (triton.cdiv(width, PLACES) if columns else 0), planes
    weight_sums_kernel[grid](
        # The columns' branch is compiled also where no program takes it: it wants a pointer.
        flag, by_row, by_column, weight, row_out, column_out if columns else row_out, along,
        height, parts, other_parts, width, tiles, other_tiles, row_programs,
        0 if row_out is None else row_out.stride(0), column_out.stride(0) if columns else 0,
        ROW_FIRST=anew or place.columns[0] == 0, COLUMN_FIRST=anew or place.rows[0] == 0,
        EITHER=len(launched) > 1, SUMMED=row_out is not None, WEIGHTED=weight is not None, MIRRORED=place.mirrored,
        BLOCK_M=PARTS, BLOCK_N=PLACES,
    )  # fmt: skip
    return along.sum(1)
