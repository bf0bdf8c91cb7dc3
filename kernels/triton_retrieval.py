"""Retrieval in Triton: ranks and nearest neighbours in one pass over a gallery of any size, nothing read on the host.

Q queries, G gallery rows (under 2^31), scores s = q.g in float32, 2 Q G D operations each. A program owns a tile of
queries and every n-th tile of the gallery; what it finds is counts or k keys a query, so no score is ever stored.

Ranks count over the whole gallery and subtract afterwards what the listed rows (positives, exclusions) contributed:
their scores are made by the same instructions at the same tile shape, so they have the bits that the count saw. (In
the interpreter a product's rounding depends on its place, and a rank may be off by what that makes of a tie.)

Neighbours are ordered by one integer: the score's bits, made to compare like the score, above the complement of the
index. The order is total (ties by lower index), so the splits' lists merge exactly. A tile's best score is compared
with each query's k-th; while any query gains, its best is moved over. That is rare once some thousand rows are seen: k
log(G / k) times a query in all. An excluded row is stopped there, at the price of one round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import HALF, spans
from .chunked_retrieval import best_score, distinct
from .triton_tiles import INTERPRETING, Config, Work, choose_config, product_tile

KEPT = 64  # neighbours of one pass; more take one pass over the gallery for each 64
PROGRAMS = 1024  # enough for any GPU: few queries spread the gallery over more programs
NOTHING = tl.constexpr(-(2**31))  # below every score's bits
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def listed_scores_kernel(
    query_ptr, gallery_ptr, table_ptr, out_ptr, q, P, D, stride_q, stride_g,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores (q, P) of the gallery rows in table (q, P): the diagonal of a tile, so that its bits are a tile's."""
    first_row, slot = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    a = query_ptr + tl.cast(first_row, tl.int64) * stride_q + (row[:, None] * stride_q + k[None, :])
    row_mask = (row < q - first_row)[:, None]
    own = tl.zeros((BLOCK_M,), tl.float32)
    for shift in range(0, BLOCK_M, BLOCK_N):
        column = shift + tl.arange(0, BLOCK_N)
        column_ok = (column < BLOCK_M) & (column < q - first_row)
        entry = tl.load(table_ptr + (first_row + column).to(tl.int64) * P + slot, mask=column_ok, other=-1)
        b = gallery_ptr + entry[None, :] * stride_g + k[:, None]
        entry_mask = (entry >= 0)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, D, BLOCK_K):
            left = tl.load(a + start, mask=row_mask & (k < D - start)[None, :], other=0.0)
            right = tl.load(b + start, mask=entry_mask & (k < D - start)[:, None], other=0.0)
            if INTERPRETING:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        own += tl.sum(tl.where(row[:, None] == column[None, :], total, 0.0), 1)
    tl.store(out_ptr + (first_row + row).to(tl.int64) * P + slot, own, mask=row < q - first_row)


@triton.jit
def rank_counts_kernel(
    query_ptr, gallery_ptr, best_ptr, out_ptr, q, g, D, stride_q, stride_g,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """How many gallery rows beat each query's best (a NaN on either side does), and how many equal it: out (2, splits,
    q)."""
    first_row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M)
    best = tl.load(best_ptr + rows, mask=rows < q, other=0.0)[:, None]
    above = tl.zeros((BLOCK_M,), tl.int32)
    tied = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(split * BLOCK_N, g, tl.num_programs(1) * BLOCK_N):
        s = product_tile(
            query_ptr, gallery_ptr, first_row, first, q, g, D, stride_q, stride_g, BLOCK_M, BLOCK_N, BLOCK_K
        )
        inside = (first + tl.arange(0, BLOCK_N) < g)[None, :]
        above += tl.sum((inside & ((s <= best) == 0)).to(tl.int32), 1)
        tied += tl.sum((inside & (s == best)).to(tl.int32), 1)
    out = out_ptr + split.to(tl.int64) * q + rows
    tl.store(out, above, mask=rows < q)
    tl.store(out + tl.num_programs(1).to(tl.int64) * q, tied, mask=rows < q)


@triton.jit
def comparable(s):
    """Bits of s as an int32 that compares like s; both zeros are one, and a NaN is above everything, as torch sorts."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ LAST, bits)
    return tl.where(s != s, LAST, bits)


@triton.jit
def neighbours_kernel(
    query_ptr, gallery_ptr, exclude_ptr, ceiling_ptr, out_ptr, q, g, D, stride_q, stride_g, excluded, k,
    KEEP: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k <= KEEP largest keys of each query in this program's tiles, out (splits, q, k) unordered.

    exclude (q, excluded); BOUNDED takes only keys below ceiling (q,), the last key of the pass before. Places still
    empty hold keys under all others, different from each other as all keys are, so that one place gives way at a time.
    """
    first_row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < q
    place = tl.arange(0, KEEP).to(tl.int64)
    nothing = tl.full((KEEP,), NOTHING, tl.int64) << 32
    top_end = tl.full((KEEP,), LAST, tl.int64) << 32
    empty = tl.where(place < k, nothing + place, top_end + LAST - place)  # places past k never give way
    best = tl.zeros((BLOCK_M, KEEP), tl.int64) + empty[None, :]
    worst = tl.min(best, 1)
    if BOUNDED:
        ceiling = tl.load(ceiling_ptr + rows, mask=row_ok, other=0)
        most = (ceiling >> 32).to(tl.int32)
        after = ((ceiling & LAST) ^ LAST).to(tl.int32)
    for first in range(split * BLOCK_N, g, tl.num_programs(1) * BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        s = product_tile(
            query_ptr, gallery_ptr, first_row, first, q, g, D, stride_q, stride_g, BLOCK_M, BLOCK_N, BLOCK_K
        )
        keys = comparable(s)
        offered = row_ok[:, None] & (columns < g)[None, :]
        if BOUNDED:
            later = (keys == most[:, None]) & (columns[None, :] > after[:, None])
            offered = offered & ((keys < most[:, None]) | later)
        keys = tl.where(offered, keys, NOTHING)
        top = tl.max(keys, 1)
        # Columns ascend within a program: an equal score is a later one, and gains nothing.
        while tl.max((top > (worst >> 32)).to(tl.int32), 0) > 0:
            index = tl.min(tl.where(keys == top[:, None], columns[None, :], LAST), 1)
            gains = top > (worst >> 32)
            for e in range(excluded):
                entry = tl.load(exclude_ptr + rows.to(tl.int64) * excluded + e, mask=row_ok, other=-1)
                gains = gains & (entry != index)
            key = (top.to(tl.int64) << 32) + LAST - index
            best = tl.where(gains[:, None] & (best == worst[:, None]), key[:, None], best)
            keys = tl.where(columns[None, :] == index[:, None], NOTHING, keys)
            top = tl.max(keys, 1)
            worst = tl.min(best, 1)
    out = out_ptr + (split.to(tl.int64) * q + rows[:, None]) * k + place[None, :]
    tl.store(out, best, mask=row_ok[:, None] & (place < k)[None, :])


def _prepare(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """16 bits as they are, everything else in float32; features side by side."""
    dtype = query.dtype if query.dtype in HALF else torch.float32
    return query.to(dtype).contiguous(), gallery.to(dtype).contiguous()


def _grid(queries: int, gallery: int, config: Config) -> tuple[int, int]:
    tiles = triton.cdiv(queries, config.block_m)
    return tiles, min(triton.cdiv(gallery, config.block_n), max(config.splits, PROGRAMS // tiles))


def listed_scores(query: Tensor, gallery: Tensor, table: Tensor, config: Config | None = None) -> Tensor:
    """(q, P) float32 scores of the listed gallery rows, 0 where table (q, P) is -1."""
    config = config or choose_config(query, Work.FULL)
    out = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    if table.shape[1]:
        listed_scores_kernel[triton.cdiv(len(query), config.block_m), table.shape[1]](
            query, gallery, table, out, len(query), table.shape[1], query.shape[1], query.stride(0), gallery.stride(0),
            **config.launch(),
        )  # fmt: skip
    return out


def retrieval_ranks(
    query: Tensor, gallery: Tensor, positives: Tensor, exclude: Tensor | None, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(above, tied, same), each (Q,) int64; see vlscale.kernels.retrieval_ranks."""
    query, gallery = _prepare(query, gallery)
    config = config or choose_config(query, "ranks")
    found = torch.empty(3, len(query), dtype=torch.int64, device=query.device)
    for i in spans(0, len(query), config.wave_rows):
        here = query[slice(*i)]
        left_out = positives.new_empty(len(here), 0) if exclude is None else exclude[slice(*i)]
        table, left_out = distinct(positives[slice(*i)], len(gallery), left_out), distinct(left_out, len(gallery))
        own, lost = (listed_scores(here, gallery, entries, config) for entries in (table, left_out))
        best = best_score(own, table >= 0)
        grid = _grid(len(here), len(gallery), config)
        counts = torch.zeros(2, grid[1], len(here), dtype=torch.int32, device=query.device)
        rank_counts_kernel[grid](
            here, gallery, best, counts, len(here), len(gallery), query.shape[1], query.stride(0), gallery.stride(0),
            **config.launch(),
        )  # fmt: skip
        found[:2, slice(*i)] = counts.sum(1)
        for entries, scores in ((table, own), (left_out, lost)):
            found[0, slice(*i)] -= ((entries >= 0) & ~(scores <= best)).sum(1)
            found[1, slice(*i)] -= ((entries >= 0) & (scores == best)).sum(1)
        found[2, slice(*i)] = ((table >= 0) & (own == best)).sum(1)
    return found[0], found[1], found[2]


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = (keys >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ LAST.value, bits).view(torch.float32)
    nothing = (bits == NOTHING.value) | (scores == -torch.inf)
    return scores.masked_fill(nothing, -torch.inf), (LAST.value - (keys & LAST.value)).masked_fill(nothing, -1)


def topk_neighbors(
    query: Tensor,
    gallery: Tensor,
    k: int,
    exclude: Tensor | None,
    config: Config | None = None,
    kept: int = KEPT,
) -> tuple[Tensor, Tensor]:
    """(scores, indices), each (Q, k); see vlscale.kernels.topk_neighbors. `kept` neighbours are found in a pass."""
    query, gallery = _prepare(query, gallery)
    config = config or choose_config(query, "neighbours")
    keys = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    table = keys.new_empty(len(query), 0) if exclude is None else exclude.contiguous()
    for i in spans(0, len(query), config.wave_rows):
        here = query[slice(*i)]
        grid = _grid(len(here), len(gallery), config)
        ceiling = None
        for j in spans(0, k, kept):
            wanted = j[1] - j[0]
            found = keys.new_empty(grid[1], len(here), wanted)
            neighbours_kernel[grid](
                here, gallery, table[slice(*i)], ceiling, found, len(here), len(gallery), query.shape[1],
                query.stride(0), gallery.stride(0), table.shape[1], wanted,
                KEEP=triton.next_power_of_2(wanted), BOUNDED=ceiling is not None, **config.launch(),
            )  # fmt: skip
            best = found.transpose(0, 1).flatten(1).topk(wanted, dim=1).values
            keys[slice(*i), slice(*j)] = best
            ceiling = best[:, -1].contiguous()
    return _decoded(keys)
