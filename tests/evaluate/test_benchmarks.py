"""Benchmarks of the literature: counts, folds, CxC's files, and equality with independent code where installed."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluate.corpora import make_corpus
from vlscale.evaluate import benchmarks, evaluate_corpus
from vlscale.evaluate.benchmarks import folds, identify, listed_columns
from vlscale.evaluate.protocols import relevance_of
from vlscale.evaluate.rouge import rouge_table

COLOURS = ["red", "green", "blue", "white", "black"]


def coco(images: int, captions: int, noise: float = 0.5):
    """A corpus with COCO's numbers: image n has cocoid 100 + n and sentids 1000 + its captions' places."""
    meta = [
        {"cocoid": 100 + n, "sentids": [1000 + n * captions + place for place in range(captions)]}
        for n in range(images)
    ]
    corpus = make_corpus(images, captions, noise=noise, meta=meta)
    words = [f"a {COLOURS[i % 5]} {COLOURS[i // 5 % 5]} thing {i % 7}" for i in range(images * captions)]
    return dataclasses.replace(corpus, captions=words)


def test_flickr30k_is_judged_by_rouge_and_says_that_the_counts_differ(tmp_path):
    corpus = coco(60, 2)
    result = evaluate_corpus(corpus, "flickr30k", bootstrap=10, cache=tmp_path)
    assert result.notes[0].startswith(
        "flickr30k: 60 images and 120 captions are not the benchmark's (test: 1,000 and 5,000"
    )
    assert {"i2i/ndcg@50", "t2t/ndcg@10_norm", "i2it/ndcg@10_paper", "t2it/ndcg@20_paper"} <= result.metrics.keys()
    assert len(list(tmp_path.iterdir())) == 1
    table = rouge_table(corpus.captions, corpus.text_image, 60, workers=1)
    assert torch.equal(relevance_of(corpus, result).t2i(torch.arange(120)), table)


def test_a_random_model_scores_ndcg_of_a_half_on_flickr30k():
    """0.52 in the papers' column, before anything is learnt: why the fixed column stands over chance."""
    root = Path(os.environ.get("VLSCALE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    path = root / "captions" / "flickr30k_val.json"
    if not path.is_file():
        pytest.skip("no captions/flickr30k_val.json; set VLSCALE_TEST_DATA to the folder that holds captions/")
    captions = [caption for entry in json.loads(path.read_text()) for caption in entry["caption"]]
    corpus = dataclasses.replace(make_corpus(1014, 5, noise=100.0), captions=captions)
    result = evaluate_corpus(corpus, "flickr30k", bootstrap=0)
    assert result.notes == []
    assert result["i2i/ndcg@10_paper"].value == pytest.approx(52.5, abs=1)
    assert result["i2i/ndcg@10_norm"].value == pytest.approx(0, abs=1.5)


@pytest.mark.parametrize("name, images, captions", [("flickr30k", 1014, 5070), ("coco-5k", 5000, 25010)])
def test_the_right_counts_need_no_note(name, images, captions):
    corpus = dataclasses.replace(make_corpus(10, 1), keys=["k"] * images, captions=["c"] * captions)
    notes: list[str] = []
    benchmarks.check_counts(name, corpus, notes)
    assert notes == []


def test_coco_1k_is_the_mean_of_its_folds(monkeypatch):
    monkeypatch.setattr("vlscale.evaluate.benchmarks.FOLD", 40)
    corpus = coco(130, 2, noise=1.0)  # three folds and a rest of ten
    parts = list(folds(corpus))
    assert [len(part.keys) for part in parts] == [40, 40, 40] and parts[2].captions[0] == corpus.captions[160]
    assert torch.equal(parts[1].image_emb, corpus.image_emb[40:80]) and parts[1].keys == corpus.keys[40:80]
    assert torch.equal(parts[1].text_emb, corpus.text_emb[80:160]) and parts[1].text_image.tolist()[:3] == [0, 0, 1]
    whole = evaluate_corpus(corpus, "coco-1k", bootstrap=10)
    for name in ("rsum", "t2i/r@1", "i2t/mean_rank"):
        by_fold = [evaluate_corpus(part, "pairs", bootstrap=0)[name].value for part in parts]
        assert whole[name].value == pytest.approx(np.mean(by_fold)), name
    assert "t2t/ndcg@10_norm" in whole.metrics


def test_coco_1k_needs_a_fold():
    with pytest.raises(ValueError, match="folds of 1,000 images, got 60"):
        evaluate_corpus(coco(60, 2), "coco-1k")


@pytest.fixture
def rated(tmp_path):
    """Image 0 is like image 1 (4.5) and not like image 2; caption 0 (image 0) like caption 6 (image 3)."""
    (tmp_path / "sis_val.csv").write_text(
        "image1,image2,agg_score,sampling_method\n"
        "COCO_val2014_000000000100.jpg,COCO_val2014_000000000101.jpg,4.5,x\n"
        "COCO_val2014_000000000100.jpg,COCO_val2014_000000000102.jpg,0.5,x\n"
        "COCO_val2014_000000000103.jpg,COCO_val2014_000000000104.jpg,1.5,x\n"
        "COCO_val2014_000000000103.jpg,COCO_val2014_000000099999.jpg,5,x\n"
    )
    (tmp_path / "sts_val.csv").write_text(
        "caption1,caption2,agg_score,sampling_method\n"
        "COCO_val2014:sentid:1000,COCO_val2014:sentid:1006,3.0,x\n"
        "COCO_val2014:sentid:1002,COCO_val2014:sentid:1008,1.0,x\n"
    )
    (tmp_path / "sits_val.csv").write_text(
        "caption,image,agg_score,sampling_method\n"
        "COCO_val2014:sentid:1000,COCO_val2014_000000000105.jpg,3.5,x\n"
        "COCO_val2014:sentid:1002,COCO_val2014_000000000107.jpg,2.9,x\n"
    )
    return tmp_path


def test_cxc_positives_are_the_pairs_of_3_and_above_and_what_belongs_together(rated, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        benchmarks, "listed_columns", lambda corpus, task, positives, prefix: seen.setdefault(task, positives) and {}
    )
    notes: list[str] = []
    _, estimates = benchmarks.cxc(coco(20, 2), rated, notes)
    assert seen["i2i"] == {0: [1], 1: [0]}
    assert seen["t2t"][0] == [1, 6] and seen["t2t"][6] == [0, 7] and seen["t2t"][2] == [3]
    assert seen["t2i"][0] == [0, 5] and seen["t2i"][2] == [1]
    assert seen["i2t"][5] == [0, 10, 11] and seen["i2t"][0] == [0, 1]
    assert notes == ["cxc: 1 of 4 SIS pairs are not in this corpus"]
    assert estimates["cxc:sis/spearman"].queries == 3


def test_cxc_correlation_is_that_of_cosines_with_scores(rated):
    corpus = coco(20, 2)
    image_emb = torch.zeros(20, 2)
    image_emb[:, 1] = 1
    angles = {0: 0.0, 1: 0.2, 2: 1.4, 3: 0.0, 4: 0.9}  # 0-1 nearest, then 3-4, then 0-2: as people said
    for place, angle in angles.items():
        image_emb[place] = torch.tensor([np.cos(angle), np.sin(angle)])
    result = evaluate_corpus(dataclasses.replace(corpus, image_emb=image_emb, text_emb=corpus.text_emb[:, :2]), "cxc",
                             bootstrap=10, annotations=rated)  # fmt: skip
    assert result["cxc:sis/spearman"].value > 90
    assert result["cxc:i2i/r@1"].queries == 2 and result["cxc:i2i/r@1"].value > 0
    assert {"cxc:t2t/r@5", "cxc:t2i/r@1", "cxc:i2t/r@10", "cxc:sits/spearman"} <= result.metrics.keys()


def test_cxc_without_its_files_or_with_broken_ones(tmp_path):
    with pytest.raises(ValueError, match=r"csv files, found none in"):
        evaluate_corpus(coco(20, 2), "cxc", annotations=tmp_path)
    (tmp_path / "sis_val.csv").write_text("image1,image2,agg_score\n100.jpg,nothing,3\n")
    with pytest.raises(ValueError, match=r"sis_val.csv: expected CxC's columns.*line 2"):
        evaluate_corpus(coco(20, 2), "cxc", annotations=tmp_path)


def test_images_are_known_by_cocoid_or_by_the_number_of_their_key():
    corpus = dataclasses.replace(make_corpus(10, 1), keys=[f"COCO_val2014_{n:012d}" for n in range(7, 17)])
    assert identify(corpus).image[7] == 0 and identify(corpus).caption == {}
    with pytest.raises(ValueError, match=r"10 of 10 samples have neither a cocoid.*number in their key"):
        identify(dataclasses.replace(corpus, keys=list("abcdefghij")))
    with pytest.raises(ValueError, match="9 of 10 samples repeat the cocoid of another"):
        identify(dataclasses.replace(corpus, meta=[{"cocoid": 5}] * 10))


def test_eccv_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "eccv_caption", None)
    with pytest.raises(ValueError, match="pip install eccv_caption"):
        evaluate_corpus(coco(20, 2), "eccv")


@pytest.fixture(scope="module")
def coco_test():
    """COCO's 5K test split by number, with embeddings of 8 dimensions that know something."""
    eccv_caption = pytest.importorskip("eccv_caption")
    truth = eccv_caption.Metrics()
    images = list(dict.fromkeys(truth.coco_gts["t2i"][int(c)][0] for c in truth.coco_ids))
    sentids = {image: list(truth.coco_gts["i2t"][image]) for image in images}
    known = {caption for own in sentids.values() for caption in own}
    for image, captions in truth.eccv_gts["i2t"].items():  # a few images have a sixth caption, which ECCV knows
        sentids[image] += [caption for caption in captions if caption not in known]
        known.update(captions)
    corpus = make_corpus(5000, 8, noise=0.4, meta=[{"cocoid": image, "sentids": sentids[image]} for image in images])
    kept = torch.tensor([8 * n + place for n, image in enumerate(images) for place in range(len(sentids[image]))])
    captions = [corpus.captions[place] for place in kept.tolist()]
    return truth, dataclasses.replace(
        corpus, text_emb=corpus.text_emb[kept], text_image=corpus.text_image[kept], captions=captions
    )


@pytest.mark.parametrize("task", ["i2t", "t2i"])
def test_eccv_equals_eccv_caption(coco_test, task):
    truth, corpus = coco_test
    who = identify(corpus)
    asks, gallery = who.places(task)
    positives = {asks[q]: [gallery[item] for item in items] for q, items in truth.eccv_gts[task].items()}
    columns = listed_columns(corpus, task, positives, "")
    emb = {"i": corpus.image_emb, "t": corpus.text_emb}
    number = np.array(list(gallery))[np.argsort(list(gallery.values()))]
    queries = list(truth.eccv_gts[task])
    scores = emb[task[0]][[asks[q] for q in queries]] @ emb[task[2]].T
    shown = {q: number[row].tolist() for q, row in zip(queries, scores.topk(60, dim=1).indices.numpy(), strict=True)}
    theirs = truth.eccv_metrics({task: shown}, task)
    for ours, name in (("r@1", "eccv_r1"), ("r_precision", "eccv_rprecision"), ("map@r", "eccv_map_at_r")):
        assert columns[f"{task}/{ours}"][0].mean() == pytest.approx(theirs[name][task], abs=1e-6), name


def shown_by_number(corpus, task: str) -> dict[int, list[int]]:
    """What a model shows for each query, best first, both by COCO's numbers."""
    asks, gallery = identify(corpus).places(task)
    number = np.array(list(gallery))[np.argsort(list(gallery.values()))]
    emb = {"i": corpus.image_emb, "t": corpus.text_emb}
    order = (emb[task[0]][list(asks.values())] @ emb[task[2]].T).topk(60, dim=1).indices.numpy()
    return {query: number[row].tolist() for query, row in zip(asks, order, strict=True)}


def test_a_whole_eccv_run_equals_eccv_caption(coco_test):
    truth, corpus = coco_test
    result = evaluate_corpus(corpus, "eccv", bootstrap=0)
    assert len(result.notes) == 1 and "25,002 captions are not the benchmark's" in result.notes[0]  # all was found
    shown = {task: shown_by_number(corpus, task) for task in ("i2t", "t2i")}
    theirs = truth.eccv_metrics(shown, "all")
    theirs |= {f"cxc_r{k}": truth.cxc_recalls(shown, "all", k) for k in (1, 5, 10)}
    names = {"eccv_r1": "eccv:{}/r@1", "eccv_map_at_r": "eccv:{}/map@r", "eccv_rprecision": "eccv:{}/r_precision"}
    names |= {f"cxc_r{k}": f"cxc:{{}}/r@{k}" for k in (1, 5, 10)}
    for name, own in names.items():
        for task in shown:
            assert result[own.format(task)].value == pytest.approx(100 * theirs[name][task], abs=1e-4), (name, task)


def test_coco_5k_recall_equals_eccv_caption(coco_test):
    """On the captions that the package takes for COCO's: five an image."""
    truth, corpus = coco_test
    known = set(truth.coco_gts["t2i"])
    meta = [{**sample, "sentids": [s for s in sample["sentids"] if s in known]} for sample in corpus.meta]
    number = {place: sentid for sentid, place in identify(corpus).caption.items()}
    kept = torch.tensor([place for place in range(len(corpus.captions)) if number[place] in known])
    corpus = dataclasses.replace(
        corpus,
        text_emb=corpus.text_emb[kept],
        text_image=corpus.text_image[kept],
        captions=[corpus.captions[place] for place in kept.tolist()],
        meta=meta,
    )
    result = evaluate_corpus(corpus, "pairs", bootstrap=0)
    shown = {task: shown_by_number(corpus, task) for task in ("i2t", "t2i")}
    for k in (1, 5, 10):
        theirs = truth.coco_5k_recalls(shown, "all", k)
        for task in shown:
            assert result[f"{task}/r@{k}"].value == pytest.approx(100 * theirs[task], abs=1e-4), (task, k)


class _Known:
    """A model for clip_benchmark whose inputs are rows of known embeddings."""

    def __init__(self, corpus):
        self.encode_image, self.encode_text = corpus.image_emb.__getitem__, corpus.text_emb.__getitem__


def test_recall_equals_clip_benchmark():
    """The package's whole zero-shot retrieval, on a model that knows its embeddings."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    corpus = make_corpus(200, 3, noise=1.0)
    batches = [
        (torch.arange(start, start + 50), [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(start, start + 50)])
        for start in range(0, 200, 50)
    ]
    found = theirs.evaluate(_Known(corpus), batches, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])
    result = evaluate_corpus(corpus, "pairs", bootstrap=0)
    for k in (1, 5, 10):
        for ours, name in (("t2i", "image"), ("i2t", "text")):
            value = 100 * found[f"{name}_retrieval_recall@{k}"]
            assert result[f"{ours}/r@{k}"].value == pytest.approx(value, abs=1e-4)  # theirs is of float32
            assert value == pytest.approx(CLIP_BENCHMARK[ours][k], abs=1e-4)


# What clip_benchmark 1.6.2 gives for make_corpus(200, 3, noise=1.0).
CLIP_BENCHMARK = {"t2i": {1: 23.666667, 5: 52.0, 10: 64.666667}, "i2t": {1: 30.0, 5: 57.5, 10: 71.5}}


def test_recall_equals_what_clip_benchmark_gave():
    result = evaluate_corpus(make_corpus(200, 3, noise=1.0), "pairs", bootstrap=0)
    for task, values in CLIP_BENCHMARK.items():
        for k, value in values.items():
            assert result[f"{task}/r@{k}"].value == pytest.approx(value, abs=1e-4), (task, k)
