"""Retrieval tasks of one corpus, measured in blocks of queries so that no table of all queries exists.

Letters: Q queries, q queries of a block, G gallery items, I images, T captions. Correspondence, in words:
- i2i: a picture searches the other pictures; t2t: a caption searches the other captions;
- i2it, t2it: the same, in one gallery that holds all pictures and then all captions, by the same cosine;
- i2t, t2i: across; here the query is never in its own gallery.
The query itself is taken out of the gallery. `Own.OTHERS` takes out everything else of its sample as well.
Where the corpus was re-ranked (see `reranked`), scores across the modalities are the permuted cosines.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.metrics import best_positive, ndcg, own_modality, own_modality_chance, recall_chance
from vlscale.evaluate.relevance import Relevance
from vlscale.evaluate.result import RERANKED

BLOCK_NUMBERS = 1 << 22  # scores at once: 16 MB in float32
MIXED = ("i2it", "t2it")
ACROSS = ("i2t", "t2i", *MIXED)  # what re-ranking changes
Columns = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (value of each query, image of each query)


class Own(Enum):
    """Whether the rest of the query's sample (its picture, its other captions) stays in the gallery."""

    KEPT = "kept"
    OTHERS = "others"


@dataclass(frozen=True)
class Gallery:
    """Pictures, captions, or pictures and then captions, as one searchable table."""

    emb: Tensor  # (G, D)
    image: Tensor  # (G,) the image each item is or belongs to
    of_images: int  # the first so many items are pictures


def gallery(corpus: EmbeddedCorpus, modalities: str) -> Gallery:
    """`modalities` is the task's right side: i, t or it."""
    images = len(corpus.image_emb)
    return {
        "i": Gallery(corpus.image_emb, torch.arange(images), images),
        "t": Gallery(corpus.text_emb, corpus.text_image, 0),
        "it": Gallery(
            torch.cat([corpus.image_emb, corpus.text_emb]), torch.cat([torch.arange(images), corpus.text_image]), images
        ),
    }[modalities]


@dataclass(frozen=True)
class Block:
    """Some queries of a task against its whole gallery."""

    rows: Tensor  # (q,) which images or captions ask
    image: Tensor  # (q,) the image each query is or belongs to
    scores: Tensor  # (q, G)
    relevance: Tensor  # (q, G)
    exclude: Tensor  # (q, E) gallery items out of the search, padded by -1


def blocks(
    corpus: EmbeddedCorpus, task: str, relevance: Relevance, own: Own, queries: Tensor | None = None
) -> Iterator[Block]:
    """The task's queries, all in order or those of `queries` (Q,)."""
    asks, searched = task.split("2")
    space = gallery(corpus, searched)
    query_emb = corpus.image_emb if asks == "i" else corpus.text_emb
    query_image = torch.arange(len(corpus.image_emb)) if asks == "i" else corpus.text_image
    siblings = items_of_images(space.image, len(corpus.image_emb)) if own is Own.OTHERS else None
    queries = torch.arange(len(query_emb)) if queries is None else queries
    for rows in queries.split(max(1, BLOCK_NUMBERS // len(space.emb))):
        table = relevance_rows(relevance, task, rows)
        image = query_image[rows]
        if siblings is not None:
            exclude = siblings[image]
        elif asks in searched:
            exclude = (rows + (space.of_images if asks == "t" else 0))[:, None]
        else:
            exclude = rows.new_zeros((len(rows), 0))
        scores = query_emb[rows] @ space.emb.T
        if corpus.reranked is not None:
            scores = corpus.reranked.rescored(task, rows, scores)
        yield Block(rows, image, scores, table, exclude)


def with_reranked(columns_of: Callable[..., Columns], corpus: EmbeddedCorpus, task: str, *options) -> Columns:
    """`columns_of(corpus, task, *options)` of the dual encoder and, where re-ranking changes them, under RERANKED."""
    columns = columns_of(replace(corpus, reranked=None), task, *options)
    if corpus.reranked is None or task not in ACROSS:
        return columns
    return columns | renamed(columns_of(corpus, task, *options))


def renamed(columns: Columns) -> Columns:
    return {f"{RERANKED}{name}": column for name, column in columns.items()}


def relevance_rows(relevance: Relevance, task: str, rows: Tensor) -> Tensor:
    """(q, G) relevance of the task's gallery to some of its queries."""
    asks, searched = task.split("2")
    return torch.cat([getattr(relevance, f"{asks}2{side}")(rows) for side in searched], dim=1)


def graded_columns(
    corpus: EmbeddedCorpus,
    task: str,
    relevance: Relevance,
    ks: tuple[int, ...],
    own: Own = Own.KEPT,
    suffix: str = "",
    prefix: str = "",
) -> Columns:
    """`TASK/ndcg@K` and `TASK/ndcg@K/chance` of every query; mixed tasks also say `TASK/own_modality@10`."""
    gathered: dict[str, list[Tensor]] = {}
    images: list[Tensor] = []
    named = f"{prefix}{task}{suffix}"
    asks, searched = task.split("2")
    for block in blocks(corpus, task, relevance, own):
        graded = ndcg(block.scores, block.relevance, ks, block.exclude)
        for place, k in enumerate(ks):
            gathered.setdefault(f"{named}/ndcg@{k}", []).append(graded.value[:, place])
            gathered.setdefault(f"{named}/ndcg@{k}/chance", []).append(graded.chance[:, place])
        if len(searched) == 2:
            is_picture = torch.arange(block.scores.shape[1]) < len(corpus.image_emb)
            mine = is_picture if asks == "i" else ~is_picture
            share = own_modality(block.scores, mine, min(10, max(ks)), block.exclude)
            gathered.setdefault(f"{named}/own_modality@10", []).append(share)
            by_chance = own_modality_chance(mine, block.exclude)
            gathered.setdefault(f"{named}/own_modality@10/chance", []).append(by_chance)
        images.append(block.image)
    return _columns(gathered, images)


def label_columns(
    corpus: EmbeddedCorpus, task: str, relevance: Relevance, ks: tuple[int, ...], own: Own, prefix: str
) -> Columns:
    """`PREFIXTASK/r@K` and its chance: is anything with the query's label among the first K."""
    gathered: dict[str, list[Tensor]] = {}
    images: list[Tensor] = []
    for block in blocks(corpus, task, relevance, own):
        positive = block.relevance > 0
        ranks = best_positive(block.scores, positive, block.exclude)
        taken = (block.exclude >= 0).sum(1)
        found = (positive.sum(1) - _taken_positives(positive, block.exclude)).clamp(min=0)
        for k in ks:
            chance = recall_chance(found, positive.shape[1] - taken, k)
            gathered.setdefault(f"{prefix}{task}/r@{k}", []).append(ranks.recall(k))
            gathered.setdefault(f"{prefix}{task}/r@{k}/chance", []).append(chance.masked_fill(found == 0, torch.nan))
        images.append(block.image)
    return _columns(gathered, images)


def _taken_positives(positive: Tensor, exclude: Tensor) -> Tensor:
    if exclude.shape[1] == 0:
        return torch.zeros(len(positive), dtype=torch.long)
    return (positive.gather(1, exclude.clamp(min=0)) & (exclude >= 0)).sum(1)


def _columns(gathered: dict[str, list[Tensor]], images: list[Tensor]) -> Columns:
    image = torch.cat(images).numpy()
    return {name: (torch.cat(parts).double().numpy(), image) for name, parts in gathered.items()}


def items_of_images(image: Tensor, images: int) -> Tensor:
    """(I, largest number of items an image has): each image's gallery items, padded by -1."""
    order = image.argsort(stable=True)
    counts = torch.bincount(image, minlength=images)
    table = torch.full((images, int(counts.max())), -1)
    within = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image[order]]
    table[image[order], within] = order
    return table
