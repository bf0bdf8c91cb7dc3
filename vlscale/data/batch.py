"""What one rank trains on in one step. B pairs of this rank, H = W the model's picture size, L tokens."""

from dataclasses import dataclass

from torch import Tensor

from vlscale.data.lanes import StreamState


@dataclass
class Batch:
    keys: list[str]  # sample keys, in the order of the global batch
    captions: list[str]  # the text of each pair, as tokenised
    positions: Tensor  # (B,) int64, place of each pair in the global batch
    pair_id: Tensor  # (B,) int64, equal ids are positives
    images: Tensor  # (B, 3, H, W) uint8
    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64
    second_images: Tensor | None  # another augmented view of the same pictures
    second_input_ids: Tensor | None  # another caption of the same samples, where they have one
    second_attention_mask: Tensor | None
    state: StreamState  # of this rank's lanes, after this batch
    epoch: float  # passes over the corpus so far; with data.captions=all over the part that is this rank's
    skipped: int  # samples of this rank's lanes that failed so far
    second_captions: list[str] | None = None  # the text of `second_input_ids`
    teacher_image: Tensor | None = None  # (B, D_image) float32 unit rows of a teacher cache, of the picture unaugmented
    teacher_text: Tensor | None = None  # (B, D_text), of the caption that trains
    truncated: int = 0  # captions of this batch that were longer than the model takes, and were cut
