"""Nothing waits for the device: the launchers on the meta device, whose values cannot be read; and on a GPU the losses
with waiting made an error, and captured in a CUDA graph that is replayed on other inputs.
"""

from functools import cache

import pytest
import torch

from tests.kernels import cases as k
from tests.kernels.live_bytes import LiveBytes, body, without_kernels
from vlscale.kernels import (
    contrastive,
    contrastive_loss,
    relation_kl,
    relation_kl_loss,
    relation_match,
    relation_match_loss,
    retrieval_ranks,
    sigmoid,
    sigmoid_loss,
    topk_neighbors,
)

pytest.importorskip("triton")

N = 20_000  # three waves of rows
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_of_contrastive(width: int, ids: bool) -> None:
    x, y = (meta(N, width, dtype=torch.bfloat16) for _ in range(2))
    pair_id = meta(N, dtype=torch.int64) if ids else None
    statistics = body(contrastive.forward_op)(x, y, meta(), pair_id, "triton")[1]
    given = meta(), x, y, meta(), pair_id, statistics, "triton"
    body(contrastive.backward_op)(*given, True, True)
    body(contrastive.double_backward_op)(x, y, meta(), *given)


def all_of_sigmoid(ids: bool) -> None:
    x, y = (meta(N, 64, dtype=torch.bfloat16) for _ in range(2))
    pair_id = meta(N, dtype=torch.int64) if ids else None
    body(sigmoid.forward_op)(x, y, meta(), meta(), pair_id, [True] * 4, "triton")


def all_of_kl(relation: str, matrix: bool) -> None:
    x, z = meta(N, 64, dtype=torch.bfloat16), meta(N, 48, dtype=torch.bfloat16)
    given = x, meta(1), z, meta(2), [32, 16], relation, matrix, "triton"
    statistics = body(relation_kl.forward_op)(*given)[1]
    body(relation_kl.backward_op)(meta(), *given, statistics, True, True, True)
    body(relation_kl.backward_op)(meta(), *given, statistics, True, False, True)


def all_of_mae() -> None:
    x, z = meta(N, 64, dtype=torch.bfloat16), meta(N, 48, dtype=torch.bfloat16)
    body(relation_match.forward_op)(x, meta(1), z, meta(2), [32, 16], "mae", True, True, "triton")


def all_of_retrieval() -> None:
    from vlscale.kernels import triton_retrieval

    query, gallery, table = meta(N, 64), meta(3 * N, 64), meta(N, 3, dtype=torch.int64)
    triton_retrieval.retrieval_ranks(query, gallery, table, table)
    triton_retrieval.topk_neighbors(query, gallery, 100, table)


LAUNCHERS = {
    "contrastive, fused": lambda: all_of_contrastive(64, False),
    "contrastive, waves": lambda: all_of_contrastive(512, False),
    "contrastive, ids": lambda: all_of_contrastive(64, True),
    "sigmoid": lambda: all_of_sigmoid(False),
    "sigmoid, ids": lambda: all_of_sigmoid(True),
    "relation_kl": lambda: all_of_kl("cosine", False),
    "relation_kl, matrix": lambda: all_of_kl("cosine", True),
    "relation_kl, euclidean": lambda: all_of_kl("euclidean", False),
    "relation_mae": all_of_mae,
    "retrieval": all_of_retrieval,
}


class OnTheDevice(LiveBytes):
    """Refuses what makes a tensor elsewhere: a copy to the host, or one of a list from there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        assert not isinstance(result, torch.Tensor) or result.device.type == "meta", function
        return result


@pytest.mark.parametrize("launch", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_launchers_read_nothing(launch, monkeypatch):
    kernel = without_kernels(monkeypatch)
    with OnTheDevice():
        launch()
    assert len(kernel.launched) >= 3


def test_reading_a_value_would_show():
    with pytest.raises(RuntimeError), OnTheDevice():
        meta().item()
    with pytest.raises(AssertionError, match="aten"), OnTheDevice():
        torch.zeros(3)


X, Y = k.embeddings("random", 300, 320)


@cache
def ids() -> torch.Tensor:
    """Copied to the device once: that is a caller's business."""
    return (torch.arange(len(X)) // 2).cuda()


def kl(x, y, s, **settings):
    """Two teachers, whose weights and temperatures learn."""
    weights = torch.stack([s, 2 * s]) / 30
    taus = {"student_temperature": 1 / s, "teacher_temperature": 2 / s}
    return relation_kl_loss(x, [y, y[:, :64]], teacher_weights=weights, impl="triton", **taus, **settings)


def match(x, y, s, metric):
    return relation_match_loss(x, [y], s.reshape(1) / 10, temperature=0.1, metric=metric, impl="triton")


def second(x, y, s):
    grads = torch.autograd.grad(contrastive_loss(x, y, s, impl="triton"), (x, y, s), create_graph=True)
    return sum(g.float().square().sum() for g in grads)


LOSSES = {
    "contrastive": lambda x, y, s: contrastive_loss(x, y, s, impl="triton"),
    "contrastive, fused": lambda x, y, s: contrastive_loss(x[:, :64], y[:, :64], s, impl="triton"),
    "contrastive, ids": lambda x, y, s: contrastive_loss(x, y, s, pair_id=ids(), impl="triton"),
    "contrastive, twice": second,
    "sigmoid": lambda x, y, s: sigmoid_loss(x, y, s, -10.0, impl="triton"),
    "sigmoid, ids": lambda x, y, s: sigmoid_loss(x, y, s, -s, pair_id=ids(), impl="triton"),
    "relation_kl": kl,
    "relation_kl, matrix": lambda x, y, s: kl(x, y, s, scope="matrix"),
    "relation_kl, euclidean": lambda x, y, s: kl(x, y, s, relation="euclidean"),
    "relation_mae": lambda x, y, s: match(x, y, s, "mae"),
    "relation_mse": lambda x, y, s: match(x, y, s, "mse"),
    "relation_wasserstein": lambda x, y, s: match(x, y, s, "wasserstein"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def leaves_of(x: torch.Tensor, y: torch.Tensor, scale: float) -> list[torch.Tensor]:
    rows = [v.to("cuda", torch.bfloat16).requires_grad_() for v in (x, y)]
    return [*rows, torch.tensor(scale, device="cuda", requires_grad=True)]


def forward_and_backward(loss, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@on_a_gpu
@every_loss
def test_no_loss_waits_for_the_device(loss):
    leaves = leaves_of(X, Y, 14.0)
    forward_and_backward(loss, leaves)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = forward_and_backward(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.isfinite().all() for part in found)


@on_a_gpu
def test_retrieval_does_not_wait_for_the_device():
    query, gallery = (v.float().cuda() for v in (X, Y))
    own = torch.arange(len(X), device="cuda")[:, None]

    def search():
        ranks = retrieval_ranks(query, gallery, own, exclude=own + 1, impl="triton")
        return *ranks, *topk_neighbors(query, gallery, 70, exclude=own, impl="triton")

    first = search()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = search()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_a_gpu
@every_loss
def test_a_cuda_graph_of_forward_and_backward(loss):
    """Replayed on other inputs it gives their loss and gradients."""
    leaves, others = leaves_of(X, Y, 14.0), leaves_of(Y.flip(0), X, 30.0)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            forward_and_backward(loss, leaves)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(loss, leaves)
    graph.replay()
    before = [part.clone() for part in captured]
    expected = forward_and_backward(loss, others)
    with torch.no_grad():
        for leaf, other in zip(leaves, others, strict=True):
            leaf.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for old, value, truth in zip(before, captured, expected, strict=True):
        assert k.relative(value.double(), truth.double()) < 1e-3 < k.relative(old.double(), truth.double())
