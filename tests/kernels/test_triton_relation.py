"""The relation kernels in Triton against the error budget, and their rectangles against the chunked ones.

The interpreter's tiles are 32 x 64 and its waves 96 x 128: N = 260 has three row waves and several tiles in each.
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels import cases as k

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("watched_kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["cosine", "euclidean"]


@pytest.mark.parametrize("regime", ["random", "cone", "near_equal"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relation_kl_regimes(regime, scope, dtype):
    x, z = k.embeddings(regime, 130, 48)
    z = z if regime == "near_equal" else k.embeddings(regime, 130, 40, seed=1)[0]
    k.check_budget(k.kl_case(x, [z], [1.0], (0.1, 0.1), scope=scope), "triton", dtype)


@pytest.mark.parametrize(("regime", "scope"), [("random", "row"), ("cone", "matrix"), ("near_equal", "row")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relation_kl_euclidean(regime, scope, dtype):
    x, z = k.embeddings(regime, 130, 48)
    z = z if regime == "near_equal" else k.embeddings(regime, 130, 40, seed=1)[0]
    k.check_budget(k.kl_case(x, [z], [1.0], (0.1, 0.1), scope=scope, relation="euclidean"), "triton", dtype)


@pytest.mark.parametrize(
    ("n", "kind"), [(3, "cosine"), (65, "cosine"), (260, "cosine"), (3, "euclidean"), (70, "euclidean")]
)
def test_relation_kl_mixed_teachers(n, kind):
    x, z = k.embeddings("random", n, 24)
    other = k.embeddings("cone", n, 40)[0]
    case = k.kl_case(x, [z, other], [0.7, 0.4], (0.2, 0.1), relation=kind)
    k.check_budget(case, "triton", torch.float32, floor=2e-6)


@pytest.mark.parametrize("loss", ["row", "matrix", "mae"])
def test_three_teachers_in_bfloat16(loss, monkeypatch):
    """They reach the kernels as they are: float32 would cost the tensor cores."""
    from vlscale.kernels import triton_relation

    seen, original = set(), triton_relation.Operand.of

    def recorded(rows, *arguments):
        seen.add(rows.dtype)
        return original(rows, *arguments)

    monkeypatch.setattr(triton_relation.Operand, "of", recorded)
    x = k.embeddings("random", 130, 48)[0]
    teachers, mixture = [k.embeddings("cone", 130, width, seed=width)[0] for width in (40, 24, 16)], [0.5, 0.3, 0.2]
    if loss == "mae":
        case = k.match_case(x, teachers, mixture, 0.2, "mae")
    else:
        case = k.kl_case(x, teachers, mixture, (0.2, 0.1), scope=loss)
    k.check_budget(case, "triton", torch.bfloat16, floor=2e-6)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("kind", KINDS)
def test_relation_kl_fallback(scope, kind):
    x, z = (v.float() for v in k.embeddings("random", 70, 16))
    case = k.kl_case(x, [z], [1.0], (0.004, 0.003), scope=scope, relation=kind)
    truth = k.Case({name: v.double() for name, v in case.inputs.items()}, case.loss).run("reference")
    dense, got = case.run("reference", torch.float32), case.run("triton", torch.float32)
    for name in ("loss", "x", "tau_s"):
        assert k.relative(got[name], truth[name]) <= max(2 * k.relative(dense[name], truth[name]), 2e-5)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperatures", [(0.5, 0.3), (0.004, 0.003)], ids=["constant", "maxima"])
def test_a_mixture_that_learns_over_frozen_teachers(scope, kind, temperatures):
    """Its weights' gradient is made without the teachers'."""
    x, z = (v.float() for v in k.embeddings("random", 130, 24))
    case = k.kl_case(x, [z, x.flip(0)[:, :13]], [0.7, 0.6], temperatures, scope=scope, relation=kind)
    for learned in (["w"], ["x", "w"]):
        alone, among = k.gradients_of(case, learned, "triton", torch.float32)
        for value, truth in zip(alone, among, strict=True):
            assert truth.abs().sum() > 0
            assert k.relative(value.cpu().double(), truth.cpu().double()) < 2e-5


def test_copies_of_a_row_have_distance_and_slope_zero():
    """Where rounding cannot tell a distance from 0 it is 0: in bfloat16, whose products are exact, as in `chunked`."""
    x, z = (v[torch.arange(66) // 2] for v in k.embeddings("random", 33, 16))
    case = k.kl_case(x, [z], [1.0], (0.5, 0.3), relation="euclidean")
    truth, got = (case.run(impl, torch.bfloat16) for impl in ("chunked", "triton"))
    assert all(value.isfinite().all() for value in got.values())
    assert all(k.relative(got[name], truth[name]) < 5e-3 for name in ("loss", "x", "z0"))


def test_nan_propagates_and_repeats_are_bitwise():
    from vlscale.kernels import relation_kl_loss

    settings = {"student_temperature": 0.1, "teacher_temperature": 0.1, "impl": "triton"}
    for kind in KINDS:
        x, z = (v.float().to(DEVICE) for v in k.embeddings("random", 40, 16))
        first, second = (relation_kl_loss(x, z, relation=kind, **settings) for _ in range(2))
        assert torch.equal(first, second)
        x[30, 3] = torch.nan
        assert relation_kl_loss(x, z, relation=kind, **settings).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3, 130])
def test_relation_mae(n, dtype):
    """A rounding that flips a sign is an error of any method: hence the floor."""
    x, z = k.embeddings("random", n, 24)
    other = k.embeddings("cone", n, 40)[0]
    k.check_budget(k.match_case(x, [z, other], [0.7, -0.4], 0.2, "mae"), "triton", dtype, floor=1e-3)


def test_relation_mae_without_gradients():
    from vlscale.kernels import relation_match_loss

    x, z = (v.float().to(DEVICE) for v in k.embeddings("random", 130, 24))
    values = [relation_match_loss(x, [z], [1.0], temperature=0.1, impl=impl) for impl in ("triton", "chunked")]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_reference_reaches_over_all_logits_and_no_further_than_their_bound(side, kind):
    """Whichever side has the larger logits, in several blocks of rows; too low a one would cost the fallback."""
    from vlscale.kernels.chunked_relation import Tile
    from vlscale.kernels.triton_relation_passes import relation_reference

    from vlscale.kernels import primitives as p

    x, z = k.embeddings("random", 70, 24)
    x = x * torch.linspace(1, 2, 70, dtype=x.dtype)[:, None]
    large, small = torch.tensor([[-900.0, 700.0], [-1.0, 0.5]], dtype=x.dtype)
    weights = (large[:1].abs() if kind == "cosine" else large[:1], small) if side == "student" else (small[:1], large)
    student, teacher = both_forms(x, x, weights[0], [24], kind), both_forms(z, z, weights[1], [16, 8], kind)
    found = relation_reference(student[1], teacher[1]).cpu().double()
    chosen = student if side == "student" else teacher
    tile = chosen[0].logits(Tile((0, 70), (0, 70), False), *torch.empty(2, 70, 70, dtype=x.dtype))
    reach = p.REACH[torch.float32]
    assert tile.max() - reach <= found <= (chosen[1].bound().cpu().double() - reach) * (1 + 1e-6)
    assert found > 0


@pytest.mark.parametrize("ran", [0, 1])
def test_weights_are_summed_over_the_launch_that_has_run(ran):
    """Two whose tiles differ share room for the larger one's parts: what only the other would have written is NaN."""
    from vlscale.kernels.chunked_relation import Tile
    from vlscale.kernels.triton_relation_passes import add_weight_sums

    place, launched = Tile((0, 70), (96, 186), True), [(2, 3), (40, 35)]
    tiles, parts = launched[ran]
    rows, columns = torch.randn(2, parts, 70), torch.randn(tiles, 90)
    by_row, by_column = torch.full((2, 1, 35, 70), torch.nan), torch.full((1, 40, 90), torch.nan)
    for room, written in ((by_row, rows), (by_column, columns)):
        room.view(-1)[: written.numel()] = written.view(-1)
    before, anew = torch.ones(1, 70, device=DEVICE), torch.full((1, 90), torch.nan, device=DEVICE)
    weight, flag = torch.full((1,), 2.0, device=DEVICE), torch.full((), ran, dtype=torch.int32, device=DEVICE)
    given = by_row.to(DEVICE), by_column.to(DEVICE), launched, flag, place, before, anew, weight
    along = add_weight_sums(*given)
    torch.testing.assert_close(before.cpu()[0], 1 + rows[0].sum(0))
    torch.testing.assert_close(anew.cpu()[0], columns.sum(0))
    torch.testing.assert_close(along.cpu()[0], rows[1].double().sum() / 2)


ROWS_OF_RANKS = [(0, slice(0, 40)), (40, slice(40, 70))]


def both_forms(rows, columns, weights, widths, kind):
    """The same side for the chunked primitives in float64 and for Triton's in float32."""
    from vlscale.kernels.triton_relation import Operand

    from vlscale.kernels import primitives as p

    narrow = (v.float().to(DEVICE) for v in (rows, columns, weights))
    return p.Relation(rows, columns, weights, widths, kind), Operand.of(*narrow, widths, kind)


def cut(offset, rows, columns, kind):
    """Student of one segment, teacher of two: (chunked pair, Triton pair) of these rows against those columns."""
    x, z = k.embeddings("random", 70, 24)
    weights = torch.tensor([3.0, 2.0], dtype=torch.float64)
    student = both_forms(x[rows], x[columns], weights[:1] * 2, [24], kind)
    teacher = both_forms(z[rows], z[columns], weights, [16, 8], kind)
    return (student[0], teacher[0]), (student[1], teacher[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sweep", "maxima"),
    [("rows", False), ("rows", True), ("triangle", False), ("pair", False)],  # a reference a row serves rows alone
)
def test_rectangles_agree_with_the_chunked_ones(sweep, kind, maxima):
    """A rank's rows x all columns, its own triangle, and its rows against another's, in waves of 32 x 64."""
    from vlscale.kernels.triton_tiles import INTERPRETED

    from vlscale.kernels import primitives as p
    from vlscale.kernels import triton_relation_kl as kernels

    offset, rows = ROWS_OF_RANKS[1 if sweep == "rows" else 0]
    columns = {"rows": slice(0, 70), "triangle": rows, "pair": slice(40, 70)}[sweep]
    offset, how = None if sweep == "pair" else offset, p.Sweep(sweep)
    exact, narrow = cut(offset, rows, columns, kind)
    config = replace(INTERPRETED, wave_rows=32, wave_columns=64)
    constant = torch.full((), 1.5, dtype=torch.float64)
    truth_refs = [p.References(constant, constant)]
    got_refs = [p.References(*[constant.float().to(DEVICE)] * 2)]
    if maxima:
        everyone = cut(0, slice(0, 70), slice(0, 70), kind)
        truth_refs = [p.References(*p.relation_maxima(*exact, offset), *p.relation_maxima(*everyone[0], 0))]
        tops = kernels.relation_maxima(*narrow, offset, config=config)
        got_refs = [p.References(*tops, *kernels.relation_maxima(*everyone[1], 0, config=config))]
        for top, truth in zip(tops, (truth_refs[0].student, truth_refs[0].teacher), strict=True):
            torch.testing.assert_close(top.cpu().double(), truth, rtol=1e-5, atol=1e-5)
    sums = p.relation_kl_statistics(*exact, truth_refs[0], how, offset)
    found = kernels.relation_kl_statistics(*narrow, got_refs[0], how, offset, config=config)
    close(found, sums)

    generator = torch.Generator().manual_seed(3)
    own, other = (torch.rand(5, n, generator=generator, dtype=torch.float64) for n in (rows.stop - rows.start, 70))
    other = own if sweep == "triangle" else other[:, columns]
    want = {"want_student": True, "want_teacher": True}
    truth = p.relation_kl_gradients(*exact, truth_refs[0], own, other, how, offset, **want)
    mine, theirs = (c.float().to(DEVICE) for c in (own, other))
    got = kernels.relation_kl_gradients(*narrow, got_refs[0], mine, theirs, how, offset, config=config, **want)
    for a, b in zip(truth, got, strict=True):
        close(b.finish(), a.finish())

    want = {"want_student": False, "want_weights": True}
    truth = p.relation_kl_gradients(*exact, truth_refs[0], own, other, how, offset, **want)
    got = kernels.relation_kl_gradients(*narrow, got_refs[0], mine, theirs, how, offset, config=config, **want)
    assert truth[0] is got[0] is None
    close(got[1].finish(), truth[1].finish())


def close(got, truth):
    for value, exact in zip(got, truth, strict=True):
        assert (value is None) == (exact is None)
        if exact is not None:
            assert k.relative(value.cpu().double(), exact) < 2e-5
