"""The rectangular primitives cut over pretended ranks: collectives are sums and concatenations of lists here."""

import pytest
import torch

from tests.kernels import cases as k
from vlscale.kernels import contrastive_loss, relation_kl_loss, relation_match_loss, sigmoid_loss
from vlscale.kernels import primitives as p

N, D = 60, 6
CUTS = [[60], [30, 30], [20, 7, 33]]
X, Y = k.embeddings("random", N, D)
IDS = torch.arange(N) // 2
ONE = torch.ones((), dtype=torch.float64)


def parts(sizes):
    """(offset, slice) of each pretended rank."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(end - size, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def grads_of(loss, *leaves, **more):
    return torch.autograd.grad(loss, leaves, **more)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("maxima", [False, True])
def test_contrastive(small_tiles, sizes, ids, maxima):
    x, y, scale = X.clone().requires_grad_(), Y.clone().requires_grad_(), (8 * ONE).requires_grad_()
    loss = contrastive_loss(x, y, scale, pair_id=ids, impl="reference")
    grads = grads_of(loss, x, y, scale, create_graph=True)
    u, v, w = torch.randn(N, D).double(), torch.randn(N, D).double(), 0.3 * ONE
    second = grads_of((grads[0] * u).sum() + (grads[1] * v).sum() + grads[2] * w, x, y, scale)

    s, ranks = 8 * ONE, []
    refs = [p.contrastive_maxima(X[part], Y, s) for _, part in parts(sizes)]
    col_ref = torch.stack([c for _, c in refs]).amax(0) if maxima else ONE
    for (offset, part), (row_max, _) in zip(parts(sizes), refs, strict=True):
        positives = p.Positives(None if ids is None else ids[part], ids, offset)
        row_ref = row_max if maxima else ONE
        rows, cols = p.contrastive_statistics(X[part], Y, s, row_ref, col_ref, positives)
        ranks.append((part, positives, row_ref, rows, cols))
    cols = sum(r[4] for r in ranks)
    total = sum(p.contrastive_terms(rows, row_ref, pos.row_count).sum() for _, pos, row_ref, rows, _ in ranks)
    total = total + p.contrastive_terms(cols, col_ref, ranks[0][1].col_count).sum()
    torch.testing.assert_close(total / (2 * N), loss.detach())

    own = p.contrastive_own_direction(X, Y, u, v, s, w)
    weights = [p.Weights(row_ref, col_ref, rows, cols, pos) for _, pos, row_ref, rows, _ in ranks]
    first = [p.contrastive_gradients(X[part], Y, s, wt) for (part, *_), wt in zip(ranks, weights, strict=True)]
    dx, dy = torch.cat([g[0] for g in first]), sum(g[1] for g in first)
    for got, exact in ((dx * s, grads[0]), (dy * s, grads[1]), ((dx * X).sum(), grads[2])):
        torch.testing.assert_close(got / (2 * N), exact.detach())

    args = [(X[part], Y, u[part], v, s, w, wt, (own[part], own)) for (part, *_), wt in zip(ranks, weights, strict=True)]
    sums = [p.contrastive_double_statistics(*a) for a in args]
    col_sums = sum(c for _, c in sums)
    bars = [p.contrastive_double_gradients(*a, (r, col_sums)) for a, (r, _) in zip(args, sums, strict=True)]
    for got, exact in (
        (torch.cat([b[0] for b in bars]), second[0]),
        (sum(b[1] for b in bars), second[1]),
        (sum(b[2] for b in bars), second[2]),
    ):
        torch.testing.assert_close(got / (2 * N), exact)


@pytest.mark.parametrize("sizes", CUTS)
def test_sigmoid(small_tiles, sizes):
    x, y, bias = X.clone().requires_grad_(), Y.clone().requires_grad_(), (-3 * ONE).requires_grad_()
    loss = sigmoid_loss(x, y, 8 * ONE, bias, pair_id=IDS, impl="reference")
    dx, dy, d_bias = grads_of(loss, x, y, bias)
    found = [
        p.sigmoid_sweep(X[i], Y, 8 * ONE, -3 * ONE, p.Positives(IDS[i], IDS, o), want_x=True, want_y=True)
        for o, i in parts(sizes)
    ]
    torch.testing.assert_close(sum(f[0] for f in found) / N, loss.detach())
    torch.testing.assert_close(torch.cat([f[1] for f in found]) * 8 / N, dx)
    torch.testing.assert_close(sum(f[2] for f in found) * 8 / N, dy)
    torch.testing.assert_close(sum(f[3] for f in found) / N, d_bias)


def relation(rows, columns, tau, kind):
    return p.Relation(rows, columns, torch.tensor([1 / tau]).double(), [D], kind)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
@pytest.mark.parametrize("maxima", [False, True])
def test_relation_kl_rows(small_tiles, sizes, kind, maxima):
    x, z = X.clone().requires_grad_(), Y.clone().requires_grad_()
    loss = relation_kl_loss(x, z, student_temperature=0.2, teacher_temperature=0.1, relation=kind, impl="reference")
    dx, dz = grads_of(loss, x, z)
    pairs = [(relation(X[i], X, 0.2, kind), relation(Y[i], Y, 0.1, kind), o, i) for o, i in parts(sizes)]
    tops = [p.relation_maxima(s, t, o) for s, t, o, _ in pairs]
    all_s, all_t = (torch.cat([top[k] for top in tops]) for k in range(2))
    refs = [p.References(*top, all_s, all_t) if maxima else p.References(ONE, ONE) for top in tops]
    sums = [p.relation_kl_statistics(s, t, r, p.Sweep.ROWS, o)[0] for (s, t, o, _), r in zip(pairs, refs, strict=True)]
    torch.testing.assert_close(torch.cat([p.relation_kl_terms(s) for s in sums]).mean(), loss.detach())
    c = p.relation_kl_coefficients(torch.cat(sums, 1))
    found = [
        p.relation_kl_gradients(s, t, r, c[:, i], c, p.Sweep.ROWS, o, want_teacher=True)
        for (s, t, o, i), r in zip(pairs, refs, strict=True)
    ]
    torch.testing.assert_close(torch.cat([f[0].finish()[0] for f in found]) / N, dx)
    torch.testing.assert_close(torch.cat([f[1].finish()[0] for f in found]) / N, dz)


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_relation_kl_half_ring(small_tiles, kind):
    """Two ranks: each its own triangle, and one of them the block between; nothing is computed twice."""
    x, tau = X.clone().requires_grad_(), torch.tensor(0.2).double().requires_grad_()
    loss = relation_kl_loss(x, Y, student_temperature=tau, teacher_temperature=0.1, relation=kind, impl="reference")
    dx, d_tau = grads_of(loss, x, tau)
    a, b = slice(0, 25), slice(25, N)
    blocks = [(a, a, p.Sweep.TRIANGLE, 0), (b, b, p.Sweep.TRIANGLE, 0), (a, b, p.Sweep.PAIR, None)]
    refs, sums, grad, weight = p.References(ONE, ONE), torch.zeros(5, N).double(), torch.zeros(N, D).double(), 0.0
    for i, j, sweep, offset in blocks:
        pair = relation(X[i], X[j], 0.2, kind), relation(Y[i], Y[j], 0.1, kind)
        rows, cols = p.relation_kl_statistics(*pair, refs, sweep, offset)
        sums[:, i] += rows
        if cols is not None:
            sums[:, j] += cols
    torch.testing.assert_close(p.relation_kl_terms(sums).mean(), loss.detach())
    c = p.relation_kl_coefficients(sums)
    for i, j, sweep, offset in blocks:
        pair = relation(X[i], X[j], 0.2, kind), relation(Y[i], Y[j], 0.1, kind)
        rows, cols, weights = p.relation_kl_gradients(*pair, refs, c[:, i], c[:, j], sweep, offset)[0].finish()
        grad[i] += rows
        weight = weight + weights[0]
        if cols is not None:
            grad[j] += cols
    torch.testing.assert_close(grad / N, dx)
    torch.testing.assert_close(weight / N * -1 / 0.2**2, d_tau)


@pytest.mark.parametrize("metric", ["mae", "mse", "wasserstein"])
@pytest.mark.parametrize("sizes", CUTS)
def test_relation_match(small_tiles, sizes, metric):
    x = X.clone().requires_grad_()
    loss = relation_match_loss(x, [Y], [0.7], temperature=0.5, metric=metric, impl="reference")
    dx = grads_of(loss, x)[0]
    pairs, grad, total = N * (N - 1), torch.zeros(N, D).double(), 0.0
    joined = torch.cat([X, Y], 1)
    weights = torch.tensor([2.0, -1.4]).double()
    if metric == "mse":
        leaf = X.clone().requires_grad_()
        both, spread = torch.cat([leaf, Y], 1), weights.repeat_interleave(D)
        gram = sum(p.relation_gram(both[i]) for _, i in parts(sizes))
        own = sum(p.relation_mse_total(both[i], spread, gram) for _, i in parts(sizes))
        total = own - (len(sizes) - 1) * (gram.square() * spread[:, None] * spread).sum()
        grad, total = grads_of(total, leaf)[0], total.detach()
    for offset, i in parts(sizes):
        student, teacher = relation(X[i], X, 0.5, "cosine"), p.Relation(Y[i], Y, -weights[1:], [D], "cosine")
        if metric == "mae":
            difference = p.Relation(joined[i], joined, weights, [D, D], "cosine")
            part, gradient = p.relation_mae_sweep(difference, student, p.Sweep.ROWS, offset)
            grad[i] += gradient.finish()[0]
            total = total + part
        elif metric == "wasserstein":
            part, gradient, _ = p.relation_wasserstein_sweep(
                student, teacher, offset, p.Sweep.PAIR, want_student=True, want_teacher=False
            )
            rows, cols, _ = gradient.finish()
            grad[i] += rows
            grad += cols
            total = total + part
    torch.testing.assert_close(total / pairs, loss.detach())
    torch.testing.assert_close(grad / pairs, dx)
