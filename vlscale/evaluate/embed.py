"""A corpus as embeddings: what every evaluation reads, and how a model makes it, spread over ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlscale.data.faults import BadSample
from vlscale.data.images import MAX_PIXELS, ImageSpec, decode_eval, normalise
from vlscale.data.samples import Sample, open_corpus, read_manifest
from vlscale.data.tokens import tokenise
from vlscale.distributed import Ranks
from vlscale.evaluate.reranked import Reranked
from vlscale.logging import get_logger
from vlscale.progress import Progress
from vlscale.sections import DataConfig


@dataclass(frozen=True)
class EmbeddedCorpus:
    """I images, T captions, D width; the captions of image i are those whose `text_image` is i."""

    keys: list[str]  # (I,)
    image_emb: Tensor  # (I, D) float32, L2-normalised
    text_emb: Tensor  # (T, D) float32, L2-normalised
    text_image: Tensor  # (T,) int64: the image each caption belongs to
    captions: list[str]  # (T,)
    meta: list[dict]  # (I,) each sample's json
    reranked: Reranked | None = None  # what a fusion encoder said of the nearest candidates, where it was asked


class Encoder(Protocol):
    """What a dual encoder offers here: pixels (B, 3, H, W), or ids and mask (B, L), to unit rows (B, D)."""

    def encode_image(self, pixels: Tensor) -> Tensor: ...

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Preprocess:
    """How samples become model inputs; and what was said of those that cannot, however often they are read."""

    spec: ImageSpec
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    said: set[str] = field(default_factory=set, compare=False)

    def first_time(self, said: str) -> bool:
        """Whether this is to be said now: nothing is said twice."""
        new = said not in self.said
        self.said.add(said)
        return new


@torch.no_grad()
def embed_corpus(
    encoder: Encoder,
    urls: list[str],
    data: DataConfig,
    preprocess: Preprocess,
    *,
    batch_size: int,
    ranks: Ranks,
    progress: Progress | None = None,
) -> EmbeddedCorpus:
    """Every sample of `urls` that can be read, with all its captions; the same result on every rank.

    Each rank embeds a contiguous part. The ranks forward in step, with empty batches at the end of shorter parts, since
    sharded parameters (ZeRO-3) are gathered by all ranks together.
    """
    manifest = open_corpus(urls, data, tell=ranks.first and preprocess.first_time(f"corpus {urls}"))
    shard, first_time = (ranks.rank, ranks.size), preprocess.first_time
    samples, parts = read_manifest(manifest, data, shard=shard, first_time=first_time), []
    if progress is not None:
        progress.expect(manifest.num_samples // ranks.size)
    for batch in in_step(samples, batch_size, ranks):
        parts.append(embed_batch(encoder, batch, preprocess, ranks.device, data.max_pixels))
        if progress is not None:
            progress.advance(len(batch))
    keys, captions, meta, counts, image_emb, text_emb = (
        [row for part in parts for row in part[field]] for field in range(6)
    )
    everyone = ranks.gather_objects((keys, captions, meta, counts, _stack(image_emb), _stack(text_emb)))
    keys, captions, meta, counts = ([row for part in everyone for row in part[field]] for field in range(4))
    if not keys:
        raise ValueError(f"no sample of {' '.join(urls)} could be read: nothing to evaluate")
    return EmbeddedCorpus(
        keys=keys,
        image_emb=torch.cat([part[4] for part in everyone if len(part[4])]),
        text_emb=torch.cat([part[5] for part in everyone if len(part[5])]),
        text_image=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        captions=captions,
        meta=meta,
    )


def in_step(samples: Iterator[Sample], batch_size: int, ranks: Ranks) -> Iterator[list[Sample]]:
    """Batches until every rank has run out; a rank that has run out gets empty ones."""
    while True:
        batch = list(islice(samples, batch_size))
        if int(ranks.sum(torch.tensor(len(batch), device=ranks.device))) == 0:
            return
        yield batch


def embed_batch(
    encoder: Encoder,
    batch: list[Sample],
    preprocess: Preprocess,
    device: torch.device,
    max_pixels: int = MAX_PIXELS,
):
    """Keys, captions, json, captions a sample, and the embeddings of images and captions as lists of rows."""
    read, pixels = decode_batch(batch, preprocess, device, max_pixels)
    captions = [caption for sample in read for caption in sample.captions]
    ids, mask = tokenise(preprocess.tokenizer, captions or ["empty"], preprocess.max_length)
    image_emb = encoder.encode_image(pixels).float().cpu()[: len(read)]
    text_emb = encoder.encode_text(ids.to(device), mask.to(device)).float().cpu()[: len(captions)]
    counts = [len(sample.captions) for sample in read]
    return [s.key for s in read], captions, [s.meta for s in read], counts, list(image_emb), list(text_emb)


def decode_batch(
    batch: list[Sample], preprocess: Preprocess, device: torch.device, max_pixels: int = MAX_PIXELS
) -> tuple[list[Sample], Tensor]:
    """The samples whose pictures could be read, and these normalised (B, 3, H, W); one of zeros where there is none.
    Pictures of more than `max_pixels` are skipped as broken ones are."""
    read, images = [], []
    for sample in batch:
        try:
            images.append(torch.from_numpy(decode_eval(sample.image, preprocess.spec, max_pixels)).permute(2, 0, 1))
            read.append(sample)
        except BadSample as fault:
            if preprocess.first_time(f"{sample.key}: {fault}"):
                get_logger().warning("skipped sample %s: %s", sample.key, fault)
    size = preprocess.spec.size
    pixels = torch.stack(images) if images else torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return read, normalise(pixels.to(device), preprocess.spec)


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, 0)
