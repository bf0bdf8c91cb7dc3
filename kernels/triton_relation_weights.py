"""Relation KL's kernel over one block of pairs, backward: gradient weights H of the student, and of the teacher."""

import triton
import triton.language as tl

from .triton_relation import exponentials, relation_tile, segment_tile
from .triton_tiles import side_by_side, store_weights

PART = tl.constexpr(32)  # columns of a tile that are worked on at once


@triton.jit
def of_rows(coefficients_ptr, k: tl.constexpr, rows, b):
    return tl.load(coefficients_ptr + k * b + rows, mask=rows < b, other=0.0)[:, None]


@triton.jit
def of_columns(coefficients_ptr, k: tl.constexpr, columns, n):
    return tl.load(coefficients_ptr + k * n + columns, mask=columns < n, other=0.0)[None, :]


@triton.jit
def relation_weights_part(
    s, t, first_row, first_column, xw_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr, tc_ref_ptr,
    coefficients_ptr, column_coefficients_ptr, h_ptr, column_sums_ptr,
    row_start, row_end, column_start, column_end, offset, b, n, stride_h,
    EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores H of the logits s and t and the sums of its columns; returns each row's <H, S> and sum of H, and with
    TEACHER its H."""
    BLOCK_M: tl.constexpr = s.shape[0]
    BLOCK_N: tl.constexpr = s.shape[1]
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < row_end, columns < column_end
    r, c = coefficients_ptr, column_coefficients_ptr
    if SHARED:
        e_s, e_t, d, difference = exponentials(
            s, t, tl.load(s_ref_ptr), tl.load(t_ref_ptr), first_row, first_column, row_end, column_end, offset,
            NARROW, WHOLE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        h = difference * (of_rows(r, 0, rows, b) + of_columns(c, 0, columns, n))
        h += e_s * (of_rows(r, 1, rows, b) + of_columns(c, 1, columns, n))
        h += e_t * (of_rows(r, 2, rows, b) + of_columns(c, 2, columns, n))
        if TEACHER:
            h_t = d * (of_rows(r, 3, rows, b) + of_columns(c, 3, columns, n))
            h_t = e_t * (h_t + of_rows(r, 4, rows, b) + of_columns(c, 4, columns, n))
    else:
        s_ref = tl.load(s_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        t_ref = tl.load(t_ref_ptr + rows, mask=row_ok, other=0.0)[:, None]
        e_s, e_t, d, difference = exponentials(
            s, t, s_ref, t_ref, first_row, first_column, row_end, column_end, offset, NARROW, WHOLE, BLOCK_M, BLOCK_N
        )
        h = difference * of_rows(r, 0, rows, b) + e_s * of_rows(r, 1, rows, b) + e_t * of_rows(r, 2, rows, b)
        if TEACHER:
            h_t = e_t * (d * of_rows(r, 3, rows, b) + of_rows(r, 4, rows, b))
        s_ref = tl.load(sc_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        t_ref = tl.load(tc_ref_ptr + columns, mask=column_ok, other=0.0)[None, :]
        e_s, e_t, d, difference = exponentials(
            s, t, s_ref, t_ref, first_row, first_column, row_end, column_end, offset, NARROW, WHOLE, BLOCK_M, BLOCK_N
        )
        h += difference * of_columns(c, 0, columns, n) + e_s * of_columns(c, 1, columns, n)
        h += e_t * of_columns(c, 2, columns, n)
        if TEACHER:
            h_t += e_t * (d * of_columns(c, 3, columns, n) + of_columns(c, 4, columns, n))
    along = tl.sum(h * s, 1)
    if EUCLIDEAN:
        weight = tl.load(xw_ptr)
        h = tl.where(s == 0.0, 0.0, -h * weight * weight / tl.where(s == 0.0, 1.0, s))  # s is -weight times distance
    local_row, local_column = first_row - row_start, first_column - column_start
    by_column = tl.program_id(0).to(tl.int64) * (column_end - column_start) + local_column + tl.arange(0, BLOCK_N)
    tl.store(column_sums_ptr + by_column, tl.sum(h, 0), mask=column_ok)
    corner = h_ptr + tl.cast(local_row, tl.int64) * stride_h + local_column
    inside = row_ok[:, None] & column_ok[None, :]
    store_weights(corner, h, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), stride_h, inside)
    if TEACHER:
        return along, tl.sum(h, 1), h_t
    else:
        return along, tl.sum(h, 1), h


@triton.jit
def relation_weights_tile(
    tile, parts,
    x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr, tc_ref_ptr,
    coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
    teacher_ptr, teacher_rows_ptr, teacher_columns_ptr,
    row_start, row_end, column_start, column_end, offset, b, n, D, F, stride_h, plane_h,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """relation_weights_kernel's column tile `tile` of `parts`."""
    NARROW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    WIDTH: tl.constexpr = BLOCK_N if TEACHER else min(BLOCK_N, PART)
    first_row, first_column = row_start + tl.program_id(0) * BLOCK_M, column_start + tile * BLOCK_N
    s = relation_tile(
        x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr, first_row, first_column, row_end, column_end, D,
        1, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    t = relation_tile(
        z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, first_row, first_column, row_end, column_end, F,
        K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    s_parts, t_parts = side_by_side(s, WIDTH), side_by_side(t, WIDTH)
    along = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(BLOCK_N // WIDTH):
        more_along, more, h_t = relation_weights_part(
            s_parts[part], t_parts[part], first_row, first_column + part * WIDTH, xw_ptr, s_ref_ptr, t_ref_ptr,
            sc_ref_ptr, tc_ref_ptr, coefficients_ptr, column_coefficients_ptr, h_ptr, column_sums_ptr,
            row_start, row_end, column_start, column_end, offset, b, n, stride_h,
            EUCLIDEAN, SHARED, TEACHER, NARROW, WHOLE,
        )  # fmt: skip
        along += more_along
        total += more
    height, tiles = row_end - row_start, tl.cast(parts, tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row_start + row < row_end
    by_row = tl.cast(tile, tl.int64) * height + row
    tl.store(row_sums_ptr + tiles * height + by_row, along, mask=row_ok)
    tl.store(row_sums_ptr + by_row, total, mask=row_ok)
    if TEACHER:
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = column_start + column < column_end
        inside = row_ok[:, None] & column_ok[None, :]
    if TEACHER == 2:
        for k in range(K):
            raw = segment_tile(
                z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, z_starts_ptr, k,
                first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            out = teacher_rows_ptr + (K + tl.cast(k, tl.int64)) * tiles * height + by_row
            tl.store(out, tl.sum(h_t * raw, 1), mask=row_ok)
    if TEACHER == 1:
        if EUCLIDEAN:
            for k in range(K):
                away = segment_tile(
                    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, z_starts_ptr, k,
                    first_row, first_column, row_end, column_end, F, K, EUCLIDEAN, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                at = tl.cast(k, tl.int64)
                out = teacher_rows_ptr + at * tiles * height + by_row
                tl.store(out + K * tiles * height, tl.sum(h_t * away, 1), mask=row_ok)
                slope = -h_t * tl.load(zw_ptr + k) / tl.where(away == 0.0, 1.0, away)
                slope = tl.where(away == 0.0, 0.0, slope)
                store_weights(teacher_ptr + at * plane_h, slope, row, column, stride_h, inside)
                tl.store(out, tl.sum(slope, 1), mask=row_ok)
                plane = at * tl.num_programs(0) + tl.program_id(0)
                out = teacher_columns_ptr + plane * (column_end - column_start) + column
                tl.store(out, tl.sum(slope, 0), mask=column_ok)
        else:
            store_weights(teacher_ptr, h_t, row, column, stride_h, inside)


@triton.jit
def relation_weights_kernel(
    run_ptr,
    x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
    z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr, tc_ref_ptr,
    coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
    teacher_ptr, teacher_rows_ptr, teacher_columns_ptr,
    row_start, row_end, column_start, column_end, parts, offset, b, n, D, F, stride_h, plane_h,
    K: tl.constexpr, EUCLIDEAN: tl.constexpr, SHARED: tl.constexpr, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """One block of H, or of C for euclidean relations, in h and with TEACHER (float32) in teacher, a plane a segment.

    row_sums (sum of what is stored, <H, S>; column tiles; rows), column_sums (row tiles, columns); teacher_rows (the
    same without the weight; K; column tiles; rows), teacher_columns (K, row tiles, columns), for euclidean ones only.
    TEACHER 2 wants its weights alone: the second half of teacher_rows is all that is made for it.
    A program takes one column tile; those for a reference a row, which rarely run, are fewer and walk over all `parts`.
    """
    if tl.load(run_ptr) == 0:
        return
    if SHARED:  # a loop of one round would spill
        relation_weights_tile(
            tl.program_id(1), parts, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
            z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr,
            tc_ref_ptr, coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr, teacher_ptr,
            teacher_rows_ptr, teacher_columns_ptr, row_start, row_end, column_start, column_end, offset, b, n, D, F,
            stride_h, plane_h, K, EUCLIDEAN, SHARED, TEACHER, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(1), parts, tl.num_programs(1)):
            relation_weights_tile(
                tile, parts, x_ptr, xc_ptr, x_norms_ptr, xc_norms_ptr, xw_ptr, x_starts_ptr,
                z_ptr, zc_ptr, z_norms_ptr, zc_norms_ptr, zw_ptr, z_starts_ptr, s_ref_ptr, t_ref_ptr, sc_ref_ptr,
                tc_ref_ptr, coefficients_ptr, column_coefficients_ptr, h_ptr, row_sums_ptr, column_sums_ptr,
                teacher_ptr, teacher_rows_ptr, teacher_columns_ptr, row_start, row_end, column_start, column_end,
                offset, b, n, D, F, stride_h, plane_h, K, EUCLIDEAN, SHARED, TEACHER, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE,
            )  # fmt: skip
