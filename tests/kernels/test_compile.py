"""torch.compile(fullgraph=True) around every loss, and the ops' fakes against what the ops return."""

import pytest
import torch
from torch.library import opcheck

from tests.kernels import cases as k
from vlscale.kernels import (
    contrastive,
    contrastive_loss,
    relation_kl,
    relation_kl_loss,
    relation_match,
    relation_match_loss,
    sigmoid,
    sigmoid_loss,
)

X, Y = (v.float() for v in k.embeddings("random", 12, 8))
IDS = torch.arange(12) // 2

LOSSES = {
    "contrastive": lambda x, y, s: contrastive_loss(x, y, s),
    "contrastive_ids": lambda x, y, s: contrastive_loss(x, y, s, pair_id=IDS),
    "sigmoid": lambda x, y, s: sigmoid_loss(x, y, s, -5.0),
    "relation_kl": lambda x, y, s: relation_kl_loss(x, y, student_temperature=1 / s, teacher_temperature=0.1),
    "relation_mae": lambda x, y, s: relation_match_loss(x, [y], s.reshape(1), temperature=0.1),
    "relation_mse": lambda x, y, s: relation_match_loss(x, [y], s.reshape(1), temperature=0.1, metric="mse"),
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


def contrastive_arguments():
    loss, statistics = contrastive.forward_op(X, Y, torch.tensor(9.0), None, "chunked")
    return torch.ones_like(loss), leaf(X), leaf(Y), leaf(9.0), None, statistics


def sigmoid_arguments():
    return torch.tensor(1.0), leaf(X), leaf(Y), leaf(9.0), leaf(-5.0), IDS


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
}


@pytest.mark.parametrize("make", OPS.values(), ids=OPS.keys())
def test_op_and_fake_agree(make):
    op, arguments = make()
    opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
