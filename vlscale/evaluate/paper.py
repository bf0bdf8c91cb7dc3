"""Single-modal and mixed NDCG as the papers' official code computes them, its faults included, for comparison only.

Where the official evaluation departs from what it means to measure:
1. Self-similarity is set to 0, not removed: wherever fewer than K items have a positive cosine the query's own slot is
   among the first K and earns nothing.
2. Caption queries are each image's first caption alone.
3. t2t: a gallery caption's relevance is measured against the query's *image* (all its captions), not the query
   caption, and the query's siblings stay in the gallery although each is, word for word, part of that reference.
4. i2it and t2it keep the query in its own gallery, where it stands first with full relevance.
5. t2it scores picture j for caption query q by the cosine of *j's caption with q's picture*: the transposed block.
6. i2it and t2it put cosines beside the matching head's raw logits, with -100 where nothing was scored. This is so here
   where the corpus was re-ranked; a dual encoder alone has no such head, and both sides are cosines.
7. Queries without anything relevant count as 0; ties stand in the order of the sort; nothing is said about chance
   (it stands beside our numbers: 52 on Flickr30K i2i).

Letters: I images, T captions, q queries of a block.
"""

import torch
from torch import Tensor

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.relevance import Relevance
from vlscale.evaluate.tasks import BLOCK_NUMBERS, Columns


def paper_columns(corpus: EmbeddedCorpus, relevance: Relevance, ks: tuple[int, ...]) -> Columns:
    """`TASK/ndcg@K_paper` of every query, and its chance, for all four tasks; images without a caption do not ask."""
    first = first_captions(corpus.text_image, len(corpus.image_emb))
    asking = (first >= 0).nonzero(as_tuple=True)[0]
    image_emb, text_emb = corpus.image_emb[asking], corpus.text_emb
    first_emb = text_emb[first[asking]]
    gathered: dict[str, list[Tensor]] = {}
    items = len(asking) + len(text_emb)
    for places in torch.arange(len(asking)).split(max(1, BLOCK_NUMBERS // items)):
        rows = asking[places]
        to_images = relevance.t2i(first[rows])[:, asking]  # first caption of the query's image with each image
        to_texts = relevance.i2t(rows)  # each caption with the query's image (fault 3)
        crossed = to_texts[:, first[asking]]  # first caption of each image with the query's image
        across = image_emb[places] @ text_emb.T
        if corpus.reranked is not None:
            across = corpus.reranked.i2t.of(rows).paper_scores(len(text_emb))
        image_scores = image_emb[places] @ image_emb.T
        text_scores = first_emb[places] @ text_emb.T
        tables = {
            "i2i": (_silenced(image_scores, places), _silenced(to_images, places)),
            "t2t": (_silenced(text_scores, first[rows]), _silenced(to_texts, first[rows])),
            "i2it": (
                torch.cat([image_scores, across], 1),
                torch.cat([to_images, to_texts], 1),
            ),
            "t2it": (
                torch.cat([text_scores, across[:, first[asking]]], 1),  # fault 5
                torch.cat([to_texts, crossed], 1),
            ),
        }
        for task, (scores, table) in tables.items():
            values, chance = _official_ndcg(scores, table, ks)
            for place, k in enumerate(ks):
                gathered.setdefault(f"{task}/ndcg@{k}_paper", []).append(values[:, place])
                gathered.setdefault(f"{task}/ndcg@{k}_paper/chance", []).append(chance[:, place])
    return {name: (torch.cat(parts).numpy(), asking.numpy()) for name, parts in gathered.items()}


def first_captions(text_image: Tensor, images: int) -> Tensor:
    """(I,) the first caption of each image, -1 where it has none."""
    first = torch.full((images,), len(text_image))
    first.scatter_reduce_(0, text_image, torch.arange(len(text_image)), reduce="amin")
    return torch.where(first == len(text_image), -1, first)


def _silenced(table: Tensor, own: Tensor) -> Tensor:
    """A copy with each row's own item set to 0 (fault 1)."""
    return table.scatter(1, own[:, None], 0.0)


def _official_ndcg(scores: Tensor, table: Tensor, ks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values, and those of a random order of the same table; both (q, number of cut-offs) float64."""
    deepest = max(ks)
    discounts = 1 / torch.log2(torch.arange(deepest, dtype=torch.float64) + 2)
    last = torch.tensor(ks) - 1
    gains = table.gather(1, scores.topk(deepest, dim=1).indices).double()
    ideal = (table.topk(deepest, dim=1).values.double() * discounts).cumsum(1)[:, last]
    value = (gains * discounts).cumsum(1)[:, last] / ideal
    chance = table.mean(1, keepdim=True, dtype=torch.float64) * discounts.cumsum(0)[last] / ideal
    return torch.where(ideal > 0, value, 0.0), torch.where(ideal > 0, chance, 0.0)
