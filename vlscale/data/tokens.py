"""Tokenizers: one trained on the corpus's own captions, and captions to padded ids. T captions, L tokens."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlscale.data.fast_tokens import TokenRows

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_ALPHABET_SHARE = 4  # single characters take at most a quarter of the vocabulary


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-pair merges of lower-cased words, at most `vocab_size` entries. A small corpus gets whole words."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, UNKNOWN, START, END],
        limit_alphabet=max(32, vocab_size // _ALPHABET_SHARE),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        bos_token=START,
        eos_token=END,
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (T, L) int64, L the longest caption's tokens, cut at `max_length`."""
    input_ids, attention_mask, _ = tokenise_and_count(tokenizer, captions, max_length)
    return input_ids, attention_mask


def tokenise_and_count(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int
) -> tuple[Tensor, Tensor, int]:
    """As `tokenise`, with how many captions were cut."""
    encoded = tokenizer(captions, padding=True, truncation=True, max_length=max_length, return_attention_mask=True)
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    if encoded.encodings is not None:
        return ids, mask, sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    full = torch.nonzero(mask.sum(1) >= max_length).flatten().tolist()  # of these a slow tokenizer does not tell
    whole = tokenizer([captions[row] for row in full])["input_ids"] if full else []
    return ids, mask, sum(len(tokens) > max_length for tokens in whole)


def padded(rows: TokenRows, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """As `tokenise`, of captions that are tokens already."""
    ids, mask = rows.padded(tokenizer.pad_token_id, left=tokenizer.padding_side == "left")
    return torch.from_numpy(ids), torch.from_numpy(mask)
