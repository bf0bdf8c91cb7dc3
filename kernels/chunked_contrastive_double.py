"""Gradient of the contrastive gradient, by tiles, in O(N) memory: what second-order training steps need.

Cotangents u (b, D) of dx, v (N, D) of dy and w of dscale; the letters of chunked_contrastive. With A = u y^T + x v^T,
S = x y^T and M = scale A + w S (the direction in which the logits move):

    G  = P_row + P_col - 2 T
    Gb = P_row o (M - rowsum(P_row o M)) + P_col o (M - colsum(P_col o M))
    xb = scale (Gb y + G v) + w G y,   yb = scale (Gb^T x + G^T u) + w G^T x,   all over 2N
    scale's = <Gb, S> + <G, A>,        the first gradient's own cotangent: <G, M>

Two passes: the sums inside Gb first. M is taken relative to each row's (column's) own pair, which changes nothing in Gb
but keeps it exact once a probability is near 1: there M - own is 0 to the bit and what is left are the sums alone.
"""

import torch
from torch import Tensor

from .chunked import COLUMNS, ROWS, Scratch, diagonal_part, product, row_blocks, spans, tile_diagonal
from .chunked_contrastive import Weights


def contrastive_double_operands(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """x, y, u and v in x's dtype; float16 in float32, since cotangents make weights of any size."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return tuple(rows.to(dtype).contiguous() for rows in (x, *others))


def contrastive_own_direction(x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor) -> Tensor:
    """M_ii of matching rows, (b,); x, y, u, v (b, D) are these rows' pairs, of any float dtype.

    Gathered over ranks it is the columns'.
    """
    found = scale.new_empty(len(x))
    for i in row_blocks(*x.shape):
        xi, yi, ui, vi = (rows[i].to(scale.dtype) for rows in (x, y, u, v))
        found[i] = scale * ((ui * yi).sum(1) + (xi * vi).sum(1)) + w * (xi * yi).sum(1)
    return found


def _sides(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[u, x] and [y, v]: their product is A."""
    return torch.cat([u, x], 1), torch.cat([y, v], 1)


def contrastive_double_statistics(
    x: Tensor, y: Tensor, u: Tensor, v: Tensor, scale: Tensor, w: Tensor, weights: Weights, own: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """rowsum(P_row o (M - own_row)) (b,), and colsum(P_col o (M - own_col)) (N,) partial over these rows."""
    row_sums, col_sums = x.new_zeros(len(x)), x.new_zeros(len(y))
    left, right = _sides(x, y, u, v)
    scratch = Scratch(4, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        for j in spans(0, len(y), COLUMNS):
            s, m, spare, other = (scratch.tile(k, i[1] - i[0], j[1] - j[0]) for k in range(4))
            _direction(x, y, left, right, scale, w, i, j, s, m)
            _set_own(m, own[0], weights.positives.offset, i, j)
            row, col = _split(weights, s, i, j, spare, other)
            row_sums[slice(*i)] += row.mul_(m - own[0][slice(*i), None]).sum(1)
            col_sums[slice(*j)] += col.mul_(m.sub_(own[1][slice(*j)])).sum(0)
    return row_sums, col_sums


def _direction(x, y, left, right, scale, w, i, j, s: Tensor, m: Tensor) -> None:
    """Fill s with the logits scale S and m with M on one tile.

    The logits have the bits that the row and column sums were made of: a probability that is off by its logit's
    rounding leaves rows whose sum is not 1, and in Gb that is all there is once a row is nearly decided.
    """
    product(x[slice(*i)] * scale, y[slice(*j)], s)
    product(left[slice(*i)], right[slice(*j)], m)
    m.mul_(scale).addcmul_(s, w / scale)


def _set_own(m: Tensor, own: Tensor, offset: int, i, j) -> None:
    """Own pairs of one tile have the bits that M is taken relative to."""
    if part := diagonal_part(i, j, offset):
        tile_diagonal(m, part, i, j, offset).copy_(own[part[0] - offset : part[1] - offset])


def _split(weights: Weights, s: Tensor, i, j, spare: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(P_row, P_col) of one tile from its scaled logits, which are overwritten."""
    if weights.shared:
        e = s.sub_(weights.row_ref).exp_()
        row = torch.mul(e, weights.row_inverse[slice(*i), None], out=other)
        return row, torch.mul(e, weights.col_inverse[slice(*j)], out=spare)
    return weights.probabilities(s, i, j, spare)


def contrastive_double_gradients(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    w: Tensor,
    weights: Weights,
    own: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(xb (b, D), yb (N, D) partial, scale's partial, <G, M> partial), all still to be divided by 2N."""
    xb, yb = torch.zeros_like(x), torch.zeros_like(y)
    scale_bar, along = x.new_zeros(()), x.new_zeros(())
    left, right = _sides(x, y, u, v)
    scratch = Scratch(5, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        for j in spans(0, len(y), COLUMNS):
            s, m, spare, other, logits = (scratch.tile(k, i[1] - i[0], j[1] - j[0]) for k in range(5))
            _direction(x, y, left, right, scale, w, i, j, logits, m)
            _set_own(m, own[0], weights.positives.offset, i, j)
            row, col = _split(weights, s.copy_(logits), i, j, spare, other)
            g = weights.set_positives(row + col, i, j)
            along += (g * m).sum()
            # sums may be far under the rounding of own: taken off one after the other, they are left where M is own
            row.mul_((m - own[0][slice(*i), None]).sub_(sums[0][slice(*i), None]))
            gb = row.add_(col.mul_((m - own[1][slice(*j)]).sub_(sums[1][slice(*j)])))
            scale_bar += ((gb * logits).sum() + (g * m.addcmul_(logits, w / scale, value=-1)).sum()) / scale
            toward = gb.mul_(scale).addcmul_(g, w)
            g.mul_(scale)
            xb[slice(*i)].addmm_(toward, y[slice(*j)]).addmm_(g, v[slice(*j)])
            yb[slice(*j)].addmm_(toward.T, x[slice(*i)]).addmm_(g.T, u[slice(*i)])
    return xb, yb, scale_bar, along
