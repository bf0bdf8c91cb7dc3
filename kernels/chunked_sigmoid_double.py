"""Gradient of the sigmoid loss's gradient, by tiles, in O(N) memory: what second-order training steps need.

Cotangents u (b, D) of dx, v (N, D) of dy, w of dscale and t of dbias; the letters of chunked_sigmoid. With
A = u y^T + x v^T, S = x y^T, M = scale A + w S + t (the direction in which the logits move), n the derivative of an
element by its logit and h = sigmoid(z) sigmoid(-z) the second one, of positives and negatives alike:

    g  = h o M
    xb = scale (g y + n v) + w n y,   yb = scale (g^T x + n^T u) + w n^T x,   all over N
    scale's = <g, S> + <n, A>,   bias's = sum g,   the first gradient's own cotangent: <n, M>

8 N^2 D multiply-adds. h is a product of two sigmoids: sigmoid(z) (1 - sigmoid(z)) would be rounding error once z is
large.
"""

import torch
from torch import Tensor

from .chunked import COLUMNS, ROWS, Scratch, product, spans
from .chunked_contrastive import Positives
from .chunked_sigmoid import flip_positives


def sigmoid_double_sweep(
    x: Tensor,
    y: Tensor,
    u: Tensor,
    v: Tensor,
    scale: Tensor,
    bias: Tensor,
    w: Tensor,
    t: Tensor,
    positives: Positives,
) -> tuple[Tensor, Tensor, Tensor]:
    """(xb (b, D), yb (N, D), (3,) float64: scale's, bias's, <n, M>), all still over N; all but xb are partial."""
    xb, yb = torch.zeros_like(x), torch.zeros_like(y)
    sums = x.new_zeros(3, dtype=torch.float64)
    left, right = torch.cat([u, x], 1), torch.cat([y, v], 1)  # their product is A
    scratch = Scratch(5, min(len(x), ROWS) * min(len(y), COLUMNS), x)
    for i in spans(0, len(x), ROWS):
        here, cotangent = x[slice(*i)], u[slice(*i)]
        for j in spans(0, len(y), COLUMNS):
            s, a, z, h, m = (scratch.tile(k, i[1] - i[0], j[1] - j[0]) for k in range(5))
            product(here, y[slice(*j)], s)
            product(left[slice(*i)], right[slice(*j)], a)
            torch.mul(s, scale, out=z).add_(bias)
            z = flip_positives(z, positives, i, j)
            torch.neg(z, out=h).sigmoid_()
            n = z.sigmoid_()
            h.mul_(n)
            n = flip_positives(n, positives, i, j)
            torch.mul(a, scale, out=m).addcmul_(s, w).add_(t)
            along, of_scale = _inner(n, m), _inner(n, a)
            g = m.mul_(h)
            of_scale += _inner(g, s)
            sums += torch.stack([of_scale, g.sum(dtype=torch.float64), along])
            toward = g.mul_(scale).addcmul_(n, w)
            n.mul_(scale)
            xb[slice(*i)].addmm_(toward, y[slice(*j)]).addmm_(n, v[slice(*j)])
            yb[slice(*j)].addmm_(toward.T, here).addmm_(n.T, cotangent)
    return xb, yb, sums


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """<left, right>, rows in their own dtype, their sum in float64."""
    return torch.linalg.vecdot(left, right).sum(dtype=torch.float64)
