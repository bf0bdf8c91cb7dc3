"""The Triton kernels against the error budget: on a GPU where there is one, else in Triton's interpreter.

The interpreter's tiles are 32 x 64 and its waves 96 x 128, so N = 260 has three row waves with a ragged end, three
column waves, two splits of the columns and several tiles in each.
"""

import pytest
import torch

from tests.kernels import cases as k
from tests.kernels.test_gradients import second_order
from vlscale.kernels import primitives as p

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from vlscale.kernels.triton_tiles import side_by_side  # noqa: E402 (needs triton)


@triton.jit
def parts_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr):
    """Copies a 16 x 64 tile by its parts."""
    rows = tl.arange(0, 16)[:, None] * 64
    parts = side_by_side(tl.load(x_ptr + rows + tl.arange(0, 64)[None, :]), WIDTH)
    for part in tl.static_range(64 // WIDTH):
        tl.store(out_ptr + rows + part * WIDTH + tl.arange(0, WIDTH)[None, :], parts[part])


pytestmark = pytest.mark.usefixtures("watched_kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 16, 14.3), (63, 100, 100.0), (129, 64, 14.3), (260, 40, 100.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_multiplied_as_they_are(dtype):
    from vlscale.kernels.chunked import tile_operands
    from vlscale.kernels.triton_gradient import stored_dtype
    from vlscale.kernels.triton_relation import Operand
    from vlscale.kernels.triton_tiles import fused_config

    x, one = torch.zeros(2, 8, dtype=dtype), torch.ones(1)
    assert tile_operands(x, x, one, "triton")[0] is x and Operand.of(x, x, one, [8], "cosine").rows is x
    assert stored_dtype(x, torch.float32) == torch.float16 and fused_config(x) is not None


@pytest.mark.parametrize(("n", "d", "scale"), SHAPES)
def test_contrastive_shapes(n, d, scale):
    k.check_budget(k.contrastive_case(*k.embeddings("random", n, d), scale), "triton", torch.float32, cap=1e-5)


@pytest.mark.parametrize("regime", ["random", "cone", "converged"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contrastive_regimes(regime, ids, dtype):
    x, y = k.embeddings(regime, 130, 48)
    pair_id = torch.arange(130) // 3 if ids else None
    cap = 3e-3 if dtype == torch.bfloat16 and regime == "random" else None
    k.check_budget(k.contrastive_case(x, y, 14.3, pair_id), "triton", dtype, cap=cap)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", [k.contrastive_case, k.sigmoid_case])
def test_ids_that_nobody_shares(case, scale):
    """As a trainer gives them: positives, the largest weights, are rounded with the others and not added apart."""
    x, y = k.embeddings("cone", 130, 48)
    k.check_budget(case(x, y, scale, torch.randperm(130)), "triton", torch.bfloat16)


@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_fallback(ids):
    x, y = k.embeddings("random", 70, 16)
    pair_id = torch.arange(70) // 2 if ids else None
    k.check_budget(k.contrastive_case(3 * x, y, 3000.0, pair_id), "triton", torch.float32, floor=5e-6)


def test_contrastive_second_order():
    for ids in (None, torch.arange(100) // 3):
        case = k.contrastive_case(*(v.float().double() for v in k.embeddings("cone", 100, 20)), 14.0, ids)
        truth = second_order(case, "reference", torch.float64)
        dense = second_order(case, "reference", torch.float32)
        for exact, yardstick, value in zip(truth, dense, second_order(case, "triton", torch.float32), strict=True):
            assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), 5e-6)


def test_contrastive_second_order_of_saturated_pairs_is_not_rounding():
    case = k.contrastive_case(*(v.float().double() for v in k.embeddings("converged", 65, 16)), 60.0)
    truth, dense = (second_order(case, "reference", dtype) for dtype in (torch.float64, torch.float32))
    for exact, yardstick, value in zip(truth, dense, second_order(case, "triton", torch.float32), strict=True):
        assert k.relative(yardstick, exact) > 0.1
        assert k.relative(value, exact) < 2e-5


@pytest.mark.parametrize("regime", ["random", "cone", "converged"])
@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_second_order_of_bfloat16(regime, ids):
    """As a loss, rounded to bfloat16; and before that, where only the stored weights are rounded, to 16 bits."""
    n, d, scale = 130, 40, torch.tensor(14.25, device=DEVICE)
    pair_id = torch.arange(n, device=DEVICE) // 3 if ids else None
    x, y = (v.bfloat16().double() for v in k.embeddings(regime, n, d))
    case = k.contrastive_case(x, y, 14.25, None if pair_id is None else pair_id.cpu())
    truth = second_order(case, "reference", torch.float64)
    dense = second_order(case, "reference", torch.bfloat16)
    for exact, yardstick, value in zip(truth, dense, second_order(case, "triton", torch.bfloat16), strict=True):
        assert k.relative(value, exact) <= max(2 * k.relative(yardstick, exact), 1e-3)

    from vlscale.kernels import triton_contrastive, triton_contrastive_double

    generator = torch.Generator().manual_seed(3)
    operands = [x, y, *torch.randn(2, n, d, generator=generator, dtype=torch.float64).bfloat16().double()]
    w, positives = torch.tensor(0.5, device=DEVICE), p.Positives(pair_id, pair_id, 0)

    def passes(module, operands, scale, w):
        x, y = operands[:2]
        if module is p:
            row_ref = col_ref = p.fixed_reference(p.contrastive_bound(x, y, scale), scale.dtype)
            rows, cols = p.contrastive_statistics(x, y, scale, row_ref, col_ref, positives)
        else:
            statistics = triton_contrastive.contrastive_forward(x, y, scale, positives)[1]
            row_ref, col_ref, rows, cols = statistics[0], statistics[1], statistics[2:5], statistics[5:]
        weights = p.Weights(row_ref.expand(n).contiguous(), col_ref.expand(n).contiguous(), rows, cols, positives)
        own = p.contrastive_own_direction(*operands, scale, w)
        sums = module.contrastive_double_statistics(*operands, scale, w, weights, (own, own))
        return *sums, *module.contrastive_double_gradients(*operands, scale, w, weights, (own, own), sums)

    exact = passes(p, [rows.to(DEVICE) for rows in operands], scale.double(), w.double())
    got = passes(triton_contrastive_double, [rows.bfloat16().to(DEVICE) for rows in operands], scale, w)
    assert all(value.dtype == torch.float32 for value in got)
    for truth, value in zip(exact, got, strict=True):
        assert k.relative(value.cpu().double(), truth.cpu()) < 3e-5


def test_contrastive_single_pair_and_repeatability():
    x, y = (v.float() for v in k.embeddings("random", 260, 16))
    case = k.contrastive_case(x, y, 14.3)
    first, second = (case.run("triton", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = k.contrastive_case(x[:1], y[:1], 100.0).run("triton", torch.float32)
    assert all(value.abs().max() <= 1e-7 for value in alone.values())


@pytest.mark.parametrize("regime", ["random", "cone", "converged"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sigmoid_regimes(regime, ids, dtype):
    x, y = k.embeddings(regime, 130, 48)
    pair_id = torch.arange(130) // 3 if ids else None
    k.check_budget(k.sigmoid_case(x, y, 10.0, pair_id), "triton", dtype)


@pytest.mark.parametrize(("n", "d", "scale"), SHAPES)
def test_sigmoid_shapes(n, d, scale):
    k.check_budget(k.sigmoid_case(*k.embeddings("random", n, d), scale), "triton", torch.float32, cap=1e-5)


@pytest.mark.parametrize("ids", [None, torch.arange(70) // 3], ids=["own pairs", "ids"])
def test_nothing_beyond_the_ends_is_used(ids):
    """The kernels on views into NaN-filled storage, between rows and past the last: a missed mask would show. The
    public losses copy such rows together first."""
    from vlscale.kernels import triton_contrastive, triton_sigmoid, triton_tiles

    n, d, ref = 70, 20, torch.tensor(1.5, device=DEVICE)
    x, y = (rows.float().to(DEVICE) for rows in k.embeddings("random", n, d))
    room = torch.full((2, n + 10, d + 4), torch.nan, device=DEVICE)
    room[0, :n, :d], room[1, :n, :d] = x, y
    ids = ids if ids is None else ids.to(DEVICE)
    positives, refs = p.Positives(ids, ids, 0), ref.expand(n).contiguous()
    scale, clear = torch.tensor(9.0, device=DEVICE), torch.zeros((), dtype=torch.int32, device=DEVICE)

    def everything(x, y):
        rows, columns = triton_contrastive.contrastive_statistics(x, y, scale, ref, ref, positives, clear)
        weights = p.Weights(refs, refs, rows, columns, positives)
        waves = triton_tiles.choose_config(x, triton_tiles.Work.FULL)
        gradients = triton_contrastive.contrastive_gradients(x, y, scale, weights, clear, waves)
        sweep = triton_sigmoid.sigmoid_sweep(x, y, scale, -ref, positives, want_x=True, want_y=True, want_scalars=True)
        return rows, columns, *gradients, *sweep

    clean, poisoned = everything(x, y), everything(room[0, :n, :d], room[1, :n, :d])
    assert len(clean) == 10 and all(torch.isfinite(part).all() and part.abs().sum() > 0 for part in clean)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


def test_float64_is_served_by_the_chunked_tiles():
    x, y = k.embeddings("random", 40, 8)
    case = k.contrastive_case(x, y, 14.3)
    truth, got = case.run("reference"), case.run("triton")
    assert all(k.relative(got[name], truth[name]) < 1e-12 for name in truth)


@pytest.mark.parametrize("width", [64, 32, 16])
def test_parts_of_a_tile_lie_side_by_side(width):
    x = torch.arange(16 * 64, dtype=torch.float32, device=DEVICE).view(16, 64)
    out = torch.full_like(x, -1)
    parts_kernel[1,](x, out, WIDTH=width)
    assert torch.equal(out, x)
