"""The sigmoid loss of a global batch over ranks: each rank its own rows x all columns, 3/W of N^2 D products.

Legend: W ranks, b rows a rank, N = W b, D width. There is no normaliser: one sweep makes the loss and its gradients, so
bytes are those of the contrastive loss without its sums, and in a ring the columns travel once.

By gather it is differentiable twice; text rows and cotangents are gathered again for that, so that an ordinary step
keeps none of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.distributed import COMMS, Agreement, Gather, Ranks, all_gather, all_reduce, gather_rows
from vlscale.kernels import primitives as p
from vlscale.kernels import sigmoid_loss
from vlscale.kernels.checks import as_scalar, check_choice, compute_dtype
from vlscale.kernels.chunked import full_precision
from vlscale.objectives.pair_tiles import Ids, Tiles, check_pairs, describe_pairs
from vlscale.objectives.sharded import Computed, make_blocks


@dataclass(frozen=True)
class Problem:
    """What is no tensor to differentiate by."""

    ranks: Ranks
    comm: str
    ids: Ids | None
    impl: str


def sharded_sigmoid_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    pair_id: Tensor | None = None,
    ranks: Ranks,
    comm: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """`sigmoid_loss` of all ranks' pairs, 0-d and the same on every rank; arguments as `sharded_contrastive_loss`.

    Differentiable twice with comm `gather`, once in a ring; impl `reference` gathers everything and is dense and whole
    on each rank, of any order.
    """
    if ranks.size == 1:
        check_choice("comm", comm, COMMS)
        return sigmoid_loss(image_emb, text_emb, logit_scale, logit_bias, pair_id=pair_id, impl=impl)
    with Agreement("sigmoid loss", ranks) as agreement:
        impl, comm = check_pairs(image_emb, text_emb, pair_id, ranks, comm, impl)
        dtype = compute_dtype(image_emb)
        scale = as_scalar("logit_scale", logit_scale, image_emb, dtype, positive=True)
        bias = as_scalar("logit_bias", logit_bias, image_emb, dtype, positive=False)
        agreement.offer(len(image_emb), (*describe_pairs(image_emb, pair_id), comm, impl))
    everyone = None if pair_id is None else all_gather(pair_id, ranks)
    if impl == "reference":
        image_emb, text_emb = gather_rows(image_emb, ranks), gather_rows(text_emb, ranks)
        return sigmoid_loss(image_emb, text_emb, scale, bias, pair_id=everyone, impl=impl)
    inputs = image_emb, text_emb, scale, bias
    want = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    ids = None if everyone is None else Ids.of(everyone, ranks.rank, len(image_emb))
    return _Loss.apply(*inputs, want, Problem(ranks, comm, ids, impl))


class _Loss(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(
        ctx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, want: tuple[bool, ...], problem: Problem
    ):
        tiles = Tiles(image, scale, problem.ids, problem.impl)
        loss, made = _sweep(tiles, text, bias, want, problem.comm, problem.ranks)
        ctx.problem = problem
        ctx.save_for_backward(image, text, scale, bias, *made)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs, made = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        return *_Gradient.apply(grad, *inputs, made, ctx.problem), None, None


class _Gradient(torch.autograd.Function):
    """The loss's gradient as a function of its own, so that it has one too."""

    @staticmethod
    @full_precision
    def forward(ctx, grad, image, text, scale, bias, made: tuple[Tensor | None, ...], problem: Problem):
        total = all_reduce(grad, problem.ranks)
        ctx.problem = problem
        ctx.save_for_backward(total, image, text, scale, bias)
        ctx.set_materialize_grads(False)
        likes = image, text, scale, bias
        return tuple(
            None if part is None else (part * total).to(like.dtype) for part, like in zip(made, likes, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents: Tensor | None):
        if ctx.problem.comm != "gather":
            raise ValueError(
                "sigmoid loss: its gradient is differentiated, which blocks in a ring cannot serve; "
                "set engine.comm=gather"
            )
        total, *inputs = ctx.saved_tensors
        pairs = zip(cotangents, inputs, strict=True)
        cotangents = [torch.zeros_like(like) if given is None else given for given, like in pairs]
        along, *found = _double_gradients(*cotangents, *inputs, ctx.problem)
        grads = ((part * total).to(like.dtype) for part, like in zip(found, inputs, strict=True))
        return along.to(total.dtype), *grads, None, None


@full_precision
def _double_gradients(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    t: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    problem: Problem,
) -> tuple[Tensor, ...]:
    """<n, M> of all ranks, xb (b, D), yb (b, D), and this rank's parts of the scale's and the bias's, all over N.

    Each rank's copies of scale and bias make its own rows of logits, so `w` and `t` are this rank's cotangents.
    """
    ranks, tiles = problem.ranks, Tiles(image, scale, problem.ids, "chunked")
    x, y, u, v = (rows.to(scale.dtype).contiguous() for rows in (image, text, u, v))
    n, found = ranks.size * len(x), []

    def visit(block):
        columns, everyone_v = block.held
        xb, yb, sums = p.sigmoid_double_sweep(x, columns, u, everyone_v, scale, bias, w, t, tiles.positives(block))
        found.extend([xb, *sums.unbind()])
        return [yb]

    blocks = Gather(ranks)
    (yb,) = blocks.sweep(blocks.hold(y, v), [], visit)
    xb, of_scale, of_bias, along = (part / n for part in found)
    return all_reduce(along, ranks), xb, yb / n, of_scale, of_bias


def _sweep(tiles: Tiles, text: Tensor, bias: Tensor, want: tuple[bool, ...], comm: str, ranks: Ranks) -> Computed:
    """The loss, and the gradients of image, text, scale and bias that are wanted."""
    blocks, scale = make_blocks(comm, ranks), tiles.scale
    sums = scale.new_zeros(3, dtype=torch.float64)
    rows = scale.new_zeros(tiles.rows.shape) if want[0] else None

    def visit(block):
        part, dx, dy = tiles.sigmoid(block, bias, want)
        sums.add_(part)
        if want[0]:
            rows.add_(dx)
        return [dy] if want[1] else []

    returned = blocks.sweep(blocks.hold(text), [], visit)
    n = ranks.size * len(text)
    loss, along, total = sums.unbind()
    gradients = [
        rows.mul_(scale / n) if want[0] else None,
        returned[0].mul_(scale / n) if want[1] else None,
        along / n if want[2] else None,
        total / n if want[3] else None,
    ]
    return (all_reduce(loss, ranks) / n).to(scale.dtype), gradients
