"""Retrieval by tiles: ranks of the positives and nearest neighbours in a gallery of any size.

Q queries, G gallery rows, scores q.g. Every product is made at one shape, padded at the ends: an element's sum is then
rounded the same way wherever it lies, so equal rows have equal scores and ties are ties. That needs shapes without a
remainder for BLAS's inner kernels: at 4096 gallery rows, or for 3 queries, float64 products of equal rows differ.
"""

import torch
from torch import Tensor

from .checks import compute_dtype
from .chunked import spans

QUERIES = 2560  # at most in one product; blocks of queries are of equal size, so that the last one is no waste
BLOCK = 1536  # gallery rows of one product: 32 times 48, the widest inner kernel
TILE = 768 * BLOCK  # scores that few queries look at together, of many products
FEW = 8  # up to here the gallery is the product's left factor, half the time of reading it as the right one
GROUP = 32  # neighbours are sought group by group; a group whose maximum is too low is never opened
PENDING = 1 << 20  # newcomers that may wait for their order


class Scorer:
    """Scores of one block of queries against any gallery rows, always computed BLOCK rows at a time.

    Embeddings of 16 bits are widened by the block: a gallery may be most of what memory holds.
    """

    def __init__(self, query: Tensor, gallery: Tensor):
        rows = self.rows = max(1, -(-len(query) // max(1, -(-len(query) // QUERIES))))
        self.few = rows <= FEW
        padded = max(2, 1 << (rows - 1).bit_length()) if self.few else rows + -rows % 16
        blocks = min(max(1, TILE // (padded * BLOCK)), -(-len(gallery) // BLOCK))
        self.gallery, self.width, self.count = gallery, blocks * BLOCK, 0
        dtype = compute_dtype(query)
        self.query = query.new_zeros(padded, query.shape[1], dtype=dtype)
        self.filler = gallery.new_zeros(BLOCK, gallery.shape[1], dtype=dtype)
        self.scores = query.new_empty(padded, self.width, dtype=dtype)

    def load(self, query: Tensor) -> None:
        self.count = len(query)
        self.query[: self.count] = query

    def against(self, rows: Tensor) -> Tensor:
        """(queries, rows) scores; at most `width` rows."""
        for first, last in spans(0, len(rows), BLOCK):
            block = rows[first:last]
            if len(block) < BLOCK or block.dtype != self.filler.dtype:
                self.filler[: len(block)] = block
                block = self.filler
            out = self.scores[:, first : first + BLOCK]
            if self.few:
                out.copy_((block @ self.query.T).T)
            else:
                torch.mm(self.query, block.T, out=out)
        return self.scores[: self.count, : len(rows)]


def in_tile(table: Tensor, j: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(query, column) of every index of `table` (q, P) that falls into the tile's columns."""
    query, place = ((table >= j[0]) & (table < j[1])).nonzero(as_tuple=True)
    return query, table[query, place] - j[0]


def distinct(table: Tensor, size: int, excluded: Tensor | None = None) -> Tensor:
    """(q, P) indices, each row's in ascending order; repeats, rows outside the gallery and excluded ones are -1."""
    table = table.sort(1).values.contiguous()
    dropped = (table < 0) | (table >= size)
    dropped[:, 1:] |= table[:, 1:] == table[:, :-1]
    if excluded is not None and excluded.shape[1]:
        excluded = excluded.sort(1).values.contiguous()
        place = torch.searchsorted(excluded, table).clamp_max(excluded.shape[1] - 1)
        dropped |= excluded.gather(1, place) == table
    return table.masked_fill(dropped, -1)


def best_score(own: Tensor, listed: Tensor) -> Tensor:
    """(q, 1): the highest of each query's own positives' scores (q, P), -inf where it has none."""
    if not own.shape[1]:
        return own.new_full((len(own), 1), -torch.inf)
    return own.masked_fill(~listed, -torch.inf).amax(1, keepdim=True)


def _positive_scores(scorer: Scorer, table: Tensor) -> Tensor:
    """(q, P) scores of each query's own positives; padding scores gallery row 0 and is masked by the caller."""
    wanted, place = table.clamp_min(0).unique(return_inverse=True)
    found = torch.empty(table.shape, dtype=scorer.scores.dtype, device=table.device)
    for j in spans(0, len(wanted), scorer.width):
        scores = scorer.against(scorer.gallery[wanted[slice(*j)]])
        query, column = in_tile(place, j)
        slot = ((place >= j[0]) & (place < j[1])).nonzero(as_tuple=True)[1]
        found[query, slot] = scores[query, column]
    return found


def retrieval_ranks(
    query: Tensor, gallery: Tensor, positives: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(above, tied, same), each (Q,) int64; see vlscale.kernels.retrieval_ranks."""
    above, tied, same = torch.zeros(3, len(query), dtype=torch.int64, device=query.device)
    scorer = Scorer(query, gallery)
    for i in spans(0, len(query), scorer.rows):
        scorer.load(query[slice(*i)])
        left_out = None if exclude is None else exclude[slice(*i)]
        table = distinct(positives[slice(*i)], len(gallery), left_out)
        own = _positive_scores(scorer, table)
        best = best_score(own, table >= 0)
        same[slice(*i)] = ((table >= 0) & (own == best)).sum(1)
        skipped = [table] if left_out is None else [table, left_out]
        for j in spans(0, len(gallery), scorer.width):
            scores = scorer.against(gallery[slice(*j)])
            beaten, equal = ~(scores <= best), scores == best  # a NaN on either side counts as beaten
            for entries in skipped:
                beaten[in_tile(entries, j)] = False
                equal[in_tile(entries, j)] = False
            above[slice(*i)] += beaten.sum(1)
            tied[slice(*i)] += equal.sum(1)
    return above, tied, same


def topk_neighbors(query: Tensor, gallery: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scores, indices), each (Q, k); see vlscale.kernels.topk_neighbors."""
    scores = query.new_empty(len(query), k, dtype=compute_dtype(query))
    indices = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    scorer = Scorer(query, gallery)
    for i in spans(0, len(query), scorer.rows):
        scorer.load(query[slice(*i)])
        best = Shortlist(scorer, k)
        for j in spans(0, len(gallery), scorer.width):
            tile = scorer.against(gallery[slice(*j)])
            if exclude is not None:
                tile[in_tile(exclude[slice(*i)], j)] = -torch.inf
            best.add(tile, j[0])
        scores[slice(*i)], indices[slice(*i)] = best.finish()
    return scores, indices


class Shortlist:
    """The k best of each query among the scores seen so far; equal scores stay in order of index.

    Newcomers above a query's k-th score wait unsorted, and are put in order each time the gallery seen has doubled:
    about k of them a query and doubling, so that sorting is nothing beside the products. Only groups whose maximum is
    above the k-th score are looked into.
    """

    def __init__(self, scorer: Scorer, k: int):
        self.scores = scorer.scores.new_full((scorer.count, k), -torch.inf)
        self.indices = torch.full((scorer.count, k), -1, dtype=torch.int64, device=self.scores.device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # (query, score, index), each query's by index
        self.seen = self.ordered = self.pending = 0

    def add(self, tile: Tensor, start: int) -> None:
        """tile (queries, columns): the scores of the gallery rows from `start` on."""
        missing = -tile.shape[1] % GROUP
        if missing:
            tile = torch.nn.functional.pad(tile, (0, missing), value=-torch.inf)
        groups = tile.unflatten(1, (-1, GROUP))
        tops = groups.amax(2)
        floor = self.scores[:, -1:]
        too_low = (tops <= floor) | floor.isnan()  # nothing beats a NaN
        k = self.scores.shape[1]
        if not self.seen and tops.shape[1] >= k:  # the k best groups' maxima are k scores: what is under them is out
            floor = tops.topk(k).values[:, -1:]
            too_low = tops < floor
        query, group = (~too_low).nonzero(as_tuple=True)
        opened = groups[query, group]
        least = floor[query]
        pair, place = (~(opened < least) if not self.seen else ~(opened <= least)).nonzero(as_tuple=True)
        self.waiting.append((query[pair], opened[pair, place], start + group[pair] * GROUP + place))
        self.seen += tile.shape[1]
        self.pending += len(pair)
        if self.seen >= 2 * self.ordered or self.pending > max(PENDING, 4 * self.scores.numel()):
            self._order()

    def finish(self) -> tuple[Tensor, Tensor]:
        """(scores, indices), each (queries, k), best first."""
        if self.waiting:
            self._order()
        return self.scores, self.indices.masked_fill_(self.scores == -torch.inf, -1)

    def _order(self) -> None:
        count, k = self.scores.shape
        held = torch.arange(count, device=self.scores.device).repeat_interleave(k)
        parts = [(held, self.scores.flatten(), self.indices.flatten()), *self.waiting]
        query, score, index = (torch.cat(part) for part in zip(*parts, strict=True))
        order = score.sort(descending=True, stable=True).indices
        order = order[query[order].sort(stable=True).indices]
        amount = query.bincount(minlength=count)
        place = torch.arange(len(order), device=order.device) - (amount.cumsum(0) - amount).repeat_interleave(amount)
        kept = order[place < k]
        self.scores, self.indices = score[kept].view(count, k), index[kept].view(count, k)
        self.waiting, self.pending, self.ordered = [], 0, self.seen
