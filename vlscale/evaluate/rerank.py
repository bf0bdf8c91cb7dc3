"""Re-ranking: the nearest k of every query both ways, scored by the fusion encoder, spread over ranks.

A rank scores the pairs of the pictures that it reads; a pair that both directions ask for is scored once. Pictures come
in batches, their tokens encoded once and kept for the batch alone; captions' tokens are kept in a window of bounded
size (see `scoring`). Ranks stay in step, since sharded parameters (ZeRO-3) are gathered by all of them together.

Letters: I images, T captions, k candidates, P pairs. A pair's code is image * T + caption.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlscale.data.samples import open_corpus, read_manifest
from vlscale.distributed import Ranks
from vlscale.evaluate.benchmarks import fold_slices
from vlscale.evaluate.embed import EmbeddedCorpus, Preprocess, decode_batch, in_step
from vlscale.evaluate.protocols import check_corpus
from vlscale.evaluate.reranked import Candidates, Reranked
from vlscale.evaluate.scoring import WINDOW_BYTES, CaptionWindow, PairScorer
from vlscale.kernels import topk_neighbors
from vlscale.models.dual_encoder import DualEncoder
from vlscale.progress import LINE_SECONDS, Progress
from vlscale.sections import DataConfig


def check_fusion(model: DualEncoder, what: str) -> None:
    """`what` asked for re-ranking."""
    if model.fusion is None:
        raise ValueError(
            f"{what} needs a model with a fusion encoder, and this one is a dual encoder alone; leave it out, or train "
            "one with model.fusion and objective.itm_weight"
        )


def check_k(k: int, images: int, captions: int) -> None:
    if not 1 <= k <= min(images, captions):
        raise ValueError(
            f"re-ranking {k:,} candidates: expected 1 to {min(images, captions):,}, for a gallery has {images:,} "
            f"pictures and {captions:,} captions; lower --rerank (eval.rerank)"
        )


@torch.no_grad()
def rerank_corpus(
    model: DualEncoder,
    corpus: EmbeddedCorpus,
    urls: list[str],
    data: DataConfig,
    preprocess: Preprocess,
    *,
    k: int,
    batch_size: int,
    ranks: Ranks,
    protocol: str = "pairs",
    window_bytes: int = WINDOW_BYTES,
    progress: bool = True,
) -> EmbeddedCorpus:
    """`corpus` with what the fusion encoder says of every query's k nearest; the same on every rank.

    `urls` are the shards that the corpus was embedded from, whose pictures are read again. `batch_size` bounds the
    pictures whose tokens are held, and the pairs of a forward; `window_bytes` the captions' tokens.
    """
    check_fusion(model, "--rerank (eval.rerank)")
    check_corpus(corpus)
    galleries = fold_slices(corpus) if protocol == "coco-1k" else [slice(0, len(corpus.keys))]
    i2t, t2i = nearest_both_ways(corpus, k, galleries, ranks)
    captions, wanted = len(corpus.captions), pair_codes(i2t, t2i)
    scorer = PairScorer(CaptionWindow(model, corpus.captions, preprocess, ranks, batch_size, window_bytes))
    place = {key: row for row, key in enumerate(corpus.keys)}
    scored = [(wanted[:0], torch.empty(0, 2))]
    manifest, shard = open_corpus(urls, data, tell=False), (ranks.rank, ranks.size)
    samples = read_manifest(manifest, data, shard=shard, first_time=preprocess.first_time)
    known = (sample for sample in samples if sample.key in place)
    with Progress("matching", len(wanted) // ranks.size, "pairs", shown=progress, line_seconds=LINE_SECONDS) as bar:
        for batch in in_step(known, batch_size, ranks):
            read, pixels = decode_batch(batch, preprocess, ranks.device, data.max_pixels)
            _, pictures = model.image_tokens(pixels)
            rows = torch.tensor([place[sample.key] for sample in read], dtype=torch.int64)
            whose, codes = pairs_of(rows, wanted, captions)
            scored.append((codes, scorer.score(pictures, whose, codes % captions, bar.advance)))
    everyone = [batch for rank in ranks.gather_objects(scored) for batch in rank]
    codes, logits = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    return replace(corpus, reranked=_reranked(i2t, t2i, wanted, codes, logits))


def nearest_both_ways(
    corpus: EmbeddedCorpus, k: int, galleries: Sequence[slice], ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """(I, k) captions and (T, k) images, by falling cosine; each query searches the run of images that it lies in, and
    their captions. Rows of queries that lie in none are -1."""
    i2t = torch.full((len(corpus.keys), k), -1)
    t2i = torch.full((len(corpus.captions), k), -1)
    for images in galleries:
        inside = ((corpus.text_image >= images.start) & (corpus.text_image < images.stop)).nonzero()[:, 0]
        check_k(k, images.stop - images.start, len(inside))
        image_emb, text_emb = corpus.image_emb[images], corpus.text_emb[inside]
        i2t[images] = inside[_nearest(image_emb, text_emb, k, ranks)]
        t2i[inside] = images.start + _nearest(text_emb, image_emb, k, ranks)
    return i2t, t2i


def pair_codes(i2t: Tensor, t2i: Tensor) -> Tensor:
    """(P,) ascending: every pair that either direction asks for, once."""
    by_image, by_caption = _codes(i2t, t2i)
    return torch.cat([by_image[i2t >= 0], by_caption[t2i >= 0]]).unique()


def _codes(i2t: Tensor, t2i: Tensor) -> tuple[Tensor, Tensor]:
    """Of the candidates of either direction, (I, k) and (T, k); what belongs to a place of -1 means nothing."""
    captions = len(t2i)
    return torch.arange(len(i2t))[:, None] * captions + i2t, t2i * captions + torch.arange(captions)[:, None]


def pairs_of(rows: Tensor, wanted: Tensor, captions: int) -> tuple[Tensor, Tensor]:
    """The codes that begin with the images `rows` (n,), in their order, and the place of each code's image in it."""
    start, stop = (torch.searchsorted(wanted, edge * captions) for edge in (rows, rows + 1))
    counts = stop - start
    whose = torch.arange(len(rows)).repeat_interleave(counts)
    within = torch.arange(len(whose)) - (counts.cumsum(0) - counts)[whose]
    return whose, wanted[start[whose] + within]


def _nearest(query: Tensor, gallery: Tensor, k: int, ranks: Ranks) -> Tensor:
    """(Q, k); each rank looks for a share of the queries."""
    share = query.tensor_split(ranks.size)[ranks.rank].to(ranks.device)
    found = torch.empty(0, k, dtype=torch.int64)
    if len(share):
        found = topk_neighbors(share, gallery.to(ranks.device), k)[1].cpu()
    return torch.cat(ranks.gather_objects(found))


def _reranked(i2t: Tensor, t2i: Tensor, wanted: Tensor, codes: Tensor, logits: Tensor) -> Reranked:
    """Scores of pairs in any order to those of both directions."""
    order = codes.argsort()
    codes, logits = codes[order], logits[order]
    lost = wanted[~torch.isin(wanted, codes)]
    if len(lost):
        raise ValueError(
            f"{len((lost // len(t2i)).unique()):,} pictures that were embedded could not be read a second time, to be "
            "matched; see the warnings above, and evaluate again"
        )
    assert torch.equal(codes, wanted), "every pair is scored once"
    broken = int((~logits.isfinite()).any(1).sum())
    if broken:
        raise ValueError(f"{broken:,} of {len(logits):,} matching scores are not finite: the fusion encoder diverged")
    both = (
        Candidates(items, logits[torch.searchsorted(codes, asked).clamp(max=len(codes) - 1)])
        for items, asked in zip((i2t, t2i), _codes(i2t, t2i), strict=True)
    )
    return Reranked(*both, pairs=len(wanted))
