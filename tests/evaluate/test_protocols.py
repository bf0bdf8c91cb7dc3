"""Protocols on small corpora: the correspondence, who is counted, blocks, chance, and what is refused."""

import dataclasses
import json

import pytest
import torch

from tests.evaluate.corpora import make_corpus
from vlscale.evaluate import EvalResult, compare, evaluate_corpus
from vlscale.evaluate.relevance import CaptionRelevance, labels, scenes
from vlscale.evaluate.tasks import Own, blocks


def shuffled(corpus, order):
    """The same corpus with its captions in another order."""
    return dataclasses.replace(
        corpus,
        text_emb=corpus.text_emb[order],
        text_image=corpus.text_image[order],
        captions=[corpus.captions[i] for i in order],
    )


def test_perfect_embeddings_find_everything():
    corpus = make_corpus(20, 2, noise=0.0)
    result = evaluate_corpus(corpus, "pairs", bootstrap=20)
    assert result["rsum"].value == pytest.approx(600) and result["t2i/mean_rank"].value == 1
    assert (result["rsum"].low, result["rsum"].high) == (pytest.approx(600), pytest.approx(600))


def test_embeddings_that_say_nothing_score_chance():
    corpus = make_corpus(20, 2)
    flat = dataclasses.replace(
        corpus, image_emb=torch.ones_like(corpus.image_emb) / 4, text_emb=torch.ones_like(corpus.text_emb) / 4
    )
    result = evaluate_corpus(flat, "pairs", bootstrap=0)
    for name in ("i2t/r@1", "i2t/r@10", "t2i/r@5", "i2t/mean_rank", "rsum"):
        assert result[name].value == pytest.approx(result[name].chance), name
    assert result["t2i/r@5"].chance == pytest.approx(100 * 5 / 20)
    assert result["rsum"].low is None


def test_any_number_of_captions_in_any_order():
    whole = make_corpus(30, 3)
    kept = torch.tensor([place for place in range(90) if place % 7])
    uneven = shuffled(whole, kept)
    turned = shuffled(uneven, torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)))
    first, second = (evaluate_corpus(c, "pairs", bootstrap=0) for c in (uneven, turned))
    assert first.captions == len(kept)
    for name, measure in first.metrics.items():
        assert second[name].value == pytest.approx(measure.value, abs=1e-4), name


def test_an_image_without_captions_is_searched_but_does_not_ask():
    corpus = make_corpus(20, 2)
    silent = shuffled(corpus, torch.arange(2, 40))
    result = evaluate_corpus(silent, "pairs", bootstrap=10)
    assert (result.images, result["i2t/r@1"].queries, result["t2i/r@1"].queries) == (20, 19, 38)


def test_recalls_by_hand():
    # 12 images on a circle; each caption lies between its image and the next, nearer to the next
    angle = torch.arange(12) * 2 * torch.pi / 12
    caption = angle + 0.6 * 2 * torch.pi / 12
    corpus = dataclasses.replace(
        make_corpus(12, 1),
        image_emb=torch.stack([angle.cos(), angle.sin()], 1),
        text_emb=torch.stack([caption.cos(), caption.sin()], 1),
    )
    result = evaluate_corpus(corpus, "pairs", bootstrap=0)
    assert [result[f"t2i/r@{k}"].value for k in (1, 5, 10)] == [0, 100, 100]
    assert result["t2i/median_rank"].value == 2
    assert result["i2t/mean_rank"].value == 2  # the caption before is 0.4 away, its own 0.6


def test_auto_takes_what_the_corpus_has(synthetic):
    plain = make_corpus(20, 2, meta=[{"kind": i % 3} for i in range(20)])
    assert evaluate_corpus(synthetic, bootstrap=0).protocol == "synthetic"
    assert evaluate_corpus(plain, bootstrap=0).protocol == "pairs"
    assert evaluate_corpus(plain, labels=["kind"], bootstrap=0).protocol == "labels"


def test_synthetic_has_every_column_and_blocks_change_nothing(synthetic, monkeypatch):
    whole = evaluate_corpus(synthetic, bootstrap=0)
    for task in ("i2i", "t2t", "i2it", "t2it"):
        for column in ("ndcg@10", "ndcg@50", "ndcg@10_norm", "ndcg@10_paper"):
            assert f"{task}/{column}" in whole.metrics
        fixed = whole[f"{task}/ndcg@10"]
        over_chance = (fixed.value - fixed.chance) / (100 - fixed.chance) * 100
        assert whole[f"{task}/ndcg@10_norm"].value == pytest.approx(over_chance)
    monkeypatch.setattr("vlscale.evaluate.tasks.BLOCK_NUMBERS", 700)
    monkeypatch.setattr("vlscale.evaluate.relevance.KEPT_WHOLE", 0)
    for name, measure in evaluate_corpus(synthetic, bootstrap=0).metrics.items():
        assert measure.value == pytest.approx(whole[name].value, abs=1e-3), name


def test_a_ranking_by_true_relevance_is_ideal(synthetic):
    """Embeddings whose cosines are the relevance itself: eigenvectors of a table that is made positive."""
    relevance = scenes(synthetic.meta, synthetic.text_image).i2i(torch.arange(60)).double()
    table = relevance / 2 + torch.eye(60) / 2  # the same order, and positive definite
    values, vectors = torch.linalg.eigh(table)
    assert values.min() > 0
    emb = (vectors * values.sqrt()).float()
    ideal = dataclasses.replace(synthetic, image_emb=emb, text_emb=emb[synthetic.text_image])
    result = evaluate_corpus(ideal, bootstrap=0)
    for task in ("i2i", "t2t", "i2it", "t2it"):
        assert result[f"{task}/ndcg@10_norm"].value == pytest.approx(100, abs=0.01), task


def test_the_query_and_on_request_its_sample_are_out_of_the_gallery(synthetic):
    relevance = scenes(synthetic.meta, synthetic.text_image)

    def excluded(task, own):
        block = next(iter(blocks(synthetic, task, relevance, own, torch.tensor([3]))))
        return sorted(block.exclude[0][block.exclude[0] >= 0].tolist())

    assert excluded("i2i", Own.KEPT) == [3]
    assert excluded("t2t", Own.KEPT) == [3]
    assert excluded("t2t", Own.OTHERS) == [2, 3]
    assert excluded("i2it", Own.OTHERS) == [3, 60 + 6, 60 + 7]
    assert excluded("t2it", Own.KEPT) == [60 + 3]
    assert excluded("t2it", Own.OTHERS) == [1, 60 + 2, 60 + 3]
    assert excluded("i2t", Own.KEPT) == []


def test_labels_count_only_queries_with_another_sample_of_the_label():
    meta = [{"concept": ["a", "a", "b", "b", "c", None][i % 6] if i < 12 else f"alone {i}"} for i in range(30)]
    result = evaluate_corpus(make_corpus(30, 2, meta=meta), "labels", ["concept"], bootstrap=10)
    assert result["concept:i2i/r@1"].queries == 10  # a: 4, b: 4, c: 2; None and the others have no partner
    assert result["concept:t2t/ndcg@10_norm"].queries == 20
    assert any("20 of 30 samples" in note for note in result.notes)


def test_label_chance_is_what_a_model_without_knowledge_scores():
    meta = [{"kind": i % 4} for i in range(24)]
    corpus = make_corpus(24, 2, meta=meta)
    flat = dataclasses.replace(
        corpus, image_emb=torch.ones_like(corpus.image_emb) / 4, text_emb=torch.ones_like(corpus.text_emb) / 4
    )
    result = evaluate_corpus(flat, "labels", ["kind"], bootstrap=0)
    for name in ("i2i/r@1", "t2t/r@5", "i2t/r@1", "t2i/r@10", "i2i/ndcg@10", "t2it/ndcg@10"):
        measure = result[f"kind:{name}"]
        assert measure.value == pytest.approx(measure.chance, abs=1e-3), name


def test_caption_relevance_reads_the_table_both_ways():
    text_image = torch.tensor([0, 0, 1])
    relevance = CaptionRelevance(torch.tensor([[1.0, 0.2], [0.8, 0.4], [0.3, 1.0]]), text_image)
    assert relevance.t2i(torch.tensor([1])).tolist() == [pytest.approx([0.8, 0.4])]
    assert relevance.i2t(torch.tensor([1])).tolist() == [pytest.approx([0.2, 0.4, 1.0])]
    assert relevance.t2t(torch.tensor([2])).tolist() == [pytest.approx([0.3, 0.3, 1.0])]
    assert relevance.i2i(torch.tensor([0])).tolist() == [pytest.approx([0.9, 0.3])]


def test_results_survive_json_and_compare_pairwise(synthetic):
    first = evaluate_corpus(synthetic, bootstrap=50)
    better = dataclasses.replace(synthetic, text_emb=synthetic.image_emb[synthetic.text_image])
    second = evaluate_corpus(better, bootstrap=50)
    difference = compare(first, second, "rsum")
    assert difference.value == pytest.approx(second["rsum"].value - first["rsum"].value)
    assert difference.sure and difference.low <= difference.value <= difference.high
    assert not compare(first, first, "rsum").sure
    read = EvalResult.from_json(json.dumps({"step": 7} | json.loads(first.to_json())))
    assert read.metrics == first.metrics and read.notes == first.notes
    assert compare(read, second, "rsum").low is None  # intervals of differences are not in the file


def test_every_interval_holds_its_value(synthetic):
    result = evaluate_corpus(synthetic, bootstrap=200)
    for name, measure in result.metrics.items():
        assert measure.low <= measure.value <= measure.high, name
        assert len(result.replicates[name]) == 200


def test_small_galleries_shorten_the_cutoffs_with_a_note(scene_meta):
    result = evaluate_corpus(make_corpus(30, 1, meta=scene_meta[:30]), bootstrap=0)
    assert "i2i/ndcg@20" in result.metrics and "i2i/ndcg@50" not in result.metrics
    assert result.notes == ["NDCG@50 not measured: a query has only 29 other items to rank"]


@pytest.mark.parametrize(
    "corpus, protocol, names, message",
    [
        (make_corpus(9, 2), "pairs", [], "R@10 needs a gallery of at least 10 images and 10 captions, got 9 and 18"),
        (make_corpus(10, 1, meta=[{"kind": 1}] * 10), "labels", ["kind"], "NDCG@10 needs 10 other.*got 9"),
        (make_corpus(20, 2), "synthetic", [], "20 of 20 have none"),
        (make_corpus(20, 2), "labels", [], "needs at least one json field"),
        (
            make_corpus(20, 2, meta=[{"kind": 1}] * 20),
            "labels",
            ["kin"],
            "'kin' is in no sample's json; choose from: kind",
        ),
        (make_corpus(20, 2, meta=[{"kind": i} for i in range(20)]), "labels", ["kind"], "no two of the 20 samples"),
        (make_corpus(20, 2), "flickr", [], "protocol 'flickr' is unknown; choose from: auto, pairs"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(corpus, protocol, names, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate_corpus(corpus, protocol, names)
    assert "\n" not in str(error.value)


def test_a_caption_of_no_image_is_refused():
    corpus = make_corpus(20, 1)
    with pytest.raises(ValueError, match="images 0 to 20, but there are 20 images"):
        evaluate_corpus(dataclasses.replace(corpus, text_image=torch.cat([corpus.text_image[:-1], torch.tensor([20])])))


def test_repeated_keys_and_embeddings_that_are_no_numbers_are_refused():
    corpus = make_corpus(20, 1)
    with pytest.raises(ValueError, match=r"2 sample keys stand for more than one sample \(a, b\)"):
        evaluate_corpus(dataclasses.replace(corpus, keys=["a", "b", "a", "b", *corpus.keys[4:]]))
    broken = corpus.text_emb.clone()
    broken[[3, 7], 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match=r"2 of 20 text embeddings are not finite \(samples sample-3, sample-7\)"):
        evaluate_corpus(dataclasses.replace(corpus, text_emb=broken))
    with pytest.raises(ValueError, match=r"20 of 20 image .* \(samples sample-0, .*2, \.{3}\)") as error:
        evaluate_corpus(dataclasses.replace(corpus, image_emb=corpus.image_emb * torch.nan))
    assert "\n" not in str(error.value)


def test_missing_labels_match_nobody():
    relevance = labels([{"kind": 1}, {}, {"kind": 1}, {}], "kind", torch.arange(4))
    assert relevance.i2i(torch.arange(4)).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
