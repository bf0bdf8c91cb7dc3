"""What one rank trains on in one step. B pairs of this rank, H = W the model's picture size, L tokens."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from vlscale.data.images import Piece
from vlscale.data.lanes import StreamState


@dataclass(frozen=True)
class PackedPictures:
    """Decoded pictures of any sizes, neither resized, flipped nor coloured yet: what `preprocess_images` takes."""

    pictures: Tensor  # (bytes,) uint8, one (h, w, 3) after another
    offsets: Tensor  # (B,) int64, where each begins
    sizes: Tensor  # (B, 2) int64, height and width
    boxes: Tensor  # (B, 4) float64, the crop: left, top, width, height
    flips: Tensor  # (B,) bool
    colours: Tensor | None  # (B, 3, 4) float32, see `colour_map`; None: as they are

    @classmethod
    def of(cls, pieces: list[Piece]) -> "PackedPictures":
        sizes = torch.tensor([piece.pixels.shape[:2] for piece in pieces])
        lengths = 3 * sizes.prod(1)
        return cls(
            pictures=torch.from_numpy(np.concatenate([piece.pixels.reshape(-1) for piece in pieces])),
            offsets=lengths.cumsum(0) - lengths,
            sizes=sizes,
            boxes=torch.tensor([piece.box for piece in pieces], dtype=torch.float64),
            flips=torch.tensor([piece.flip for piece in pieces]),
            colours=None if pieces[0].colours is None else torch.from_numpy(np.stack([p.colours for p in pieces])),
        )

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, field.name) for field in fields(self))
        return sum(part.nbytes for part in parts if part is not None)


@dataclass
class Batch:
    keys: list[str]  # sample keys, in the order of the global batch
    captions: list[str]  # the text of each pair, as tokenised
    positions: Tensor  # (B,) int64, place of each pair in the global batch
    pair_id: Tensor  # (B,) int64, equal ids are positives
    images: Tensor | PackedPictures  # (B, 3, H, W) uint8; packed with data.decode=device
    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64
    second_images: Tensor | PackedPictures | None  # another augmented view of the same pictures
    second_input_ids: Tensor | None  # another caption of the same samples, where they have one
    second_attention_mask: Tensor | None
    state: StreamState  # of this rank's lanes, after this batch
    epoch: float  # passes over the corpus so far; with data.captions=all over the part that is this rank's
    skipped: int  # samples of this rank's lanes that failed so far
    second_captions: list[str] | None = None  # the text of `second_input_ids`
    teacher_image: Tensor | None = None  # (B, D_image) float32 unit rows of a teacher cache, of the picture unaugmented
    teacher_text: Tensor | None = None  # (B, D_text), of the caption that trains
    truncated: int = 0  # captions of this batch that were longer than the model takes, and were cut

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from where copies to a GPU do not keep the host waiting."""
        return _pinned(self)


def _pinned(holder: Batch | PackedPictures) -> Batch | PackedPictures:
    changed = {}
    for name, value in vars(holder).items():
        if isinstance(value, PackedPictures):
            changed[name] = _pinned(value)
        elif isinstance(value, Tensor):
            changed[name] = value.pin_memory()
    return replace(holder, **changed)
