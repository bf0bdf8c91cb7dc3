"""Error budgets of `chunked`: truth is float64 of the same rounded inputs, the yardstick dense torch in the same dtype.

Shapes are pairwise, not a product: N = 1..65 lie under one tile, 127/129 beside a power of two, 1000 spans two row
tiles, 4097 nine row and three column tiles with a ragged end of one; D = 8..640 are the towers' widths, 100 and 1152 no
multiples of a tile, 4096 the widest; scale 1 is diffuse, 14.3 the start of training, 100 its clamp.
"""

import pytest
import torch

from tests.kernels import cases as k

SHAPES = [
    (2, 8, 1.0),
    (63, 640, 100.0),
    (65, 100, 14.3),
    (127, 1152, 1.0),
    (129, 64, 100.0),
    (129, 4096, 14.3),
    (1000, 384, 100.0),
    (1000, 512, 14.3),
    (127, 768, 14.3),
    (4097, 8, 100.0),
]
REGIMES = ["random", "cone", "converged"]


@pytest.mark.parametrize(("n", "d", "scale"), SHAPES)
def test_contrastive_shapes(n, d, scale):
    k.check_budget(k.contrastive_case(*k.embeddings("random", n, d), scale), "chunked", torch.float32, cap=1e-5)


@pytest.mark.parametrize(("regime", "scale"), [*((r, 14.3) for r in REGIMES), ("random", 100.0), ("cone", 100.0)])
@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_regimes(regime, scale, ids):
    x, y = k.embeddings(regime, 600, 64)
    pair_id = torch.arange(600) // 3 if ids else None
    k.check_budget(k.contrastive_case(x, y, scale, pair_id), "chunked", torch.float32)


def test_contrastive_saturated_gradient_is_not_rounding():
    """Identical pairs at scale 40: 1 - p is near 1e-9, and p - 1 in float32 would be wrong by its whole size."""
    x, _ = k.embeddings("random", 200, 64)
    case = k.contrastive_case(x.float().double(), x.float().double(), 40.0)
    truth, dense, got = case.run("reference"), case.run("reference", torch.float32), case.run("chunked", torch.float32)
    assert truth["loss"] < 1e-7
    assert k.relative(dense["x"], truth["x"]) > 0.1
    assert k.relative(got["x"], truth["x"]) < 1e-5
    assert k.relative(got["loss"], truth["loss"]) < 1e-5


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_bf16(regime, ids):
    x, y = k.embeddings(regime, 300, 128)
    pair_id = torch.arange(300) // 2 if ids else None
    k.check_budget(k.contrastive_case(x, y, 14.3, pair_id), "chunked", torch.bfloat16, cap=3e-3)


@pytest.mark.parametrize(("n", "d", "scale"), SHAPES[:-1])
def test_sigmoid_shapes(n, d, scale):
    k.check_budget(k.sigmoid_case(*k.embeddings("random", n, d), scale), "chunked", torch.float32, cap=1e-5)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid_regimes(regime, dtype):
    x, y = k.embeddings(regime, 600, 64)
    k.check_budget(k.sigmoid_case(x, y, 10.0, torch.arange(600) // 3), "chunked", dtype)


@pytest.mark.parametrize(("n", "d", "scale"), SHAPES[1:])
def test_relation_kl_shapes(n, d, scale):
    x, z = k.embeddings("random", n, d)
    tau = 1 / min(scale, 20.0)
    k.check_budget(k.kl_case(x, [z], [1.0], (tau, tau)), "chunked", torch.float32, cap=1e-5)


@pytest.mark.parametrize("regime", [*REGIMES, "near_equal"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_relation_kl_regimes(regime, scope, relation):
    x, z = k.embeddings(regime, 600, 64)
    z = z if regime == "near_equal" else k.embeddings(regime, 600, 48, seed=1)[0]
    case = k.kl_case(x, [z], [1.0], (0.1, 0.1), scope=scope, relation=relation)
    k.check_budget(case, "chunked", torch.float32)


@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_relation_kl_mixed_teachers_bf16(relation):
    x, z = k.embeddings("random", 300, 64)
    other = k.embeddings("cone", 300, 40)[0]
    case = k.kl_case(x, [z, other], [0.7, 0.4], (0.1, 0.05), relation=relation)
    k.check_budget(case, "chunked", torch.bfloat16)


def test_relation_kl_keeps_small_divergences():
    """KL near 1e-5, where lse_s - lse_t + sum p_t (t - s) leaves only rounding in float32."""
    x, z = k.embeddings("near_equal", 600, 64)
    case = k.kl_case(x.float().double(), [z.float().double()], [1.0], (0.1, 0.1))
    truth, got = case.run("reference"), case.run("chunked", torch.float32)
    assert truth["loss"] < 2e-2
    assert k.relative(got["loss"], truth["loss"]) < 5e-6
    assert k.relative(got["x"], truth["x"]) < 3e-5


@pytest.mark.parametrize("metric", ["mae", "mse", "wasserstein"])
@pytest.mark.parametrize("regime", REGIMES)
def test_relation_match_regimes(metric, regime):
    """mae's and wasserstein's gradients are sums of signs: a rounding that flips one is an error of any method."""
    x, y = k.embeddings(regime, 400, 64)
    z = k.embeddings(regime, 400, 48, seed=1)[0]
    case = k.match_case(x, [y, z], [0.7, -0.2], 0.1, metric)
    k.check_budget(case, "chunked", torch.float32, floor=4e-7 if metric == "mse" else 1e-3)


def test_relation_mse_keeps_small_differences():
    x, z = k.embeddings("near_equal", 400, 64)
    case = k.match_case(x.float().double(), [z.float().double()], [1.0], 1.0, "mse")
    truth, got = case.run("reference"), case.run("chunked", torch.float32)
    assert truth["loss"] < 1e-4
    assert k.relative(got["loss"], truth["loss"]) < 1e-6


@pytest.mark.parametrize("scale", [300.0, 3000.0])
@pytest.mark.parametrize("ids", [False, True])
def test_contrastive_fallback_for_logits_that_spread_too_far(small_tiles, scale, ids):
    """Random pairs at these scales put whole rows under exp's range for one constant: the maxima take over."""
    x, y = k.embeddings("random", 70, 16)
    pair_id = torch.arange(70) // 2 if ids else None
    k.check_budget(k.contrastive_case(3 * x, y, scale, pair_id), "chunked", torch.float32, floor=2e-6)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
def test_relation_kl_fallback(small_tiles, scope, relation):
    x, z = k.embeddings("random", 70, 16)
    case = k.kl_case(x, [z], [1.0], (0.004, 0.003), scope=scope, relation=relation)
    k.check_budget(student_alone(case), "chunked", torch.float32, floor=2e-6)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("relation", ["cosine", "euclidean"])
@pytest.mark.parametrize("length", [10.0, 100.0, 10000.0])
def test_relation_kl_of_embeddings_that_nobody_normalised(small_tiles, scope, relation, length):
    """Logits up to 1e9, of which a rounding is 64: both orders of a pair have to have the same one."""
    x, z = k.embeddings("random", 70, 16)
    case = k.kl_case(length * x, [length * z], [1.0], (0.1, 0.1), scope=scope, relation=relation)
    k.check_budget(student_alone(case), "chunked", torch.float32, floor=2e-6)


@pytest.mark.parametrize("tau", [(0.001, 0.07), (0.07, 0.001), (0.001, 0.001), (0.0001, 1.0)])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_relation_kl_in_float64_of_sums_far_apart(tau, scope):
    """One constant reaches over e^1000: the student's sum over the teacher's is not finite, their logarithms are."""
    x, z = k.embeddings("random", 65, 8)
    case = student_alone(k.kl_case(x, [z], [1.0], tau, scope=scope))
    truth, got = (case.run(impl) for impl in ("reference", "chunked"))
    assert all(k.relative(got[name], truth[name]) < 1e-11 for name in truth)


def student_alone(whole: k.Case) -> k.Case:
    """The gradients of everything else are nearly 0 where rows are decided."""
    fixed = {name: value for name, value in whole.inputs.items() if name != "x"}

    def loss(student, impl):
        dtype = student["x"].dtype
        return whole.loss({name: value.to(dtype) for name, value in fixed.items()} | student, impl)

    return k.Case({"x": whole.inputs["x"]}, loss)
