"""Contrastive loss by tiles: rectangular primitives for statistics and gradients.

b local rows x against N columns y, logits s_ij = scale x_i.y_j; row i is global row i + offset, and its positives are
the columns of equal id (its own global index where there are no ids). With e = exp(s - reference):

    row sums      pos_i = sum of e over positives, off_i = sum over the others, target_i = mean s over positives
    column sums   the same down the columns; partial over these rows, summed over ranks
    loss          (sum_i rows_i + sum_j columns_j) / 2N,  rows_i = log((pos_i + off_i) / exp(target_i - reference))
    gradient      G = P_row + P_col - 2 T,   dx = scale G y / 2N,   dy = scale G^T x / 2N,   dscale = <G y, x> / 2N

4 N^2 D multiply-adds in all: one product forward, one again backward and two for the gradients. One positive's gradient
is -(off_i/r_i + off_j/q_j), r = pos + off: p - 1 would be nothing but rounding error once p is near 1.
A 0-d reference serves rows and columns alike and costs one exponential an element; vector references (the maxima) cost
two and are for inputs whose logits spread too far for one constant.
"""

from functools import cached_property

import torch
from torch import Tensor

from .chunked import (
    COLUMNS,
    ROWS,
    Scratch,
    diagonal_part,
    fixed_reference,
    product,
    row_blocks,
    same_id_count,
    spans,
    sums_are_sound,
    tile_diagonal,
)


class Positives:
    """Which elements of a tile are positives, and how many each row and column has.

    `counts`, (b,) and (N,), are given where these columns are only a block of all that the positives are among. Ids are
    packed here, since callers take them as views (a column of a table) and the kernels read what lies in memory.
    """

    def __init__(
        self,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        offset: int,
        counts: tuple[Tensor, Tensor] | None = None,
    ):
        if row_ids is not None:
            row_ids, col_ids = row_ids.contiguous(), col_ids.contiguous()
        self.row_ids, self.col_ids, self.offset = row_ids, col_ids, offset
        if counts is None and row_ids is not None:
            counts = same_id_count(row_ids, col_ids), same_id_count(col_ids, col_ids)
        self.row_count, self.col_count = counts or (None, None)

    def mask(self, i: tuple[int, int], j: tuple[int, int]) -> Tensor:
        return self.row_ids[slice(*i), None] == self.col_ids[None, slice(*j)]


def outer_sum(rows: Tensor, cols: Tensor, out: Tensor) -> Tensor:
    return torch.add(rows[:, None], cols[None, :], out=out)


def contrastive_bound(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """An upper bound of |logits|, 0-d in scale's dtype: scale times the largest norms (scale for unit vectors)."""
    return scale.abs() * _largest_norm(x, scale.dtype) * _largest_norm(y, scale.dtype)


def _largest_norm(emb: Tensor, dtype: torch.dtype) -> Tensor:
    squares = [emb[i].to(dtype).square().sum(1).amax() for i in row_blocks(*emb.shape)]
    return torch.stack(squares).amax().sqrt()


def contrastive_maxima(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Exact references: row maxima (b,) and column maxima (N,) of the logits; ranks combine the columns' by max."""
    rows = x.new_full((len(x),), -torch.inf)
    cols = x.new_full((len(y),), -torch.inf)
    scratch = Scratch(1, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        left = x[slice(*i)] * scale
        for j in spans(0, len(y), COLUMNS):
            s = product(left, y[slice(*j)], scratch.tile(0, i[1] - i[0], j[1] - j[0]))
            torch.maximum(rows[slice(*i)], s.amax(1), out=rows[slice(*i)])
            torch.maximum(cols[slice(*j)], s.amax(0), out=cols[slice(*j)])
    return rows, cols


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, row_ref: Tensor, col_ref: Tensor, positives: Positives
) -> tuple[Tensor, Tensor]:
    """(3, b) row sums and (3, N) column sums: pos, off, target. The columns' are partial: add them over ranks."""
    rows, cols = x.new_zeros(3, len(x)), x.new_zeros(3, len(y))
    shared = row_ref.dim() == 0
    scratch = Scratch(1 if shared else 2, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        left = x[slice(*i)] * scale
        r = row_ref if shared else row_ref[slice(*i), None]
        for j in spans(0, len(y), COLUMNS):
            s = product(left, y[slice(*j)], scratch.tile(0, i[1] - i[0], j[1] - j[0]))
            c = s if shared else torch.sub(s, col_ref[slice(*j)], out=scratch.tile(1, *s.shape))
            _add_targets(rows, cols, s, positives, i, j)
            e_row = s.sub_(r).exp_()
            e_col = e_row if shared else c.exp_()
            _add_sums(rows[:, slice(*i)], e_row, 1, positives, i, j)
            _add_sums(cols[:, slice(*j)], e_col, 0, positives, i, j)
    return rows, cols


def _add_targets(rows: Tensor, cols: Tensor, s: Tensor, positives: Positives, i, j) -> None:
    if positives.row_ids is None:
        if part := diagonal_part(i, j, positives.offset):
            own = tile_diagonal(s, part, i, j, positives.offset)
            rows[2, part[0] - positives.offset : part[1] - positives.offset] = own
            cols[2, part[0] : part[1]] = own
        return
    chosen = s * positives.mask(i, j)
    rows[2, slice(*i)] += chosen.sum(1) / positives.row_count[slice(*i)]
    cols[2, slice(*j)] += chosen.sum(0) / positives.col_count[slice(*j)]


def _add_sums(sums: Tensor, e: Tensor, dim: int, positives: Positives, i, j) -> None:
    """Add one tile's positives to sums[0] and the rest to sums[1]; `sums` is (3, rows or columns of the tile)."""
    if positives.row_ids is not None:
        mask = positives.mask(i, j)
        sums[0] += (e * mask).sum(dim)
        sums[1] += (e * ~mask).sum(dim)
        return
    part = diagonal_part(i, j, positives.offset)
    if part is None:
        sums[1] += e.sum(dim)
        return
    own = tile_diagonal(e, part, i, j, positives.offset)
    kept = own.clone()
    own.zero_()
    sums[1] += e.sum(dim)
    own.copy_(kept)
    start = part[0] - positives.offset - i[0] if dim == 1 else part[0] - j[0]
    sums[0, start : start + len(kept)] += kept


def contrastive_terms(sums: Tensor, ref: Tensor, count: Tensor | None) -> Tensor:
    """(3, n) sums -> each row's (column's) loss, (n,) float64.

    Near its positives a row's loss is log1p(off / pos), exact where log(sum) - target would be all rounding.
    """
    pos, off, target = sums.double()
    many = 0.0 if count is None else torch.where(count > 1, pos.log() + ref - target, 0.0)
    return torch.where(off < 1e3 * pos, (off / pos).log1p() + many, (pos + off).log() + ref - target)


def contrastive_references(
    x: Tensor, y: Tensor, scale: Tensor, positives: Positives
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One process's statistics with the cheapest sound reference: (row_ref, col_ref, rows, cols).

    The fixed reference is checked afterwards on a CPU; other devices take the maxima rather than wait for an answer.
    """
    if x.device.type == "cpu":
        ref = fixed_reference(contrastive_bound(x, y, scale), x.dtype)
        rows, cols = contrastive_statistics(x, y, scale, ref, ref, positives)
        if sums_are_sound(len(y), rows[0] + rows[1], cols[0] + cols[1]) or not torch.isfinite(ref):
            return ref, ref, rows, cols
    row_ref, col_ref = contrastive_maxima(x, y, scale)
    return row_ref, col_ref, *contrastive_statistics(x, y, scale, row_ref, col_ref, positives)


class Weights:
    """Turns tiles of logits into tiles of P_row + P_col - 2 T, from finished statistics."""

    def __init__(self, row_ref: Tensor, col_ref: Tensor, rows: Tensor, cols: Tensor, positives: Positives):
        self.row_ref, self.col_ref, self.positives = row_ref, col_ref, positives
        self.rows, self.cols = rows, cols
        self.shared = row_ref.dim() == 0

    @cached_property
    def row_inverse(self) -> Tensor:
        return 1 / (self.rows[0] + self.rows[1])

    @cached_property
    def col_inverse(self) -> Tensor:
        return 1 / (self.cols[0] + self.cols[1])

    @cached_property
    def row_miss(self) -> Tensor:
        return self.rows[1] / (self.rows[0] + self.rows[1])

    @cached_property
    def col_miss(self) -> Tensor:
        return self.cols[1] / (self.cols[0] + self.cols[1])

    def probabilities(self, s: Tensor, i, j, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """P_row + P_col in place of `s` where the reference is shared, else (P_row in `s`, P_col in `spare`)."""
        row, col = self.row_inverse[slice(*i)], self.col_inverse[slice(*j)]
        if self.shared:
            return s.sub_(self.row_ref).exp_().mul_(outer_sum(row, col, spare)), None
        torch.sub(s, self.col_ref[slice(*j)], out=spare).exp_().mul_(col)
        return s.sub_(self.row_ref[slice(*i), None]).exp_().mul_(row[:, None]), spare

    def set_positives(self, g: Tensor, i, j) -> Tensor:
        """Subtract 2 T from P_row + P_col; a lone positive is -(the mass that missed it) and needs no subtraction."""
        positives = self.positives
        if positives.row_ids is None:
            if part := diagonal_part(i, j, positives.offset):
                own = slice(part[0] - positives.offset, part[1] - positives.offset)
                miss = self.row_miss[own] + self.col_miss[part[0] : part[1]]
                tile_diagonal(g, part, i, j, positives.offset).copy_(-miss)
            return g
        mask, count = positives.mask(i, j), positives.row_count[slice(*i), None]
        lone = -(self.row_miss[slice(*i), None] + self.col_miss[slice(*j)])
        return torch.where(mask, torch.where(count == 1, lone, g - 2 / count.to(g.dtype)), g)

    def tile(self, s: Tensor, i, j, spare: Tensor) -> Tensor:
        g, columns = self.probabilities(s, i, j, spare)
        if columns is not None:
            g.add_(columns)
        return self.set_positives(g, i, j)


def contrastive_gradients(
    x: Tensor, y: Tensor, scale: Tensor, weights: Weights, *, want_x: bool = True, want_y: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(G y, G^T x): (b, D) complete and (N, D) partial over these rows; None where not wanted.

    The caller multiplies by cotangent * scale / 2N, and by cotangent / 2N for dscale = <G y, x>.
    """
    dx = torch.empty_like(x) if want_x else None
    dy = torch.zeros_like(y) if want_y else None
    scratch = Scratch(2, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        here = x[slice(*i)]
        left = here * scale
        for j in spans(0, len(y), COLUMNS):
            shape = (i[1] - i[0], j[1] - j[0])
            right = y[slice(*j)]
            g = weights.tile(product(left, right, scratch.tile(0, *shape)), i, j, scratch.tile(1, *shape))
            if want_x:
                torch.addmm(dx[slice(*i)], g, right, beta=float(j[0] > 0), out=dx[slice(*i)])
            if want_y:
                dy[slice(*j)].addmm_(g.T, here)
    return dx, dy
