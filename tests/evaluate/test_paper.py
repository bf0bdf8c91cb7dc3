"""The papers' column against a plain query-by-query rendering of what their evaluation does."""

import numpy as np
import pytest
import torch

from tests.evaluate.corpora import make_corpus
from vlscale.evaluate.paper import first_captions, paper_columns
from vlscale.evaluate.relevance import CaptionRelevance

K = 10


def plain_ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Mean over rows; a row without anything relevant counts as 0."""
    values = []
    for row, gains in zip(scores, relevance, strict=True):
        order = np.argsort(-row, kind="stable")[:K]
        discounts = np.log2(np.arange(K) + 2)
        ideal = (np.sort(gains)[::-1][:K] / discounts).sum()
        values.append((gains[order] / discounts).sum() / ideal if ideal > 0 else 0.0)
    return float(np.mean(values))


@pytest.fixture(scope="module")
def tables():
    """24 images, 3 captions each, and relevance of every caption to every image, not symmetric."""
    corpus = make_corpus(24, 3, noise=0.7, seed=3)
    table = torch.rand(72, 24, generator=torch.Generator().manual_seed(4))
    table[torch.arange(72), corpus.text_image] = 1.0
    return corpus, table


def test_columns_equal_the_plain_rendering(tables):
    corpus, table = tables
    found = paper_columns(corpus, CaptionRelevance(table, corpus.text_image), (K,))
    relevance = table.numpy()
    image, text = corpus.image_emb.numpy(), corpus.text_emb.numpy()
    first = np.arange(24) * 3

    scores, gains = image @ image.T, relevance[first].copy()
    np.fill_diagonal(scores, 0)
    np.fill_diagonal(gains, 0)
    assert found["i2i/ndcg@10_paper"][0].mean() == pytest.approx(plain_ndcg(scores, gains), abs=1e-6)

    scores, gains = text[first] @ text.T, relevance.T.copy()
    scores[np.arange(24), first] = 0
    gains[np.arange(24), first] = 0
    assert found["t2t/ndcg@10_paper"][0].mean() == pytest.approx(plain_ndcg(scores, gains), abs=1e-6)

    scores = np.hstack([image @ image.T, image @ text.T])
    gains = np.hstack([relevance[first], relevance.T])
    assert found["i2it/ndcg@10_paper"][0].mean() == pytest.approx(plain_ndcg(scores, gains), abs=1e-6)

    caption_to_image = text @ image.T
    scores = np.hstack([text[first] @ text.T, caption_to_image.T[:, first]])
    gains = np.hstack([relevance.T, relevance[first].T])
    assert found["t2it/ndcg@10_paper"][0].mean() == pytest.approx(plain_ndcg(scores, gains), abs=1e-6)


def test_blocks_change_nothing(tables, monkeypatch):
    corpus, table = tables
    relevance = CaptionRelevance(table, corpus.text_image)
    whole = paper_columns(corpus, relevance, (5, K))
    monkeypatch.setattr("vlscale.evaluate.paper.BLOCK_NUMBERS", 500)
    for name, (values, _) in paper_columns(corpus, relevance, (5, K)).items():
        assert values == pytest.approx(whole[name][0], abs=1e-6), name


def test_the_query_in_its_own_mixed_gallery_flatters(tables):
    corpus, table = tables
    found = paper_columns(corpus, CaptionRelevance(table, corpus.text_image), (1,))
    assert (found["i2it/ndcg@1_paper"][0] == 1).all()  # it finds itself


def test_chance_is_what_random_embeddings_score(tables):
    _, table = tables
    values, chances = [], []
    for seed in range(60):
        corpus = make_corpus(24, 3, noise=50.0, seed=seed)
        found = paper_columns(corpus, CaptionRelevance(table, corpus.text_image), (K,))
        values.append(found["t2t/ndcg@10_paper"][0].mean())
        chances.append(found["t2t/ndcg@10_paper/chance"][0].mean())
    assert np.ptp(chances) < 1e-9
    assert np.mean(values) == pytest.approx(chances[0], abs=0.02)


def test_first_captions():
    assert first_captions(torch.tensor([2, 0, 0, 2]), 4).tolist() == [1, -1, 0, -1]
