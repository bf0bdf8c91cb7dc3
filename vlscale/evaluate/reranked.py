"""The order that a fusion encoder's matching gives to the nearest candidates, and exactly what was not scored.

Letters: Q queries, k candidates of each, G gallery items, I images, T captions. A candidate is one of the k items of
the other modality nearest to a query by cosine, and every candidate is scored. What is not scored keeps the dual
encoder's order, below everything that is. Two columns:

fixed   candidates by the log-odds that they match, logit 1 - logit 0. *On the scale of cosines*: the candidate that
        matches best takes the largest of the k cosines, the next one the next; so a gallery of both modalities has one
        scale, the cosine, on which matching only permutes. (A monotone map of log-odds alone could not do that: how
        many of a query's own modality belong before a pair of odds 3:1 is nothing that matching has learned.)
paper   as the official code: logit 1 raw, everything that was not scored at -100; in mixed galleries beside cosines.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.evaluate.metrics import Ranks, best_positive

NOT_SCORED = -100.0  # the official code's score of such a pair
NUDGE = 1e-12  # parts equal cosines that matching orders; far below a float32's digits, far above a float64's


@dataclass(frozen=True)
class Candidates:
    """Of one direction: `items` (Q, k) int64 gallery places, by falling cosine; `logits` (Q, k, 2) float32, the second
    that they match. A row of -1 is a query that was not asked."""

    items: Tensor
    logits: Tensor

    def of(self, rows: Tensor) -> "Candidates":
        return Candidates(self.items[rows], self.logits[rows])

    @property
    def log_odds(self) -> Tensor:
        """(Q, k) float64: a difference of float32 logits would tie where they are large."""
        return self.logits[..., 1].double() - self.logits[..., 0].double()

    def ranks(self, positives: Tensor, dual: Ranks) -> Ranks:
        """Fixed: ranks of the best of `positives` (Q, P), padded by -1, where `dual` has the dual encoder's.

        Where a positive was scored, only candidates can stand above the best one. Where none was, its rank by cosine
        stands, but for items that tie with it: those that were scored, k - above of them, have come above it.
        """
        k = self.items.shape[1]
        passed = (k - dual.above).clamp(min=0)
        below = Ranks(dual.above.clamp(min=k), (dual.tied - passed).clamp(min=0), dual.same)
        return _scored_else(best_positive(self.log_odds, _among(self.items, positives)), below)

    def paper_ranks(self, positives: Tensor, gallery: int) -> Ranks:
        """Paper: by raw logit; all of the `gallery` that was not scored ties at the end."""
        k = self.items.shape[1]
        count = (positives >= 0).sum(1)
        rest = Ranks(torch.full_like(count, k), gallery - k - count, count)
        return _scored_else(best_positive(self.logits[..., 1], _among(self.items, positives)), rest)

    def on_cosines(self, cosines: Tensor) -> Tensor:
        """Fixed: the queries' (Q, G) cosines, candidates permuted by matching; float64.

        Candidates with equal odds share the mean of their cosines.
        """
        items = self.items
        held = cosines.double().gather(1, items)
        beyond = cosines.scatter(1, items, -torch.inf).amax(1, keepdim=True).double()
        # the table's products may differ in the last digit from those that chose the candidates
        levels = held.maximum(beyond).sort(1, descending=True).values
        levels = levels + NUDGE * torch.arange(items.shape[1], 0, -1)
        ordered, order = self.log_odds.sort(1, descending=True)
        group = torch.zeros_like(order)
        group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        total = torch.zeros_like(levels).scatter_add_(1, group, levels)
        count = torch.zeros_like(levels).scatter_add_(1, group, torch.ones_like(levels))
        shared = (total / count.clamp(min=1)).gather(1, group)
        return cosines.double().scatter(1, items.gather(1, order), shared)

    def paper_scores(self, gallery: int) -> Tensor:
        """Paper: (Q, G) float32, raw logits of the candidates, NOT_SCORED elsewhere."""
        return torch.full((len(self.items), gallery), NOT_SCORED).scatter(1, self.items, self.logits[..., 1])


@dataclass(frozen=True)
class Reranked:
    """Both directions over one corpus, each pair scored once. `pairs`: how many pairs were scored, of all."""

    i2t: Candidates
    t2i: Candidates
    pairs: int

    @property
    def k(self) -> int:
        return self.i2t.items.shape[1]

    def note(self) -> str:
        """The bookkeeping, in words."""
        everything = len(self.i2t.items) * len(self.t2i.items)
        return (
            f"re-ranked: the {self.k:,} nearest of every query, {self.pairs:,} pairs scored, each once; the other "
            f"{everything - self.pairs:,} keep the dual encoder's order below them"
        )

    def rescored(self, task: str, rows: Tensor, cosines: Tensor) -> Tensor:
        """Fixed: a task's (q, G) cosines; what lies inside the query's modality stays as it is."""
        asks, searched = task.split("2")
        if asks == searched:
            return cosines
        across = (self.i2t if asks == "i" else self.t2i).of(rows)
        if len(searched) == 1:
            return across.on_cosines(cosines)
        images = len(self.i2t.items)  # a gallery of both holds the images first
        pictures, captions = cosines[:, :images], cosines[:, images:]
        if asks == "i":
            return torch.cat([pictures.double(), across.on_cosines(captions)], 1)
        return torch.cat([across.on_cosines(pictures), captions.double()], 1)

    def inside(self, images: slice, captions: Tensor) -> "Reranked":
        """Of a fold: candidates that were chosen within it, in its own places. `captions` are the fold's."""
        place = torch.full((len(self.t2i.items),), -1)
        place[captions] = torch.arange(len(captions))
        i2t = Candidates(place[self.i2t.items[images]], self.i2t.logits[images])
        t2i = Candidates(self.t2i.items[captions] - images.start, self.t2i.logits[captions])
        assert bool((i2t.items >= 0).all()) and bool((t2i.items >= 0).all()), "candidates from outside the fold"
        return Reranked(i2t, t2i, self.pairs)


def _among(items: Tensor, positives: Tensor) -> Tensor:
    """(Q, k) bool: which candidates are among the query's positives (Q, P)."""
    found = torch.zeros(items.shape, dtype=torch.bool)
    for column in positives.T:
        found |= (items == column[:, None]) & (column >= 0)[:, None]
    return found


def _scored_else(by_match: Ranks, rest: Ranks) -> Ranks:
    """By matching for the queries that had a positive among their candidates."""
    scored = by_match.same > 0
    fields = ("above", "tied", "same")
    return Ranks(*(torch.where(scored, getattr(by_match, name), getattr(rest, name)) for name in fields))
