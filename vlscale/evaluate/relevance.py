"""Who is relevant to whom: four blocks of a relevance table, made row by row so that the whole never has to exist.

Letters: q query rows of a block, I images, T captions. An item's relevance to a query is at least 0; larger is better.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlscale.data.scenes import scene_relevance

KEPT_WHOLE = 1 << 26  # numbers of a relevance table that is made once and kept (256 MB): 8,192 scenes


class Relevance(Protocol):
    """`rows` (q,) are images for `i2i` and `i2t`, captions for `t2i` and `t2t`; columns are all images or captions."""

    def i2i(self, rows: Tensor) -> Tensor: ...
    def i2t(self, rows: Tensor) -> Tensor: ...
    def t2i(self, rows: Tensor) -> Tensor: ...
    def t2t(self, rows: Tensor) -> Tensor: ...


class SampleRelevance:
    """Relevance known between samples: a caption is as relevant as the picture it belongs to."""

    def __init__(self, block: Callable[[Tensor], Tensor], text_image: Tensor):
        """`block` maps images (q,) to their relevance to all images (q, I) float32."""
        self.block = block
        self.text_image = text_image

    def i2i(self, rows: Tensor) -> Tensor:
        return self.block(rows)

    def i2t(self, rows: Tensor) -> Tensor:
        return self.block(rows)[:, self.text_image]

    def t2i(self, rows: Tensor) -> Tensor:
        images, place = self.text_image[rows].unique(return_inverse=True)
        return self.block(images)[place]

    def t2t(self, rows: Tensor) -> Tensor:
        images, place = self.text_image[rows].unique(return_inverse=True)
        return self.block(images)[:, self.text_image][place]


class CaptionRelevance:
    """Relevance of a caption to an image's captions, table (T, I): what ROUGE-L gives (see `rouge`).

    A picture speaks through its captions: as a query it takes the mean over them, and caption c is relevant to it as
    table[c, picture]. Between captions, a gallery caption stands for its image.
    """

    def __init__(self, table: Tensor, text_image: Tensor):
        self.table = table
        self.text_image = text_image
        counts = torch.bincount(text_image, minlength=table.shape[1]).clamp(min=1)
        self.between_images = torch.zeros(table.shape[1], table.shape[1]).index_add_(0, text_image, table.float())
        self.between_images /= counts[:, None]

    def i2i(self, rows: Tensor) -> Tensor:
        return self.between_images[rows]

    def i2t(self, rows: Tensor) -> Tensor:
        return self.table[:, rows].T

    def t2i(self, rows: Tensor) -> Tensor:
        return self.table[rows]

    def t2t(self, rows: Tensor) -> Tensor:
        return self.table[rows][:, self.text_image]


def pairs(images: int, text_image: Tensor) -> SampleRelevance:
    """1 between a picture and its own captions, 0 elsewhere."""
    return SampleRelevance(lambda rows: torch.nn.functional.one_hot(rows, images).float(), text_image)


def scenes(meta: Sequence[dict[str, Any]], text_image: Tensor) -> SampleRelevance:
    """Exact graded relevance of synthetic scenes, from each sample's `scene`."""
    missing = [place for place, sample in enumerate(meta) if "scene" not in sample]
    if missing:
        raise ValueError(
            f"protocol synthetic needs a `scene` in every sample's json: {len(missing)} of {len(meta)} have none; "
            "use protocol pairs or labels for this corpus"
        )
    all_scenes = [sample["scene"] for sample in meta]
    if len(all_scenes) ** 2 <= KEPT_WHOLE:
        table = torch.as_tensor(scene_relevance(all_scenes, all_scenes))
        return SampleRelevance(lambda rows: table[rows], text_image)

    def block(rows: Tensor) -> Tensor:
        return torch.as_tensor(scene_relevance([all_scenes[i] for i in rows.tolist()], all_scenes))

    return SampleRelevance(block, text_image)


def labels(meta: Sequence[dict[str, Any]], field: str, text_image: Tensor) -> SampleRelevance:
    """1 where two samples have the same value of a json field, else 0; samples without the field match nobody."""
    values = [sample.get(field) for sample in meta]
    if all(value is None for value in values):
        known = sorted({key if key.isprintable() else repr(key) for sample in meta for key in sample})
        raise ValueError(f"label {field!r} is in no sample's json; choose from: {', '.join(known) or '(no fields)'}")
    names = sorted({json.dumps(value, sort_keys=True) for value in values if value is not None})
    number = {name: place for place, name in enumerate(names)}
    codes = torch.tensor([-1 if v is None else number[json.dumps(v, sort_keys=True)] for v in values])

    def block(rows: Tensor) -> Tensor:
        return ((codes[rows, None] == codes) & (codes[rows, None] >= 0)).float()

    return SampleRelevance(block, text_image)
