"""The rectangular primitives: my b rows against all N columns, statistics in and out.

The public functions are the case b = N, offset = 0 of one process. A form over W ranks (b = N / W rows each) calls the
same functions and puts collectives between them; nothing in this library knows about process groups. Embeddings are
given in the compute dtype (float32 or float64), scalars as 0-d tensors of it. `offset` is the global index of row 0.
"Partial" results cover the pairs of these rows: add them over ranks. All are blockwise, O(N) memory, no autograd.

Contrastive, rows x (b, D) against gathered columns y (N, D)
    positives = Positives(row_ids | None, col_ids | None, offset)
    ref = fixed_reference(contrastive_bound(x, y, scale), dtype)          all_reduce(MAX) the bound first
    rows, cols = contrastive_statistics(x, y, scale, ref, ref, positives) all_reduce(SUM) cols
    sums_are_sound(N, r, q) with r = rows[0] + rows[1], q likewise; if any rank says no, on every rank:
        row_ref, col_ref = contrastive_maxima(x, y, scale)                all_reduce(MAX) col_ref, then statistics again
    loss = (sum contrastive_terms(rows, row_ref, positives.row_count)     all_reduce(SUM) this part
            + sum contrastive_terms(cols, col_ref, positives.col_count)) / 2N
    weights = Weights(row_ref, col_ref, rows, cols, positives)
    dx, dy = contrastive_gradients(x, y, scale, weights)                  reduce_scatter(SUM) dy
        multiply both by cotangent * scale / 2N;  dscale = cotangent <dx, x> / 2N before that, all_reduce(SUM)
  gradient of the gradient, cotangents u (b, D), v (N, D) gathered, w 0-d
    own = contrastive_own_direction(x, y[mine], u, v[mine], scale, w)     all_gather to own_all (N,)
    row_sums, col_sums = contrastive_double_statistics(x, y, u, v, scale, w, weights, (own, own_all))
                                                                          all_reduce(SUM) col_sums
    xb, yb, scale_b, along = contrastive_double_gradients(..., (row_sums, col_sums))
                                                                          reduce_scatter yb, all_reduce both scalars

Sigmoid: loss, dx, dy, total = sigmoid_sweep(x, y, scale, bias, positives, want_x=, want_y=), each over N by the caller;
    all_reduce(SUM) loss and total, reduce_scatter(SUM) dy.
  gradient of the gradient, cotangents u (b, D), v (N, D) gathered, w and t 0-d
    xb, yb, sums = sigmoid_double_sweep(x, y, u, v, scale, bias, w, t, positives)
                                                                          reduce_scatter yb, all_reduce sums

Relations, rows x (b, F) of X (N, F): Relation(x, X, weights, widths, kind) for the student and for the teacher
    references = References(c, c), c = fixed_reference(bound, dtype, REACH[dtype]), bound by all_reduce(MAX)
    sums, _ = relation_kl_statistics(student, teacher, references, Sweep.ROWS, offset)       all_gather sums to (5, N)
    terms = relation_kl_terms(sums) (matrix scope: of the sums added over all rows)
    coefficients = relation_kl_coefficients(all sums);  mine = coefficients[:, offset : offset + b]
    gradients = relation_kl_gradients(student, teacher, references, mine, coefficients, Sweep.ROWS, offset)
        gradients[0].finish() -> (d rows, complete; None; d weights, partial): no gradient travels
    Where one constant does not reach: relation_maxima(student, teacher, offset), gathered, as References(s, t, S, T).
    Half ring: Sweep.TRIANGLE for a rank's own block, Sweep.PAIR (offset None) for one block against another; both
    return the columns' part as well, which travels back to its owner.
    relation_mae_sweep(difference, toward, sweep, offset): the same three sweeps, loss and gradient at once.
    relation_gram(v) -> (F, F), all_reduce(SUM); relation_mse_total(v, spread, gram) differentiable by autograd.
    relation_wasserstein_sweep(student, teacher, offset, Sweep.PAIR, ...): my rows x all columns.

These are the PyTorch forms, for any device. triton_contrastive.contrastive_statistics and contrastive_gradients and
triton_sigmoid.sigmoid_sweep take the same rectangles and offsets (with a device flag in place of the host's answer to
sums_are_sound), and so do triton_relation_kl's relation_maxima, relation_kl_statistics and relation_kl_gradients, with
triton_relation.Operand.of(rows, columns, weights, widths, kind) in place of a Relation (16 bits as they are, else
float32) and the same sweeps, references, coefficients and finish(). triton_relation_match.relation_mae_sweep takes
the two sides apart, the teacher with its weights negated.
"""

from .chunked import fixed_reference, sums_are_sound
from .chunked_contrastive import (
    Positives,
    Weights,
    contrastive_bound,
    contrastive_gradients,
    contrastive_maxima,
    contrastive_statistics,
    contrastive_terms,
)
from .chunked_contrastive_double import (
    contrastive_double_gradients,
    contrastive_double_operands,
    contrastive_double_statistics,
    contrastive_own_direction,
)
from .chunked_relation import Relation, RelationGradient, Sweep
from .chunked_relation_kl import (
    REACH,
    References,
    relation_kl_coefficients,
    relation_kl_gradients,
    relation_kl_reference,
    relation_kl_statistics,
    relation_kl_terms,
    relation_maxima,
)
from .chunked_relation_match import (
    relation_gram,
    relation_mae_sweep,
    relation_mse_total,
    relation_wasserstein_sweep,
)
from .chunked_sigmoid import sigmoid_sweep
from .chunked_sigmoid_double import sigmoid_double_sweep

__all__ = [
    "REACH",
    "Positives",
    "References",
    "Relation",
    "RelationGradient",
    "Sweep",
    "Weights",
    "contrastive_bound",
    "contrastive_double_gradients",
    "contrastive_double_operands",
    "contrastive_double_statistics",
    "contrastive_gradients",
    "contrastive_maxima",
    "contrastive_own_direction",
    "contrastive_statistics",
    "contrastive_terms",
    "fixed_reference",
    "relation_gram",
    "relation_kl_coefficients",
    "relation_kl_gradients",
    "relation_kl_reference",
    "relation_kl_statistics",
    "relation_kl_terms",
    "relation_mae_sweep",
    "relation_maxima",
    "relation_mse_total",
    "relation_wasserstein_sweep",
    "sigmoid_double_sweep",
    "sigmoid_sweep",
    "sums_are_sound",
]
