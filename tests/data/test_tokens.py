"""Tokenizers made from captions: deterministic, loaded by plain transformers, padded and cut."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Wav2Vec2CTCTokenizer

from vlscale.data.fast_tokens import FastTokens, TokenRows, state_of
from vlscale.data.tokens import padded, tokenise, tokenise_and_count, train_tokenizer

CAPTIONS = ["A red circle, on the LEFT", "a green square in the top left", "Ein grüner Käfer"] * 4


def test_words_of_the_corpus_are_whole_and_case_does_not_matter():
    tokenizer = train_tokenizer(CAPTIONS, 500, 32)
    assert tokenizer.tokenize("a RED Käfer in the square") == ["a", "red", "käfer", "in", "the", "square"]


def test_special_tokens_frame_a_caption():
    tokenizer = train_tokenizer(CAPTIONS, 500, 32)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("red \N{SNOWMAN}")["input_ids"])
    assert tokens == ["[CLS]", "red", "[UNK]", "[SEP]"]


def test_the_vocabulary_is_bounded_and_unseen_words_are_put_together():
    tokenizer = train_tokenizer(CAPTIONS, 48, 32)
    assert len(tokenizer) <= 48
    assert tokenizer.unk_token_id not in tokenizer("circles leftern")["input_ids"]


def test_training_is_deterministic():
    first, second = (train_tokenizer(CAPTIONS, 60, 32) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_saved_and_loaded_by_transformers(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 500, 32)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(CAPTIONS[:3])["input_ids"] == tokenizer(CAPTIONS[:3])["input_ids"]
    assert loaded.model_max_length == 32 and loaded.pad_token_id == 0


def test_a_batch_is_padded_to_its_longest_and_cut():
    tokenizer = train_tokenizer(CAPTIONS, 500, 32)
    ids, mask = tokenise(tokenizer, ["red", "a green square in the top left"], 6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == mask.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert ids[1, -1] == tokenizer.sep_token_id and ids[0, 3:].tolist() == [tokenizer.pad_token_id] * 3


def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's and CLIP's work: bytes, leading spaces, end tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TEXTS = [*CAPTIONS[:3], "", "  two  spaces ", "\N{SNOWMAN} ünï ½ [CLS] <s>", "word " * 50, "red"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [lambda: train_tokenizer(CAPTIONS, 500, 32), byte_level], ids=["words", "bytes"])
def test_tokens_made_where_data_is_loaded_are_those_of_transformers(make, side):
    tokenizer = make()
    tokenizer.padding_side = tokenizer.truncation_side = side
    rows = FastTokens(state_of(tokenizer, 12))
    ids, mask, cut = tokenise_and_count(tokenizer, TEXTS, 12)
    together = padded(rows(TEXTS), tokenizer)
    apart = padded(TokenRows.join([rows(TEXTS[:3]), rows([]), rows(TEXTS[3:])]), tokenizer)
    for found in (together, apart):
        assert torch.equal(found[0], ids) and torch.equal(found[1], mask)
        assert found[0].dtype == found[1].dtype == torch.int64
    assert int(rows(TEXTS).cut.sum()) == cut > 0


class Shouting(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__([t.upper() for t in text] if isinstance(text, list) else text.upper(), **options)


def test_what_a_tokenizer_does_beyond_its_compiled_part_is_not_lost():
    plain = byte_level()
    shouting = Shouting(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>")
    assert state_of(plain, 12) is not None and state_of(shouting, 12) is None
    without_padding = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer)
    assert state_of(without_padding, 12) is None


def test_a_tokenizer_written_in_python_tells_what_it_cut(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(["[PAD]", "[UNK]", *"abc"])}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="[PAD]", unk_token="[UNK]", bos_token=None, eos_token=None
    )
    assert not tokenizer.is_fast and state_of(tokenizer, 4) is None
    ids, mask, cut = tokenise_and_count(tokenizer, ["abc", "abca", "abcab", "aaaaaaa"], 4)
    assert ids.shape == (4, 4) and mask.sum(1).tolist() == [3, 4, 4, 4] and cut == 2
