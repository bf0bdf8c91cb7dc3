"""Crisscrossed Captions on its real ratings, where they are present: against plain numpy and scipy.

The model is a bag of words: a picture is the sum of its captions, so it knows something of what people judged.
"""

import csv
import json
import re
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch

from vlscale.evaluate import EmbeddedCorpus, evaluate_corpus

WIDTH = 256


def words(caption: str) -> np.ndarray:
    row = np.zeros(WIDTH, dtype=np.float32)
    for word in re.findall(r"[a-z]+", caption.lower()):
        row[crc32(word.encode()) % WIDTH] += 1
    return row


def unit(rows: np.ndarray) -> torch.Tensor:
    rows = np.log1p(rows) - np.log1p(rows).mean(0)
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)


def ratings(path: Path) -> list[tuple[int, int, float]]:
    def number(name: str) -> int:
        return int(re.findall(r"\d+", name)[-1])

    with path.open() as file:
        rows = list(csv.reader(file))[1:]
    return [(number(first), number(second), float(score)) for first, second, score, _ in rows]


@pytest.fixture(scope="module")
def folder(real_data) -> Path:
    folder = real_data / "captions"
    if not all((folder / name).is_file() for name in ("coco_val.json", "sis_val.csv", "sts_val.csv")):
        pytest.skip("no captions/coco_val.json with sis_val.csv and sts_val.csv")
    return folder


@pytest.fixture(scope="module")
def coco(folder) -> EmbeddedCorpus:
    """COCO's 5,000 validation pictures, known by their names; the source has no caption numbers."""
    entries = json.loads((folder / "coco_val.json").read_text())
    captions = [caption for entry in entries for caption in entry["caption"]]
    owner = torch.tensor([place for place, entry in enumerate(entries) for _ in entry["caption"]])
    text = np.stack([words(caption) for caption in captions])
    image = np.zeros((len(entries), WIDTH), dtype=np.float32)
    np.add.at(image, owner.numpy(), text)
    keys = [Path(entry["image"]).stem for entry in entries]
    return EmbeddedCorpus(keys, unit(image), unit(text), owner, captions, [{} for _ in entries])


def sampled(rated: list[tuple[int, int, float]], cosine: np.ndarray) -> float:
    """CxC's figure: half of the queries, a pair of each, rank correlation; the mean over samples."""
    stats = pytest.importorskip("scipy.stats")
    by_query: dict[int, list[int]] = {}
    for place, (query, _, _) in enumerate(rated):
        by_query.setdefault(query, []).append(place)
    pools, rng = list(by_query.values()), np.random.default_rng(1)
    human, found = np.array([score for _, _, score in rated]), []
    for _ in range(100):
        half = rng.permutation(len(pools))[: len(pools) // 2]
        pairs = [pools[n][rng.integers(len(pools[n]))] for n in half]
        found.append(stats.spearmanr(cosine[pairs], human[pairs]).statistic)
    return 100 * float(np.mean(found))


def recalls(emb: torch.Tensor, positives: dict[int, set[int]], ks: tuple[int, ...]) -> list[float]:
    """Percent of queries with a positive among the first k others."""
    queries = sorted(positives)
    scores = emb[queries] @ emb.T
    scores[torch.arange(len(queries)), queries] = -torch.inf
    order = scores.topk(max(ks), dim=1).indices.tolist()
    hits = [[bool(positives[q] & set(row[:k])) for k in ks] for q, row in zip(queries, order, strict=True)]
    return (100 * np.mean(hits, axis=0)).tolist()


def liked(rated: list[tuple[int, int, float]]) -> dict[int, set[int]]:
    """Rated 3 and above, both ways."""
    found: dict[int, set[int]] = {}
    for a, b, score in rated:
        if score >= 3:
            found.setdefault(a, set()).add(b)
            found.setdefault(b, set()).add(a)
    return found


def test_pictures_are_judged_as_by_plain_code(coco, folder):
    result = evaluate_corpus(coco, "cxc", bootstrap=0, annotations=folder)
    place = {int(key[-12:]): n for n, key in enumerate(coco.keys)}
    rated = [(place[a], place[b], score) for a, b, score in ratings(folder / "sis_val.csv")]
    a, b = (torch.tensor([pair[side] for pair in rated]) for side in (0, 1))
    cosine = (coco.image_emb[a] * coco.image_emb[b]).sum(1).numpy()
    assert result["cxc:sis/spearman"].queries == len(rated) > 10_000
    assert result["cxc:sis/spearman"].value == pytest.approx(sampled(rated, cosine), abs=0.5)
    assert result["cxc:sis/spearman"].value > 50  # a bag of words agrees with people
    assert result["cxc:sis/spearman"].low < result["cxc:sis/spearman"].value < result["cxc:sis/spearman"].high
    positives = liked(rated)
    ours = [result[f"cxc:i2i/r@{k}"].value for k in (1, 5, 10)]
    assert ours == pytest.approx(recalls(coco.image_emb, positives, (1, 5, 10)), abs=1e-4)
    assert result["cxc:i2i/r@1"].queries == len(positives)
    assert any("STS pairs are not in this corpus" in note for note in result.notes)  # no caption numbers here
    assert "cxc: no sits*.csv, so SITS is not measured" in result.notes


def test_captions_are_judged_as_by_plain_code(folder):
    """The captions of the first ratings, each with a picture of its own; the other ratings are left out, and said."""
    every = ratings(folder / "sts_val.csv")
    names = sorted({name for pair in every[:1500] for name in pair[:2]})
    place = {name: n for n, name in enumerate(names)}
    rated = [(place[a], place[b], score) for a, b, score in every if a in place and b in place]
    emb = torch.nn.functional.normalize(torch.randn(len(names), 8, generator=torch.Generator().manual_seed(0)), dim=1)
    meta = [{"cocoid": n, "sentids": [name]} for n, name in enumerate(names)]
    captions = [f"caption {name}" for name in names]
    corpus = EmbeddedCorpus(list(map(str, names)), emb, emb, torch.arange(len(names)), captions, meta)
    result = evaluate_corpus(corpus, "cxc", bootstrap=0, annotations=folder)
    assert f"cxc: {len(every) - len(rated):,} of {len(every):,} STS pairs are not in this corpus" in result.notes
    a, b = (torch.tensor([pair[side] for pair in rated]) for side in (0, 1))
    cosine = (emb[a] * emb[b]).sum(1).numpy()
    assert result["cxc:sts/spearman"].value == pytest.approx(sampled(rated, cosine), abs=1)
    ours = [result[f"cxc:t2t/r@{k}"].value for k in (1, 5, 10)]
    assert ours == pytest.approx(recalls(emb, liked(rated), (1, 5, 10)), abs=1e-4)
