"""Sigmoid (SigLIP) loss by tiles: the rectangular primitive, loss and gradients in one pass.

b local rows x against N columns y, z_ij = scale x_i.y_j + bias. There is no normaliser, so the gradient of an element
is known where the element is made: with n_ij = sigmoid(z_ij) for negatives and -sigmoid(-z_ij) for positives,

    loss sum = sum over negatives of softplus(z) + sum over positives of softplus(-z)
    dx = scale n y,   dy = scale n^T x,   dscale = <n y, x>,   dbias = sum n              (all over N, by the caller)

3 N^2 D multiply-adds. Positives are signed before the exponential: sigmoid(z) - 1 would be rounding error once z is
large.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import COLUMNS, ROWS, Scratch, diagonal_part, product, spans, tile_diagonal
from .chunked_contrastive import Positives


def flip_positives(z: Tensor, positives: Positives, i, j) -> Tensor:
    """Negate the positives of one tile; applied to logits before, and to the derivative after, the sigmoid."""
    if positives.row_ids is not None:
        return torch.where(positives.mask(i, j), -z, z)
    if part := diagonal_part(i, j, positives.offset):
        tile_diagonal(z, part, i, j, positives.offset).neg_()
    return z


def sigmoid_sweep(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, positives: Positives, *, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(loss sum, n y (b, D), n^T x (N, D), sum n); all but n y are partial over these rows. Unwanted ones are None."""
    loss, total = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
    dx = torch.empty_like(x) if want_x else None
    dy = torch.zeros_like(y) if want_y else None
    scratch = Scratch(2, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        here = x[slice(*i)]
        left = here * scale
        for j in spans(0, len(y), COLUMNS):
            right = y[slice(*j)]
            z = product(left, right, scratch.tile(0, i[1] - i[0], j[1] - j[0])).add_(bias)
            z = flip_positives(z, positives, i, j)
            loss -= F.logsigmoid(-z).sum(dtype=torch.float64)
            if not (want_x or want_y):
                continue
            n = flip_positives(z.sigmoid_(), positives, i, j)
            total += n.sum(dtype=torch.float64)
            if want_x:
                torch.addmm(dx[slice(*i)], n, right, beta=float(j[0] > 0), out=dx[slice(*i)])
            if want_y:
                dy[slice(*j)].addmm_(n.T, here)
    return loss, dx, dy, total
