"""Which pairs a forward fuses, in one batch: every pair itself, each with a hard negative on either side, and each with
words of its caption masked.

What the negatives are and how their rows come from other ranks is the business of `Others`, which a step hands in; so
all that a model computes is inside its one forward, where ZeRO-3 has its weights.

At once, the towers run once and the tokens of negatives travel. By chunks, tokens live for one chunk alone and are made
again in the backward, so it is the negatives' inputs that travel, and the towers see these too: after a forward that
chooses, 2 rows of each tower for every pair, and as many again in the backward.

Legend: B pairs of this rank, L text tokens, V vision tokens, M masked tokens, W width of the fusion encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import torch

from vlscale.models.chunks import checkpointed
from vlscale.models.fusion import FusionEncoder
from vlscale.models.masked_head import MaskedHead
from vlscale.models.rows import unit

Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # pixels (B, 3, H, W), token ids (B, L), their mask (B, L)
Pooled = tuple[torch.Tensor, torch.Tensor]  # of a tower: (B, width), and all its tokens (B, L or V, width)
Made = tuple[torch.Tensor, torch.Tensor, "Fused"]  # pooled rows of the pictures, of the captions, and what is fused


class Others(Protocol):
    """The hard negatives of this rank's pairs, from the global batch."""

    chosen: bool

    def choose(self, image_emb: torch.Tensor, text_emb: torch.Tensor, logit_scale: torch.Tensor) -> None:
        """By the similarities of unit rows (B, D), the first time that it is called."""

    def pictures(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows (B, ...) of pictures to those of each caption's negative picture."""

    def captions(self, rows: torch.Tensor) -> torch.Tensor:
        """Likewise of each picture's negative caption."""


@dataclass(frozen=True)
class Masked:
    """Captions with some words masked. Places are row * L + token, in order."""

    input_ids: torch.Tensor  # (B, L)
    places: torch.Tensor  # (M,)
    words: torch.Tensor  # (M,) that stood there
    counts: list[int]  # (B,) of each caption, known without waiting for the device

    def chunks(self, size: int) -> Iterator["Masked"]:
        length, start = self.input_ids.shape[1], 0
        for first in range(0, len(self.counts), size):
            counts = self.counts[first : first + size]
            end = start + sum(counts)
            places = self.places[start:end] - first * length
            yield Masked(self.input_ids[first : first + size], places, self.words[start:end], counts)
            start = end


@dataclass(frozen=True)
class Fusing:
    """What a forward is to fuse: its first `pairs` pictures and captions, and further what is not None."""

    pairs: int
    others: Others | None = None
    masked: Masked | None = None


class Fused(NamedTuple):
    cls: torch.Tensor  # (B, W) fused [CLS] of the pairs, L2-normalised
    matching: torch.Tensor | None  # (B, 3, 2) logits: of the pair, with another picture, with another caption
    masked: torch.Tensor | None  # (M,) -log p of each masked word


class Encoder(Protocol):
    """What a dual encoder with a fusion encoder offers here."""

    fusion: FusionEncoder
    masked_head: MaskedHead | None

    def vision_rows(self, pixels: torch.Tensor) -> Pooled: ...

    def text_rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Pooled: ...

    def embeddings(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


def fuse_pairs(encoder: Encoder, own: Pairs, fusing: Fusing, scale: torch.Tensor, chunk_size: int | None) -> Made:
    """`own`: the pairs to fuse; `scale`: of the logits that negatives are chosen by."""
    if chunk_size is None or chunk_size >= fusing.pairs:
        return _at_once(encoder, own, fusing, scale)
    others, given = fusing.others, list(own)
    if others is not None:
        _choose(encoder, own, fusing, scale, chunk_size)
        given += [others.pictures(own[0]), others.captions(own[1]), others.captions(own[2])]
    chunks = zip(*(rows.split(chunk_size) for rows in given), strict=True)
    masked = repeat(None) if fusing.masked is None else fusing.masked.chunks(chunk_size)
    made = [checkpointed(fuse_chunk, encoder, part, *chunk) for chunk, part in zip(chunks, masked, strict=False)]
    image, text, fused = zip(*made, strict=True)
    return torch.cat(image), torch.cat(text), _join(fused)


@torch.no_grad()
def _choose(encoder: Encoder, own: Pairs, fusing: Fusing, scale: torch.Tensor, chunk_size: int) -> None:
    if fusing.others.chosen:
        return
    image, text = [], []
    for pixels, ids, mask in zip(*(rows.split(chunk_size) for rows in own), strict=True):
        found = encoder.embeddings(encoder.vision_rows(pixels)[0], encoder.text_rows(ids, mask)[0])
        image.append(found[0])
        text.append(found[1])
    fusing.others.choose(torch.cat(image), torch.cat(text), scale)


def _at_once(encoder: Encoder, own: Pairs, fusing: Fusing, scale: torch.Tensor) -> Made:
    others, masked, mask = fusing.others, fusing.masked, own[2]
    image, vision = encoder.vision_rows(own[0])
    text, tokens = encoder.text_rows(*_stack(own[1:], masked))
    count = len(image)
    pictures, captions = [vision], [(tokens[:count], mask)]
    if others is not None:
        with torch.no_grad():
            others.choose(*encoder.embeddings(image.detach(), text[:count].detach()), scale)
        pictures.append(others.pictures(vision))
        captions.append((others.captions(tokens[:count]), others.captions(mask)))
    if masked is not None:
        captions.append((tokens[count:], mask))
    return image, text[:count], _fuse(encoder, pictures, captions, masked)


def fuse_chunk(encoder: Encoder, masked: Masked | None, *rows: torch.Tensor) -> Made:
    """`rows`: of a chunk's own pairs, and behind them the inputs of its negatives."""
    count = len(rows[0])
    image, vision = encoder.vision_rows(torch.cat(rows[::3]))
    mask = torch.cat(rows[2::3])
    text, tokens = encoder.text_rows(*_stack((torch.cat(rows[1::3]), mask), masked))
    pictures, captions = list(vision.split(count)), list(zip(tokens.split(count), mask.split(count), strict=False))
    if masked is not None:
        captions.append((tokens[-count:], rows[2]))
    return image[:count], text[:count], _fuse(encoder, pictures, captions, masked)


def _stack(captions: tuple[torch.Tensor, torch.Tensor], masked: Masked | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, with the masked captions of the first rows behind."""
    if masked is None:
        return captions
    return torch.cat([captions[0], masked.input_ids]), torch.cat([captions[1], captions[1][: len(masked.input_ids)]])


def _fuse(
    encoder: Encoder,
    pictures: list[torch.Tensor],
    captions: list[tuple[torch.Tensor, torch.Tensor]],
    masked: Masked | None,
) -> Fused:
    """One forward of the fusion encoder over up to 4 B pairs: tokens (B, V, width) of the pictures and, where there
    are negatives, of other pictures; (tokens, mask) of the captions, other captions, and masked captions."""
    count = len(pictures[0])
    met = [(captions[0], pictures[0])]
    if len(pictures) > 1:
        met += [(captions[0], pictures[1]), (captions[1], pictures[0])]
    if masked is not None:
        met.append((captions[-1], pictures[0]))
    text, vision = zip(*met, strict=True)
    fused = encoder.fusion(*(torch.cat(part) for part in zip(*text, strict=True)), torch.cat(vision))
    matching = nll = None
    if len(pictures) > 1:
        matching = encoder.fusion.matching(fused[: 3 * count, 0]).view(3, count, 2).transpose(0, 1)
    if masked is not None:
        nll = encoder.masked_head(fused[-count:].flatten(0, 1)[masked.places], masked.words)
    return Fused(unit(fused[:count, 0]), matching, nll)


def _join(chunks: tuple[Fused, ...]) -> Fused:
    """Those of a batch, from those of its chunks."""
    return Fused(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))
