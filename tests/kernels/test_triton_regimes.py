"""The Triton kernels in waves of other sizes than their configurations choose: a large problem's code at small N.

Tiles stay as they are (32 x 64 in the interpreter, the device's on a GPU); waves of one tile, or of few in one
direction, leave many of them and ragged ones at the ends. Row and column waves meet the diagonal at different places.
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels import cases as k
from tests.kernels.test_gradients import second_order
from vlscale.kernels import reference, retrieval_ranks, topk_neighbors

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("watched_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 700 if DEVICE == "cuda" else 100
WAVES = {"one tile": (1, 1, 1), "high": (3, 1, 3)}  # rows and columns in tiles, splits


@pytest.fixture(params=WAVES.values(), ids=WAVES.keys())
def other_waves(request, monkeypatch):
    """Sets every launcher's waves; counts how many configurations were asked for."""
    from vlscale.kernels import (
        triton_contrastive,
        triton_contrastive_double,
        triton_contrastive_fused,
        triton_relation_kl,
        triton_relation_match,
        triton_retrieval,
        triton_sigmoid,
        triton_tiles,
    )

    rows, columns, splits = request.param
    chosen = []

    def smaller(config):
        if config is not None:
            sizes = {"wave_rows": rows * config.block_m, "wave_columns": columns * config.block_n}
            config = replace(config, **sizes, splits=splits)
            chosen.append(config)
        return config

    def choose(*arguments):
        return smaller(triton_tiles.choose_config(*arguments))

    def fused(*arguments):
        return smaller(triton_tiles.fused_config(*arguments))

    plain = triton_contrastive_double, triton_relation_kl, triton_relation_match, triton_retrieval, triton_sigmoid
    for module in (triton_contrastive, *plain):
        monkeypatch.setattr(module, "choose_config", choose)
    for module in (triton_contrastive, triton_contrastive_fused):
        monkeypatch.setattr(module, "fused_config", fused)
    return chosen


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("width", [24, 40], ids=["fused", "waves"])
def test_contrastive(other_waves, width, ids):
    pair_id = torch.arange(N) // 3 if ids else None
    case = k.contrastive_case(*k.embeddings("cone", N, width), 14.3, pair_id)
    k.check_budget(case, "triton", torch.bfloat16)
    assert other_waves


def test_contrastive_fallback(other_waves):
    x, y = k.embeddings("random", N, 16)
    k.check_budget(k.contrastive_case(3 * x, y, 3000.0), "triton", torch.float32, floor=5e-6)


def test_contrastive_second_order(other_waves):
    case = k.contrastive_case(*(v.float().double() for v in k.embeddings("cone", N, 20)), 14.0, torch.arange(N) // 3)
    truth, dense = (second_order(case, "reference", dtype) for dtype in (torch.float64, torch.float32))
    for exact, yardstick, value in zip(truth, dense, second_order(case, "triton", torch.float32), strict=True):
        assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), 5e-6)
    assert other_waves


@pytest.mark.parametrize("ids", [False, True])
def test_sigmoid(other_waves, ids):
    pair_id = torch.arange(N) // 3 if ids else None
    k.check_budget(k.sigmoid_case(*k.embeddings("cone", N, 24), 10.0, pair_id), "triton", torch.bfloat16)
    assert other_waves


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_relation_kl(other_waves, scope, relation):
    x, z = k.embeddings("random", N, 24)
    case = k.kl_case(x, [z, k.embeddings("cone", N, 16)[0]], [0.7, 0.4], (0.2, 0.1), scope=scope, relation=relation)
    k.check_budget(case, "triton", torch.float32, floor=2e-6)
    assert other_waves


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_relation_kl_fallback(other_waves, scope):
    x, z = k.embeddings("random", N, 16)
    case = k.kl_case(x, [z], [1.0], (0.004, 0.003), scope=scope)
    case = k.Case({name: v.float().double() for name, v in case.inputs.items()}, case.loss)
    truth = case.run("reference")
    dense, got = case.run("reference", torch.float32), case.run("triton", torch.float32)
    for name in ("loss", "x", "tau_s"):
        assert k.relative(got[name], truth[name]) <= max(2 * k.relative(dense[name], truth[name]), 2e-5)
    assert other_waves


def test_relation_mae(other_waves):
    x, z = k.embeddings("random", N, 24)
    case = k.match_case(x, [z, k.embeddings("cone", N, 16)[0]], [0.7, -0.4], 0.2, "mae")
    k.check_budget(case, "triton", torch.float32, floor=1e-3)
    assert other_waves


def test_retrieval(other_waves):
    """Small integers: products are exact, so ties are."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (n, 20), generator=generator).float() for n in (N, 2 * N + 9))
    table = torch.randint(-1, 2 * N, (N, 3), generator=generator)
    query, gallery, table = (v.to(DEVICE) for v in (query, gallery, table))
    got = retrieval_ranks(query, gallery, table, exclude=table[:, :1], impl="triton")
    for value, truth in zip(got, reference.retrieval_ranks(query, gallery, table, table[:, :1]), strict=True):
        assert torch.equal(value, truth)
    got = topk_neighbors(query, gallery, 7, exclude=table, impl="triton")
    for value, truth in zip(got, reference.topk_neighbors(query, gallery, 7, table), strict=True):
        assert torch.equal(value, truth)
    assert other_waves
