"""Relation matrices of a fixed probe as pictures: who is like whom, in truth, to the teacher and to each run.

The probe is evenly spread over the corpus, a picture and its first caption from each sample, in one order for all
matrices that puts alike samples side by side. Colours span each matrix's own values, for models differ in scale; what
compares is the pattern, and its rank correlation with the first matrix, over all pairs.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.paper import first_captions
from vlscale.evaluate.protocols import relevance_of
from vlscale.evaluate.spearman import spearman
from vlscale.report.runs import RunReport

PROBE = 48  # samples
RAMP = np.array(
    [(246, 241, 228), (226, 178, 120), (176, 85, 96), (88, 38, 94), (24, 17, 51)], dtype=float
)  # low to high


@dataclass(frozen=True)
class Matrix:
    name: str
    run: int | None  # place of the run; None for truth and teacher
    picture: str  # data URI
    agreement: float | None  # rank correlation with the first matrix; None for that one


@dataclass(frozen=True)
class Relations:
    title: str
    against: str  # name of the matrix that the others are held against
    size: int  # samples of the probe
    matrices: list[Matrix]


def relations(runs: list[RunReport], teacher: EmbeddedCorpus | None) -> list[Relations]:
    """Among pictures, then among captions; empty where there is neither truth nor teacher to hold the runs against."""
    corpus, result = runs[0].corpus, runs[0].result
    first = first_captions(corpus.text_image, len(corpus.keys))
    captioned = (first >= 0).nonzero()[:, 0]
    probe = captioned[:: max(1, len(captioned) // PROBE)][:PROBE]
    truth = relevance_of(corpus, result) if result.protocol == "synthetic" else None
    if truth is None and teacher is None:
        return []
    exact = truth.i2i(probe)[:, probe] if truth is not None else None
    order = _alike_together(exact if exact is not None else _cosines(teacher.image_emb[probe]))
    made = []
    for title, side in (("Among pictures", "i"), ("Among captions", "t")):
        tables = [] if exact is None else [("truth", None, exact)]
        sources = [] if teacher is None else [("teacher", None, teacher)]
        sources += [(run.name, number, run.corpus) for number, run in enumerate(runs)]
        for name, number, source in sources:
            emb = source.image_emb[probe] if side == "i" else source.text_emb[first[probe]]
            tables.append((name, number, _cosines(emb)))
        made.append(Relations(title, tables[0][0], len(probe), _matrices(tables, order)))
    return made


def _matrices(tables: list[tuple[str, int | None, Tensor]], order: Tensor) -> list[Matrix]:
    pairs = torch.triu_indices(len(order), len(order), 1)
    known = tables[0][2][pairs[0], pairs[1]].double().numpy()
    found = []
    for place, (name, run, table) in enumerate(tables):
        agreement = spearman(known, table[pairs[0], pairs[1]].double().numpy()) if place else None
        found.append(Matrix(name, run, _picture(table[order][:, order]), agreement))
    return found


def _cosines(emb: Tensor) -> Tensor:
    return emb @ emb.T


def _alike_together(table: Tensor) -> Tensor:
    """(n,) an order that goes on, from the most connected item, to the likest of those that are left."""
    left = table.clone().fill_diagonal_(-torch.inf)
    place = int(table.sum(1).argmax())
    order = [place]
    while len(order) < len(table):
        left[:, place] = -torch.inf
        place = int(left[place].argmax())
        order.append(place)
    return torch.tensor(order)


def _picture(table: Tensor) -> str:
    """A PNG of a pixel a pair; the diagonal takes the largest value off it."""
    size = len(table)
    off_diagonal = table[~torch.eye(size, dtype=torch.bool)].float()
    low, high = torch.quantile(off_diagonal, torch.tensor([0.02, 0.98])).tolist()
    level = ((table.float() - low) / max(high - low, 1e-9)).clamp(0, 1).numpy() * (len(RAMP) - 1)
    steps = np.arange(len(RAMP))
    pixels = np.stack([np.interp(level, steps, RAMP[:, channel]) for channel in range(3)], axis=2)
    out = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
