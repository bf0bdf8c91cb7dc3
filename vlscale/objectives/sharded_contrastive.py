"""The contrastive loss of a global batch over ranks: each rank its own rows x all columns, 4/W of N^2 D products.

Legend: W ranks, b rows a rank, N = W b, D width, e bytes an element of the embeddings; equations, letters and the
guarded reference are those of vlscale.kernels.primitives, gradients over ranks those of vlscale.objectives.sharded.

Bytes a rank receives:
gather     (W-1)/W N (D e + 4 D + 8)                     the columns once, their sums there and back, their gradient
ring       (W-1)/W N (2 D e + 4) + N (4 D + 4)           the columns again in the backward; sums and gradient go round
With ids 8 more for the ids and 12 for the sums of positives.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.distributed import COMMS, Agreement, Blocks, Gather, Ranks, all_gather, all_reduce, gather_rows
from vlscale.kernels import contrastive_loss
from vlscale.kernels import primitives as p
from vlscale.kernels.checks import as_scalar, check_choice, compute_dtype
from vlscale.kernels.chunked import full_precision, tile_operands
from vlscale.objectives.pair_tiles import Ids, Statistics, Tiles, check_pairs, describe_pairs
from vlscale.objectives.sharded import make_blocks


@dataclass(frozen=True)
class Problem:
    """What is no tensor to differentiate by."""

    ranks: Ranks
    blocks: Blocks
    ids: Ids | None
    impl: str

    def tiles(self, rows: Tensor, scale: Tensor) -> Tiles:
        return Tiles(rows, scale, self.ids, self.impl)


def sharded_contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: float | Tensor,
    *,
    pair_id: Tensor | None = None,
    ranks: Ranks,
    comm: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """`contrastive_loss` of all ranks' pairs, 0-d and the same on every rank.

    image_emb, text_emb (b, D) and pair_id (b,) are this rank's, b the same on every rank. comm: gather (differentiable
    twice), ring (once), auto (`choose_comm`); half_ring means ring here. impl `reference` gathers everything and is
    dense and whole on each rank, differentiable any number of times. The guard of the reference is read on the host:
    its answer decides which collectives follow.
    """
    if ranks.size == 1:
        check_choice("comm", comm, COMMS)
        return contrastive_loss(image_emb, text_emb, logit_scale, pair_id=pair_id, impl=impl)
    with Agreement("contrastive loss", ranks, numbers=3) as agreement:
        impl, comm = check_pairs(image_emb, text_emb, pair_id, ranks, comm, impl)
        scale = as_scalar("logit_scale", logit_scale, image_emb, compute_dtype(image_emb), positive=True)
        details = *describe_pairs(image_emb, pair_id), comm, impl
        agreement.offer(len(image_emb), details, _norms(image_emb, text_emb, scale))
    everyone = None if pair_id is None else all_gather(pair_id, ranks)
    if impl == "reference":
        image_emb, text_emb = gather_rows(image_emb, ranks), gather_rows(text_emb, ranks)
        return contrastive_loss(image_emb, text_emb, scale, pair_id=everyone, impl=impl)
    ids = None if everyone is None else Ids.of(everyone, ranks.rank, len(image_emb))
    problem = Problem(ranks, make_blocks(comm, ranks), ids, impl)
    return _Loss.apply(image_emb, text_emb, scale, agreement.largest.to(scale.dtype), problem)


@full_precision
def _norms(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(3,) squares of this rank's largest norms, and the scale: the ranks' largest bound the logits of all pairs."""
    x, y, one = image.detach().to(scale.dtype), text.detach().to(scale.dtype), scale.new_ones(())
    bounds = [p.contrastive_bound(rows, rows, one) for rows in (x, y)]
    return torch.stack([*bounds, scale.detach().abs()])


def _statistics(tiles: Tiles, held: list[Tensor], largest: Tensor, problem: Problem) -> Statistics:
    """Sums over the one reference, or over the maxima where any rank's are unsound."""
    ref = p.fixed_reference(largest[2] * (largest[0] * largest[1]).sqrt(), tiles.scale.dtype)
    statistics = _sums(tiles, held, ref, ref, problem.blocks)
    n = problem.ranks.size * len(tiles.rows)
    sums = [part[0] + part[1] for part in (statistics.rows, statistics.cols)]
    sound = p.sums_are_sound(n, *sums) or not torch.isfinite(ref)  # maxima do not help against NaN
    if not all_reduce(ref.new_tensor(not sound), problem.ranks, largest=True):
        return statistics
    return _sums(tiles, held, *_maxima(tiles, held, problem.blocks), problem.blocks)


def _maxima(tiles: Tiles, held: list[Tensor], blocks: Blocks) -> tuple[Tensor, Tensor]:
    rows = tiles.scale.new_full((len(tiles.rows),), -torch.inf)

    def visit(block):
        row_max, col_max = tiles.maxima(block)
        torch.maximum(rows, row_max, out=rows)
        return [col_max]

    return rows, blocks.sweep(held, [], visit, largest=True)[0]


def _sums(tiles: Tiles, held: list[Tensor], row_ref: Tensor, col_ref: Tensor, blocks: Blocks) -> Statistics:
    rows, cols = tiles.scale.new_zeros(2, 3, len(tiles.rows))
    shared = col_ref.dim() == 0

    def visit(block):
        of_rows, of_cols = tiles.statistics(block, row_ref, col_ref if shared else block.riding[0])
        rows.add_(of_rows)
        if tiles.ids is not None:
            return [of_cols.T.contiguous()]
        if own := tiles.own(block):
            cols[::2] = of_cols[::2, own]  # without ids a column's one positive is with its owner
        return [of_cols[1]]

    (sums,) = blocks.sweep(held, [] if shared else [col_ref], visit)
    if tiles.ids is None:
        cols[1] = sums
    else:
        cols.copy_(sums.T)
    return Statistics(row_ref, col_ref, rows, cols)


class _Loss(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, largest: Tensor, problem: Problem) -> Tensor:
        tiles = problem.tiles(image, scale)
        held = problem.blocks.hold(text)
        found = _statistics(tiles, held, largest, problem)
        count = None if problem.ids is None else problem.ids.count[problem.ids.own]
        terms = p.contrastive_terms(found.rows, found.row_ref, count).sum()
        terms = terms + p.contrastive_terms(found.cols, found.col_ref, count).sum()
        ctx.problem, ctx.statistics = problem, found
        ctx.save_for_backward(image, text, scale, *held)
        n = problem.ranks.size * len(image)
        return (all_reduce(terms, problem.ranks) / (2 * n)).to(scale.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        image, text, scale, held = ctx.saved_tensors
        want = ctx.needs_input_grad[:2]
        found = _Gradient.apply(grad, image, text, scale, held.detach(), ctx.statistics, ctx.problem, want)
        return *found, None, None


class _Gradient(torch.autograd.Function):
    """The loss's gradient as a function of its own, so that it has one too."""

    @staticmethod
    @full_precision
    def forward(ctx, grad, image, text, scale, held, statistics: Statistics, problem: Problem, want: tuple[bool, bool]):
        tiles = problem.tiles(image, scale)
        n = problem.ranks.size * len(image)
        rows = scale.new_zeros(image.shape) if want[0] else None
        along = scale.new_zeros((), dtype=torch.float64)

        def visit(block):
            dx, dy, part = tiles.gradients(block, statistics, want_rows=want[0], want_columns=want[1])
            along.add_(part)
            if want[0]:
                rows.add_(dx)
            return [dy] if want[1] else []

        returned = problem.blocks.sweep([held], statistics.riding(problem.ids), visit)
        mean = all_reduce(grad, problem.ranks) / (2 * n)
        ctx.problem, ctx.statistics = problem, statistics
        ctx.save_for_backward(mean, image, text, scale, held)
        ctx.set_materialize_grads(False)
        d_image = rows.mul_(mean * scale).to(image.dtype) if want[0] else None
        d_text = returned[0].mul_(mean * scale).to(text.dtype) if want[1] else None
        return d_image, d_text, (along * mean).to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, u: Tensor | None, v: Tensor | None, w: Tensor | None):
        if not isinstance(ctx.problem.blocks, Gather):
            raise ValueError(
                "contrastive loss: its gradient is differentiated, which blocks in a ring cannot serve;"
                " set engine.comm=gather"
            )
        mean, image, text, scale, held = ctx.saved_tensors
        pairs = (u, image), (v, text), (w, scale)
        cotangents = [torch.zeros_like(like) if given is None else given for given, like in pairs]
        along, xb, yb, scale_b = _double_gradients(*cotangents, image, text, scale, held, ctx.statistics, ctx.problem)
        n = ctx.problem.ranks.size * len(image)
        return (
            along.to(mean.dtype) / (2 * n),
            xb.mul_(mean).to(image.dtype),
            yb.mul_(mean).to(text.dtype),
            scale_b * mean,
            *[None] * 4,
        )


@full_precision
def _double_gradients(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    held: Tensor,
    statistics: Statistics,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(<G, M> of all ranks, xb (b, D), yb (b, D), this rank's part of the scale's), all still over 2N.

    Each rank's copy of the scale multiplies its own rows of logits, so `w` is this rank's cotangent and M's rows have
    each their rank's.
    """
    ranks, tiles = problem.ranks, problem.tiles(image, scale)
    x, y, _ = tile_operands(image, text, scale, problem.impl)
    x, y, u, v = p.contrastive_double_operands(x, y, u, v)
    own = p.contrastive_own_direction(x, y, u, v, scale, w)
    passes = p
    if tiles.triton:
        from vlscale.kernels import triton_contrastive_double as passes
    scalars = []

    def visit(block):
        everyone_v, own_all = block.riding[:2]
        weights = tiles.weights(replace(block, riding=block.riding[2:]), statistics)
        arguments = x, block.held[0].to(x.dtype), u, everyone_v, scale, w, weights, (own, own_all)
        row_sums, col_sums = passes.contrastive_double_statistics(*arguments)
        col_sums = all_reduce(col_sums, ranks)
        xb, yb, *rest = passes.contrastive_double_gradients(*arguments, (row_sums, col_sums))
        scalars.extend([xb, *rest])
        return [yb]

    (yb,) = problem.blocks.sweep([held], [v, own, *statistics.riding(problem.ids)], visit)
    xb, scale_b, along = scalars
    return all_reduce(along, ranks), xb, yb, scale_b
