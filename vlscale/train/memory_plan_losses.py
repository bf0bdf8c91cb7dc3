"""What the losses of a run cost a rank: the bytes, products and traffic of each of their terms.

Legend: as in `memory_plan`; F = D_s + D_t, the widths of a relation term's student and of all its teachers; L of them
get a gradient, numbers a row. Where the formulas come from: vlscale.objectives.sharded_contrastive,
sharded_relation_kl, sharded_relation_match.
"""

from vlscale.kernels.chunked_relation_match import ROW_ELEMENTS
from vlscale.train.loss_terms import MASTER, Relations, contrasts, relations
from vlscale.train.memory_plan_facts import Run

IDS = 20  # bytes of a pair's id, and of its sums over positives
WAVE_BYTES = 1 << 30  # the Triton losses' at their largest
SORTED = 40  # bytes an element of the rows that Wasserstein sorts at once
GRAM = 8  # bytes of an element of mse's (F, F) matrix


def loss_bytes(run: Run) -> int:
    """Rows of other ranks, gradients in float32, sums, and the tiles of the widest term.

    By gather a contrast holds the N columns and their gradients; by ring three blocks of b. The distances but kl make
    their gradients in the forward and keep nothing else.
    """
    o, width, everyone = run.config.objective, run.config.model.embed_dim, run.config.train.global_batch_size
    away = _away(run, run.comm)
    sums = 6 * MASTER * (everyone + run.local)
    held = away * run.size * (run.world > 1)
    contrast = width * (held + MASTER * (away if run.world > 1 else everyone) + MASTER * run.local) + sums
    terms = [_bytes_of(term, run) for term in relations(o, run.widths)]
    tile = min(run.local, 512) * min(everyone, 2048) * MASTER * 4
    wave = min(run.local, 8192) * min(everyone, 65536) * 2 if o.impl != "chunked" else 0
    passing = max((passing for _, passing in terms), default=0)
    return contrasts(o) * contrast + sum(kept for kept, _ in terms) + passing + max(tile, min(wave, WAVE_BYTES))


def _bytes_of(term: Relations, run: Run) -> tuple[int, int]:
    """(what waits for the backward, what is gone when the term's forward is done)."""
    away = _away(run, _comm(term, run)) * (run.world > 1)
    everyone = run.config.train.global_batch_size
    held, gradient = away * term.width * run.size, MASTER * run.local * term.learned
    if term.distance == "kl":
        return held + gradient + 6 * MASTER * (everyone + run.local), 0
    if term.distance == "mse":
        return 3 * GRAM * term.width**2 + 2 * GRAM * run.local * term.width, 0
    if term.distance == "wasserstein":
        return gradient, held + SORTED * min(ROW_ELEMENTS, run.local * everyone)
    joined = MASTER * term.width * (run.local + away)
    return gradient, held + joined


def loss_traffic(run: Run) -> int:
    """Bytes that a rank receives for one loss, all terms.

    A contrast by gather: (W-1)/W N (D e + 4 D + 8), columns there, their gradients back in float32, sums; by ring
    (W-1) b (2 D e + 4) + N (4 D + 4), columns in both passes, gradients and sums all the way round; and IDS of a pair
    for pair ids. Relations: see `_traffic_of`.
    """
    everyone, width = run.config.train.global_batch_size, run.config.model.embed_dim
    others = (run.world - 1) / run.world
    if run.comm == "gather":
        contrast = others * (everyone * width * (run.size + MASTER) + 8 * everyone)
    else:
        columns = (run.world - 1) * run.local * (2 * width * run.size + 4)
        contrast = columns + everyone * (MASTER * width + 4)
    contrast += others * everyone * IDS
    relation = sum(_traffic_of(term, run) for term in relations(run.config.objective, run.widths))
    return int(contrasts(run.config.objective) * contrast * run.passes.consistency + relation)


def _traffic_of(term: Relations, run: Run) -> float:
    """kl: N F e there, by ring again in the backward, and three coefficients a row, five where the mixture learns; mae:
    N F e; both times (W-1)/W. A half ring brings floor(W/2) b rows, and as many sums and gradients of L come back, to
    the lower half of the ranks b/2 fewer at even W. Wasserstein gathers rows, and their gradients come back; mse adds
    (F, F) matrices, and their gradients where rows learn."""
    everyone, others, comm = run.config.train.global_batch_size, (run.world - 1) / run.world, _comm(term, run)
    there, back = term.width * run.size, MASTER * term.learned
    if term.distance == "mse":
        return 2 * others * GRAM * term.width**2 * (1 + (not term.frozen_student))
    if term.distance == "wasserstein":
        return others * everyone * (there + back)
    sums = 0
    if term.distance == "kl":
        coefficients = MASTER * (5 if term.mixed else 3) * (run.config.objective.relation_scope == "row")
        there = there * (1 if comm == "gather" else 2) + coefficients
        sums = 5 * MASTER
    if comm == "half_ring":
        return run.world // 2 * run.local * (there + sums + back)
    return others * everyone * there


def loss_operations(run: Run) -> int:
    """Of one loss, a rank's part: a contrast is 8 N^2 D, kl 4 N^2 F + 2 N^2 L and N^2 D_t where weights learn, mae and
    Wasserstein 2 N^2 (F + L), mse 2 N F^2 and twice that again where rows learn."""
    everyone, width = run.config.train.global_batch_size, run.config.model.embed_dim
    relation = 0
    for term in relations(run.config.objective, run.widths):
        if term.distance == "mse":
            relation += 2 * everyone * term.width**2 * (1 if term.frozen_student else 3)
        else:
            relation += 2 * everyone**2 * (term.width + term.learned)
        if term.distance == "kl":
            relation += everyone**2 * (2 * term.width + term.teachers * term.mixed)
    return (8 * everyone**2 * width * contrasts(run.config.objective) * run.passes.consistency + relation) // run.world


def _away(run: Run, comm: str) -> int:
    """Rows of other ranks that a rank holds at once, its own among them."""
    return run.config.train.global_batch_size if comm == "gather" else 3 * run.local


def _comm(term: Relations, run: Run) -> str:
    """How a relation term meets the rows of other ranks."""
    return "gather" if term.distance == "wasserstein" else run.met.way
