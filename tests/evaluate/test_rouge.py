"""ROUGE-L against its plain definition, on made-up captions and on real ones where they are present."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vlscale.evaluate.rouge import rouge_table


def common(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plain(candidate: str, references: list[str]) -> float:
    words, others = candidate.lower().split(" "), [reference.lower().split(" ") for reference in references]
    precision = max(common(words, other) / len(words) for other in others)
    recall = max(common(words, other) / len(other) for other in others)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


CAPTIONS = [
    "A small red square",
    "a Small  red square on black",  # two spaces: an empty word between
    "two blue circles",
    "circles, blue",
    "a red circle on a black ground near a red square ",
    "x",
]
IMAGE = torch.tensor([2, 0, 2, 3, 0, 3])  # in no order, image 1 without a caption


def test_every_cell_equals_the_plain_definition():
    table = rouge_table(CAPTIONS, IMAGE, 4, workers=1)
    for row, caption in enumerate(CAPTIONS):
        for image in (0, 2, 3):
            own = [CAPTIONS[place] for place in (image == IMAGE).nonzero()[:, 0].tolist()]
            assert table[row, image].item() == pytest.approx(plain(caption, own), abs=1e-6), (caption, own)
    assert (table[:, 1] == 0).all() and table[0, 2] == 1


def test_precision_and_recall_come_each_from_its_best_reference():
    # precision 1 from the long reference, recall 1 from the short one: together 1, though neither equals the caption
    captions = ["red square", "red", "a red and blue square"]
    table = rouge_table(captions, torch.tensor([0, 1, 1]), 2, workers=1)
    assert table[0, 1].item() == pytest.approx(1.0)


def test_blocks_and_cores_change_nothing(monkeypatch):
    whole = rouge_table(CAPTIONS, IMAGE, 4, workers=1)
    heard = []
    monkeypatch.setattr("vlscale.evaluate.rouge.BLOCK_PAIRS", 12)
    assert torch.equal(rouge_table(CAPTIONS, IMAGE, 4, workers=2, on_rows=heard.append), whole)
    assert heard == [2, 2, 2]


def test_the_cache_is_used_and_knows_its_input(tmp_path, monkeypatch):
    whole = rouge_table(CAPTIONS, IMAGE, 4, cache=tmp_path / "deep", workers=1)
    monkeypatch.setattr("vlscale.evaluate.rouge._table", lambda *_: pytest.fail("made again"))
    assert torch.equal(rouge_table(CAPTIONS, IMAGE, 4, cache=tmp_path / "deep", workers=1), whole)
    assert len(list((tmp_path / "deep").iterdir())) == 1
    with pytest.raises(pytest.fail.Exception):
        rouge_table([*CAPTIONS[:-1], "y"], IMAGE, 4, cache=tmp_path / "deep", workers=1)


def test_more_different_words_than_characters(monkeypatch):
    monkeypatch.setattr("vlscale.evaluate.rouge.LARGEST_CHARACTER", 5)
    with pytest.raises(ValueError, match="at most 5 different words, got"):
        rouge_table(CAPTIONS, IMAGE, 4)


def test_words_beyond_the_surrogates():
    many = [" ".join(f"w{number}" for number in range(start, start + 300)) for start in range(0, 60_000, 300)]
    table = rouge_table([*many, "w100 w59999"], torch.arange(201), 201, workers=1)
    assert torch.equal(table.diagonal(), torch.ones(201))
    assert table[200, 199].item() == pytest.approx(plain("w100 w59999", [many[199]]), abs=1e-6)


def test_real_captions_on_a_sample():
    root = Path(os.environ.get("VLSCALE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    path = root / "captions" / "flickr30k_val.json"
    if not path.is_file():
        pytest.skip("no captions/flickr30k_val.json; set VLSCALE_TEST_DATA to the folder that holds captions/")
    entries = json.loads(path.read_text())[:200]
    captions = [caption for entry in entries for caption in entry["caption"]]
    text_image = torch.arange(len(entries)).repeat_interleave(5)
    table = rouge_table(captions, text_image, len(entries), workers=1)
    rng = np.random.default_rng(0)
    for row, image in zip(rng.integers(len(captions), size=150), rng.integers(len(entries), size=150), strict=True):
        assert table[row, image].item() == pytest.approx(plain(captions[row], entries[image]["caption"]), abs=1e-6)
