"""Relation matrices by tiles: logits of one modality against itself, and the way back from their gradients.

K segments of an embedding (N, F), F = sum of widths, with one weight each:

    cosine      l_ij = sum_k w_k z^k_i . z^k_j          one product of the weighted rows with the columns
    euclidean   l_ij = -sum_k w_k |z^k_i - z^k_j|       a product and a square root a segment

A loss over l hands back H_ij = dL/dl_ij + dL/dl_ji, the derivative by an unordered pair (its diagonal is 0):

    cosine      dz_i = w o sum_j H_ij z_j;  dw_k = <dz^k, z^k> / 2 w_k, from the product before the weights
    euclidean   C_ij = -w_k H_ij / |z_i - z_j| (0 at distance 0);  dz^k_i = sum_j C_ij (z^k_i - z^k_j)

so each relation costs one gradient product although its matrix holds every embedding twice. `Sweep` says which tiles
are visited: all columns for my rows, the upper triangle of a square (each tile serves its rows and its columns), or a
pair of different blocks (the same, for rank I against rank J).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

from .chunked import COLUMNS, ROWS, diagonal_part, product, spans, tile_diagonal


class Sweep(Enum):
    ROWS = "rows"  # my rows x all columns; only the rows are served
    TRIANGLE = "triangle"  # rows and columns are the same; tiles right of the diagonal serve both sides
    PAIR = "pair"  # two different blocks; every tile serves both sides


@dataclass(frozen=True)
class Tile:
    rows: tuple[int, int]
    columns: tuple[int, int]
    mirrored: bool  # whether the columns are served as well
    square: bool = False  # whether the columns are the rows: each pair is here twice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def sweep_tiles(sweep: Sweep, rows: int, columns: int) -> Iterator[Tile]:
    for i in spans(0, rows, ROWS):
        if sweep is Sweep.TRIANGLE:
            yield Tile(i, i, False, square=True)
        for j in spans(i[1] if sweep is Sweep.TRIANGLE else 0, columns, COLUMNS):
            yield Tile(i, j, sweep is not Sweep.ROWS)


def tile_elements(sweep: Sweep, rows: int, columns: int) -> int:
    width = max(min(COLUMNS, columns), min(ROWS, rows)) if sweep is Sweep.TRIANGLE else min(COLUMNS, columns)
    return min(ROWS, rows) * width


def set_diagonal(tile: Tensor, place: Tile, offset: int | None, value: float) -> None:
    """Overwrite the elements that pair a row with itself; `offset` None: the blocks share no row."""
    if offset is None:
        return
    if part := diagonal_part(place.rows, place.columns, offset):
        tile_diagonal(tile, part, place.rows, place.columns, offset).fill_(value)


class Relation:
    """Logits of rows (b, F) against columns (N, F), segment widths `widths`, weights (K,)."""

    def __init__(self, rows: Tensor, columns: Tensor, weights: Tensor, widths: list[int], kind: str):
        self.rows, self.columns, self.weights, self.kind = rows, columns, weights, kind
        self.segments = [slice(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]
        self.spread = torch.cat([weight.expand(width) for weight, width in zip(weights, widths, strict=True)])
        if kind == "euclidean":
            self.row_norms = [rows[:, k].square().sum(1) for k in self.segments]
            self.column_norms = [columns[:, k].square().sum(1) for k in self.segments]

    def bound(self) -> Tensor:
        """An upper bound of all logits, 0-d."""
        if self.kind == "cosine":
            rows = (self.rows.square() * self.spread.abs()).sum(1).amax()
            return (rows * (self.columns.square() * self.spread.abs()).sum(1).amax()).sqrt()
        reach = [r.amax().sqrt() + c.amax().sqrt() for r, c in zip(self.row_norms, self.column_norms, strict=True)]
        return ((-self.weights).clamp_min(0) * torch.stack(reach)).sum()

    def distances(self, k: int, place: Tile, out: Tensor) -> Tensor:
        """Segment k's distances; what rounding cannot tell from 0 is 0."""
        i, j = slice(*place.rows), slice(*place.columns)
        norms = torch.add(self.row_norms[k][i, None], self.column_norms[k][None, j])
        gram = product(self.rows[i, self.segments[k]], self.columns[j, self.segments[k]], out)
        squared = torch.sub(norms, gram, alpha=2, out=out)
        noise = norms.mul_(4 * torch.finfo(out.dtype).eps)
        return squared.mul_(squared > noise).sqrt_()

    def logits(self, place: Tile, out: Tensor, spare: Tensor) -> Tensor:
        """A tile; of a square's two roundings of one pair both elements get the upper one's."""
        if self.kind == "cosine":
            product(self.rows[slice(*place.rows)] * self.spread, self.columns[slice(*place.columns)], out)
            return out.triu_().add_(torch.triu(out, 1, out=spare).T) if place.square else out
        out.zero_()
        for k in range(len(self.segments)):
            out.addcmul_(self.distances(k, place, spare), self.weights[k], value=-1)
        return out


class RelationWeights:
    """Collects the gradient of one relation's weights (K,) alone, partial over the tiles of this process."""

    def __init__(self, relation: Relation):
        self.relation = relation
        self.weight_sums = torch.zeros(len(relation.weights), dtype=torch.float64, device=relation.rows.device)

    def add(self, h: Tensor, place: Tile, spare: Tensor) -> None:
        rows, columns = self.relation.rows[slice(*place.rows)], self.relation.columns[slice(*place.columns)]
        if self.relation.kind == "cosine":
            along = ((h @ columns) * rows).sum(0, dtype=torch.float64)
            along = torch.stack([along[segment].sum() for segment in self.relation.segments])
        else:
            segments = range(len(self.relation.segments))
            along = torch.stack([-(h * self.relation.distances(k, place, spare)).sum().double() for k in segments])
        self.weight_sums += along * (1.0 if place.mirrored else 0.5)

    def finish(self) -> tuple[None, None, Tensor]:
        """(None, None, weights), as of one whose embeddings learn."""
        return None, None, self.weight_sums.to(self.relation.weights.dtype)


class RelationGradient:
    """Collects the gradient of one relation's embeddings and weights from tiles of H.

    `columns` is where mirrored tiles send the columns' gradient: the rows' own buffer in a triangle, one of its own for
    a pair of blocks, None for rows alone. `weights` is partial over the tiles of this process: add it over ranks.
    """

    def __init__(self, relation: Relation, sweep: Sweep):
        self.relation = relation
        self.rows = torch.zeros_like(relation.rows)
        self.columns = self.rows if sweep is Sweep.TRIANGLE else None
        if sweep is Sweep.PAIR:
            self.columns = torch.zeros_like(relation.columns)
        self.sweep = sweep
        self.weight_sums = torch.zeros_like(relation.weights)

    def add(self, h: Tensor, place: Tile, spare: Tensor) -> None:
        if self.relation.kind == "cosine":
            self.rows[slice(*place.rows)].addmm_(h, self.relation.columns[slice(*place.columns)])
            if place.mirrored:
                self.columns[slice(*place.columns)].addmm_(h.T, self.relation.rows[slice(*place.rows)])
            return
        for k, segment in enumerate(self.relation.segments):
            d = self.relation.distances(k, place, spare)
            self.weight_sums[k] -= (h * d).sum() * (1.0 if place.mirrored else 0.5)
            c = torch.where(d > 0, h / d, 0).mul_(self.relation.weights[k])
            rows = self.relation.rows[slice(*place.rows), segment]
            columns = self.relation.columns[slice(*place.columns), segment]
            self.rows[slice(*place.rows), segment] += (c @ columns).addcmul_(rows, c.sum(1, keepdim=True), value=-1)
            if place.mirrored:
                back = (c.T @ rows).addcmul_(columns, c.sum(0)[:, None], value=-1)
                self.columns[slice(*place.columns), segment] += back

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """(rows, columns or None, weights)."""
        if self.relation.kind == "euclidean":
            return self.rows, None if self.sweep is Sweep.TRIANGLE else self.columns, self.weight_sums
        along = (self.rows * self.relation.rows).sum(0, dtype=torch.float64)
        # rows alone and a triangle meet each unordered pair twice in <rows' gradient, rows>, a pair of blocks once
        share = 1.0 if self.sweep is Sweep.PAIR else 0.5
        weights = torch.stack([along[k].sum() for k in self.relation.segments]).mul_(share).to(self.rows.dtype)
        columns = self.columns.mul_(self.relation.spread) if self.sweep is Sweep.PAIR else None
        return self.rows.mul_(self.relation.spread), columns, weights
