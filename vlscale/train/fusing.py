"""What a fusion encoder is shown of a batch: hard negatives of its pairs, and its captions with words masked.

Both are drawn by the run's seed, the number of the global batch in the run, and each pair's place in it: they are the
same at any number of ranks, after a resume and in every pass of a meta step.
"""

import torch
import torch.nn.functional as F

from vlscale.data.batch import Batch
from vlscale.data.keyed import hash64
from vlscale.distributed import Ranks, all_reduce
from vlscale.models.fused_pairs import Fusing
from vlscale.objectives.masked_language import Words, mask_words
from vlscale.objectives.matching import HardNegatives
from vlscale.sections import ObjectiveConfig

Given = dict[str, torch.Tensor | Fusing | int | None]  # what the model's forward takes


class Draws:
    """Those of one step; each batch's negatives are chosen once, in the first pass over it."""

    def __init__(self, seed: int = 0, number: int = 0):
        self.key = hash64(seed, "fusing", number)
        self._negatives: dict[int, HardNegatives] = {}  # by batch: a meta step may look at two

    def fusing(self, batch: Batch, given: Given, words: Words | None, o: ObjectiveConfig, ranks: Ranks) -> Given:
        """`given`, all of whose captions come to be as long as the longest of any rank, with what is to be fused."""
        others = None
        if o.matching_weight > 0:
            given = given | _as_long_as_any(given["input_ids"], given["attention_mask"], ranks)
            others = self._negatives.setdefault(
                id(batch), HardNegatives(batch.pair_id.to(ranks.device), batch.positions, self.key, ranks)
            )
        masked = None
        if o.mlm_weight > 0:
            room = (0, given["input_ids"].shape[1] - batch.input_ids.shape[1])
            ids, mask = F.pad(batch.input_ids, room), F.pad(batch.attention_mask, room)
            masked = mask_words(ids, mask, batch.positions, words, o.mlm_probability, self.key, ranks.device)
        return given | {"fusing": Fusing(len(batch.keys), others, masked)}


def _as_long_as_any(ids: torch.Tensor, mask: torch.Tensor, ranks: Ranks) -> Given:
    """Captions (B, L) padded, behind the mask, to the longest of any rank: tokens travel between ranks."""
    longest = ids.shape[1]
    if ranks.group is not None:
        longest = int(all_reduce(torch.tensor(longest, device=ids.device), ranks, largest=True))
    room = (0, longest - ids.shape[1])
    return {"input_ids": F.pad(ids, room), "attention_mask": F.pad(mask, room)}
