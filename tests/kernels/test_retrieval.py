"""Ranks and neighbours: hand-made tables first, then random ones against the dense definition."""

import pytest
import torch

from tests.kernels import cases as k
from vlscale.kernels import chunked_retrieval, retrieval_ranks, topk_neighbors

IMPLS = ["reference", "chunked"]
GALLERY = torch.tensor([[1.0], [3.0], [2.0], [3.0], [0.0]])
QUERY = torch.tensor([[1.0]])


@pytest.fixture
def ragged(monkeypatch):
    """Blocks that leave several, with ragged ends, of small tables."""
    monkeypatch.setattr(chunked_retrieval, "QUERIES", 16)
    monkeypatch.setattr(chunked_retrieval, "GALLERY", 40)
    monkeypatch.setattr(chunked_retrieval, "GROUP", 8)


def counts(positives, exclude=None, impl="chunked", query=QUERY, gallery=GALLERY):
    table = torch.tensor([positives])
    left_out = None if exclude is None else torch.tensor([exclude])
    return tuple(int(v) for v in retrieval_ranks(query, gallery, table, exclude=left_out, impl=impl))


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
    scores, indices = topk_neighbors(QUERY, GALLERY, 5, impl=impl)
    assert scores.tolist() == [[3, 3, 2, 1, 0]] and indices.tolist() == [[1, 3, 2, 0, 4]]
    scores, indices = topk_neighbors(QUERY, GALLERY, 4, exclude=torch.tensor([[1, 2, -1]]), impl=impl)
    assert indices.tolist() == [[3, 0, 4, -1]] and scores.tolist() == [[3, 1, 0, -torch.inf]]


@pytest.mark.parametrize("with_exclusions", [False, True])
def test_random_tables_with_many_ties(ragged, with_exclusions):
    """Small integers: products are exact, so ties are exact and every implementation agrees to the last one."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (n, 3), generator=generator).float() for n in (53, 211))
    positives = torch.randint(-1, 211, (53, 4), generator=generator)
    exclude = torch.randint(-1, 211, (53, 7), generator=generator) if with_exclusions else None
    dense, tiled = (retrieval_ranks(query, gallery, positives, exclude=exclude, impl=impl) for impl in IMPLS)
    for a, b in zip(dense, tiled, strict=True):
        assert torch.equal(a, b)
    for size in (1, 10, 100, 211):
        dense, tiled = (topk_neighbors(query, gallery, size, exclude=exclude, impl=impl) for impl in IMPLS)
        assert torch.equal(dense[0], tiled[0]) and torch.equal(dense[1], tiled[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_copies_of_a_row_tie_wherever_they_stand(dtype):
    """Equal rows have to have equal scores in every tile and position, whatever the width does to the rounding."""
    query = k.embeddings("random", 300, 100)[0].to(dtype)
    gallery = query[torch.randperm(9000, generator=torch.Generator().manual_seed(2)) % 300]
    copies = torch.stack([(gallery == query[i]).all(1).nonzero()[:, 0] for i in range(300)])
    above, tied, same = retrieval_ranks(query, gallery, copies[:, :1])
    assert above.sum() == 0 and (tied == 29).all() and (same == 1).all()
    assert torch.equal(topk_neighbors(query, gallery, 30)[1], copies)


def test_nan_scores_come_last_for_ranks_and_never_hang():
    gallery = GALLERY.clone()
    gallery[4] = torch.nan
    assert counts([2], gallery=gallery) == counts([2], gallery=gallery, impl="reference") == (3, 0, 1)
    assert counts([4], gallery=gallery)[0] == counts([4], gallery=gallery, impl="reference")[0] == 4
    assert topk_neighbors(QUERY, gallery, 2)[0][0, 0].isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_neighbors(QUERY, GALLERY, 6), "k: expected 1 to 5, the size of the gallery, got 6"),
        (lambda: topk_neighbors(QUERY, GALLERY, 0), "k: expected 1 to 5"),
        (lambda: topk_neighbors(QUERY, torch.ones(5, 2), 1), "gallery_emb: expected width 1 as query_emb, got 2"),
        (
            lambda: retrieval_ranks(QUERY, GALLERY, torch.zeros(2, 1)),
            r"positives: expected a tensor \(1, P\).*\(2, 1\)",
        ),
        (lambda: retrieval_ranks(QUERY, GALLERY, torch.zeros(1, 1)), "positives: expected int64, got torch.float32"),
        (lambda: retrieval_ranks(QUERY, GALLERY, None), "positives: expected a tensor"),
        (lambda: topk_neighbors(QUERY, GALLERY, 1, exclude=torch.zeros(1)), "exclude: expected a tensor"),
        (lambda: topk_neighbors(QUERY, GALLERY[:0], 1), "gallery_emb: expected at least one row"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
