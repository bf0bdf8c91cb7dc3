"""Every objective over ranks against one process: losses, gradients of every parameter, second order, bytes, refusals.

One launch a world runs all its cases; the tests compare what rank 0 found with the dense loss of one process in
float64. Three ranks, an odd number, run what depends on how blocks meet.
"""

import functools
from dataclasses import replace

import pytest
import torch

from tests.objectives import costs_over_ranks as c
from tests.objectives import over_ranks as o
from tests.worlds import World, meet, worlds
from vlscale.distributed import Ranks
from vlscale.kernels import primitives as p


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What each rank of a world found."""

    launched: dict[World, list[dict] | None] = {}

    def launch(world: World) -> list[dict]:
        if world not in launched:
            launched[world] = None
            launched[world] = meet(o.on_rank, world, tmp_path_factory.mktemp(str(world)))
        assert launched[world], "this world failed when the first test asked for it"
        return launched[world]

    return launch


@functools.cache
def truth(case: o.Case) -> dict[str, torch.Tensor]:
    return o.gradient(replace(case, comm="gather", chunks=1, dtype=torch.float64, impl="reference"), Ranks())


def check(
    got: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    bound: float,
    dense: dict[str, torch.Tensor] | None = None,
) -> None:
    """Each parameter within `bound` of its gradient, or of a thousandth of the whole where its own is next to zero; or
    within ten times the error of the `dense` loss in the same precision."""
    assert got.keys() == exact.keys()
    parameters = [value for name, value in exact.items() if name != "loss"]
    floor = 1e-3 * torch.cat([value.flatten() for value in parameters]).norm() / len(parameters) ** 0.5
    assert floor > 0
    for name, value in exact.items():
        size = max(value.norm(), floor)
        error = (got[name].double() - value).norm() / size
        allowed = bound if dense is None else max(bound, 10 * (dense[name].double() - value).norm() / size)
        assert error <= allowed, f"{name}: off by {error:.1e}"


def test_every_objective_is_there_by_every_way_and_number_of_chunks():
    """In float32: each objective with each of its settings by gather, ring and, for relations and sums of terms, half
    ring, in 1 and 4 chunks."""
    found: dict[tuple, set] = {}
    for case in o.CASES:
        if case.dtype == torch.float32:
            found.setdefault((case.objective, case.settings, case.locked), set()).add((case.comm, case.chunks))
    kernels = {"contrastive", "sigmoid", "relation_kl", "relation_match"}
    assert {objective for objective, *_ in found} == kernels | o.TOTALS.keys()
    for (objective, *_), ways in found.items():
        comms = o.COMMS[:2] if objective in ("contrastive", "sigmoid") else o.COMMS
        assert ways == {(comm, chunks) for comm in comms for chunks in (1, 4)}, objective


def test_rules_of_conflict_change_the_gradient_that_ranks_are_held_to():
    rules = ("keep", "scale", "project")
    cases = [o.Case("covlr", ids=True, settings=(("conflict", rule),)) for rule in rules]
    first, *others = (torch.cat([g.flatten() for g in truth_of(case).values()]) for case in cases)
    for other in others:
        assert (other - first).norm() > 1e-2 * first.norm()


def bound_of(case: o.Case) -> float:
    if case.dtype == torch.float32:
        return 1e-5
    return 1e-9 if case.spread != 1 else 1e-10  # logits of thousands lose digits themselves


def truth_of(case: o.Case) -> dict[str, torch.Tensor]:
    return truth(replace(case, comm="gather", chunks=1, dtype=torch.float64, impl="reference"))


@pytest.mark.parametrize("case", o.CASES, ids=str)
def test_one_rank_is_the_kernels_own(case):
    check(o.gradient(case, Ranks()), truth_of(case), bound_of(case))


@pytest.mark.parametrize("world", worlds(2, 4))
@pytest.mark.parametrize("case", o.CASES, ids=str)
def test_gradients_over_ranks(found, world, case):
    ranks = [each["cases"][str(case)] for each in found(world)]
    assert len({float(each["loss"]) for each in ranks}) == 1
    check(ranks[0], truth_of(case), bound_of(case))


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize("case", o.TRITON, ids=str)
def test_gradients_over_ranks_in_triton(found, world, case):
    """Over all N^2 relations of long embeddings one pair is all of the teachers' distribution: their gradients are then
    next to nothing, and float32 loses their digits in the dense loss too."""
    settings = dict(case.settings)
    dense = None
    if case.spread != 1 and settings.get("scope") == "matrix":
        dense = o.gradient(replace(case, comm="gather", impl="reference"), Ranks())
    first = found(world)[0]
    if "triton" not in first:
        pytest.skip("Triton's interpreter is not there for CPU tensors where there are GPUs")
    check(first["triton"][str(case)], truth_of(case), bound_of(case), dense)


@pytest.mark.parametrize("world", worlds(2, 3))
@pytest.mark.parametrize("index", range(len(o.META)), ids=[str(case) for case, _ in o.META])
def test_second_order_over_ranks(found, world, index):
    dense = [replace(case, comm="gather", impl="reference") for case in o.META[index]]
    check(found(world)[0]["meta"][index], o.meta_gradient(*dense, Ranks()), 1e-10)


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize(("index", "bound"), enumerate([1e-5, 1e-5, 4e-3, 4e-3]), ids=[str(c) for c in o.SECOND])
def test_second_order_over_ranks_in_triton(found, world, index, bound):
    """Against the chunked kernels in float64, of the same inputs; bfloat16 results are rounded by up to 2e-3."""
    for each in found(world):
        if "second" not in each:
            pytest.skip("Triton's interpreter is not there for CPU tensors where there are GPUs")
        for got, exact in zip(*each["second"][index], strict=True):
            assert exact.abs().max() > 0
            assert (got - exact).norm() <= bound * exact.norm()


@torch.no_grad()
def test_the_spread_cases_need_the_fallback():
    """Embeddings this long leave sums unsound over one reference, in the dtype they are run in."""
    for case in o.CASES + o.TRITON:
        if case.spread != 1 and case.objective == "contrastive":
            model = o.Small().to(case.dtype)
            x, y = (
                case.spread * torch.nn.functional.normalize(tower(rows), dim=1)
                for tower, rows in zip((model.image, model.text), o.inputs_of()[0].to(case.dtype), strict=True)
            )
            scale = model.log_scale.exp()
            ref = p.fixed_reference(p.contrastive_bound(x, y, scale), case.dtype)
            rows, _ = p.contrastive_statistics(x, y, scale, ref, ref, p.Positives(None, None, 0))
            assert not p.sums_are_sound(o.N, rows[0] + rows[1])


@pytest.mark.parametrize("world", worlds(2, 4))
def test_half_precision(found, world):
    inputs, _ = o.inputs_of()
    x, y = (torch.nn.functional.normalize(rows, dim=1).bfloat16().double().requires_grad_() for rows in inputs)
    o.sharded_contrastive_loss(x, y, 14.3, ranks=Ranks(), impl="reference").backward()
    for name, exact in (("image", x.grad), ("text", y.grad)):
        got = torch.cat([each["half"][name] for each in found(world)])
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("world", worlds(2, 3, 4))
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_how_blocks_meet(found, world, rows):
    """Gather and ring: every row and column once. Half ring: every pair of ranks' rows once, one way or the other."""
    meetings = found(world)[0]["meetings"]
    for way in ("Gather", "Ring"):
        assert (meetings[way, rows] == 1).all()
    half = meetings["HalfRing", rows]
    owner = torch.arange(world.size * rows) // rows
    same = owner[:, None] == owner[None, :]
    assert ((half + half.T)[~same] == 1).all() and (half[same] == 1).all()


@pytest.mark.parametrize("world", worlds(2, 3, 4))
@pytest.mark.parametrize("comm", ["gather", "ring", "half_ring"])
def test_one_row_a_rank(found, world, comm):
    x, z = (part.clone().requires_grad_() for part in o.inputs_of(slice(0, world.size))[0])
    loss = o.relation(x, Ranks(), teacher=z, impl="reference")
    (loss + o.sharded_relation_match_loss(x, [z], [0.7], temperature=1.0, ranks=Ranks(), impl="reference")).backward()
    got = torch.cat([each["one row"][comm] for each in found(world)], 1)
    torch.testing.assert_close(got, torch.stack([x.grad, z.grad]), rtol=1e-10, atol=1e-13)


def on_paper(size: int, e: int) -> dict[str, tuple[float, float]]:
    """What a rank receives by the design on paper, forward + backward, and how much of that never travels here.

    A contrast's ring there sends columns, sums and gradient round together in the backward, W hops each: all of them
    come home. Here only what was added up comes home: a rank has kept its own columns, b D e bytes."""
    b, d, share = c.B, c.D, (size - 1) * c.B
    return {
        "contrastive gather": (share * (d * e + 4 * d) + 8 * share, 0),
        "contrastive ring": (share * (d * e + 4) + size * b * (d * e + 4 + 4 * d), b * d * e),
        "relation_kl gather": (share * 2 * d * e + 8 * share, 0),
    }


def by_hops(size: int, e: int) -> dict[str, float]:
    """The same for every way, added up from sweeps of so many bytes a row; a half ring's of all ranks together, over
    their number.

    In a sweep columns travel to the rows, and what was computed for them travels back. Gather: W - 1 of W blocks there,
    as many back. Ring: a rank has its own columns, so W - 1 hops; its sums have the last rank's part only after W.
    Half ring: W/2 hops there, W/2 back straight to the owner, at even W the last of them of half a block for the lower
    of the two ranks: W/2 - 1/4 on average.

    A contrast sweeps for its sums (with ids 12 bytes, without 4) and again, with the columns' sums (8 or 4), for the
    gradient in float32; sigmoid and mae have their gradient in one sweep. Relation KL has rows of two sides, sums that
    come back from a half ring alone, and in its second sweep 12 bytes of coefficients with each column. Ids are
    gathered first. mse adds (F, F) matrices of float64 by all-reduce, in the forward and for the gradient."""
    b, d = c.B, c.D
    columns, gradient = d * e, 4 * d

    def gather(there: float, back: float = 0) -> float:
        return (size - 1) * b * (there + back)

    def ring(there: float, back: float = 0) -> float:
        return (size - 1) * b * there + size * b * back

    def half_ring(there: float, back: float) -> float:
        return size / 2 * b * there + (size / 2 - 1 / 4) * b * back

    ids = gather(8)
    return {
        "contrastive gather": gather(columns, 4) + gather(4, gradient),
        "contrastive ring": ring(columns, 4) + ring(columns + 4, gradient),
        "contrastive by id gather": ids + gather(columns, 12) + gather(8, gradient),
        "contrastive by id ring": ids + ring(columns, 12) + ring(columns + 8, gradient),
        "sigmoid gather": gather(columns, gradient),
        "sigmoid ring": ring(columns, gradient),
        "relation_kl gather": gather(2 * columns) + gather(12),
        "relation_kl ring": ring(2 * columns) + ring(2 * columns + 12),
        "relation_kl half_ring": half_ring(2 * columns, 20) + half_ring(2 * columns + 12, gradient),
        "mae gather": gather(2 * columns),
        "mae ring": ring(2 * columns),
        "mae half_ring": half_ring(2 * columns, gradient),
        **{f"mse {comm}": 2 * 2 * (size - 1) / size * 8 * (2 * d) ** 2 for comm in o.COMMS},
        **{f"wasserstein {comm}": gather(2 * columns, gradient) for comm in o.COMMS},
    }


@pytest.mark.parametrize("world", worlds(2, 4))
@pytest.mark.parametrize("dtype", c.DTYPES)
def test_bytes_received(found, world, dtype):
    """Within 5 % of the sum of its hops, and of the design on paper less what never travels; the sigmoid loss takes no
    more than the contrastive one."""
    received = {
        name.removesuffix(f" {dtype}"): [sum(each["costs"][name][0].values()) for each in found(world)]
        for name in found(world)[0]["costs"]
        if name.endswith(str(dtype))
    }
    for name, formula in by_hops(world.size, dtype.itemsize).items():
        of_ranks = [sum(received[name]) / world.size] if name.endswith("half_ring") else received[name]
        assert of_ranks == pytest.approx([formula] * len(of_ranks), rel=0.05), name
    for name, (formula, saved) in on_paper(world.size, dtype.itemsize).items():
        assert received[name] == pytest.approx([formula - saved] * world.size, rel=0.05), name
    for comm in ("gather", "ring"):
        assert max(received[f"sigmoid {comm}"]) <= min(received[f"contrastive {comm}"])


@pytest.mark.parametrize("world", worlds(2, 4))
@pytest.mark.parametrize("dtype", c.DTYPES)
def test_bytes_of_matching(found, world, dtype):
    """Embeddings, ids and places of all pairs once, what each rank asks for twice, and then the tokens of negatives
    that another rank holds, with their gradients."""
    e = dtype.itemsize
    for each in found(world):
        received, travelled = each["matching"][str(dtype)]
        formula = (world.size - 1) * c.B * (2 * c.D * e + 8 + 8 + 2 * 8) + travelled * c.TOKENS * e
        assert received == pytest.approx(formula, rel=0.05) and travelled > 0


@pytest.mark.parametrize("world", worlds(2, 4))
def test_what_kind_of_traffic_each_way_is(found, world):
    kinds = {name: set(traffic) for name, (traffic, _) in found(world)[0]["costs"].items()}
    for dtype in c.DTYPES:
        assert kinds[f"contrastive gather {dtype}"] == {"all_gather", "reduce_scatter", "all_reduce"}
        assert kinds[f"sigmoid gather {dtype}"] == {"all_gather", "reduce_scatter", "all_reduce"}
        for name in ("contrastive", "sigmoid", "relation_kl", "mae"):
            assert kinds[f"{name} ring {dtype}"] == kinds[f"{name} half_ring {dtype}"] == {"transfer", "all_reduce"}
        for comm in o.COMMS:  # which have one way each
            assert kinds[f"mse {comm} {dtype}"] == {"all_reduce"}
            assert kinds[f"wasserstein {comm} {dtype}"] == {"all_gather", "reduce_scatter", "all_reduce"}


@pytest.mark.parametrize("world", worlds(2, 4))
def test_nothing_is_computed_twice(found, world):
    """Products of 2 N^2 D operations over all ranks are one process's; a rank's own block is a whole square here."""
    products = {"contrastive gather": 4, "contrastive ring": 4, "relation_kl gather": 5, "relation_kl ring": 5}
    products |= {"relation_kl half_ring": 3 + 2 / world.size}
    for name, expected in products.items():
        operations = [each["costs"][f"{name} torch.float32"][1] for each in found(world)]
        assert sum(operations) == pytest.approx(expected * 2 * (c.B * world.size) ** 2 * c.D)
        assert max(operations) <= 1.01 * min(operations)


@pytest.mark.parametrize("world", worlds(2, 3, 4))
def test_every_rank_hears_what_is_wrong(found, world):
    told = [each["refusals"] for each in found(world)]
    for each in told:
        assert each["uneven"].startswith(
            "ValueError: contrastive loss: every rank needs the same number of rows, rank 0"
        )
        assert "rank 0 has 4, rank 1 has 5" in each["uneven"]
        assert "comm: expected one of auto, gather, ring, half_ring, got 'torus'" in each["everyone"]
        assert each["ring twice"].startswith("ValueError") and "engine.comm=gather" in each["ring twice"]
        assert "engine.comm=gather" in each["sigmoid in a ring twice"]
        assert each["third"].startswith("RuntimeError")
        assert "row cosine gather" in each["unlike"] and "rank 1 has width 8" in each["unlike"]
    assert [each["empty"].startswith("ValueError: image_emb: expected at least one row") for each in told[:2]] == [0, 1]
    assert "rank 1 refused its input: image_emb: expected at least one row" in told[0]["empty"]
    assert "rank 1 refused its input: student_temperature: expected a finite positive" in told[0]["argument"]
