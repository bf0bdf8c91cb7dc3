"""Benchmarks of the literature: their counts, their extra judgements, and how a corpus is matched to them.

- Flickr30K, COCO 5K, VizWiz: relevance inside a modality by ROUGE-L (see `rouge`); COCO 1K the same in five folds.
- Crisscrossed Captions (`cxc`): people's similarity of image pairs (SIS), caption pairs (STS) and image-caption pairs
  (SITS), 0 to 5: retrieval with the pairs of 3 and above as positives, and Spearman correlation over all of them.
- ECCV Caption (`eccv`): COCO 5K with the positives that the original pairs leave out; R@1, R-Precision, mAP@R.

Correspondence: an image is known by its `cocoid`, or else by the number that ends its key; a caption by its place in
its sample's `sentids`.
"""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlscale.evaluate.bootstrap import Estimate
from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.metrics import at_r_chance, best_positive, precision_at_r, recall_chance
from vlscale.evaluate.spearman import sampled_spearman, spearman
from vlscale.evaluate.tasks import Columns, Own, blocks, with_reranked

COUNTS = {  # split -> images, captions
    "flickr30k": {"test": (1000, 5000), "val": (1014, 5070)},
    "coco-5k": {"test": (5000, 25010), "test, first five captions": (5000, 25000), "val": (5000, 25010)},
    "coco-1k": {"test": (5000, 25010), "test, first five captions": (5000, 25000), "val": (5000, 25010)},
    "vizwiz": {"val": (7750, 38750), "test": (8000, 40000)},
    "cxc": {"test": (5000, 25010), "test, first five captions": (5000, 25000), "val": (5000, 25010)},
    "eccv": {"test": (5000, 25010), "test, first five captions": (5000, 25000)},
}
FOLD = 1000  # images of a COCO 1K fold
POSITIVE = 3.0  # CxC scores from here on count as relevant
KINDS = {"sis": "i2i", "sts": "t2t", "sits": "t2i"}  # CxC file -> the task it judges
Positives = dict[int, list[int]]  # query -> its relevant gallery items, both as places in the corpus


def check_counts(name: str, corpus: EmbeddedCorpus, notes: list[str]) -> None:
    """A note where the corpus is not the benchmark's."""
    have = len(corpus.keys), len(corpus.captions)
    if have not in COUNTS[name].values():
        known = "; ".join(f"{split}: {images:,} and {captions:,}" for split, (images, captions) in COUNTS[name].items())
        notes.append(
            f"{name}: {have[0]:,} images and {have[1]:,} captions are not the benchmark's ({known}): numbers do not "
            "compare with published ones"
        )


def fold_slices(corpus: EmbeddedCorpus) -> list[slice]:
    """Runs of FOLD images in the corpus's order; a rest smaller than a fold is left out."""
    if len(corpus.keys) < FOLD:
        raise ValueError(f"protocol coco-1k needs folds of {FOLD:,} images, got {len(corpus.keys):,} images")
    return [slice(start, start + FOLD) for start in range(0, len(corpus.keys) // FOLD * FOLD, FOLD)]


def folds(corpus: EmbeddedCorpus) -> Iterator[EmbeddedCorpus]:
    """Each fold a corpus of its own, with its captions."""
    for images in fold_slices(corpus):
        start = images.start
        inside = ((corpus.text_image >= start) & (corpus.text_image < images.stop)).nonzero()[:, 0]
        yield replace(
            corpus,
            keys=corpus.keys[images],
            image_emb=corpus.image_emb[images],
            text_emb=corpus.text_emb[inside],
            text_image=corpus.text_image[inside] - start,
            captions=[corpus.captions[place] for place in inside.tolist()],
            meta=corpus.meta[images],
            reranked=corpus.reranked and corpus.reranked.inside(images, inside),
        )


def joined(parts: list[Columns]) -> Columns:
    """Queries of all folds together: with folds of one size their mean is the mean over folds."""
    return {
        name: (
            np.concatenate([part[name][0] for part in parts]),
            np.concatenate([part[name][1] + number * FOLD for number, part in enumerate(parts)]),
        )
        for name in parts[0]
    }


@dataclass(frozen=True)
class Identity:
    """Places in the corpus by the benchmark's numbers."""

    image: dict[int, int]
    caption: dict[int, int]

    def places(self, task: str) -> tuple[dict[int, int], dict[int, int]]:
        """Of the task's queries and of its gallery."""
        sides = {"i": self.image, "t": self.caption}
        return sides[task[0]], sides[task[2]]


def identify(corpus: EmbeddedCorpus) -> Identity:
    numbers = [_image_number(key, meta) for key, meta in zip(corpus.keys, corpus.meta, strict=True)]
    unknown = [corpus.keys[place] for place, number in enumerate(numbers) if number is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(numbers)} samples have neither a cocoid in their json nor a number in their key "
            f"({', '.join(unknown[:3])}): import COCO with `vlscale data import karpathy`"
        )
    image = {number: place for place, number in enumerate(numbers)}
    if len(image) < len(numbers):
        raise ValueError(f"{len(numbers) - len(image)} of {len(numbers)} samples repeat the cocoid of another")
    caption: dict[int, int] = {}
    counted = [0] * len(numbers)
    for place, owner in enumerate(corpus.text_image.tolist()):
        sentids = corpus.meta[owner].get("sentids", [])
        if not isinstance(sentids, list) or not all(isinstance(number, Integral) for number in sentids):
            raise ValueError(f"sample {corpus.keys[owner]}: expected sentids as a list of numbers, got {sentids!r}")
        if counted[owner] < len(sentids):
            caption[sentids[counted[owner]]] = place
        counted[owner] += 1
    return Identity(image, caption)


def eccv(corpus: EmbeddedCorpus, notes: list[str]) -> Columns:
    """ECCV Caption's and, under `cxc:`, CxC's extended positives, as the package eccv_caption ships them."""
    try:
        from eccv_caption import Metrics
    except ImportError:
        raise ValueError("protocol eccv needs the package eccv_caption: pip install eccv_caption") from None
    truth, who = Metrics(), identify(corpus)
    columns: Columns = {}
    for prefix, table in (("eccv", truth.eccv_gts), ("cxc", truth.cxc_gts)):
        for task in ("i2t", "t2i"):
            positives = _found(table[task], *who.places(task), f"{prefix} {task}", notes)
            columns |= with_reranked(listed_columns, corpus, task, positives, f"{prefix}:")
    return columns


def cxc(corpus: EmbeddedCorpus, folder: Path | None, notes: list[str]) -> tuple[Columns, dict[str, Estimate]]:
    """From CxC's files sis*.csv, sts*.csv and sits*.csv in `folder`; those that are missing leave a note."""
    files = {kind: sorted(folder.glob(f"{kind}*.csv")) if folder is not None else [] for kind in KINDS}
    if not any(files.values()):
        raise ValueError(f"protocol cxc needs the folder of CxC's sis, sts and sits csv files, found none in {folder}")
    who = identify(corpus)
    columns: Columns = {}
    estimates: dict[str, Estimate] = {}
    for kind, task in KINDS.items():
        if not files[kind]:
            notes.append(f"cxc: no {kind}*.csv, so {kind.upper()} is not measured")
            continue
        rows = [row for path in files[kind] for row in read_ratings(path)]
        asks, gallery = who.places(task)
        known = [(asks[a], gallery[b], score) for a, b, score in rows if a in asks and b in gallery]
        if len(known) < len(rows):
            notes.append(
                f"cxc: {len(rows) - len(known):,} of {len(rows):,} {kind.upper()} pairs are not in this corpus"
            )
        if len(known) < 2:
            continue
        estimates[f"cxc:{kind}/spearman"] = _correlation(corpus, task, known)
        estimates[f"cxc:{kind}/spearman/chance"] = Estimate(0.0, np.empty(0), len(known))
        for direction in (task, "i2t") if kind == "sits" else (task,):
            positives = _relevant(corpus, direction, known if direction == task else [(b, a, s) for a, b, s in known])
            columns |= with_reranked(listed_columns, corpus, direction, positives, "cxc:")
    return columns, estimates


def listed_columns(corpus: EmbeddedCorpus, task: str, positives: Positives, prefix: str) -> Columns:
    """R@K, R-Precision and mAP@R of the queries that have positives; the query itself is out of its gallery."""
    if not positives:
        return {}
    gathered: dict[str, list[Tensor]] = {}
    images: list[Tensor] = []
    queries = torch.tensor(sorted(positives))
    for block in blocks(corpus, task, _Listed(positives, corpus), Own.KEPT, queries):
        positive = block.relevance > 0
        ranks = best_positive(block.scores, positive, block.exclude)
        at_r = precision_at_r(block.scores, positive, block.exclude)
        items = torch.full((len(block.rows),), block.scores.shape[1] - block.exclude.shape[1])
        by_chance = at_r_chance(positive.sum(1), items)
        values = {"r_precision": at_r.r_precision, "r_precision/chance": by_chance.r_precision}
        values |= {"map@r": at_r.map_at_r, "map@r/chance": by_chance.map_at_r}
        for k in (1, 5, 10):
            values |= {f"r@{k}": ranks.recall(k), f"r@{k}/chance": recall_chance(positive.sum(1), items, k)}
        for name, value in values.items():
            gathered.setdefault(f"{prefix}{task}/{name}", []).append(value)
        images.append(block.image)
    image = torch.cat(images).numpy()
    return {name: (torch.cat(parts).double().numpy(), image) for name, parts in gathered.items()}


class _Listed:
    """Relevance 1 for the listed positives of one task."""

    def __init__(self, positives: Positives, corpus: EmbeddedCorpus):
        self.positives, self.images, self.captions = positives, len(corpus.keys), len(corpus.captions)

    def i2i(self, rows: Tensor) -> Tensor:
        return self._table(rows, self.images)

    def i2t(self, rows: Tensor) -> Tensor:
        return self._table(rows, self.captions)

    def t2i(self, rows: Tensor) -> Tensor:
        return self._table(rows, self.images)

    def t2t(self, rows: Tensor) -> Tensor:
        return self._table(rows, self.captions)

    def _table(self, rows: Tensor, items: int) -> Tensor:
        table = torch.zeros(len(rows), items)
        for place, row in enumerate(rows.tolist()):
            table[place, self.positives[row]] = 1
        return table


def _image_number(key: str, meta: dict) -> int | None:
    if "cocoid" in meta:
        if not isinstance(meta["cocoid"], Integral):
            raise ValueError(f"sample {key}: expected cocoid as a number, got {meta['cocoid']!r}")
        return meta["cocoid"]
    digits = re.search(r"(\d+)$", key)
    return int(digits[1]) if digits else None


def _found(table: dict[int, list[int]], asks: dict[int, int], gallery: dict[int, int], what: str, notes: list[str]):
    """The truth in places of the corpus; queries and positives that are not in it leave a note."""
    positives = {
        asks[q]: [gallery[item] for item in items if item in gallery] for q, items in table.items() if q in asks
    }
    positives = {query: items for query, items in positives.items() if items}
    if not positives:
        raise ValueError(f"{what}: none of its {len(table):,} queries is in this corpus; is it COCO's 5K test split?")
    kept, total = sum(map(len, positives.values())), sum(map(len, table.values()))
    if kept < total:
        notes.append(f"{what}: {total - kept:,} of {total:,} positives are not in this corpus")
    return positives


def read_ratings(path: Path) -> list[tuple[int, int, float]]:
    """Pairs of a CxC file: the numbers of its first two columns' names, and the score."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            first, second = (reader.fieldnames or [])[:2]
            return [(_number(row[first]), _number(row[second]), _score(row["agg_score"])) for row in reader]
        except (KeyError, ValueError, TypeError, csv.Error):
            raise ValueError(
                f"{path}: expected CxC's columns, two names that end in numbers and agg_score; line {reader.line_num}"
            ) from None


def _score(text: str) -> float:
    if not math.isfinite(score := float(text)):
        raise ValueError(text)
    return score


def _number(name: str) -> int:
    digits = re.search(r"(\d+)(?:\.\w+)?$", name)
    if digits is None:
        raise ValueError(name)
    return int(digits[1])


def _relevant(corpus: EmbeddedCorpus, task: str, rated: list[tuple[int, int, float]]) -> Positives:
    """Pairs of POSITIVE and above, both ways inside a modality, and what belongs together anyway: an image with its
    captions, a caption with its siblings."""
    positives: dict[int, set[int]] = {}
    for a, b, score in rated:
        if score >= POSITIVE:
            positives.setdefault(a, set()).add(b)
            if task in ("i2i", "t2t"):
                positives.setdefault(b, set()).add(a)
    owner = corpus.text_image.tolist()
    captions_of: dict[int, list[int]] = {}
    for caption, image in enumerate(owner):
        captions_of.setdefault(image, []).append(caption)
    for caption, image in enumerate(owner):
        if task == "t2i":
            positives.setdefault(caption, set()).add(image)
        elif task == "i2t":
            positives.setdefault(image, set()).add(caption)
        elif task == "t2t" and len(captions_of[image]) > 1:
            positives.setdefault(caption, set()).update(set(captions_of[image]) - {caption})
    return {query: sorted(items) for query, items in positives.items()}


def _correlation(corpus: EmbeddedCorpus, task: str, rated: list[tuple[int, int, float]]) -> Estimate:
    """Spearman correlation of cosines with scores, sampled by the pairs' first item."""
    emb = {"i": corpus.image_emb, "t": corpus.text_emb}
    a, b = (torch.tensor([row[side] for row in rated]) for side in (0, 1))
    cosine = (emb[task[0]][a] * emb[task[2]][b]).sum(1).double().numpy()
    human = np.array([row[2] for row in rated])
    samples = sampled_spearman(a.numpy(), cosine, human)
    value = float(np.nanmean(samples)) if np.isfinite(samples).any() else spearman(cosine, human)
    return Estimate(value, samples, len(rated))
