"""Retrieval by tiles: ranks of the positives and nearest neighbours in a gallery of any size.

Q queries, G gallery rows, scores q.g. Every product is made at one tile shape, padded at the ends: an element's sum is
then rounded the same way wherever it lies, so equal rows have equal scores and ties are ties. That needs tiles without
a remainder for BLAS's inner kernels (up to 48 columns wide): at 4096 columns float64 products of equal rows differ.
"""

import torch
from torch import Tensor

from .chunked import spans

QUERIES, GALLERY = 384, 4608
GROUP = 32  # neighbours are sought group by group; a group whose maximum is too low is never opened


class Scorer:
    """Scores of one block of queries against any gallery rows, always computed at (QUERIES, GALLERY)."""

    def __init__(self, query: Tensor, gallery: Tensor):
        self.gallery = gallery
        self.query = query.new_zeros(QUERIES, query.shape[1])
        self.filler = gallery.new_zeros(GALLERY, gallery.shape[1])
        self.scores = query.new_empty(QUERIES, GALLERY)
        self.count = 0

    def load(self, query: Tensor) -> None:
        self.count = len(query)
        self.query[: self.count] = query

    def against(self, rows: Tensor) -> Tensor:
        """(queries, rows) scores; at most GALLERY rows."""
        if len(rows) < GALLERY:
            self.filler[: len(rows)] = rows
            block = self.filler
        else:
            block = rows
        torch.mm(self.query, block.T, out=self.scores)
        return self.scores[: self.count, : len(rows)]


def _in_tile(table: Tensor, j: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(query, column) of every index of `table` (q, P) that falls into the tile's columns."""
    query, place = ((table >= j[0]) & (table < j[1])).nonzero(as_tuple=True)
    return query, table[query, place] - j[0]


def _listed(table: Tensor, excluded: Tensor | None) -> Tensor:
    """(q, P) bool: entries that name a row, each row once, and none that is excluded."""
    p = torch.arange(table.shape[1], device=table.device)
    repeated = ((table[:, :, None] == table[:, None, :]) & (p[:, None] > p)).any(2)
    kept = (table >= 0) & ~repeated
    if excluded is not None:
        kept &= ~(table[:, :, None] == excluded[:, None, :]).any(2)
    return kept


def _positive_scores(scorer: Scorer, table: Tensor) -> Tensor:
    """(q, P) scores of each query's own positives; padding scores gallery row 0 and is masked by the caller."""
    wanted, place = table.clamp_min(0).unique(return_inverse=True)
    found = torch.empty(table.shape, dtype=scorer.scores.dtype, device=table.device)
    for j in spans(0, len(wanted), GALLERY):
        scores = scorer.against(scorer.gallery[wanted[slice(*j)]])
        query, column = _in_tile(place, j)
        slot = ((place >= j[0]) & (place < j[1])).nonzero(as_tuple=True)[1]
        found[query, slot] = scores[query, column]
    return found


def retrieval_ranks(
    query: Tensor, gallery: Tensor, positives: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(above, tied, same), each (Q,) int64; see vlscale.kernels.retrieval_ranks."""
    above, tied, same = torch.zeros(3, len(query), dtype=torch.int64, device=query.device)
    scorer = Scorer(query, gallery)
    for i in spans(0, len(query), QUERIES):
        scorer.load(query[slice(*i)])
        table = positives[slice(*i)]
        left_out = None if exclude is None else exclude[slice(*i)]
        listed = _listed(table, left_out)
        own = _positive_scores(scorer, table).masked_fill(~listed, -torch.inf)
        best = own.amax(1, keepdim=True) if table.shape[1] else own.new_full((len(table), 1), -torch.inf)
        same[slice(*i)] = (listed & (own == best)).sum(1)
        skipped = [table] if left_out is None else [table, left_out]
        for j in spans(0, len(gallery), GALLERY):
            scores = scorer.against(gallery[slice(*j)])
            beaten, equal = scores > best, scores == best
            lost = scores.isnan() | best.isnan()
            beaten |= lost
            for entries in skipped:
                beaten[_in_tile(entries, j)] = False
                equal[_in_tile(entries, j)] = False
            above[slice(*i)] += beaten.sum(1)
            tied[slice(*i)] += equal.sum(1)
    return above, tied, same


def topk_neighbors(query: Tensor, gallery: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scores, indices), each (Q, k); see vlscale.kernels.topk_neighbors."""
    scores = query.new_full((len(query), k), -torch.inf)
    indices = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    scorer = Scorer(query, gallery)
    for i in spans(0, len(query), QUERIES):
        scorer.load(query[slice(*i)])
        best = scores[slice(*i)], indices[slice(*i)]
        for j in spans(0, len(gallery), GALLERY):
            tile = scorer.against(gallery[slice(*j)])
            if exclude is not None:
                tile[_in_tile(exclude[slice(*i)], j)] = -torch.inf
            _merge(best, _padded(tile), j[0])
    return scores, indices


def _padded(tile: Tensor) -> Tensor:
    """(q, g) -> (q, groups, GROUP), the last group filled up with -inf."""
    missing = -tile.shape[1] % GROUP
    if missing:
        tile = torch.nn.functional.pad(tile, (0, missing), value=-torch.inf)
    return tile.unflatten(1, (-1, GROUP))


def _merge(best: tuple[Tensor, Tensor], groups: Tensor, start: int) -> None:
    """Let one tile's scores into the running best (q, k), in place; equal scores stay in order of index.

    Only groups whose maximum beats a query's k-th score can hold a newcomer, and of those the k best are enough.
    """
    scores, indices = best
    k = scores.shape[1]
    tops = groups.amax(2)
    rows = (~(tops <= scores[:, -1:])).any(1).nonzero()[:, 0]
    if not len(rows):
        return
    order = tops[rows].sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    opened = groups[rows[:, None], order]
    where = (start + order[:, :, None] * GROUP + torch.arange(GROUP, device=order.device)).flatten(1)
    pool = torch.cat([scores[rows], opened.flatten(1)], 1)
    names = torch.cat([indices[rows], where], 1)
    pool, place = pool.sort(dim=1, descending=True, stable=True)
    scores[rows] = pool[:, :k]
    indices[rows] = torch.where(pool[:, :k] == -torch.inf, -1, names.gather(1, place[:, :k]))
