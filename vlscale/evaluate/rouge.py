"""ROUGE-L of every caption with every image's captions: what the papers take for relevance, the truth being unknown.

Letters: T captions, I images, V different words. A caption is lower-cased and split at single spaces (an empty word
where two spaces meet, as in the papers' code). Against the captions of an image, the largest precision and the largest
recall are taken, each from whichever caption gives it, and joined with beta = 1.2:

    P = max_r LCS(c, r) / |c|,   R = max_r LCS(c, r) / |r|,   ROUGE-L = (1 + beta^2) P R / (R + beta^2 P)

Each word becomes one character, so that the longest common subsequence is rapidfuzz's bit-parallel one: 30 ns a pair
of Flickr30K captions on one core. Cost: T^2 pairs of captions; memory: the (T, I) result and one
block of rows.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from torch import Tensor

BETA = 1.2
BLOCK_PAIRS = 1 << 25  # pairs of captions at once: 64 MB as uint16
LARGEST_CHARACTER = 0x10FFFF
SURROGATES = range(0xD800, 0xE000)  # code points that stand for no character


def rouge_table(
    captions: Sequence[str],
    text_image: Tensor,
    images: int,
    *,
    cache: Path | None = None,
    workers: int = -1,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """(T, I) float32 in [0, 1]; 0 for images without captions. `cache` is a folder that keeps tables by their input;
    `workers` threads (-1: all cores); `on_rows` hears how many captions were done."""
    path = cache / f"rouge-{_fingerprint(captions, text_image, images)}.npy" if cache is not None else None
    if path is not None and path.is_file():
        on_rows(len(captions))
        return torch.from_numpy(np.load(path, allow_pickle=False))
    table = _table(captions, text_image.numpy(), images, workers, on_rows)
    if path is not None:
        _keep(table, path)
    return torch.from_numpy(table)


def _table(
    captions: Sequence[str], text_image: np.ndarray, images: int, workers: int, on_rows: Callable[[int], None]
) -> np.ndarray:
    words = [caption.lower().split(" ") for caption in captions]
    coded, length = _as_characters(words), np.array([len(each) for each in words], dtype=np.float32)
    order = np.argsort(text_image, kind="stable")  # captions of one image side by side
    starts = np.flatnonzero(np.diff(text_image[order], prepend=-1))
    owners = text_image[order][starts]
    references, reference_length = [coded[place] for place in order], length[order]
    out = np.zeros((len(captions), images), dtype=np.float32)
    rows = max(1, BLOCK_PAIRS // len(captions))
    for start in range(0, len(captions), rows):
        part = slice(start, start + rows)
        common = cdist(coded[part], references, scorer=LCSseq.similarity, dtype=np.uint16, workers=workers)
        precision = np.maximum.reduceat(common, starts, axis=1) / length[part, None]
        recall = np.maximum.reduceat(common / reference_length, starts, axis=1)
        below = recall + BETA**2 * precision
        both = (1 + BETA**2) * precision * recall
        out[part, owners] = np.divide(both, below, out=np.zeros_like(below), where=below > 0)
        on_rows(len(common))
    return out


def _as_characters(words: list[list[str]]) -> list[str]:
    """A character a word, frequent words first: low code points are the quick ones."""
    counts = Counter(word for caption in words for word in caption)
    points = (point for point in range(1, LARGEST_CHARACTER + 1) if point not in SURROGATES)
    character = {word: chr(point) for (word, _), point in zip(counts.most_common(), points, strict=False)}
    if len(character) < len(counts):
        raise ValueError(f"ROUGE-L takes at most {len(character):,} different words, got {len(counts):,}")
    return ["".join(character[word] for word in caption) for caption in words]


def _fingerprint(captions: Sequence[str], text_image: Tensor, images: int) -> str:
    digest = hashlib.sha256(f"rouge-l 1 {images} {len(captions)} ".encode())
    digest.update(text_image.numpy().tobytes())
    for caption in captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()[:32]


def _keep(table: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        np.save(file, table)
    os.replace(file.name, path)
