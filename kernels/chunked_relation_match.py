"""Relation match by tiles: rectangular primitives for the mean absolute, squared and sorted difference of relations.

Student logits s and teacher logits t of N rows (cosine relations, temperatures and teacher weights inside the segments'
weights), i != j. The difference s - t is itself one relation of the concatenated embeddings, with the teachers' weights
negated, so it costs one product.

    mae           sum |s - t|: sign(s - t) is the gradient, known where the difference is made; triangle, one pass
    mse           sum (s - t)^2 = sum_fg C_fg^2 m_f m_g - sum_i own_i^2, C = V^T V: O(N F^2), no tiles at all
    wasserstein   sum over rows of |sort(s_i) - sort(t_i)|: O(N^2 log N), chunks of whole rows
"""

import torch
from torch import Tensor

from .chunked import Scratch, spans
from .chunked_relation import Relation, RelationGradient, Sweep, Tile, set_diagonal, sweep_tiles, tile_elements

ROW_ELEMENTS = 1 << 19  # of one chunk of whole rows; sorting needs about 40 bytes for each


def relation_mae_sweep(
    difference: Relation, toward: Relation | None, sweep: Sweep, offset: int | None
) -> tuple[Tensor, RelationGradient | None]:
    """(sum |s - t| partial over these tiles, its gradient in `toward`'s embeddings: all segments, one side's, none).

    `toward` holds segments of `difference`, with the weights they have there. A sum over ordered pairs i != j, except
    that a pair sweep counts each of its unordered pairs once for both orders.
    """
    b, n = len(difference.rows), len(difference.columns)
    scratch = Scratch(2, tile_elements(sweep, b, n), difference.rows)
    total = difference.rows.new_zeros((), dtype=torch.float64)
    gradient = None if toward is None else RelationGradient(toward, sweep)
    for place in sweep_tiles(sweep, b, n):
        tile = difference.logits(place, scratch.tile(0, *place.shape), scratch.tile(1, *place.shape))
        set_diagonal(tile, place, offset, 0.0)
        total += tile.abs().sum(dtype=torch.float64) * (2 if place.mirrored else 1)
        if gradient is not None:
            gradient.add(tile.sign_().mul_(2), place, scratch.tile(1, *place.shape))
    return total, gradient


def relation_gram(emb: Tensor) -> Tensor:
    """C = V^T V, (F, F) float64, partial over these rows (b, F): add it over ranks. Differentiable by autograd."""
    wide = emb.double()
    return wide.T @ wide


def relation_mse_total(emb: Tensor, spread: Tensor, gram: Tensor) -> Tensor:
    """sum over i != j of l_ij^2 for l = V diag(spread) V^T; this process's rows' diagonal is subtracted.

    float64: in float32 the difference of the two sums would lose percents once student and teacher nearly agree.
    """
    spread = spread.double()
    own = emb.double().square() @ spread
    return (gram.square() * spread[:, None] * spread).sum() - own.square().sum()


def relation_wasserstein_sweep(
    student: Relation, teacher: Relation, offset: int, sweep: Sweep, *, want_student: bool, want_teacher: bool
) -> tuple[Tensor, RelationGradient | None, RelationGradient | None]:
    """(sum of sorted differences over my rows, gradients through the sort order of both sides; None where not wanted).

    `sweep` says where the columns' gradient goes: TRIANGLE when rows and columns are the same, else PAIR.
    """
    b, n = len(student.rows), len(student.columns)
    chunk = max(1, min(b, ROW_ELEMENTS // n))
    scratch = Scratch(2, chunk * n, student.rows)
    total = student.rows.new_zeros((), dtype=torch.float64)
    gradients = [
        RelationGradient(relation, sweep) if wanted else None
        for relation, wanted in ((student, want_student), (teacher, want_teacher))
    ]
    for i in spans(0, b, chunk):
        place = Tile(i, (0, n), True)
        ordered = []
        for k, relation in enumerate((student, teacher)):
            tile = relation.logits(place, scratch.tile(k, *place.shape), scratch.tile(k, *place.shape))
            set_diagonal(tile, place, offset, torch.inf)
            ordered.append(tile.sort(1))
        difference = (ordered[0].values - ordered[1].values)[:, :-1]
        total += difference.abs().sum(dtype=torch.float64)
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                g = scratch.tile(k, *place.shape).zero_()
                g.scatter_(1, ordered[k].indices[:, :-1], difference.sign() if k == 0 else -difference.sign())
                gradient.add(g, place, g)
    return total, *gradients
