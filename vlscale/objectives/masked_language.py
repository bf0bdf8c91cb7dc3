"""Masked language modelling with a picture to look at (mlm), the text term of CoVLR and X-VLM (arXiv 2304.07567,
2111.08276).

Of the words of a caption a share is asked for: of these 80 % are replaced by the mask token, 10 % by another word, 10 %
stay. The loss is the mean over all such words of the global batch. What is masked is a function of seed, step, the
pair's place in the global batch and the word's place in the caption: the same at any number of ranks.

Legend: B pairs of this rank, L tokens, M masked tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from vlscale.data.keyed import hash64, uniforms_at
from vlscale.distributed import Ranks, sum_over_ranks
from vlscale.models.fused_pairs import Masked
from vlscale.models.rows import wide
from vlscale.objectives.contrastive import Metrics

LONGEST = 1 << 16  # tokens: a caption's share of the stream of random numbers
REPLACED, OTHER = 0.8, 0.1  # shares of the masked words that become the mask token, another word


@dataclass(frozen=True)
class Words:
    """What masking has to know of a tokenizer."""

    size: int  # of the vocabulary
    mask: int
    special: np.ndarray  # ids that are no words

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Words":
        """A tokenizer that has no mask token lends its token for unknown words."""
        mask = tokenizer.unk_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        if mask is None:
            raise ValueError(
                "objective.mlm_weight: the tokenizer has neither a mask token nor one for unknown words; give "
                "model.text.tokenizer one that has, or set objective.mlm_weight=0"
            )
        return cls(len(tokenizer), mask, np.array(sorted(tokenizer.all_special_ids)))


def mask_words(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor,
    words: Words,
    probability: float,
    key: int,
    device: torch.device,
) -> Masked:
    """Captions (B, L) and the pairs' places (B,), on the host, to masked captions on `device`."""
    ids = input_ids.numpy()
    places = positions.numpy()[:, None] * LONGEST + np.arange(ids.shape[1])
    asked = uniforms_at(hash64(key, "asked"), places) < probability
    asked &= (attention_mask.numpy() > 0) & ~np.isin(ids, words.special)
    fate = uniforms_at(hash64(key, "fate"), places)
    known = np.setdiff1d(np.arange(words.size), words.special)
    other = known[(uniforms_at(hash64(key, "other"), places) * len(known)).astype(np.int64)]
    shown = np.where(fate < REPLACED, words.mask, np.where(fate < REPLACED + OTHER, other, ids))
    made = np.where(asked, shown, ids), np.flatnonzero(asked), ids[asked]
    return Masked(*(torch.from_numpy(part).to(device, non_blocking=True) for part in made), asked.sum(1).tolist())


def masked_language(nll: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, Metrics]:
    """Mean of all ranks' -log p (M,) of masked words, the same number on every rank; 0 where nothing is masked."""
    count = ranks.sum(torch.tensor(len(nll), dtype=torch.float64, device=nll.device))
    loss = sum_over_ranks(wide(nll).sum(), ranks) / count.clamp(min=1).to(wide(nll).dtype)
    return loss, {"mlm": loss.detach()}
