"""torch.compile(fullgraph=True) around every loss, and the ops' fakes against what the ops return."""

from importlib.util import find_spec

import pytest
import torch
from torch.library import opcheck

from tests.kernels import cases as k
from vlscale.kernels import (
    contrastive,
    contrastive_loss,
    once,
    relation_kl,
    relation_kl_loss,
    relation_match,
    relation_match_loss,
    sigmoid,
    sigmoid_loss,
)

X, Y = (v.float() for v in k.embeddings("random", 12, 8))
IDS = torch.arange(12) // 2
TRITON = ["triton"] if find_spec("triton") and not torch.cuda.is_available() else []  # in the interpreter


def kl(x, y, s, **settings):
    return relation_kl_loss(x, y, **{"student_temperature": 1 / s, "teacher_temperature": 0.1} | settings)


def mixture(x, y, s, **settings):
    """Two teachers of different widths, whose weights and temperature learn."""
    weights = torch.stack([s, 2 * s]) / 30
    return kl(x, [y, x.detach()[:, :5]], 9.0, teacher_weights=weights, teacher_temperature=1 / s, **settings)


LOSSES = {
    "contrastive": lambda x, y, s: contrastive_loss(x, y, s),
    "contrastive_ids": lambda x, y, s: contrastive_loss(x, y, s, pair_id=IDS),
    "sigmoid": lambda x, y, s: sigmoid_loss(x, y, s, -5.0),
    "sigmoid_ids": lambda x, y, s: sigmoid_loss(x, y, 9.0, -s, pair_id=IDS),
    "relation_kl": kl,
    "relation_kl_matrix": lambda x, y, s: kl(x, y, s, scope="matrix"),
    "relation_kl_euclidean": lambda x, y, s: kl(x, y, s, relation="euclidean"),
    "relation_kl_mixture": mixture,
    "relation_kl_mixture_matrix_euclidean": lambda x, y, s: mixture(x, y, s, scope="matrix", relation="euclidean"),
    "relation_mae": lambda x, y, s: relation_match_loss(x, [y], s.reshape(1), temperature=0.1),
    "relation_mae_mixture": lambda x, y, s: relation_match_loss(
        x, [y, x.detach()[:, :5]], torch.stack([s, -s / 2]), temperature=1 / s
    ),
    "relation_mse": lambda x, y, s: relation_match_loss(x, [y], s.reshape(1), temperature=0.1, metric="mse"),
    "relation_wasserstein": lambda x, y, s: relation_match_loss(
        x, [y], s.reshape(1), temperature=0.1, metric="wasserstein"
    ),
}
# What the kernels of Triton serve, by the same public calls.
LOSSES |= {
    f"{name}, {impl}": loss
    for impl in TRITON
    for name, loss in {
        "contrastive": lambda x, y, s: contrastive_loss(x, y, s, pair_id=IDS, impl="triton"),
        "sigmoid": lambda x, y, s: sigmoid_loss(x, y, s, -5.0, impl="triton"),
        "relation_kl": lambda x, y, s: mixture(x, y, s, impl="triton"),
        "relation_mae": lambda x, y, s: relation_match_loss(x, [y], s.reshape(1), temperature=0.1, impl="triton"),
    }.items()
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_fullgraph(loss):
    """Backend aot_eager traces forward and backward through the fakes, without waiting for a code generator."""
    torch._dynamo.reset()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [X.clone().requires_grad_(), Y.clone().requires_grad_(), torch.tensor(9.0, requires_grad=True)]
        value = function(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def leaf(value) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32).clone().requires_grad_()


def contrastive_arguments(impl="chunked", dtype=torch.float32):
    x, y = (v.to(dtype, copy=True).requires_grad_() for v in (X, Y))
    loss, statistics, *_ = contrastive.forward_op(x.detach(), y.detach(), torch.tensor(9.0), None, impl)
    return torch.ones_like(loss), x, y, leaf(9.0), None, statistics


def contrastive_backward_kept():
    x, y = (v.bfloat16().requires_grad_() for v in (X, Y))
    loss, statistics, *kept = contrastive.forward_op(x.detach(), y.detach(), torch.tensor(9.0), None, "triton", True)
    given = torch.ones_like(loss), x, y, leaf(9.0), None, statistics
    return contrastive.backward_op, (*given, "triton", True, False, *kept)


def sigmoid_arguments():
    return torch.tensor(1.0), leaf(X), leaf(Y), leaf(9.0), leaf(-5.0), IDS


def kl_arguments(relation, matrix, impl, widths=(8,)):
    """Of the forward op: a student, and its features as `widths` of teachers."""
    weights = torch.linspace(6.0, 9.0, len(widths))
    return leaf(X), leaf([9.0]), leaf(Y), leaf(weights), list(widths), relation, matrix, impl


def kl_backward(relation, matrix, impl, sides, widths=(8,)):
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in kl_arguments(relation, matrix, impl, widths)]
    statistics = relation_kl.forward_op(*arguments)[1]
    return relation_kl.backward_op, (torch.tensor(0.5), *arguments, statistics, *sides)


def match_arguments(metric, sides, impl="chunked", widths=(8,)):
    weights = torch.linspace(1.0, 2.0, len(widths))
    return relation_match.forward_op, (leaf(X), leaf([9.0]), leaf(Y), leaf(weights), list(widths), metric, *sides, impl)


OPS = {
    "contrastive_forward": lambda: (contrastive.forward_op, (leaf(X), leaf(Y), leaf(9.0), IDS, "chunked")),
    "contrastive_backward": lambda: (contrastive.backward_op, (*contrastive_arguments(), "chunked", True, False)),
    "contrastive_double_backward": lambda: (
        contrastive.double_backward_op,
        (X, Y, torch.tensor(1.0), *(a.detach() if a is not None else None for a in contrastive_arguments()), "chunked"),
    ),
    "sigmoid_forward": lambda: (
        sigmoid.forward_op,
        (leaf(X), leaf(Y), leaf(9.0), leaf(-5.0), None, [True, False, True, False], "chunked"),
    ),
    "sigmoid_backward": lambda: (
        sigmoid.backward_op,
        (*sigmoid_arguments(), [X, Y, torch.ones(()), torch.ones(())], [True, False, True, False]),
    ),
    "sigmoid_double_backward": lambda: (
        sigmoid.double_backward_op,
        (X, Y, torch.tensor(1.0), torch.tensor(0.5), *(a.detach() for a in sigmoid_arguments()[:-1]), IDS),
    ),
    "relation_kl_forward": lambda: (
        relation_kl.forward_op,
        (leaf(X), leaf([9.0]), Y, torch.ones(1), [8], "cosine", False, "chunked"),
    ),
    "relation_match_forward": lambda: (
        relation_match.forward_op,
        (leaf(X), leaf([9.0]), Y, torch.ones(1), [8], "mae", True, False, "chunked"),
    ),
    "sigmoid_forward_ids": lambda: (
        sigmoid.forward_op,
        (leaf(X), leaf(Y), leaf(9.0), leaf(-5.0), IDS, [True] * 4, "chunked"),
    ),
    "relation_kl_forward_matrix": lambda: (relation_kl.forward_op, kl_arguments("cosine", True, "chunked", (3, 5))),
    "relation_kl_backward": lambda: kl_backward("cosine", False, "chunked", (True, False, False)),
    "relation_kl_backward_teacher": lambda: kl_backward("euclidean", False, "chunked", (False, True, False), (3, 5)),
    "relation_kl_backward_matrix": lambda: kl_backward("cosine", True, "chunked", (True, True, True), (3, 5)),
    "relation_kl_backward_weights": lambda: kl_backward("cosine", False, "chunked", (False, False, True), (3, 5)),
    "relation_match_forward_mixture": lambda: match_arguments("mae", (True, True), widths=(3, 5)),
    "relation_match_forward_wasserstein": lambda: match_arguments("wasserstein", (True, True), widths=(3, 5)),
    "relation_match_forward_of_the_teacher": lambda: match_arguments("wasserstein", (False, True)),
    "scale_saved": lambda: (once.scale_op, (torch.tensor(0.5), X, [X.bfloat16(), Y])),
}
OPS |= {
    f"{name}, {impl}": make
    for impl in TRITON
    for name, make in {
        "contrastive_forward": lambda: (contrastive.forward_op, (leaf(X), leaf(Y), leaf(9.0), IDS, "triton")),
        "contrastive_backward": lambda: (
            contrastive.backward_op,
            (*contrastive_arguments("triton"), "triton", True, True),
        ),
        "contrastive_backward_bfloat16": lambda: (
            contrastive.backward_op,
            (*contrastive_arguments("triton", torch.bfloat16), "triton", False, True),
        ),
        "contrastive_forward_kept": lambda: (
            contrastive.forward_op,
            (X.bfloat16().requires_grad_(), Y.bfloat16(), leaf(9.0), None, "triton", True),
        ),
        "contrastive_backward_kept": contrastive_backward_kept,
        "sigmoid_forward": lambda: (
            sigmoid.forward_op,
            (
                X.bfloat16(),
                Y.bfloat16().requires_grad_(),
                leaf(9.0),
                leaf(-5.0),
                None,
                [False, True, True, True],
                "triton",
            ),
        ),
        "relation_kl_forward": lambda: (relation_kl.forward_op, kl_arguments("cosine", False, "triton", (3, 5))),
        "relation_kl_backward": lambda: kl_backward("cosine", False, "triton", (True, True, True), (3, 5)),
        "relation_kl_backward_weights": lambda: kl_backward("cosine", False, "triton", (True, False, True), (3, 5)),
        "relation_match_forward": lambda: match_arguments("mae", (True, True), "triton", (3, 5)),
    }.items()
}


@pytest.mark.parametrize("make", OPS.values(), ids=OPS.keys())
def test_op_and_fake_agree(make):
    op, arguments = make()
    opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
