"""The order after re-ranking against plain tables: what was scored and what was not, ties, both columns, one scale."""

import dataclasses

import pytest
import torch

from tests.evaluate.corpora import make_corpus
from vlscale.evaluate import EvalResult, evaluate_corpus
from vlscale.evaluate.metrics import Ranks, best_positive
from vlscale.evaluate.protocols import cross_columns
from vlscale.evaluate.reranked import NOT_SCORED, Candidates, Reranked
from vlscale.evaluate.table import markdown
from vlscale.kernels import retrieval_ranks, topk_neighbors

ABOVE = 1000.0  # over every cosine


def drawn(queries: int, gallery: int, k: int, seed: int):
    """Cosines (Q, G) with many ties, candidates as the kernel chooses them, logits with ties, positives (Q, 2)."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.randint(-4, 5, (queries, gallery), generator=generator) / 4.0
    _, items = topk_neighbors(cosines, torch.eye(gallery), k)
    logits = torch.randint(-3, 4, (queries, k, 2), generator=generator).float()
    positives = torch.stack([torch.randperm(gallery, generator=generator)[:2] for _ in range(queries)])
    positives[::3, 1] = -1
    return cosines, Candidates(items, logits), positives


def is_positive(positives: torch.Tensor, gallery: int) -> torch.Tensor:
    table = torch.zeros(len(positives), gallery + 1, dtype=torch.bool)
    return table.scatter(1, torch.where(positives < 0, gallery, positives), True)[:, :gallery]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_ranks_are_those_of_a_table_with_the_scored_above_the_rest(k):
    cosines, candidates, positives = drawn(200, 12, k, seed=k)
    table = cosines.double().scatter(1, candidates.items, ABOVE + candidates.log_odds)
    truth = best_positive(table, is_positive(positives, 12))
    dual = Ranks(*retrieval_ranks(cosines, torch.eye(12), positives))
    found = candidates.ranks(positives, dual)
    for name in ("above", "tied", "same"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert (truth.tied > 0).any() and (truth.above >= k).any() == (k < 12)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_paper_ranks_are_those_of_raw_logits_with_the_rest_at_minus_100(k):
    _, candidates, positives = drawn(200, 12, k, seed=k)
    truth = best_positive(candidates.paper_scores(12), is_positive(positives, 12))
    found = candidates.paper_ranks(positives, 12)
    for name in ("above", "tied", "same"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert (candidates.paper_scores(12) == NOT_SCORED).sum() == 200 * (12 - k)


def test_on_the_scale_of_cosines_matching_only_permutes():
    cosines, candidates, positives = drawn(200, 12, 5, seed=0)
    table = candidates.on_cosines(cosines)
    order = cosines.double().scatter(1, candidates.items, ABOVE + candidates.log_odds)
    truth = best_positive(order, is_positive(positives, 12))
    found = best_positive(table, is_positive(positives, 12))
    for name in ("above", "tied", "same"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    untouched = torch.ones_like(cosines, dtype=torch.bool).scatter(1, candidates.items, False)
    assert torch.equal(table[untouched], cosines.double()[untouched])
    torch.testing.assert_close(table.sum(1), cosines.double().sum(1), rtol=0, atol=1e-9)


def test_in_a_gallery_of_both_by_hand():
    """A picture asks; captions 0 to 3 lie at .8 .6 .4 .2, pictures at .7 .5; of the first three matching prefers 2,
    and finds 0 and 1 alike. Caption 2 takes .8; 0 and 1 share the mean of .6 and .4; caption 3 was not scored."""
    candidates = Candidates(torch.tensor([[0, 1, 2]]), torch.tensor([[[0.0, 1.0], [2.0, 3.0], [0.0, 9.0]]]))
    images = Candidates(torch.tensor([[0]] * 4), torch.zeros(4, 1, 2))
    both = Reranked(Candidates(candidates.items.expand(2, 3), candidates.logits.expand(2, 3, 2)), images, pairs=6)
    cosines = torch.tensor([[0.7, 0.5, 0.8, 0.6, 0.4, 0.2]])
    found = both.rescored("i2it", torch.tensor([0]), cosines)
    assert found[0].tolist() == pytest.approx([0.7, 0.5, 0.5, 0.5, 0.8, 0.2])
    assert both.rescored("i2i", torch.tensor([0]), cosines) is cosines


def reranked(corpus, k: int, generator: torch.Generator | None = None) -> Reranked:
    """What a fusion encoder that knows which belong together would say; with a generator, one that knows nothing."""
    owner = corpus.text_image
    sides = []
    for query, gallery, own in (
        (corpus.image_emb, corpus.text_emb, lambda items: owner[items] == torch.arange(len(items))[:, None]),
        (corpus.text_emb, corpus.image_emb, lambda items: items == owner[:, None]),
    ):
        _, items = topk_neighbors(query, gallery, k)
        odds = own(items).float() if generator is None else torch.randn(items.shape, generator=generator)
        sides.append(Candidates(items, torch.stack([torch.zeros_like(odds), odds], 2)))
    return Reranked(*sides, pairs=1)


def test_a_perfect_matcher_finds_first_whatever_lies_among_the_candidates():
    corpus = make_corpus(60, 2, noise=1.2)
    dual = evaluate_corpus(corpus, "pairs", bootstrap=0)
    result = evaluate_corpus(dataclasses.replace(corpus, reranked=reranked(corpus, 10)), "pairs", bootstrap=20)
    assert dual["i2t/r@1"].value < dual["i2t/r@10"].value < 100
    for task in ("i2t", "t2i"):
        for column in ("r@1", "r@5", "r@10", "r@1_paper", "r@10_paper"):
            assert result[f"reranked:{task}/{column}"].value == pytest.approx(dual[f"{task}/r@10"].value)
    assert result["reranked:rsum"].value == pytest.approx(3 * (dual["i2t/r@10"].value + dual["t2i/r@10"].value))
    assert {name: m.value for name, m in result.split()[0].metrics.items()} == {
        name: m.value for name, m in dual.metrics.items()
    }
    assert result.rerank == 10 and "the 10 nearest of every query" in result.notes[-1]


def test_matching_of_everything_by_chance_scores_chance():
    corpus = make_corpus(40, 2, noise=0.3)
    table = reranked(corpus, 40, torch.Generator().manual_seed(0))
    columns = cross_columns(dataclasses.replace(corpus, reranked=table))
    assert columns["t2i/r@10"][0].mean() > 0.9 > 0.45 > columns["reranked:t2i/r@10"][0].mean() > 0.1


def test_mixed_retrieval_gains_from_a_perfect_matcher_and_single_modal_stays(synthetic):
    result = evaluate_corpus(dataclasses.replace(synthetic, reranked=reranked(synthetic, 20)), bootstrap=0)
    dual, again = result.split()
    for task in ("i2it", "t2it"):
        assert again[f"{task}/ndcg@10"].value > dual[f"{task}/ndcg@10"].value
        assert again[f"{task}/ndcg@10_paper"].value != dual[f"{task}/ndcg@10_paper"].value
        assert again[f"{task}/own_modality@10"].chance == dual[f"{task}/own_modality@10"].chance
    assert "reranked:i2i/ndcg@10" not in result.metrics and again["i2i/ndcg@10"] == dual["i2i/ndcg@10"]
    text = markdown({"mine": result})
    assert "| mine, re-ranked 20 |" in text and "as by the papers' own code (paper): raw matching logits" in text
    assert EvalResult.from_json(result.to_json()).split()[1]["rsum"] == again["rsum"]


def test_labels_are_measured_again_too():
    meta = [{"kind": i % 4} for i in range(24)]
    corpus = make_corpus(24, 2, meta=meta)
    corpus = dataclasses.replace(corpus, reranked=reranked(corpus, 12))
    result = evaluate_corpus(corpus, "labels", ["kind"], bootstrap=0)
    assert {"reranked:kind:i2t/r@1", "reranked:kind:i2it/ndcg@10_norm"} <= result.metrics.keys()
    assert "reranked:kind:t2t/r@1" not in result.metrics


def test_a_fold_keeps_its_own_candidates():
    corpus = make_corpus(6, 2)
    i2t = Candidates(corpus.text_image.argsort().view(6, 2), torch.randn(6, 2, 2))
    t2i = Candidates(corpus.text_image[:, None], torch.randn(12, 1, 2))
    captions = torch.arange(4, 8)
    fold = Reranked(i2t, t2i, 12).inside(slice(2, 4), captions)
    assert fold.i2t.items.tolist() == [[0, 1], [2, 3]] and fold.t2i.items.tolist() == [[0], [0], [1], [1]]
    assert torch.equal(fold.t2i.logits, t2i.logits[4:8])
