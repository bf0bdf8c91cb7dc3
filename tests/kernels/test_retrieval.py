"""Ranks and neighbours: hand-made tables first, then random ones against the dense definition."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from tests.kernels import cases as k
from tests.kernels.live_bytes import LiveBytes
from vlscale.kernels import chunked_retrieval, retrieval_ranks, topk_neighbors

IMPLS = ["reference", "chunked", *(["triton"] if find_spec("triton") else [])]
GALLERY = torch.tensor([[1.0], [3.0], [2.0], [3.0], [0.0]])
QUERY = torch.tensor([[1.0]])


@pytest.fixture
def ragged(monkeypatch):
    """Blocks that leave several, with ragged ends, of small tables, and newcomers that are ordered often."""
    for name, value in {"QUERIES": 16, "BLOCK": 40, "TILE": 16 * 40, "GROUP": 8, "PENDING": 64}.items():
        monkeypatch.setattr(chunked_retrieval, name, value)


def placed(impl, *tensors):
    """For `triton` on the GPU where there is one, else in the interpreter."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    return [None if t is None else t.to(device) for t in tensors]


def ranks(query, gallery, positives, exclude=None, impl="chunked"):
    query, gallery, positives, exclude = placed(impl, query, gallery, positives, exclude)
    return [v.cpu() for v in retrieval_ranks(query, gallery, positives, exclude=exclude, impl=impl)]


def neighbours(query, gallery, k, exclude=None, impl="chunked"):
    query, gallery, exclude = placed(impl, query, gallery, exclude)
    return [v.cpu() for v in topk_neighbors(query, gallery, k, exclude=exclude, impl=impl)]


def counts(positives, exclude=None, impl="chunked", query=QUERY, gallery=GALLERY):
    left_out = None if exclude is None else torch.tensor([exclude])
    return tuple(int(v) for v in ranks(query, gallery, torch.tensor([positives]), left_out, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_ranks_by_hand(impl):
    assert counts([2], impl=impl) == (2, 0, 1)  # both threes beat the two
    assert counts([1], impl=impl) == (0, 1, 1)  # the other three ties
    assert counts([1, 3], impl=impl) == (0, 0, 2)  # both threes are positives
    assert counts([4, 2, -1], impl=impl) == (2, 0, 1)  # the best positive counts, padding does not
    assert counts([2, 2], impl=impl) == (2, 0, 1)  # listed twice is one positive
    assert counts([2], [1, -1], impl=impl) == (1, 0, 1)  # an excluded row beats nobody
    assert counts([1, 2], [1, 3], impl=impl) == (0, 0, 1)  # nor is it a positive
    assert counts([-1], impl=impl) == (5, 0, 0)  # nothing to find: everything is above


@pytest.mark.parametrize("impl", IMPLS)
def test_neighbours_by_hand(impl):
    scores, indices = neighbours(QUERY, GALLERY, 5, impl=impl)
    assert scores.tolist() == [[3, 3, 2, 1, 0]] and indices.tolist() == [[1, 3, 2, 0, 4]]
    scores, indices = neighbours(QUERY, GALLERY, 4, torch.tensor([[1, 2, -1]]), impl)
    assert indices.tolist() == [[3, 0, 4, -1]] and scores.tolist() == [[3, 1, 0, -torch.inf]]


def same_as_reference(query, gallery, sizes, impl, positives=None, exclude=None):
    if positives is not None:
        truth, got = (ranks(query, gallery, positives, exclude, i) for i in ("reference", impl))
        assert all(torch.equal(a, b) for a, b in zip(truth, got, strict=True))
    for size in sizes:
        truth, got = (neighbours(query, gallery, size, exclude, i) for i in ("reference", impl))
        torch.testing.assert_close(got[0], truth[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[1], truth[1]), size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [3, 60])
@pytest.mark.parametrize("call", ["ranks", "neighbours"])
def test_a_gallery_of_16_bits_is_widened_block_by_block(ragged, dtype, queries, call):
    """One of a hundred million rows has no room beside it for a float32 copy."""
    query, gallery = (torch.randint(-2, 3, (n, 64)).to(dtype) for n in (queries, 20000))
    own = torch.arange(queries)[:, None]
    with LiveBytes(query, gallery, own) as seen:
        retrieval_ranks(query, gallery, own) if call == "ranks" else topk_neighbors(query, gallery, 5, exclude=own)
    assert seen.peak < gallery.numel()  # bytes: a quarter of the copy
    same_as_reference(query, gallery, (5,), "chunked", own, own + 100)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("queries", [1, 3, 53])
@pytest.mark.parametrize("with_exclusions", [False, True])
def test_random_tables_with_many_ties(ragged, impl, queries, with_exclusions):
    """Small integers: products are exact, so ties are exact and every implementation agrees to the last one.

    The tables are strided views, as callers have them.
    """
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (queries, 211))
    positives = torch.randint(-1, 211, (4, queries), generator=generator).T
    exclude = torch.randint(-1, 211, (7, queries), generator=generator).T if with_exclusions else None
    sizes = (10,) if impl == "triton" else (1, 10, 211)
    same_as_reference(query, gallery, sizes, impl, positives, exclude)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_galleries_in_the_worst_order(ragged, impl):
    """Every row beats all before it, and then none does."""
    gallery = torch.arange(150.0)[:, None]
    for rows in (gallery, gallery.flip(0)):
        same_as_reference(torch.tensor([[1.0], [2.0], [0.0]]), rows, (1, 7), impl)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_zeros_infinities_and_nan_are_ordered_as_torch_sorts(ragged, impl):
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0, 1e-40, -torch.nan, 5.0]
    gallery = torch.tensor(special * 5)[:, None]
    same_as_reference(QUERY, gallery, (4, 45), impl, torch.tensor([[8, 0]]), torch.tensor([[2, 4]]))


def test_triton_in_waves_of_rows_and_several_passes():
    """Two waves of rows, tiles higher than wide, three splits of the gallery, and 9 neighbours found 4 at a time."""
    pytest.importorskip("triton")
    from vlscale.kernels.triton_tiles import INTERPRETED

    from vlscale.kernels import reference, triton_retrieval

    generator = torch.Generator().manual_seed(1)
    query, gallery = (torch.randint(-2, 3, (n, 40), generator=generator).float() for n in (80, 300))
    exclude = torch.randint(-1, 300, (80, 3), generator=generator)
    on_device = placed("triton", query, gallery, exclude)
    config = replace(INTERPRETED, block_m=64, block_n=32, wave_rows=64, splits=3)
    got = triton_retrieval.topk_neighbors(*on_device[:2], 9, on_device[2], config, kept=4)
    for truth, value in zip(reference.topk_neighbors(query, gallery, 9, exclude), got, strict=True):
        assert torch.equal(truth, value.cpu())
    got = triton_retrieval.retrieval_ranks(*on_device, on_device[2][:, :1], config)
    for truth, value in zip(reference.retrieval_ranks(query, gallery, exclude, exclude[:, :1]), got, strict=True):
        assert torch.equal(truth, value.cpu())


def test_what_triton_leaves_to_the_chunked_tiles():
    """More neighbours than a few passes find, and float64."""
    pytest.importorskip("triton")
    gallery = torch.arange(600.0)[:, None]
    assert neighbours(QUERY, gallery, 520, impl="triton")[1][0].tolist() == list(range(599, 79, -1))
    assert neighbours(QUERY.double(), gallery.double(), 3, impl="triton")[0].dtype == torch.float64
    assert ranks(QUERY.double(), gallery.double(), torch.tensor([[597]]), impl="triton")[0].item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [3, 300])
def test_copies_of_a_row_tie_wherever_they_stand(dtype, queries):
    """Equal rows have to have equal scores in every tile and position, whatever the width does to the rounding."""
    query = k.embeddings("random", 300, 100)[0].to(dtype)
    copies_are_found(query[:queries], query[torch.randperm(9000, generator=torch.Generator().manual_seed(2)) % 300], 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="numpy's products, the interpreter's, round by place")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_a_row_tie_in_triton(dtype):
    query = k.embeddings("random", 300, 100)[0].to(dtype)
    gallery = query[torch.randperm(9000, generator=torch.Generator().manual_seed(2)) % 300]
    copies_are_found(query, gallery, 30, "triton")


def copies_are_found(query, gallery, amount, impl="chunked"):
    copies = torch.stack([(gallery == row).all(1).nonzero()[:, 0] for row in query])
    above, tied, same = ranks(query, gallery, copies[:, :1], impl=impl)
    assert above.sum() == 0 and (tied == amount - 1).all() and (same == 1).all()
    assert torch.equal(neighbours(query, gallery, amount, impl=impl)[1], copies)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_nan_scores_come_last_for_ranks_and_never_hang(impl):
    gallery = GALLERY.clone()
    gallery[4] = torch.nan
    assert counts([2], gallery=gallery, impl=impl) == counts([2], gallery=gallery, impl="reference") == (3, 0, 1)
    assert counts([4], gallery=gallery, impl=impl)[0] == counts([4], gallery=gallery, impl="reference")[0] == 4
    assert neighbours(QUERY, gallery, 2, impl=impl)[0][0, 0].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_neighbors(QUERY, GALLERY, 6), "k: expected an integer 1 to 5, the size of the gallery, got 6"),
        (lambda: topk_neighbors(QUERY, GALLERY, 0), "k: expected an integer 1 to 5"),
        (lambda: topk_neighbors(QUERY, torch.ones(5, 2), 1), "gallery_emb: expected width 1 as query_emb, got 2"),
        (
            lambda: retrieval_ranks(QUERY, GALLERY, torch.zeros(2, 1)),
            r"positives: expected a tensor \(1, P\).*\(2, 1\)",
        ),
        (lambda: retrieval_ranks(QUERY, GALLERY, torch.zeros(1, 1)), "positives: expected int64, got torch.float32"),
        (lambda: retrieval_ranks(QUERY, GALLERY, None), "positives: expected a tensor"),
        (
            lambda: retrieval_ranks(QUERY, GALLERY, torch.tensor([[0, 5]])),
            "positives: expected gallery indices 0 to 4, or -1 as padding, got 5",
        ),
        (lambda: topk_neighbors(QUERY, GALLERY, 1, exclude=torch.tensor([[-2]])), "exclude: expected .*got -2"),
        (lambda: topk_neighbors(QUERY, GALLERY, 1, exclude=torch.zeros(1)), "exclude: expected a tensor"),
        (lambda: topk_neighbors(QUERY, GALLERY[:0], 1), "gallery_emb: expected at least one row"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
