"""The fused contrastive gradient: error budgets through the public loss, and its rectangles against float64.

Tiles are 32 x 32 and the interpreter's waves 96 rows over two splits: N = 130 has two row waves, a ragged last tile of
rows and columns, and two column tiles a split; widths of 20 and 24 leave features of a 32-wide tile empty.
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels import cases as k
from vlscale.kernels import contrastive_loss
from vlscale.kernels import primitives as p

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("watched_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D = 70, 20


@pytest.mark.parametrize("regime", ["random", "cone", "converged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_regimes(regime, dtype):
    x, y = k.embeddings(regime, 130, 24)
    k.check_budget(k.contrastive_case(x, y, 14.3), "triton", dtype)


def test_narrow_embeddings_are_fused_and_others_are_not(monkeypatch):
    from vlscale.kernels import triton_contrastive as kernels

    fused = []

    def recorded(x, *arguments, **settings):
        fused.append(x.shape[1])
        return original(x, *arguments, **settings)

    original = kernels.fused_gradients
    monkeypatch.setattr(kernels, "fused_gradients", recorded)
    widths = {"cuda": (64, 200, 320), "cpu": (8, 24, 40)}[DEVICE]
    for width in widths:
        x, y = (v.to(DEVICE, torch.bfloat16).requires_grad_() for v in k.embeddings("random", 40, width))
        contrastive_loss(x, y, 10.0, impl="triton").backward()
        contrastive_loss(x, y, 10.0, pair_id=torch.arange(40, device=DEVICE) // 2, impl="triton").backward()
    assert fused == list(widths[:2])


def rectangle(rows: slice, reference: str):
    """(x, Y, scale, weights in float64, the same in float32, the fallback's flag) of some rows against all columns."""
    x, y = k.embeddings("random", N, D)
    scale = torch.tensor(9.0, dtype=torch.float64)
    tops = p.contrastive_maxima(x, y, scale)
    constant = torch.full((N,), 1.5, dtype=torch.float64)
    row_ref, col_ref = tops if reference == "maxima" else (constant, constant)
    sums = p.contrastive_statistics(x, y, scale, row_ref, col_ref, p.Positives(None, None, 0))
    pieces = row_ref[rows], col_ref, sums[0][:, rows].contiguous(), sums[1]
    found = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        parts = [part.to(device, dtype) for part in pieces]
        weights = p.Weights(*parts, p.Positives(None, None, rows.start))
        found.append((*(v.to(device, dtype) for v in (x[rows], y, scale)), weights))
    return *found, torch.tensor(int(reference == "maxima"), dtype=torch.int32, device=DEVICE)


def tiles(wave_rows: int):
    from vlscale.kernels.triton_tiles import FUSED_INTERPRETED

    return replace(FUSED_INTERPRETED, block_k=32, wave_rows=wave_rows)


def fused(x, y, scale, weights, flag, config, want=(True, True)):
    """(G y, G^T x, <G, S>) of fused_gradients, None where not wanted."""
    from vlscale.kernels.triton_contrastive_fused import fused_gradients
    from vlscale.kernels.triton_contrastive_passes import PairWeights
    from vlscale.kernels.triton_gradient import Centred, SideGradient, stored_dtype

    left, right = (Centred(v, torch.float32, stored_dtype(v, torch.float32)) for v in (x, y))
    pairs = ((x, right), (y, left))
    sides = [SideGradient(*pair, torch.float32) if wanted else None for pair, wanted in zip(pairs, want, strict=True)]
    along = fused_gradients(x, y, scale, PairWeights.of(weights, flag), *sides, config)
    return *(None if side is None else side.result() for side in sides), along


@pytest.mark.parametrize("reference", ["constant", "maxima"])
@pytest.mark.parametrize("rows", [slice(0, N), slice(40, N)], ids=["square", "a rank's"])
def test_rectangles(rows, reference):
    """All of G but the own pairs, whose -(off_i/r_i + off_j/q_j) is taken out of the truth; the columns' side too."""
    exact, narrow, flag = rectangle(rows, reference)
    x, y, scale, weights = exact
    dx, dy = p.contrastive_gradients(x, y, scale, weights)
    miss = (weights.row_miss + weights.col_miss[rows])[:, None]
    along = scale * ((dx * x).sum() + (miss[:, 0] * (x * y[rows]).sum(1)).sum())
    dx = dx + miss * y[rows]
    dy[rows] += miss * x
    got = fused(*narrow, flag, tiles(32))
    for value, truth in zip(got, (dx, dy, along), strict=True):
        assert k.relative(value.cpu().double(), truth) < 2e-6


def test_each_side_alone_is_the_same_to_the_bit():
    _, narrow, flag = rectangle(slice(0, N), "constant")
    both = fused(*narrow, flag, tiles(96))
    rows = fused(*narrow, flag, tiles(96), (True, False))
    columns = fused(*narrow, flag, tiles(96), (False, True))
    assert rows[1] is None and columns[0] is None
    assert torch.equal(rows[0], both[0]) and torch.equal(columns[1], both[1]) and torch.equal(rows[2], both[2])
    assert k.relative(columns[2], both[2]) < 1e-6


def test_nothing_beyond_the_ends_is_used():
    """Embeddings that are views into NaN-filled storage, between rows and past the last: a missed mask would show."""
    _, (x, y, scale, weights), flag = rectangle(slice(0, N), "constant")
    clean = fused(x, y, scale, weights, flag, tiles(96))
    room = torch.full((2, N + 10, D + 4), torch.nan, device=DEVICE)
    room[0, :N, :D], room[1, :N, :D] = x, y
    views = room[0, :N, :D], room[1, :N, :D]
    poisoned = fused(*views, scale, weights, flag, tiles(96))
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))
