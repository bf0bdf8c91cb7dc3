"""Products of the contrastive loss that are kept from the forward to the backward: same loss, gradients by budget."""

import pytest
import torch

from tests.kernels import cases as k
from vlscale.kernels import contrastive, contrastive_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("watched_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 200  # three waves of rows, two of columns


def loss_and_gradients(x, y, scale, impl="triton", *, keep=False, dtype=torch.bfloat16):
    leaves = [v.to(DEVICE, dtype).requires_grad_() for v in (x, y)]
    leaves.append(torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else None, device=DEVICE))
    loss = contrastive_loss(leaves[0], leaves[1], leaves[2].requires_grad_(), impl=impl, keep_products=keep)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def dense_gradients(x, y, scale):
    """Dense torch in bfloat16, as the error budget has it."""
    leaves = [v.to(DEVICE, torch.bfloat16).requires_grad_() for v in (x, y)]
    leaves.append(torch.tensor(scale, device=DEVICE, requires_grad=True))
    logits = leaves[2] * (leaves[0] @ leaves[1].T).float()
    labels = torch.arange(len(x), device=DEVICE)
    losses = [torch.nn.functional.cross_entropy(table, labels) for table in (logits, logits.T)]
    return torch.autograd.grad(sum(losses) / 2, leaves)


CASES = [(regime, scale) for regime in ("random", "cone") for scale in (1.0, 14.3, 100.0)]
CASES += [("converged", 1.0), ("converged", 14.3)]  # at 100 all that is left of the gradient is under 1e-27


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize(("regime", "scale"), CASES)
def test_gradients_keep_the_error_budget(regime, scale, width):
    """Twice what dense torch in bfloat16 is away from float64 on the same numbers; also of a width that is fused."""
    x, y = (v.bfloat16().double() for v in k.embeddings(regime, N, width))
    _, truth = loss_and_gradients(x, y, scale, "reference", dtype=torch.float64)
    loss, got = loss_and_gradients(x, y, scale, keep=True)
    again, plain = loss_and_gradients(x, y, scale)
    assert torch.equal(loss, again)
    assert not torch.equal(got[0], plain[0]), "nothing was kept"
    for value, dense, exact in zip(got, dense_gradients(x, y, scale), truth, strict=True):
        assert k.relative(value.double(), exact) <= 2 * k.relative(dense.double(), exact)


def test_where_the_one_reference_does_not_reach_nothing_kept_is_used():
    """Logits that spread by 400: the sums are made over maxima, and so are the gradients, to the bit."""
    x, y = (20 * v for v in k.embeddings("random", N, 64))
    assert all(
        torch.equal(a, b)
        for a, b in zip(loss_and_gradients(x, y, 1.0, keep=True)[1], loss_and_gradients(x, y, 1.0)[1], strict=True)
    )


def test_second_order_asks_for_logits_again():
    x, y = k.embeddings("random", 100, 64)

    def second(keep: bool):
        leaves = [v.to(DEVICE, torch.bfloat16).requires_grad_() for v in (x, y)]
        first = torch.autograd.grad(
            contrastive_loss(*leaves, 14.3, impl="triton", keep_products=keep), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)

    for kept, plain in zip(second(True), second(False), strict=True):
        assert k.relative(kept.double(), plain.double()) < 0.01


@pytest.mark.parametrize(
    ("dtype", "settings", "grad"),
    [
        (torch.bfloat16, {"impl": "chunked"}, True),
        (torch.bfloat16, {"impl": "triton", "pair_id": torch.arange(40, device=DEVICE) // 2}, True),
        (torch.float32, {"impl": "triton"}, True),
        (torch.bfloat16, {"impl": "triton"}, False),
    ],
    ids=["chunked", "ids", "float32", "no gradient"],
)
def test_nothing_is_kept_where_it_serves_nobody(dtype, settings, grad, monkeypatch):
    asked, op = [], contrastive.forward_op
    monkeypatch.setattr(contrastive, "forward_op", lambda *given: asked.append(given[5]) or op(*given))
    x, y = (v.to(DEVICE, dtype).requires_grad_(grad) for v in k.embeddings("random", 40, 64))
    contrastive_loss(x, y, 14.3, keep_products=True, **settings)
    assert asked == [False]
