"""Relation KL by tiles: rectangular primitives for statistics and gradients.

Student logits s and teacher logits t of N rows, diagonal left out; e_s = exp(s - c_s), e_t = exp(t - c_t), and
d = (t - c_t) - (s - c_s). Sums of a row (or, for matrix scope, of all rows together):

    rs = sum e_s,  rt = sum e_t,  D = sum (e_s - e_t) / rt,  E = sum e_t d / rt,  Q = sum (e_s - e_t + e_t d) / rt
    KL = E + log(rs / rt) = Q - (D - log1p D)

The second form has no cancellation when student and teacher nearly agree, where the first is all rounding; D far from 0
(the two are shifted against each other) is the other way round. e_s - e_t is -(e_s + e_t) tanh(d / 2), exact for all d.

    G_ij = e_s / rs_i - e_t / rt_i for the student,   p_t (d - E_i) for the teacher,   H = G + G^T

With one constant for each reference a tile serves its rows and its columns: N^2 (D_s + D_t) multiply-adds forward, the
same again and N^2 D_s backward. Vector references (the row maxima) cost a round of products more, and exponentials for
rows and columns apart. A triangle has one logit for both orders of a pair: where logits are large, a row whose sum was
made of one rounding and whose gradient is made of the other has probabilities that do not add up to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import Scratch, fixed_reference, sums_are_sound
from .chunked_relation import (
    Relation,
    RelationGradient,
    RelationWeights,
    Sweep,
    Tile,
    set_diagonal,
    sweep_tiles,
    tile_elements,
)

SUMS = 5  # rs, rt, sum (e_s - e_t), sum e_t d, sum (e_s - e_t + e_t d)
REACH = {torch.float32: 60.0, torch.float64: 500.0}  # under the other losses': sums of N^2 terms have to stay finite
NEAR = 0.5  # |D| under which the difference form is used


@dataclass(frozen=True)
class References:
    """What the exponentials subtract: 0-d for everything, or (b,) for the rows and (N,) for the columns."""

    student: Tensor
    teacher: Tensor
    student_columns: Tensor | None = None
    teacher_columns: Tensor | None = None

    @property
    def shared(self) -> bool:
        return self.student.dim() == 0

    def of_rows(self, place: Tile) -> tuple[Tensor, Tensor]:
        if self.shared:
            return self.student, self.teacher
        return self.student[slice(*place.rows), None], self.teacher[slice(*place.rows), None]

    def of_columns(self, place: Tile) -> tuple[Tensor, Tensor]:
        return self.student_columns[slice(*place.columns)], self.teacher_columns[slice(*place.columns)]


def relation_kl_reference(student: Relation, teacher: Relation) -> References:
    """One constant for student and teacher, so that nearly equal logits stay nearly equal exponentials."""
    bound = torch.maximum(student.bound(), teacher.bound())
    constant = fixed_reference(bound, student.rows.dtype, REACH[student.rows.dtype])
    return References(constant, constant)


def relation_maxima(
    student: Relation, teacher: Relation, offset: int, sweep: Sweep = Sweep.ROWS
) -> tuple[Tensor, Tensor]:
    """Off-diagonal row maxima of both logits, (b,) each: references where one constant does not reach.

    `sweep` ROWS or TRIANGLE, the one that they are references for.
    """
    b, n = len(student.rows), len(student.columns)
    scratch = Scratch(2, tile_elements(sweep, b, n), student.rows)
    maxima = student.rows.new_full((2, b), -torch.inf)
    for place in sweep_tiles(sweep, b, n):
        for found, relation in zip(maxima, (student, teacher), strict=True):
            tile = relation.logits(place, scratch.tile(0, *place.shape), scratch.tile(1, *place.shape))
            set_diagonal(tile, place, offset, -torch.inf)
            for side, dim in ((place.rows, 1), (place.columns, 0))[: 1 + place.mirrored]:
                torch.maximum(found[slice(*side)], tile.amax(dim), out=found[slice(*side)])
    return maxima[0], maxima[1]


@dataclass(frozen=True)
class Exponentials:
    """One tile of e_s, e_t, d = t - s and e_s - e_t."""

    e_s: Tensor
    e_t: Tensor
    d: Tensor
    difference: Tensor


class TileMaker:
    """Makes the exponentials of one tile after another in a fixed set of buffers.

    Buffers 0 and 1 hold the logits, 2 and 3 d and the difference, 4 is spare; vector references keep the logits for the
    second evaluation and put the exponentials in 5 and 6.
    """

    def __init__(self, student: Relation, teacher: Relation, references: References, sweep: Sweep, offset: int | None):
        self.student, self.teacher, self.references, self.offset = student, teacher, references, offset
        b, n = len(student.rows), len(student.columns)
        self.places = list(sweep_tiles(sweep, b, n))
        self.scratch = Scratch(5 if references.shared else 7, tile_elements(sweep, b, n), student.rows)

    def spare(self, place: Tile) -> Tensor:
        return self.scratch.tile(4, *place.shape)

    def load(self, place: Tile) -> None:
        self.student.logits(place, self.scratch.tile(0, *place.shape), self.spare(place))
        self.teacher.logits(place, self.scratch.tile(1, *place.shape), self.spare(place))

    def exponentials(self, place: Tile, references: tuple[Tensor, Tensor]) -> Exponentials:
        s, t, d, difference = (self.scratch.tile(k, *place.shape) for k in range(4))
        e_s, e_t = (s, t) if self.references.shared else (self.scratch.tile(k, *place.shape) for k in (5, 6))
        torch.sub(s, references[0], out=e_s)
        torch.sub(t, references[1], out=e_t)
        torch.sub(e_t, e_s, out=d)
        torch.mul(d, -0.5, out=difference).tanh_()
        for tile in (e_s.exp_(), e_t.exp_()):
            set_diagonal(tile, place, self.offset, 0.0)
        difference.mul_(torch.add(e_s, e_t, out=self.spare(place)))
        return Exponentials(e_s, e_t, d, difference)


def relation_kl_statistics(
    student: Relation, teacher: Relation, references: References, sweep: Sweep, offset: int | None
) -> tuple[Tensor, Tensor | None]:
    """(5, b) sums of the rows, and (5, N) of the columns in a pair sweep (a triangle adds them to its rows)."""
    maker = TileMaker(student, teacher, references, sweep, offset)
    rows = student.rows.new_zeros(SUMS, len(student.rows))
    columns = student.rows.new_zeros(SUMS, len(student.columns)) if sweep is Sweep.PAIR else None
    for place in maker.places:
        maker.load(place)
        sides = [(rows[:, slice(*place.rows)], 1)]
        if place.mirrored:
            sides.append(((rows if columns is None else columns)[:, slice(*place.columns)], 0))
        if references.shared:
            _add_sums(maker.exponentials(place, references.of_rows(place)), sides)
            continue
        for side, refs in zip(sides, (references.of_rows, references.of_columns), strict=False):
            _add_sums(maker.exponentials(place, refs(place)), [side])
    return rows, columns


def _add_sums(tile: Exponentials, sides: list[tuple[Tensor, int]]) -> None:
    """Add one tile's five sums along a dimension to each side's (5, n); `tile` is used up."""
    drift = torch.mul(tile.e_t, tile.d, out=tile.d)
    for k, part in enumerate((tile.e_s, tile.e_t, tile.difference, drift)):
        for sums, dim in sides:
            sums[k] += part.sum(dim)
    drift.add_(tile.difference)
    for sums, dim in sides:
        sums[4] += drift.sum(dim)


def relation_kl_terms(sums: Tensor) -> Tensor:
    """(5, n) sums -> (n,) float64 divergences; for matrix scope give the sums added over all rows, (5, 1)."""
    rs, rt, difference, drift, curved = sums.double()
    ratio = difference / rt
    near = curved / rt - (ratio - ratio.log1p())
    return torch.where(ratio.abs() < NEAR, near, drift / rt + (rs.log() - rt.log()))


def relation_kl_coefficients(sums: Tensor) -> Tensor:
    """(5, n) sums -> (5, n) coefficients of a tile's exponentials in the gradients, in the sums' dtype.

    Student: (e_s - e_t) / rs + e_t (1/rs - 1/rt) near agreement, e_s / rs - e_t / rt far from it.
    """
    rs, rt, difference, drift, _ = sums.double()
    ratio = difference / rt
    near = ratio.abs() < NEAR
    nothing = torch.zeros_like(rs)
    return torch.stack(
        [
            torch.where(near, 1 / rs, nothing),
            torch.where(near, nothing, 1 / rs),
            torch.where(near, -ratio / rs, -1 / rt),
            1 / rt,
            -drift / rt / rt,
        ]
    ).to(sums.dtype)


def relation_kl_gradients(
    student: Relation,
    teacher: Relation,
    references: References,
    coefficients: Tensor,
    column_coefficients: Tensor,
    sweep: Sweep,
    offset: int | None,
    *,
    want_student: bool = True,
    want_teacher: bool = False,
    want_weights: bool = False,
) -> tuple[RelationGradient | None, RelationGradient | RelationWeights | None]:
    """Gradients of the sum of `relation_kl_terms` through both relations; None where not wanted.

    `want_weights` is of the teacher's weights, without its embeddings unless `want_teacher`.
    The columns' coefficients (5, N) are finished ones: gathered over ranks, or the rows' own in a triangle.
    """
    maker = TileMaker(student, teacher, references, sweep, offset)
    gradients = RelationGradient(student, sweep) if want_student else None
    teacher_gradients = RelationGradient(teacher, sweep) if want_teacher else None
    if want_weights and not want_teacher:
        teacher_gradients = RelationWeights(teacher)
    h_tile = Scratch(1 if teacher_gradients is None else 2, maker.scratch.buffers[0].numel(), student.rows)
    far = bool(coefficients[1].any() | column_coefficients[1].any()) if coefficients.device.type == "cpu" else True
    student_terms = [(0, "difference"), *([(1, "e_s")] if far else []), (2, "e_t")]
    for place in maker.places:
        maker.load(place)
        h_s = h_tile.tile(0, *place.shape).zero_()
        h_t = None if teacher_gradients is None else h_tile.tile(1, *place.shape).zero_()
        for factors, refs in _sides(references, coefficients, column_coefficients, place, maker.spare(place)):
            tile = maker.exponentials(place, refs)
            for k, name in student_terms if want_student else []:
                h_s.addcmul_(getattr(tile, name), factors(k))
            if h_t is not None:
                h_t.addcmul_(tile.e_t, factors(4)).addcmul_(tile.d.mul_(tile.e_t), factors(3))
        if want_student:
            gradients.add(h_s, place, maker.spare(place))
        if h_t is not None:
            teacher_gradients.add(h_t, place, maker.spare(place))
    return gradients, teacher_gradients


def _sides(references: References, rows: Tensor, columns: Tensor, place: Tile, spare: Tensor):
    """(coefficient k as something that broadcasts over the tile, references): once for G + G^T, or for each in turn."""
    i, j = slice(*place.rows), slice(*place.columns)
    if references.shared:
        yield (lambda k: torch.add(rows[k, i, None], columns[k, None, j], out=spare)), references.of_rows(place)
        return
    yield (lambda k: rows[k, i, None]), references.of_rows(place)
    yield (lambda k: columns[k, None, j]), references.of_columns(place)


def relation_kl_sums(student: Relation, teacher: Relation, *, matrix: bool) -> tuple[References, Tensor]:
    """One process's references and (5, N) row sums, with the cheapest reference that is sound.

    The constant is checked afterwards on a CPU; other devices take the maxima rather than wait for an answer.
    """
    if student.rows.device.type == "cpu":
        references = relation_kl_reference(student, teacher)
        sums, _ = relation_kl_statistics(student, teacher, references, Sweep.TRIANGLE, 0)
        checked = sums[:2].double().sum(1).to(sums.dtype) if matrix else sums[:2]
        if sums_are_sound(len(student.rows), checked) or not torch.isfinite(references.student):
            return references, sums
    s, t = relation_maxima(student, teacher, 0, Sweep.TRIANGLE)
    references = References(s.amax(), t.amax()) if matrix else References(s, t, s, t)
    return references, relation_kl_statistics(student, teacher, references, Sweep.TRIANGLE, 0)[0]
