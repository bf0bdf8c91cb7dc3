"""Protocols: which tasks are measured on a corpus, and by which relevance.

- `pairs`: across the modalities only; a caption is relevant to the picture it belongs to, nothing else is.
- `synthetic`: `pairs`, and single-modal and mixed NDCG by the exact relevance of scenes, with the papers' column.
- `labels`: `pairs`, and for each json field R@K and NDCG where equal values are relevant; the query's whole sample is
  left out of the gallery, and queries without another relevant sample are not counted.
- `flickr30k`, `coco-5k`, `coco-1k` (five folds), `vizwiz`: as `synthetic`, with ROUGE-L between captions for relevance.
- `cxc`, `eccv`: `pairs`, and what people judged (see `benchmarks`).
- `auto`: `synthetic` when every sample has a scene, `labels` when labels are given, else `pairs`.
Where the corpus was re-ranked, what that changes is measured again under `reranked:`, beside the dual encoder's.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlscale.evaluate import benchmarks, relevance
from vlscale.evaluate.bootstrap import Estimate, estimate_means, estimate_medians
from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.metrics import Ranks, over_chance, recall_chance
from vlscale.evaluate.paper import paper_columns
from vlscale.evaluate.result import RERANKED, EvalResult, Measure, measure
from vlscale.evaluate.rouge import rouge_table
from vlscale.evaluate.tasks import (
    MIXED,
    Columns,
    Own,
    graded_columns,
    items_of_images,
    label_columns,
    renamed,
    with_reranked,
)
from vlscale.kernels import retrieval_ranks
from vlscale.progress import LINE_SECONDS, Progress

BY_ROUGE = ("flickr30k", "coco-5k", "vizwiz")
PROTOCOLS = ("auto", "pairs", "synthetic", "labels", *BY_ROUGE, "coco-1k", "cxc", "eccv")
RECALL_AT = (1, 5, 10)
NDCG_AT = (10, 20, 50)  # the first is asked of every corpus; the others are measured where the gallery allows
WITHIN = ("i2i", "t2t", "i2it", "t2it")


def evaluate_corpus(
    corpus: EmbeddedCorpus,
    protocol: str = "auto",
    labels: list[str] | None = None,
    bootstrap: int = 1000,
    *,
    annotations: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> EvalResult:
    """Every measure of the protocol with its 95 % interval (`bootstrap` resamples of images; 0 for none).

    `annotations`: the folder of CxC's csv files; `cache`: a folder that keeps ROUGE-L tables; `progress`: whether long
    work shows how far it is.
    """
    labels = list(labels or [])
    protocol = choose_protocol(protocol, corpus, labels)
    check_corpus(corpus)
    notes: list[str] = []
    further: dict[str, Estimate] = {}
    if protocol in benchmarks.COUNTS:
        benchmarks.check_counts(protocol, corpus, notes)
    if protocol == "coco-1k":
        columns = benchmarks.joined([_by_rouge(fold, cache, notes, progress) for fold in benchmarks.folds(corpus)])
    elif protocol in BY_ROUGE:
        columns = _by_rouge(corpus, cache, notes, progress)
    else:
        columns = cross_columns(corpus)
    if protocol == "synthetic":
        columns |= _graded(corpus, relevance.scenes(corpus.meta, corpus.text_image), notes)
    elif protocol == "labels":
        ks = usable_cutoffs(corpus, Own.OTHERS, notes)
        for field in labels:
            columns |= _columns_by_label(corpus, field, ks, notes)
    elif protocol == "eccv":
        columns |= benchmarks.eccv(corpus, notes)
    elif protocol == "cxc":
        judged, further = benchmarks.cxc(corpus, annotations, notes)
        columns |= judged
    estimates = estimate_means(columns, len(corpus.keys), bootstrap)
    ranks = {name.replace("mean_rank", "median_rank"): columns[name] for name in columns if name.endswith("/mean_rank")}
    further |= estimate_medians(ranks, len(corpus.keys), bootstrap)
    metrics, replicates = summarise(estimates | further)
    notes = list(dict.fromkeys(notes))
    rerank = None
    if corpus.reranked is not None:
        rerank = corpus.reranked.k
        notes.append(corpus.reranked.note())
    return EvalResult(protocol, len(corpus.keys), len(corpus.captions), metrics, labels, notes, rerank, replicates)


def relevance_of(corpus: EmbeddedCorpus, result: EvalResult, cache: Path | None = None) -> relevance.Relevance | None:
    """The relevance inside a modality that `result` was measured by; with several labels, the first; None for pairs.
    `cache`: as of `evaluate_corpus`."""
    if result.protocol == "synthetic":
        return relevance.scenes(corpus.meta, corpus.text_image)
    if result.protocol == "labels":
        return relevance.labels(corpus.meta, result.labels[0], corpus.text_image)
    if result.protocol in BY_ROUGE:
        return _rouge(corpus, cache, progress=True)
    return None


def choose_protocol(protocol: str, corpus: EmbeddedCorpus, labels: list[str]) -> str:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; choose from: {', '.join(PROTOCOLS)}")
    if protocol == "labels" and not labels:
        raise ValueError("protocol labels needs at least one json field: set eval.labels, for example [concept]")
    if protocol != "auto":
        return protocol
    if corpus.meta and all("scene" in sample for sample in corpus.meta):
        return "synthetic"
    return "labels" if labels else "pairs"


def check_corpus(corpus: EmbeddedCorpus) -> None:
    """Enough to rank, every sample once, every caption with its image, embeddings that are numbers."""
    images, captions = len(corpus.image_emb), len(corpus.text_emb)
    repeated = [key for key, count in Counter(corpus.keys).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} sample keys stand for more than one sample ({', '.join(repeated[:3])}): evaluate on "
            "shards with different keys, each given once"
        )
    owners = {"image": torch.arange(images), "text": corpus.text_image}
    for name, emb in (("image", corpus.image_emb), ("text", corpus.text_emb)):
        lost = (~emb.isfinite()).any(1).nonzero()[:, 0]
        if len(lost):
            keys = dict.fromkeys(corpus.keys[owner] for owner in owners[name][lost].tolist())
            raise ValueError(
                f"{len(lost):,} of {len(emb):,} {name} embeddings are not finite (samples "
                f"{', '.join(list(keys)[:3])}{', ...' if len(keys) > 3 else ''}): the model has diverged; evaluate an "
                "earlier checkpoint"
            )
    if captions and not 0 <= int(corpus.text_image.min()) <= int(corpus.text_image.max()) < images:
        raise ValueError(
            f"captions belong to images {int(corpus.text_image.min())} to {int(corpus.text_image.max())}, "
            f"but there are {images} images"
        )
    deepest = max(RECALL_AT)
    if min(images, captions) < deepest:
        raise ValueError(
            f"R@{deepest} needs a gallery of at least {deepest} images and {deepest} captions, got {images} and "
            f"{captions}: evaluate on more samples"
        )


def usable_cutoffs(corpus: EmbeddedCorpus, own: Own, notes: list[str]) -> tuple[int, ...]:
    """The NDCG cut-offs that every gallery can fill once the query is out of it; a shortened list leaves a note."""
    captions_of_one = int(torch.bincount(corpus.text_image).max()) if own is Own.OTHERS else 1
    smallest = min(len(corpus.image_emb) - 1, len(corpus.text_emb) - captions_of_one)
    if smallest < NDCG_AT[0]:
        raise ValueError(
            f"NDCG@{NDCG_AT[0]} needs {NDCG_AT[0]} other images and captions to rank for each query, got {smallest} "
            f"({len(corpus.image_emb)} images, {len(corpus.text_emb)} captions): evaluate on more samples"
        )
    usable = tuple(k for k in NDCG_AT if k <= smallest)
    if usable != NDCG_AT:
        left_out = ", ".join(f"NDCG@{k}" for k in NDCG_AT[len(usable) :])
        notes.append(f"{left_out} not measured: a query has only {smallest} other items to rank")
    return usable


def cross_columns(corpus: EmbeddedCorpus) -> Columns:
    """R@K and expected rank of every query, both ways; a hit is any of an image's captions. Linear memory."""
    images = len(corpus.image_emb)
    captions_of = items_of_images(corpus.text_image, images)
    captioned = (captions_of >= 0).any(1).nonzero(as_tuple=True)[0]
    i2t = Ranks(*retrieval_ranks(corpus.image_emb[captioned], corpus.text_emb, captions_of[captioned]))
    t2i = Ranks(*retrieval_ranks(corpus.text_emb, corpus.image_emb, corpus.text_image[:, None]))
    positives = {"i2t": captions_of[captioned], "t2i": corpus.text_image[:, None]}
    asking = {"i2t": captioned, "t2i": corpus.text_image}  # the image of each query
    items = {"i2t": len(corpus.text_emb), "t2i": images}
    columns: Columns = {}
    for task, dual in (("i2t", i2t), ("t2i", t2i)):
        given = asking[task], (positives[task] >= 0).sum(1), items[task]
        columns |= _rank_columns(task, dual, *given)
        if corpus.reranked is None:
            continue
        candidates = corpus.reranked.i2t.of(captioned) if task == "i2t" else corpus.reranked.t2i
        columns |= renamed(_rank_columns(task, candidates.ranks(positives[task], dual), *given))
        by_paper = candidates.paper_ranks(positives[task], items[task])
        columns |= renamed(_recall_columns(task, by_paper, *given, suffix="_paper"))
    return columns


def _rank_columns(task: str, ranks: Ranks, image: Tensor, positives: Tensor, items: int) -> Columns:
    """`positives` (Q,) of each query among `items`; the first of p in a random order of n stands at (n+1)/(p+1)."""
    tables = {f"{task}/mean_rank": ranks.expected(), f"{task}/mean_rank/chance": (items + 1) / (positives + 1.0)}
    columns = {name: (values.double().numpy(), image.numpy()) for name, values in tables.items()}
    return columns | _recall_columns(task, ranks, image, positives, items)


def _recall_columns(task: str, ranks: Ranks, image: Tensor, positives: Tensor, items: int, suffix: str = "") -> Columns:
    tables = {}
    for k in RECALL_AT:
        tables[f"{task}/r@{k}{suffix}"] = ranks.recall(k)
        tables[f"{task}/r@{k}{suffix}/chance"] = recall_chance(positives, torch.full_like(positives, items), k)
    return {name: (values.double().numpy(), image.numpy()) for name, values in tables.items()}


def _by_rouge(corpus: EmbeddedCorpus, cache: Path | None, notes: list[str], progress: bool) -> Columns:
    return cross_columns(corpus) | _graded(corpus, _rouge(corpus, cache, progress), notes)


def _rouge(corpus: EmbeddedCorpus, cache: Path | None, progress: bool) -> relevance.Relevance:
    captions = corpus.captions
    with Progress("ROUGE-L", len(captions), "captions", shown=progress, line_seconds=LINE_SECONDS) as bar:
        table = rouge_table(captions, corpus.text_image, len(corpus.keys), cache=cache, on_rows=bar.advance)
    return relevance.CaptionRelevance(table, corpus.text_image)


def _graded(corpus: EmbeddedCorpus, truth: relevance.Relevance, notes: list[str]) -> Columns:
    """Single-modal and mixed NDCG in both columns, and caption search with the query's siblings left out."""
    ks = usable_cutoffs(corpus, Own.KEPT, notes)
    columns: Columns = {}
    for task in WITHIN:
        columns |= with_reranked(graded_columns, corpus, task, truth, ks)
    columns |= graded_columns(corpus, "t2t", truth, ks[:1], Own.OTHERS, suffix="_others")
    columns |= paper_columns(replace(corpus, reranked=None), truth, ks)
    if corpus.reranked is not None:
        by_paper = paper_columns(corpus, truth, ks)
        columns |= renamed({name: column for name, column in by_paper.items() if name.startswith(MIXED)})
    return columns


def _columns_by_label(corpus: EmbeddedCorpus, field: str, ks: tuple[int, ...], notes: list[str]) -> Columns:
    same_label = relevance.labels(corpus.meta, field, corpus.text_image)
    columns: Columns = {}
    for task in ("i2i", "t2t", "i2t", "t2i"):
        columns |= with_reranked(label_columns, corpus, task, same_label, RECALL_AT, Own.OTHERS, f"{field}:")
    for task in WITHIN:
        columns |= with_reranked(graded_columns, corpus, task, same_label, ks, Own.OTHERS, "", f"{field}:")
    alone = int(np.isnan(columns[f"{field}:i2i/r@1"][0]).sum())
    if alone == len(corpus.keys):
        raise ValueError(f"label {field!r}: no two of the {alone} samples share a value, so there is nothing to find")
    if alone:
        notes.append(f"{field}: {alone} of {len(corpus.keys)} samples share it with no other and ask no question")
    return columns


def summarise(estimates: dict[str, Estimate]) -> tuple[dict[str, Measure], dict[str, np.ndarray]]:
    """Measures (percent, or ranks) and their replicates; chance joins its measure, and what follows from several
    columns (rsum, over chance) is made from means and from each replicate alike."""
    metrics: dict[str, Measure] = {}
    replicates: dict[str, np.ndarray] = {}

    def add(name: str, value: float, drawn: np.ndarray, queries: int, chance: float | None = None) -> None:
        if not math.isnan(value):
            metrics[name] = measure(Estimate(value, drawn, queries), chance)
            replicates[name] = drawn

    for prefix, suffix in (("", ""), (RERANKED, ""), (RERANKED, "_paper")):
        six = [f"{prefix}{task}/r@{k}{suffix}" for task in ("i2t", "t2i") for k in RECALL_AT]
        if six[0] not in estimates:
            continue
        total = 100 * sum(estimates[name].value for name in six)
        drawn = 100 * sum(estimates[name].replicates for name in six)
        by_chance = 100 * sum(estimates[f"{name}/chance"].value for name in six)
        add(f"{prefix}rsum{suffix}", total, drawn, estimates[six[0]].queries, by_chance)
    for name, found in estimates.items():
        if name.endswith("/chance"):
            continue
        chance = estimates.get(f"{name}/chance")
        if name.endswith("_rank"):
            add(name, found.value, found.replicates, found.queries, chance.value if chance else None)
            continue
        add(name, 100 * found.value, 100 * found.replicates, found.queries, 100 * chance.value if chance else None)
        if chance and "/ndcg@" in name and not name.endswith("_paper"):
            drawn = over_chance(found.replicates, chance.replicates)
            add(f"{name}_norm", 100 * over_chance(found.value, chance.value), 100 * drawn, found.queries, 0.0)
    return metrics, replicates
