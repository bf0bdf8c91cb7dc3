"""Tokenizers made from captions: deterministic, loaded by plain transformers, padded and cut."""

import torch
from transformers import AutoTokenizer

from vlscale.data.tokens import tokenise, train_tokenizer

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
