"""`vlscale search`: the nearest pictures and captions of an index to a text or a picture, exactly; by faiss where it is
installed, else by vlscale's own kernel."""

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from vlscale.data.faults import BadSample
from vlscale.data.plain_files import PICTURE_NAMES
from vlscale.export.index_file import Index
from vlscale.export.loaded import LoadedModel
from vlscale.kernels import topk_neighbors


class Of(StrEnum):
    """What is searched."""

    IMAGES = "images"
    TEXTS = "texts"
    BOTH = "both"


@dataclass(frozen=True)
class Query:
    """A text, or a picture by its path and bytes."""

    text: str
    picture: bytes | None = None


@dataclass(frozen=True)
class Hit:
    score: float  # cosine, also where a fusion encoder chose the order
    key: str  # of the sample; empty for a text of its own
    caption: str  # the one found, or the first of the picture found; empty for a picture without
    is_picture: bool
    place: int  # in the index: pictures first, then captions
    match: float | None = None  # log-odds that query and hit match, where the fusion encoder scored them


def read_query(query: str) -> Query:
    """A picture where `query` names a file, else a text."""
    if not query.strip():
        raise ValueError("the query is empty; expected a text or the path of a picture")
    path = Path(query)
    try:
        if path.is_file():
            return Query(query, path.read_bytes())
    except OSError as error:  # also of texts that are too long for a path
        if path.suffix.lower() in PICTURE_NAMES:
            raise ValueError(f"picture {query} cannot be read: {error.strerror}") from None
    if path.suffix.lower() in PICTURE_NAMES and " " not in query:
        raise ValueError(f"picture {query} does not exist; a query that ends in {path.suffix} is taken for a picture")
    return Query(query)


def check_model(model: LoadedModel, index: Index, path: Path) -> None:
    """Embeddings of two models cannot be compared."""
    made_by = index.header
    if made_by.model_hash != model.hash:
        raise ValueError(
            f"index {path} was made by model {made_by.model} (hash {made_by.model_hash}), got {model.path} "
            f"(hash {model.hash}); search with that model, or embed again with this one"
        )


def search(model: LoadedModel, index: Index, query: Query, *, k: int, of: Of) -> list[Hit]:
    """The `k` nearest, best first, ties in the index's order (pictures before captions)."""
    parts = {Of.IMAGES: [index.image_emb], Of.TEXTS: [index.text_emb], Of.BOTH: [index.image_emb, index.text_emb]}[of]
    size = sum(map(len, parts))
    if size == 0:
        raise ValueError(f"--of {of}: the index holds none; expected {Of.TEXTS if of is Of.IMAGES else Of.IMAGES}")
    if not 1 <= k <= size:
        raise ValueError(f"--k {k}: expected 1 to {size}, the size of the gallery of {of.value}")
    gallery = torch.cat([torch.from_numpy(np.array(part, np.float32)) for part in parts])  # parquet's cannot be written
    scores, places = _nearest(_embed(model, query), gallery, k)
    offset = len(index.keys) if of is Of.TEXTS else 0
    return [
        _hit(index, place + offset, score) for score, place in zip(scores[0].tolist(), places[0].tolist(), strict=True)
    ]


def _nearest(query: torch.Tensor, gallery: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and places (1, k) of a query (1, D) in a gallery (G, D). faiss gives equal scores in any order."""
    if importlib.util.find_spec("faiss") is None:
        return topk_neighbors(query, gallery, k)
    import faiss

    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(gallery.numpy())
    scores, places = flat.search(query.numpy(), k)
    order = np.lexsort((places[0], -scores[0]))
    return torch.from_numpy(scores[:, order]), torch.from_numpy(places[:, order])


def _embed(model: LoadedModel, query: Query) -> torch.Tensor:
    if query.picture is None:
        return model.embed_text(query.text)
    try:
        return model.embed_picture(query.picture)
    except BadSample as fault:
        raise ValueError(
            f"picture {query.text} cannot be read: {fault} (a query that names a file is taken for a picture)"
        ) from None


def _hit(index: Index, place: int, score: float) -> Hit:
    """`place` counts pictures first, then captions."""
    images = len(index.keys)
    if place < images:
        own = int(np.searchsorted(index.text_image, place))
        captioned = own < len(index.text_image) and index.text_image[own] == place
        return Hit(score, str(index.keys[place]), str(index.captions[own]) if captioned else "", True, place)
    caption, owner = place - images, int(index.text_image[place - images])
    return Hit(score, str(index.keys[owner]) if owner >= 0 else "", str(index.captions[caption]), False, place)
