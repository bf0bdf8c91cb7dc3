"""Passes over embeddings, sums and gradients around the all-pairs kernels: one launch where torch would need many.

A batch of some ten thousand pairs takes milliseconds, and every launch microseconds; and each pass over a float32
(N, D) that a launch takes along is one that memory need not serve again. All orders of summation are fixed.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import STORED_SCALE

ROWS, FEATURES = 32, 128  # at once, in passes over embeddings
PARTS, PLACES = 32, 128  # at once, in passes over sums


@triton.jit
def own_products_kernel(
    x_ptr, y_ptr, out_ptr, largest_ptr, b, D, stride_x, stride_y, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """out (b,) in float32: x_p . y_p; largest (2, programs): each program's largest |x_p|^2 and |y_p|^2."""
    first = tl.program_id(0) * BLOCK_M
    row, feature = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    row_ok = row < b - first
    x = x_ptr + tl.cast(first, tl.int64) * stride_x + (row[:, None] * stride_x + feature[None, :])
    y = y_ptr + tl.cast(first, tl.int64) * stride_y + (row[:, None] * stride_y + feature[None, :])
    of_x = tl.zeros((BLOCK_M,), tl.float32)
    of_y = tl.zeros((BLOCK_M,), tl.float32)
    both = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        ok = row_ok[:, None] & (feature < D - start)[None, :]
        left = tl.load(x + start, mask=ok, other=0.0).to(tl.float32)
        right = tl.load(y + start, mask=ok, other=0.0).to(tl.float32)
        of_x += tl.sum(left * left, 1)
        of_y += tl.sum(right * right, 1)
        both += tl.sum(left * right, 1)
    tl.store(out_ptr + first + row, both, mask=row_ok)
    tl.store(largest_ptr + tl.program_id(0), tl.max(of_x, 0))
    tl.store(largest_ptr + tl.num_programs(0) + tl.program_id(0), tl.max(of_y, 0))


@triton.jit
def sum_of_parts(
    part_ptr, out_ptr, place, ok, parts, stride_part,
    FIRST: tl.constexpr, MAXIMUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum (or MAXIMUM) over parts at (BLOCK_N,) places, in out's type; unless FIRST with what is at `out_ptr`."""
    part = tl.arange(0, BLOCK_M)
    kind = out_ptr.dtype.element_ty
    total = tl.full((BLOCK_N,), float("-inf") if MAXIMUM else 0.0, kind)
    for first in range(0, parts, BLOCK_M):
        here = part_ptr + place[None, :] + (first + part).to(tl.int64)[:, None] * stride_part
        mask = (first + part < parts)[:, None] & ok[None, :]
        if MAXIMUM:
            total = tl.maximum(total, tl.max(tl.load(here, mask=mask, other=float("-inf")).to(kind), 0))
        else:
            total += tl.sum(tl.load(here, mask=mask, other=0.0).to(kind), 0)
    if not FIRST:
        before = tl.load(out_ptr, mask=ok, other=0.0)
        if MAXIMUM:
            total = tl.maximum(total, before)
        else:
            total += before
    return total


@triton.jit
def several_sums_kernel(
    part_a_ptr, out_a_ptr, parts_a, n_a, stride_a, part_b_ptr, out_b_ptr, parts_b, n_b, stride_b,
    part_c_ptr, out_c_ptr, parts_c, n_c, stride_c, flag_ptr,
    FIRST_A: tl.constexpr, FIRST_B: tl.constexpr, FIRST_C: tl.constexpr, COUNT: tl.constexpr,
    MAXIMUM: tl.constexpr, GUARDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One to three outs (n,) become the sum over parts of (parts, n), or the maximum; unless FIRST with what they were.

    The second axis says which. Only while the flag is set, if GUARDED.
    """
    if GUARDED:
        if tl.load(flag_ptr) == 0:
            return
    place, which = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    if which == 0:
        a, ok_a = out_a_ptr + place, place < n_a
        of_a = sum_of_parts(part_a_ptr, a, place, ok_a, parts_a, stride_a, FIRST_A, MAXIMUM, BLOCK_M, BLOCK_N)
        tl.store(a, of_a, mask=ok_a)
    if COUNT > 1:
        if which == 1:
            b, ok_b = out_b_ptr + place, place < n_b
            of_b = sum_of_parts(part_b_ptr, b, place, ok_b, parts_b, stride_b, FIRST_B, MAXIMUM, BLOCK_M, BLOCK_N)
            tl.store(b, of_b, mask=ok_b)
    if COUNT > 2:
        if which == 2:
            c, ok_c = out_c_ptr + place, place < n_c
            of_c = sum_of_parts(part_c_ptr, c, place, ok_c, parts_c, stride_c, FIRST_C, MAXIMUM, BLOCK_M, BLOCK_N)
            tl.store(c, of_c, mask=ok_c)


@triton.jit
def largest_away(x_ptr, mean_ptr, b, D, stride_x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program's largest |x - mean|, 0 where it has no rows."""
    first = tl.program_id(0) * BLOCK_M
    row, feature = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x = x_ptr + tl.cast(first, tl.int64) * stride_x + (row[:, None] * stride_x + feature[None, :])
    best = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        ok = (row < b - first)[:, None] & (feature < D - start)[None, :]
        mean = tl.load(mean_ptr + start + feature, mask=feature < D - start, other=0.0)[None, :]
        away = tl.abs(tl.load(x + start, mask=ok, other=0.0).to(tl.float32) - mean)
        best = tl.maximum(best, tl.max(tl.where(ok, away, 0.0), 1))
    return tl.max(best, 0)


@triton.jit
def deviations_kernel(
    x_ptr, y_ptr, x_mean_ptr, y_mean_ptr, out_ptr, b, n, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (1 or 2, programs): each program's largest |x - mean| of x (b, D), and of y (n, D) by the second axis."""
    out = out_ptr + tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(out, largest_away(x_ptr, x_mean_ptr, b, D, stride_x, BLOCK_M, BLOCK_K))
    else:
        tl.store(out + tl.num_programs(0), largest_away(y_ptr, y_mean_ptr, n, D, stride_y, BLOCK_M, BLOCK_K))


@triton.jit
def centre_kernel(x_ptr, mean_ptr, reach_ptr, out_ptr, b, D, stride_x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (b, D) = (x - mean) / reach."""
    first, start = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    row, feature = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_K)
    ok = (row < b - first)[:, None] & (feature < D)[None, :]
    x = x_ptr + tl.cast(first, tl.int64) * stride_x + (row[:, None] * stride_x + feature[None, :])
    mean = tl.load(mean_ptr + feature, mask=feature < D, other=0.0)[None, :]
    away = tl.load(x, mask=ok, other=0.0).to(tl.float32) - mean
    out = out_ptr + tl.cast(first, tl.int64) * D + (row[:, None] * D + feature[None, :])
    tl.store(out, (away / tl.load(reach_ptr)).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def gradient_kernel(
    sums_ptr, total_ptr, mean_ptr, reach_ptr, weight_ptr, partner_ptr, factor_ptr, out_ptr,
    start, rows, parts, first, b, D, stride_partner,
    CENTRED: tl.constexpr, HAS_OWN: tl.constexpr, HAS_FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `start` on of a gradient, from (parts, rows, D) sums of stored weights times centred embeddings.

    Added: the mean times the weights' own sums (parts, rows); each own pair's weight times its partner, for the b rows
    from `first` on; all of it times `factor`.
    """
    low, left = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    row, feature = low + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_K)
    row_ok, feature_ok = row < rows, feature < D
    ok = row_ok[:, None] & feature_ok[None, :]
    value = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    within = tl.cast(low, tl.int64) * D + (tl.arange(0, BLOCK_M)[:, None] * D + feature[None, :])
    for part in range(parts):
        at = tl.cast(part, tl.int64) * rows
        value += tl.load(sums_ptr + at * D + within, mask=ok, other=0.0)
        if CENTRED:
            total += tl.load(total_ptr + at + row, mask=row_ok, other=0.0)
    if CENTRED:
        mean = tl.load(mean_ptr + feature, mask=feature_ok, other=0.0)
        value = value * (tl.load(reach_ptr) / STORED_SCALE) + total[:, None] * mean[None, :]
    if HAS_OWN:
        pair = start + row - first
        own = row_ok & (pair >= 0) & (pair < b)
        weight = tl.load(weight_ptr + pair, mask=own, other=0.0)
        place = partner_ptr + pair.to(tl.int64)[:, None] * stride_partner + feature[None, :]
        partner = tl.load(place, mask=own[:, None] & feature_ok[None, :], other=0.0).to(tl.float32)
        value += weight[:, None] * partner
    if HAS_FACTOR:
        value *= tl.load(factor_ptr)
    out = out_ptr + tl.cast(start, tl.int64) * D + within
    tl.store(out, value.to(out_ptr.dtype.element_ty), mask=ok)


def own_products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(x_p . y_p (b,), largest squared norms of both sides by blocks of rows (2, blocks)), float32."""
    programs = triton.cdiv(len(x), ROWS)
    out = torch.empty(len(x) + 2 * programs, dtype=torch.float32, device=x.device)
    own, largest = out[: len(x)], out[len(x) :].view(2, programs)
    own_products_kernel[(programs,)](
        x, y, own, largest, *x.shape, x.stride(0), y.stride(0), BLOCK_M=ROWS, BLOCK_K=FEATURES
    )
    return own, largest


def add_several(*sums: tuple[Tensor, Tensor, bool], flag: Tensor | None = None, maximum: bool = False) -> None:
    """Up to three outs (n,) from parts (P, at least n): sum or maximum, over what they hold or, `first`, anew.

    Each (parts, out, first). With a `flag` only while that is set.
    """
    given = [(part, out, part.shape[0], out.shape[0], part.stride(0), first) for part, out, first in sums]
    given += [(None, None, 0, 0, 0, True)] * (3 - len(sums))
    grid = triton.cdiv(max(len(out) for _, out, _ in sums), PLACES), len(sums)
    several_sums_kernel[grid](
        *(value for each in given for value in each[:5]), flag,
        FIRST_A=given[0][5], FIRST_B=given[1][5], FIRST_C=given[2][5], COUNT=len(sums),
        MAXIMUM=maximum, GUARDED=flag is not None, BLOCK_M=PARTS, BLOCK_N=PLACES,
    )  # fmt: skip


def largest_deviations(*sides: tuple[Tensor, Tensor]) -> Tensor:
    """Largest |emb - mean| of one or two embeddings (b, D) and their means (D,), (1 or 2,), float32, at least tiny."""
    (x, x_mean), (y, y_mean) = sides[0], sides[-1]
    programs = triton.cdiv(max(len(x), len(y)), ROWS)
    out = torch.empty(len(sides), programs, dtype=torch.float32, device=x.device)
    deviations_kernel[programs, len(sides)](
        x, y, x_mean, y_mean, out, len(x), len(y), x.shape[1], x.stride(0), y.stride(0), BLOCK_M=ROWS, BLOCK_K=FEATURES
    )
    return out.amax(1).clamp_min_(torch.finfo(torch.float32).tiny)


def centred(x: Tensor, mean: Tensor, reach: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - mean) / reach in `dtype`, (b, D)."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    grid = triton.cdiv(len(x), ROWS), triton.cdiv(x.shape[1], FEATURES)
    centre_kernel[grid](x, mean, reach, out, *x.shape, x.stride(0), BLOCK_M=ROWS, BLOCK_K=FEATURES)
    return out


def finished_gradient(
    sums: Tensor,
    totals: Tensor,
    mean: Tensor | None,
    reach: Tensor | None,
    weight: Tensor | None,
    partner: Tensor | None,
    first: int,
    factor: Tensor | None,
    start: int,
    out: Tensor,
) -> None:
    """gradient_kernel into out (N, D) from sums (r, D) or (parts, r, D), which may be `out` itself; None: left out."""
    parts = 1 if sums.dim() == 2 else len(sums)
    rows, width = sums.shape[-2:]
    if out.device.type == "cpu" and out.dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds
        whole = out.float()
        finished_gradient(sums, totals, mean, reach, weight, partner, first, factor, start, whole)
        out.copy_(whole)
        return
    gradient_kernel[triton.cdiv(rows, ROWS), triton.cdiv(width, FEATURES)](
        sums, totals, mean, reach, weight, partner, factor, out, start, rows, parts, first,
        0 if weight is None else len(weight), width, 0 if partner is None else partner.stride(0),
        CENTRED=mean is not None, HAS_OWN=weight is not None, HAS_FACTOR=factor is not None,
        BLOCK_M=ROWS, BLOCK_K=FEATURES,
    )  # fmt: skip
