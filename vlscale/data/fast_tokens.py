"""Captions to token ids where the data is loaded: the compiled part of a tokenizer, without torch and transformers.

T captions; rows of ids are of different lengths, and are padded by whoever puts a batch together.
"""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

_PROBES = ["a photo of two dogs", "Ünïcode — ½ \N{SNOWMAN}", "long " * 600, " <s>[CLS]</s> ", "x"]


@dataclass(frozen=True)
class TokenRows:
    ids: np.ndarray  # (all captions' tokens,) int32, caption after caption
    lengths: np.ndarray  # (T,) int32
    cut: np.ndarray  # (T,) bool: captions that were longer than the model takes

    @classmethod
    def join(cls, parts: list["TokenRows"]) -> "TokenRows":
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths", "cut")))

    def padded(self, padding: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), both (T, L) int64, L the longest caption's."""
        longest = int(self.lengths.max(initial=0))
        places = np.arange(longest)[None]
        mask = places >= (longest - self.lengths[:, None]) if left else places < self.lengths[:, None]
        ids = np.full(mask.shape, padding, np.int64)
        ids[mask] = self.ids
        return ids, mask.astype(np.int64)


class FastTokens:
    """A tokenizer for a process that loads data; `state` is what `state_of` gave there."""

    def __init__(self, state: str):
        self._tokenizer = Tokenizer.from_str(state)

    def __call__(self, captions: list[str]) -> TokenRows:
        found = self._tokenizer.encode_batch(captions)
        return TokenRows(
            np.array([token for each in found for token in each.ids], np.int32),
            np.array([len(each.ids) for each in found], np.int32),
            np.array([bool(each.overflowing) for each in found], bool),
        )


def state_of(tokenizer, max_length: int) -> str | None:
    """The compiled part of a Hugging Face tokenizer, cutting at `max_length`; None where there is none, or where the
    tokenizer does more than it."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        return None
    compiled = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    compiled.no_padding()
    compiled.enable_truncation(max_length, direction=tokenizer.truncation_side)
    ids = [tokenizer(probe, truncation=True, max_length=max_length)["input_ids"] for probe in _PROBES]
    same = ids == [found.ids for found in compiled.encode_batch(_PROBES)]
    return compiled.to_str() if same else None
