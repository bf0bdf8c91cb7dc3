"""Linear memory: measured by the benchmark's own command in a fresh process, where one matrix of logits is 400 MB; and
of what takes longer counted on the meta device, operation by operation, where it is 67 MB and a tile 1 MB."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.live_bytes import LiveBytes, body
from vlscale.kernels import (
    chunked_relation_match,
    chunked_retrieval,
    contrastive,
    relation_kl,
    relation_match,
    retrieval_ranks,
    sigmoid,
    topk_neighbors,
)

ROOT = Path(__file__).resolve().parents[2]
N, D = 4096, 16
MATRIX = 4 * N * N


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("variant", ["contrastive chunked", "relation_kl chunked"])
def test_no_matrix_of_pairs_is_stored(variant):
    command = [sys.executable, "benchmarks/kernels_cpu.py", "--memory-of", variant, "--pairs", "10240"]
    command += ["--width", "16", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 100


def rows(n: int, count: int) -> tuple[torch.Tensor, ...]:
    return torch.empty(count, n, D, device="meta").unbind()


def numbers(count: int) -> tuple[torch.Tensor, ...]:
    return torch.empty(count, device="meta").unbind()


def contrastive_double(n: int, ids: torch.Tensor | None) -> None:
    statistics = torch.empty(contrastive.STATISTICS, n, device="meta")
    u, v, x, y = rows(n, 4)
    w, grad, scale = numbers(3)
    body(contrastive.double_backward_op)(u, v, w, grad, x, y, scale, ids, statistics, "chunked")


def sigmoid_forward(n: int, ids: torch.Tensor | None) -> None:
    body(sigmoid.forward_op)(*rows(n, 2), *numbers(2), ids, [True] * 4, "chunked")


def sigmoid_double(n: int, ids: torch.Tensor | None) -> None:
    u, v, x, y = rows(n, 4)
    w, t, grad, scale, bias = numbers(5)
    body(sigmoid.double_backward_op)(u, v, w, t, grad, x, y, scale, bias, ids)


def kl_of_a_mixture(n: int, ids: None) -> None:
    x, z = rows(n, 2)
    student, teacher = torch.empty(1, device="meta"), torch.empty(2, device="meta")
    settings = student, z, teacher, [D // 2, D // 2], "euclidean", False, "chunked"
    statistics = body(relation_kl.forward_op)(x, *settings)[1]
    body(relation_kl.backward_op)(torch.empty((), device="meta"), x, *settings, statistics, True, True, True)


def match(metric: str):
    def forward(n: int, ids: None) -> None:
        x, z = rows(n, 2)
        student, teacher = torch.empty(1, device="meta"), torch.empty(1, device="meta")
        body(relation_match.forward_op)(x, student, z, teacher, [D], metric, True, True, "chunked")

    return forward


def match_mse(n: int, ids: None) -> None:
    x, z = rows(n, 2)
    weights = torch.empty(2, device="meta", requires_grad=True)
    loss = relation_match._mse([x.requires_grad_(), z], weights, [D, D])
    torch.autograd.grad(loss, [x, weights])


@pytest.mark.parametrize(
    ("compute", "ids"),
    [
        (contrastive_double, False),
        (contrastive_double, True),
        (sigmoid_forward, False),
        (sigmoid_forward, True),
        (sigmoid_double, False),
        (sigmoid_double, True),
        (kl_of_a_mixture, False),
        (match("mae"), False),
        (match("wasserstein"), False),
        (match_mse, False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None) or ("ids" if value else "own pairs"),
)
def test_twice_the_pairs_take_no_more_than_twice_the_memory(compute, ids, tiles_of, monkeypatch):
    tiles_of(256, 1024)
    monkeypatch.setattr(chunked_relation_match, "ROW_ELEMENTS", 1 << 17)
    peaks = []
    for n in (N // 2, N):
        pair_id = torch.empty(n, dtype=torch.int64, device="meta") if ids else None
        with LiveBytes(pair_id) as counted:
            compute(n, pair_id)
        peaks.append(counted.peak)
    assert 4 * N * D < peaks[1] <= 2 * peaks[0]
    assert peaks[1] < MATRIX / 4


@pytest.mark.parametrize("queries", [4, 64])
def test_retrieval_needs_hardly_more_for_a_gallery_of_twice_the_size(queries, monkeypatch):
    monkeypatch.setattr(chunked_retrieval, "TILE", 1 << 18)
    generator = torch.Generator().manual_seed(0)
    query, whole = (torch.randn(n, 8, generator=generator) for n in (queries, 200_000))
    own = torch.arange(queries)[:, None]
    for search in (
        lambda gallery: topk_neighbors(query, gallery, 10, exclude=own),
        lambda gallery: retrieval_ranks(query, gallery, own, exclude=own + queries),
    ):
        peaks = []
        for gallery in (whole[:100_000], whole):
            with LiveBytes(query, whole, own) as counted:
                search(gallery)
            peaks.append(counted.peak)
        assert peaks[1] <= 1.25 * peaks[0]  # of few queries more newcomers wait for their order
        assert peaks[1] < 4 * queries * len(whole)
