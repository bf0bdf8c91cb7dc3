"""Retrieval metrics as pure functions on tables.

Letters: Q queries, G gallery items, K cut-off. A row belongs to a query, a column to a gallery item. `exclude` (Q, E)
lists gallery items that a query does not search (itself, its siblings), padded by -1. Everything returned is a
fraction (0 to 1) or a rank (from 1), one value a query; NaN marks a query that has nothing relevant to find.

Items with equal scores have no order: every metric is its expected value over the orders in which they could be shown.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Where each query's best positive stands, each field (Q,) int64; the answer of `vlscale.kernels.retrieval_ranks`.

    `above` non-positives score higher than it, `tied` non-positives score the same, and `same` positives do, itself
    included. `same` is 0 where a query has no positive.
    """

    above: Tensor
    tied: Tensor
    same: Tensor

    def expected(self) -> Tensor:
        """(Q,) float64, from 1: of `same` positives shuffled among `tied` others the first stands at tied/(same+1)."""
        rank = 1 + self.above + self.tied.double() / (self.same + 1)
        return torch.where(self.same > 0, rank, torch.nan)

    def recall(self, k: int) -> Tensor:
        """(Q,) float64: probability that a positive is among the first k; hypergeometric inside the tied group."""
        places = (k - self.above).clamp(min=0)
        return torch.where(self.same > 0, _drawn(self.tied, self.same, places, k), torch.nan)


def best_positive(scores: Tensor, positive: Tensor, exclude: Tensor | None = None) -> Ranks:
    """Ranks from a whole table: scores (Q, G), positive (Q, G) bool."""
    scores, positive = _without(scores, exclude, -torch.inf), _without(positive, exclude, False)
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    level = scores == best
    found = positive.any(1)
    counts = [((scores > best) & ~positive).sum(1), (level & ~positive).sum(1), (level & positive).sum(1)]
    return Ranks(*(torch.where(found, count, 0) for count in counts))


def recall_chance(positives: Tensor, gallery: Tensor, k: int) -> Tensor:
    """R@K of a random order: `positives` (Q,) relevant items among `gallery` (Q,) items. Returns (Q,) float64."""
    return _drawn(gallery - positives, positives, torch.full_like(gallery, k), k)


@dataclass(frozen=True)
class AtR:
    """Of a query with R positives: share of positives among the first R, and average precision over the first R with
    only hits counted (mAP@R of ECCV Caption); both (Q,) float64."""

    r_precision: Tensor
    map_at_r: Tensor


def precision_at_r(scores: Tensor, positive: Tensor, exclude: Tensor | None = None) -> AtR:
    """scores (Q, G), positive (Q, G) bool.

    Ties by expected value: in a group of n equal scores with r positives, a place holds one with probability r/n, and
    an earlier place of the group does as well with (r-1)/(n-1); with `before` positives above the group, the place at
    i (from 1), the (j+1)th of its group, is expected to add r/n (1 + before + j (r-1)/(n-1)) / i.
    """
    scores, positive = _without(scores, exclude, -torch.inf), _without(positive, exclude, False)
    total = positive.sum(1)
    deepest = min(int(total.max()) + 1 if len(total) else 1, scores.shape[1])
    shown = scores.topk(deepest, dim=1)
    found, average = _at_r(shown.values, positive.gather(1, shown.indices), total)
    cut = (shown.values[:, 1:] == shown.values[:, :-1])[:, -1:].any(1) & (deepest < scores.shape[1])
    if cut.any():  # a group of equals goes on behind what was looked at
        ordered, order = scores[cut].sort(dim=1, descending=True)
        found[cut], average[cut] = _at_r(ordered, positive[cut].gather(1, order), total[cut])
    return AtR(found, average)


def _at_r(ordered: Tensor, hit: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """R-Precision and mAP@R of scores (Q, K) by fall, K above the largest R; 0/0 is NaN where there is no positive."""
    group = torch.zeros(ordered.shape, dtype=torch.long)
    group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    hit, total = hit.double(), total[:, None]
    size = torch.zeros_like(hit).scatter_add_(1, group, torch.ones_like(hit))
    hits = torch.zeros_like(hit).scatter_add_(1, group, hit)
    first, before = (table.cumsum(1) - table for table in (size, hits))
    size, hits, first, before = (table.gather(1, group) for table in (size, hits, first, before))
    place = torch.arange(hit.shape[1], dtype=torch.float64)
    chance = hits / size
    other = (hits - 1).clamp(min=0) / (size - 1).clamp(min=1)
    precision = (1 + before + (place - first) * other) / (place + 1)
    counted = place < total
    found = torch.where(counted, chance, 0.0).sum(1) / total[:, 0]
    return found, torch.where(counted, chance * precision, 0.0).sum(1) / total[:, 0]


def at_r_chance(positives: Tensor, gallery: Tensor) -> AtR:
    """What a random order scores: all `gallery` (Q,) items in one group of equals, `positives` (Q,) of them right."""
    found, items = positives.double(), gallery.double()
    share, other = found / items, (found - 1).clamp(min=0) / (items - 1).clamp(min=1)
    harmonic = torch.digamma(found + 1) - torch.digamma(torch.ones_like(found))  # 1 + 1/2 + ... + 1/R
    return AtR(share, share * ((1 - other) * harmonic / found + other))


@dataclass(frozen=True)
class Graded:
    """NDCG at each cut-off and what a random order would score, both (Q, number of cut-offs) float64."""

    value: Tensor
    chance: Tensor


def ndcg(scores: Tensor, relevance: Tensor, ks: tuple[int, ...], exclude: Tensor | None = None) -> Graded:
    """NDCG@K with linear gain and discount 1/log2(position + 1): scores (Q, G), relevance (Q, G) from 0 up.

    The gain of a place inside a group of equal scores is the group's mean relevance, also where K cuts the group.
    The ideal order is that of the whole gallery; a random order scores mean relevance x sum of discounts / ideal.
    """
    deepest = max(ks)
    scores, relevance = _without(scores, exclude, -torch.inf), _without(relevance, exclude, 0.0)
    excluded = (exclude >= 0).sum(1) if exclude is not None else torch.zeros(len(scores), dtype=torch.long)
    size = scores.shape[1] - excluded
    if len(size) and int(size.min()) < deepest:
        raise ValueError(f"NDCG@{deepest} needs {deepest} items to rank, got {int(size.min())}: lower K or add samples")
    gains = _gains(scores, relevance, deepest).double()
    discounts = 1 / torch.log2(torch.arange(deepest, dtype=torch.float64) + 2)
    last = torch.tensor(ks) - 1
    ideal = (relevance.topk(deepest, dim=1).values.double() * discounts).cumsum(1)[:, last]
    mean = relevance.sum(1, dtype=torch.float64) / size
    value = (gains * discounts).cumsum(1)[:, last] / ideal
    chance = mean[:, None] * discounts.cumsum(0)[last] / ideal
    return Graded(value.masked_fill(ideal <= 0, torch.nan), chance.masked_fill(ideal <= 0, torch.nan))


def over_chance(value: Tensor | float, chance: Tensor | float) -> Tensor | float:
    """0 for a random order, 1 for the ideal one. Applied to means, not to queries: a query near 1 - chance = 0 would
    drown the others."""
    return (value - chance) / (1 - chance)


def own_modality_chance(own: Tensor, exclude: Tensor) -> Tensor:
    """(Q,) float64: the own modality's share of each query's gallery."""
    taken = exclude >= 0
    mine = own.sum() - (own[exclude.clamp(min=0)] & taken).sum(1)
    return mine.double() / (len(own) - taken.sum(1))


def own_modality(scores: Tensor, own: Tensor, k: int, exclude: Tensor | None = None) -> Tensor:
    """Share of the first k results that are of the query's own modality, (Q,) float64; `own` (G,) bool.

    With one shared space it would be the modality's share of the gallery; near 1 the modalities lie apart.
    """
    top = _without(scores, exclude, -torch.inf).topk(k, dim=1).indices
    return own[top].double().mean(1)


def _gains(scores: Tensor, relevance: Tensor, deepest: int) -> Tensor:
    """(Q, deepest): expected relevance at each place."""
    shown = scores.topk(min(deepest + 1, scores.shape[1]), dim=1)
    gains = relevance.gather(1, shown.indices[:, :deepest])
    tied = (shown.values[:, 1:] == shown.values[:, :-1]).any(1)
    if tied.any():
        gains[tied] = _tied_gains(scores[tied], relevance[tied])[:, :deepest]
    return gains


def _tied_gains(scores: Tensor, relevance: Tensor) -> Tensor:
    """(Q, G): items by falling score, each with the mean relevance of the items that share its score."""
    ordered, order = scores.sort(dim=1, descending=True)
    group = torch.zeros_like(order)
    group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    total = torch.zeros_like(relevance).scatter_add_(1, group, relevance.gather(1, order))
    count = torch.zeros_like(relevance).scatter_add_(1, group, torch.ones_like(relevance))
    return (total / count.clamp(min=1)).gather(1, group)


def _without(table: Tensor, exclude: Tensor | None, fill: float | bool) -> Tensor:
    """A copy of `table` (Q, G) with the excluded items of each row set to `fill`."""
    if exclude is None or exclude.shape[1] == 0:
        return table
    rows, slots = (exclude >= 0).nonzero(as_tuple=True)
    table = table.clone()
    table[rows, exclude[rows, slots]] = fill
    return table


def _drawn(others: Tensor, positives: Tensor, places: Tensor, most: int) -> Tensor:
    """Probability that `places` (Q,) draws from `others` (Q,) and `positives` (Q,) items take a positive; float64.

    No positive is taken with probability prod over draws of (others left) / (items left); `most` bounds `places`.
    """
    missed = torch.ones(len(others), dtype=torch.float64)
    for draw in range(most):
        left = (others - draw).clamp(min=0).double() / (others + positives - draw).clamp(min=1)
        missed = torch.where(draw < places, missed * left, missed)
    return 1 - missed
