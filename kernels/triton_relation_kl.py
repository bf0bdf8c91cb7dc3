"""Relation KL in Triton: the rectangular primitives of chunked_relation_kl, same letters, same signatures.

Rows go in waves. In a triangle a wave visits the columns from its own first row on: the square on the diagonal serves
its rows, the rest serves rows and columns, whose sums are written per row tile and added in fixed order. So each pair
of waves is computed once: N^2 (D_s + D_t) operations forward, the same again and 2 N^2 D_s backward, plus the squares'
second halves. Backward makes blocks of H and takes them to dX with ordinary products, both sides of a block. Where the
parts of a row's last sums are added, its loss, its coefficients and whether it is sound are made of them at once.

One process checks the constant reference on the device: where a sum is unsound, kernels that are always launched and
return at once while their flag is clear compute maxima and start over (row scope with one reference a row and no
mirroring, matrix scope with the exact maximum as the constant). Over ranks the caller decides, and says so by the
references that it gives.
"""

import torch
import triton
from torch import Tensor

from .chunked import SUM_BITS, spans
from .chunked_relation import Sweep, Tile
from .chunked_relation_kl import SUMS, References, relation_kl_coefficients, relation_kl_terms
from .triton_passes import add_several
from .triton_relation import Operand, OperandGradient, OperandWeights, sizes, waves
from .triton_relation_passes import Losses, add_relation_sums, add_weight_sums, relation_reference
from .triton_relation_statistics import relation_maxima_kernel, relation_statistics_kernel
from .triton_relation_weights import relation_weights_kernel
from .triton_tiles import Config, Work, choose_config

STATISTICS = 2 + SUMS + 1  # two references, the rows' coefficients, and flags: see `launches_of`


def _constants(student: Operand, teacher: Operand, config: Config) -> dict:
    return {"K": len(teacher.weights), "EUCLIDEAN": student.kind == "euclidean", **config.launch()}


def _config(student: Operand, teacher: Operand, way: str, *, plain: bool = True) -> Config:
    """One reference leaves room for larger tiles, one teacher for the largest; `way` is forward or backward."""
    if plain and len(teacher.weights) == 1:
        cosine = student.kind == teacher.kind == "cosine"
        return choose_config(student.rows, f"relation_kl_{way}" if cosine else Work.PARTS)
    return choose_config(student.rows, Work.DOUBLE if plain and teacher.kind == "cosine" else Work.CROWDED)


def _always(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.int32, device=like.device)


def relation_maxima(
    student: Operand,
    teacher: Operand,
    offset: int | None,
    run: Tensor | None = None,
    config: Config | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row maxima of both logits without own pairs, (b,) each; only while `run` is set, where it is given, and otherwise
    `out` (2, b) as it was."""
    config = config or choose_config(student.rows, Work.DOUBLE if len(teacher.weights) == 1 else Work.CROWDED)
    run = _always(student.weights) if run is None else run
    extent = sizes(student, teacher, offset)
    b, n = extent[1:3]
    maxima = student.weights.new_empty(2, b) if out is None else out
    for i in spans(0, b, config.wave_rows):
        grid = triton.cdiv(i[1] - i[0], config.block_m), min(config.splits, triton.cdiv(n, config.block_n))
        parts = maxima.new_empty(2, grid[1], grid[0] * config.block_m)
        relation_maxima_kernel[grid](
            run, *student.pointers(), *teacher.pointers(), parts, i[0], *extent, **_constants(student, teacher, config)
        )
        both = ((part, of_one[slice(*i)], True) for part, of_one in zip(parts, maxima, strict=True))
        add_several(*both, flag=run, maximum=True)
    return maxima[0], maxima[1]


def relation_kl_statistics(
    student: Operand,
    teacher: Operand,
    references: References,
    sweep: Sweep,
    offset: int | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(5, b) sums of the rows, and (5, n) of the columns in a pair sweep; a triangle adds its columns' to its rows'."""
    sums = student.weights.new_empty(SUMS, len(student.rows))
    columns = sums.new_empty(SUMS, len(student.columns)) if sweep is Sweep.PAIR else None
    _fill_statistics(sums, columns, student, teacher, references, sweep, offset, config)
    return sums, columns


def _fill_statistics(
    sums: Tensor,
    columns: Tensor | None,
    student: Operand,
    teacher: Operand,
    references: References,
    sweep: Sweep,
    offset: int | None,
    config: Config | None,
    run: Tensor | None = None,
    losses: Losses | None = None,
) -> None:
    """relation_kl_statistics into sums and columns, only while `run` is set, if given; `losses` make coefficients of
    them, and take the rest."""
    config = config or _config(student, teacher, "forward", plain=references.shared)
    guard, run = run, _always(student.weights) if run is None else run
    extent = sizes(student, teacher, offset)
    b, n = extent[1:3]
    for place in waves(sweep, b, n, min(b, config.wave_rows), min(n, config.wave_columns)):
        tiles, parts = triton.cdiv(place.shape[0], config.block_m), triton.cdiv(place.shape[1], config.block_n)
        programs = parts if references.shared else min(parts, config.splits)
        row_out = sums.new_empty(SUMS, programs, place.shape[0])
        column_out = sums.new_empty(SUMS, tiles, place.shape[1] if place.mirrored else 0)
        relation_statistics_kernel[tiles, programs](
            run, *student.pointers(), *teacher.pointers(), references.student, references.teacher, row_out, column_out,
            *place.rows, *place.columns, parts, int(place.mirrored), extent[0], *extent[3:], SHARED=references.shared,
            **_constants(student, teacher, config),
        )  # fmt: skip
        mirrored, reference = sums if columns is None else columns, references.student
        add_relation_sums(row_out, column_out, sums, mirrored, place, guard=guard, reference=reference, losses=losses)


def relation_kl_forward(
    student: Operand, teacher: Operand, *, matrix: bool, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """(loss in float64, statistics (8, N): both references, the rows' coefficients, flags).

    From whichever references are sound; nothing is read on the host.
    """
    constant = relation_reference(student, teacher)
    statistics = student.weights.new_empty(STATISTICS, len(student.rows))
    refs, sums, flags = statistics[:2], statistics[2:-1], statistics[-1].view(torch.int32)
    given = sums, None, student, teacher
    if matrix:
        return _of_matrix(refs, sums, given, constant, config), statistics
    losses = Losses.of(refs)
    _fill_statistics(*given, References(constant, constant), Sweep.TRIANGLE, 0, config, None, losses)
    torch.amax(losses.unsound, 1, out=flags[:2])
    maxima = relation_maxima(student, teacher, 0, flags, config, out=refs)
    _fill_statistics(*given, References(*maxima), Sweep.ROWS, 0, config, flags, losses)
    return losses.terms.sum(), statistics


def _of_matrix(refs: Tensor, sums: Tensor, given: tuple, constant: Tensor, config: Config | None) -> Tensor:
    """Loss of the matrix scope; the exact maximum is a constant as well."""
    n = sums.shape[1]
    student, teacher = given[2:]
    _fill_statistics(*given, References(constant, constant), Sweep.TRIANGLE, 0, config)
    totals = sums[:2].sum(1)
    unsound = ~((totals >= n * 2.0 ** -SUM_BITS[sums.dtype]) & (totals < torch.inf)).all()
    run = unsound.to(torch.int32)
    s_ref, t_ref = (
        torch.where(unsound, ref.amax(), constant) for ref in relation_maxima(student, teacher, 0, run, config)
    )
    _fill_statistics(*given, References(s_ref, t_ref), Sweep.TRIANGLE, 0, config, run)
    totals = sums.double().sum(1, keepdim=True)
    refs[0], refs[1] = s_ref, t_ref
    sums.copy_(relation_kl_coefficients(totals))
    return relation_kl_terms(totals).mean()


def launches_of(statistics: Tensor, *, matrix: bool) -> list[tuple[References, Tensor]]:
    """The forward's references as the kernels to launch: row scope launches those for one constant and those for a
    reference a row, of which one returns at once. The flags say so: 1 and 0 where the constant was unsound, else 0 and
    -1."""
    s_ref, t_ref = statistics[0], statistics[1]
    shared = References(s_ref[0], t_ref[0])
    if matrix:
        return [(shared, _always(s_ref))]
    flags = statistics[-1].view(torch.int32)
    return [(shared, flags[1:]), (References(s_ref, t_ref, s_ref, t_ref), flags)]


def relation_kl_gradients(
    student: Operand,
    teacher: Operand,
    references: References | None,
    coefficients: Tensor,
    column_coefficients: Tensor,
    sweep: Sweep,
    offset: int | None,
    *,
    want_student: bool = True,
    want_teacher: bool = False,
    want_weights: bool = False,
    launches: list[tuple[References, Tensor]] | None = None,
    config: Config | None = None,
) -> tuple[OperandGradient | None, OperandWeights | None]:
    """Gradients of the sum of `relation_kl_terms` through both sides, None where not wanted.

    Coefficients (5, b) and (5, n) are finished ones; `launches` stand in for `references` where the device decides.
    `want_weights` is of the teacher's weights, without its embeddings unless `want_teacher`.
    """
    launches = launches or [(references, _always(student.weights))]
    coefficients, column_coefficients = coefficients.contiguous(), column_coefficients.contiguous()
    waved = config or _config(student, teacher, "backward")
    extent, dtype = sizes(student, teacher, offset), student.weights.dtype
    stored, euclidean = student.stored_dtype(), student.kind == "euclidean"
    gradient = OperandGradient(student, sweep, stored) if want_student else None
    teacher_gradient = OperandGradient(teacher, sweep, dtype) if want_teacher else OperandWeights(teacher)
    of_teacher = 1 if want_teacher else 2 if want_weights else 0
    segments = len(teacher.weights)
    planes = segments if euclidean and want_teacher else 1
    height, width = min(extent[1], waved.wave_rows), min(extent[2], max(1, waved.wave_columns // planes))
    block = torch.empty(1, height, max(height, width), dtype=stored, device=coefficients.device)
    teacher_block = block.new_empty(planes, *block.shape[1:], dtype=dtype) if want_teacher else None
    either = launches[1][1] if len(launches) > 1 else None
    for place in waves(sweep, *extent[1:3], height, width):
        tiles = [
            config or _config(student, teacher, "backward", plain=refs.shared and not of_teacher)
            for refs, _ in launches
        ]
        launched = [
            (triton.cdiv(place.shape[0], tile.block_m), triton.cdiv(place.shape[1], tile.block_n)) for tile in tiles
        ]
        out = _room(coefficients, 1, launched, place)
        teacher_out = _room(coefficients, segments, launched, place) if of_teacher else (None, None)
        for (refs, run), tile, grid in zip(launches, tiles, launched, strict=True):
            parts = grid[1]
            relation_weights_kernel[grid[0], parts if refs.shared else min(parts, tile.splits)](
                run, *student.pointers(), *teacher.pointers(), refs.student, refs.teacher, refs.student_columns,
                refs.teacher_columns, coefficients, column_coefficients, block, *out, teacher_block, *teacher_out,
                *place.rows, *place.columns, parts, *extent, block.stride(1), block.stride(0),
                SHARED=refs.shared, TEACHER=of_teacher, **_constants(student, teacher, tile),
            )  # fmt: skip
        here = slice(place.shape[0]), slice(place.shape[1])
        if want_student:
            sums = gradient.sums_of(place, 1)
            along = add_weight_sums(*out, launched, either, place, *sums, student.weights, anew=euclidean)
            gradient.add(block[:, *here], place, *sums)
            gradient.add_along(along)
        sums = None, None
        if want_teacher and euclidean:
            sums = teacher_gradient.sums_of(place, segments)
        if of_teacher == 2 or (want_teacher and euclidean):  # other relations' teachers have no sums to be kept
            along = add_weight_sums(*teacher_out, launched, either, place, *sums, anew=True)
            teacher_gradient.add_along(along)
        if want_teacher:
            teacher_gradient.add(teacher_block[:, *here], place, *sums)
    return gradient, teacher_gradient if of_teacher else None


def _room(like: Tensor, planes: int, launched: list[tuple[int, int]], place: Tile) -> tuple[Tensor, Tensor]:
    """For the sums of weights of the largest launch's parts, by row and by column."""
    tiles, parts = (max(sizes) for sizes in zip(*launched, strict=True))
    return like.new_empty(2, planes, parts, place.shape[0]), like.new_empty(planes, tiles, place.shape[1])
