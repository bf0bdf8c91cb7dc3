"""Passes over embeddings, sums and gradients around the all-pairs kernels: one launch where torch would need many.

A batch of some ten thousand pairs takes milliseconds, and every launch microseconds; and each pass over a float32
(N, D) that a launch takes along is one that memory need not serve again. All orders of summation are fixed.
"""

# ruff: noqa: SIM102 (Triton prunes plain branches on constexprs, and only those)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import SUM_BITS
from .triton_tiles import STORED_SCALE

ROWS, FEATURES = 32, 128  # at once, in passes over embeddings
PARTS, PLACES = 32, 128  # at once, in passes over sums


@triton.jit
def pair_products_kernel(x_ptr, y_ptr, out_ptr, b, D, stride_x, stride_y, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (3, b) in float32: |x_p|^2, |y_p|^2 and x_p . y_p."""
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
    out = out_ptr + first + row
    tl.store(out, of_x, mask=row_ok)
    tl.store(out + b, of_y, mask=row_ok)
    tl.store(out + 2 * tl.cast(b, tl.int64), both, mask=row_ok)


@triton.jit
def partial_sums_kernel(
    part_ptr, out_ptr, flag_ptr, parts, n, stride_part, plane_part, plane_out,
    FIRST: tl.constexpr, MAXIMUM: tl.constexpr, GUARDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (planes, n) becomes the sum over parts of (planes, parts, n), or the maximum; unless FIRST with what it was.

    Only while the flag is set, if GUARDED.
    """
    if GUARDED:
        if tl.load(flag_ptr) == 0:
            return
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.arange(0, BLOCK_M)
    plane = tl.program_id(1).to(tl.int64)
    ok = place < n
    out = out_ptr + plane * plane_out + place
    base = part_ptr + plane * plane_part + place[None, :]
    kind = out_ptr.dtype.element_ty
    total = tl.full((BLOCK_N,), float("-inf") if MAXIMUM else 0.0, kind)
    for first in range(0, parts, BLOCK_M):
        here = base + (first + part).to(tl.int64)[:, None] * stride_part
        mask = (first + part < parts)[:, None] & ok[None, :]
        if MAXIMUM:
            total = tl.maximum(total, tl.max(tl.load(here, mask=mask, other=float("-inf")).to(kind), 0))
        else:
            total += tl.sum(tl.load(here, mask=mask, other=0.0).to(kind), 0)
    if not FIRST:
        before = tl.load(out, mask=ok, other=0.0)
        if MAXIMUM:
            total = tl.maximum(total, before)
        else:
            total += before
    tl.store(out, total, mask=ok)


@triton.jit
def pair_terms_kernel(
    sums_ptr, own_ptr, scale_ptr, ref_ptr, count_ptr, flag_ptr, term_ptr, unsound_ptr, plane, first, b, n, floor,
    SHARED: tl.constexpr, HAS_IDS: tl.constexpr, TERMS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One side's sums (3, n) pos, off, target get their own pairs, or with ids the targets' mean; a loss a program.

    Own pairs are the b places from `first` on. unsound: whether a program's sums lost terms or overflowed.
    """
    if not SHARED:
        if tl.load(flag_ptr) == 0:
            return
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = place < n
    pos_out = sums_ptr + place
    off_out = pos_out + tl.cast(plane, tl.int64)
    target_out = off_out + tl.cast(plane, tl.int64)
    if SHARED:
        ref = tl.load(ref_ptr) + tl.zeros((BLOCK_N,), tl.float32)
    else:
        ref = tl.load(ref_ptr + place, mask=ok, other=0.0)
    off = tl.load(off_out, mask=ok, other=1.0)
    if HAS_IDS:
        count = tl.load(count_ptr + place, mask=ok, other=1).to(tl.float32)
        pos = tl.load(pos_out, mask=ok, other=1.0)
        target = tl.load(target_out, mask=ok, other=0.0) / count
        tl.store(target_out, target, mask=ok)
    else:
        own = ok & (place >= first) & (place < first + b)
        target = tl.load(scale_ptr) * tl.load(own_ptr + place - first, mask=own, other=0.0)
        pos = tl.where(own, tl.exp(target - ref), 0.0)
        tl.store(pos_out, pos, mask=ok)
        tl.store(target_out, target, mask=ok)
    if TERMS:
        total = pos + off
        sound = (total >= floor) & (total < float("inf"))
        tl.store(unsound_ptr + tl.program_id(0), tl.max((ok & (sound == 0)).to(tl.int32), 0))
        positive, others = pos.to(tl.float64), off.to(tl.float64)
        away = ref.to(tl.float64) - target.to(tl.float64)
        close = others < 1000.0 * positive  # there the loss is log1p(others / positive), exact however small it is
        z = tl.where(close, others, 0.0) / tl.where(close, positive, 1.0)
        u = 1.0 + z
        term = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
        if HAS_IDS:
            term += tl.where(close & (count > 1.0), tl.log(tl.where(close, positive, 1.0)) + away, 0.0)
        term = tl.where(close, term, tl.log(tl.where(close, 1.0, positive + others)) + away)
        tl.store(term_ptr + tl.program_id(0), tl.sum(tl.where(ok, term, 0.0), 0))


@triton.jit
def deviations_kernel(x_ptr, mean_ptr, out_ptr, b, D, stride_x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out: each program's largest |x - mean|."""
    first = tl.program_id(0) * BLOCK_M
    row, feature = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    x = x_ptr + tl.cast(first, tl.int64) * stride_x + (row[:, None] * stride_x + feature[None, :])
    best = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, D, BLOCK_K):
        ok = (row < b - first)[:, None] & (feature < D - start)[None, :]
        mean = tl.load(mean_ptr + start + feature, mask=feature < D - start, other=0.0)[None, :]
        away = tl.abs(tl.load(x + start, mask=ok, other=0.0).to(tl.float32) - mean)
        best = tl.maximum(best, tl.max(tl.where(ok, away, 0.0), 1))
    tl.store(out_ptr + tl.program_id(0), tl.max(best, 0))


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


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """(3, b) in float32: squared norms of x (b, D), of y (b, D), and their products pair by pair."""
    out = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
    pair_products_kernel[(triton.cdiv(len(x), ROWS),)](
        x, y, out, *x.shape, x.stride(0), y.stride(0), BLOCK_M=ROWS, BLOCK_K=FEATURES
    )
    return out


def add_parts(parts: Tensor, out: Tensor, *, first: bool, flag: Tensor | None = None, maximum: bool = False) -> None:
    """out (planes, n) from parts (planes, P, at least n): their sum or maximum, over what it holds or, `first`, anew.

    With a `flag` only while that is set.
    """
    grid = triton.cdiv(out.shape[1], PLACES), out.shape[0]
    partial_sums_kernel[grid](
        parts, out, flag, parts.shape[1], out.shape[1], parts.stride(1), parts.stride(0), out.stride(0),
        FIRST=first, MAXIMUM=maximum, GUARDED=flag is not None, BLOCK_M=PARTS, BLOCK_N=PLACES,
    )  # fmt: skip


def finish_side(
    sums: Tensor,
    own: Tensor | None,
    scale: Tensor,
    ref: Tensor,
    count: Tensor | None,
    first: int,
    flag: Tensor | None,
    terms: Tensor | None,
    unsound: Tensor | None,
) -> None:
    """One side's sums (3, n), see pair_terms_kernel, over the 0-d or (n,) reference; own (b,) or counts (n,).

    terms and unsound are (programs,), see `side_programs`, or None. A (n,) reference does nothing unless `flag` is set.
    """
    n = sums.shape[1]
    pair_terms_kernel[(side_programs(n),)](
        sums, own, scale, ref, count, flag, terms, unsound, sums.stride(0), first, 0 if own is None else len(own), n,
        n * 2.0 ** -SUM_BITS[torch.float32],
        SHARED=ref.dim() == 0, HAS_IDS=count is not None, TERMS=terms is not None, BLOCK_N=PLACES,
    )  # fmt: skip


def side_programs(n: int) -> int:
    return triton.cdiv(n, PLACES)


def largest_deviation(x: Tensor, mean: Tensor) -> Tensor:
    """Largest |x - mean| of x (b, D), 0-d in float32."""
    programs = triton.cdiv(len(x), ROWS)
    out = torch.empty(programs, dtype=torch.float32, device=x.device)
    deviations_kernel[(programs,)](x, mean, out, *x.shape, x.stride(0), BLOCK_M=ROWS, BLOCK_K=FEATURES)
    return out.amax()


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
