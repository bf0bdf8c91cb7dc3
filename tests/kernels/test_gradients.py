"""Derivatives against finite differences in float64: first order of every loss, second order of those of pairs."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.kernels import cases as k

IMPLS = ["reference", "chunked"]


def problem(case: k.Case, impl: str):
    names = list(case.inputs)
    leaves = tuple(value.double().clone().requires_grad_() for value in case.inputs.values())
    return lambda *values: case.loss(dict(zip(names, values, strict=True)), impl), leaves


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ids", [None, [0, 1, 1, 2, 0, 3, 4]])
def test_contrastive_twice(small_tiles, impl, ids):
    x, y = k.embeddings("random", 7, 4)
    pair_id = None if ids is None else torch.tensor(ids)
    function, leaves = problem(k.contrastive_case(x, y, 5.0, pair_id), impl)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_contrastive_twice_with_the_fallback(small_tiles):
    x, y = k.embeddings("random", 40, 5)
    case = k.contrastive_case(30 * x, 30 * y, 2.0)
    truth, got = (second_order(case, impl, torch.float64) for impl in IMPLS)
    for exact, value in zip(truth, got, strict=True):
        assert k.relative(value, exact) < 1e-8


def second_order(case: k.Case, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    named = case.leaves(impl, dtype)
    leaves = list(named.values())
    loss = case.loss(named, impl)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in grads]
    along = sum((g * c).sum() for g, c in zip(grads, cotangents, strict=True))
    return [g.cpu().double() for g in torch.autograd.grad(along, leaves)]


@pytest.mark.parametrize(
    ("regime", "scale"), [*((r, 14.0) for r in ("random", "cone", "converged")), ("random", 100.0), ("cone", 100.0)]
)
@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_second_order_within_budget(regime, scale, ids):
    """Converged pairs at scale 100 are no test: the definition's p - 1 is rounding there, in float64 too."""
    x, y = (v.float().double() for v in k.embeddings(regime, 600, 64))
    case = k.contrastive_case(x, y, scale, torch.arange(600) // 3 if ids else None)
    truth = second_order(case, "reference", torch.float64)
    dense = second_order(case, "reference", torch.float32)
    got = second_order(case, "chunked", torch.float32)
    for exact, yardstick, value in zip(truth, dense, got, strict=True):
        assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), 5e-6)


def test_contrastive_second_order_of_saturated_pairs_is_not_rounding(small_tiles):
    """Own pairs at probabilities of 1 - 1e-6 and nearer: a direction's difference from its mean is far under it."""
    case = k.contrastive_case(*(v.float().double() for v in k.embeddings("converged", 65, 16)), 60.0)
    truth = second_order(case, "reference", torch.float64)
    dense, got = (second_order(case, impl, torch.float32) for impl in IMPLS)
    for exact, yardstick, value in zip(truth, dense, got, strict=True):
        assert k.relative(yardstick, exact) > 0.1
        assert k.relative(value, exact) < 2e-5


def test_contrastive_second_order_for_one_side_only():
    """Locked text tower: no gradient for y, and the second derivative through x alone is right."""
    x, y = k.embeddings("random", 30, 8)
    found = []
    for impl in IMPLS:
        leaf = x.clone().requires_grad_()
        loss = k.contrastive_case(x, y, 5.0).loss({"x": leaf, "y": y, "scale": torch.tensor(5.0).double()}, impl)
        grad = torch.autograd.grad(loss, leaf, create_graph=True)[0]
        found.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert k.relative(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ids", [None, [0, 1, 1, 2, 0, 3, 4]])
def test_sigmoid_twice(small_tiles, impl, ids):
    x, y = k.embeddings("random", 7, 4)
    function, leaves = problem(k.sigmoid_case(x, y, 5.0, ids and torch.tensor(ids), bias=-2.0), impl)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("scale", [14.0, 60.0])
@pytest.mark.parametrize("ids", [False, True])
def test_sigmoid_second_order_within_budget(small_tiles, scale, ids):
    """Many ragged tiles; at the larger scale hardly an element is between 0 and 1 any more."""
    x, y = (v.float().double() for v in k.embeddings("converged", 100, 16))
    case = k.sigmoid_case(x, y, scale, torch.arange(100) // 3 if ids else None, bias=-10.0)
    truth = second_order(case, "reference", torch.float64)
    dense = second_order(case, "reference", torch.float32)
    got = second_order(case, "chunked", torch.float32)
    for exact, yardstick, value in zip(truth, dense, got, strict=True):
        assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_relation_kl(small_tiles, impl, scope, relation):
    x, z = k.embeddings("random", 6, 4)
    case = k.kl_case(x, [z, x.flip(0)[:, :3]], [0.7, 0.6], (0.5, 0.3), scope=scope, relation=relation)
    assert gradcheck(*problem(case, impl))


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
@pytest.mark.parametrize("learned", [["x"], ["w"], ["x", "w"], ["z0"], ["tau_s"]])
def test_relation_kl_of_what_learns(small_tiles, learned, scope, relation):
    """A mixture's weights that learn alone, as over frozen teachers, get what they get beside everything else."""
    x, z = k.embeddings("random", 6, 4)
    case = k.kl_case(x, [z, x.flip(0)[:, :3]], [0.7, 0.6], (0.5, 0.3), scope=scope, relation=relation)
    alone, among = k.gradients_of(case, learned, "chunked", torch.float64)
    for value, truth in zip(alone, among, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", ["mae", "mse", "wasserstein"])
def test_relation_match(small_tiles, impl, metric):
    x, z = k.embeddings("random", 6, 4)
    assert gradcheck(*problem(k.match_case(x, [z, x.flip(0)[:, :3]], [0.7, -0.6], 0.5, metric), impl))


@pytest.mark.parametrize("metric", ["mae", "mse", "wasserstein"])
@pytest.mark.parametrize("learned", [["x"], ["w"], ["z0", "z1"]])
def test_relation_match_of_one_side(small_tiles, metric, learned):
    """What is frozen changes nothing of the other side's gradient: RVLR holds a teacher to a mixture that learns."""
    x, z = k.embeddings("random", 6, 4)
    case = k.match_case(x, [z, x.flip(0)[:, :3]], [0.7, -0.6], 0.5, metric)
    for alone, among in zip(*k.gradients_of(case, learned, "chunked", torch.float64), strict=True):
        torch.testing.assert_close(alone, among, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        k.kl_case(*(lambda x, z: (x, [z]))(*k.embeddings("random", 5, 4)), [1.0], (0.5, 0.3)),
        k.match_case(*(lambda x, z: (x, [z]))(*k.embeddings("random", 5, 4)), [1.0], 0.5, "mae"),
    ],
    ids=["relation_kl", "relation_match"],
)
def test_second_derivative_is_refused_not_wrong(case):
    function, leaves = problem(case, "chunked")
    grad = torch.autograd.grad(function(*leaves), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), leaves[0])


def test_no_gradient_is_made_for_what_asks_for_none(monkeypatch):
    from vlscale.kernels import chunked_relation_kl, relation_kl_loss

    asked = {}
    original = chunked_relation_kl.relation_kl_gradients

    def spy(*args, **kwargs):
        asked.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(chunked_relation_kl, "relation_kl_gradients", spy)
    x, z = k.embeddings("random", 6, 4)
    leaf = x.clone().requires_grad_()
    relation_kl_loss(leaf, z, student_temperature=0.1, teacher_temperature=0.1).backward()
    assert asked == {"want_student": True, "want_teacher": False, "want_weights": False}
    assert leaf.grad.abs().sum() > 0
    mixture = torch.ones(1, dtype=torch.float64, requires_grad=True)
    relation_kl_loss(x, z, teacher_weights=mixture, student_temperature=0.1, teacher_temperature=0.1).backward()
    assert asked == {"want_student": False, "want_teacher": False, "want_weights": True}
