"""`contrastive_loss`: cross-entropy over a global batch in both directions, without the N x N logits.

    s_ij = logit_scale image_i . text_j;  targets uniform over the pairs of equal pair_id
    loss = (mean_i CE(row i) + mean_j CE(column j)) / 2

Three ops, each with a fake and the next as its gradient: forward, backward, double backward. A third derivative is
refused by autograd.
"""

import torch
from torch import Tensor

from . import chunked_contrastive as tiles
from . import chunked_contrastive_double as double_tiles
from . import reference
from .checks import as_autocast, as_scalar, check_embeddings, check_pair_id, check_same, choose_impl, compute_dtype
from .chunked import HALF, full_precision, refuse_tangents, tile_operands, without_autocast

STATISTICS = 8  # row_ref, col_ref, then pos, off, target of the rows and of the columns


@torch.library.custom_op("vlscale::contrastive_forward", mutates_args=())
@full_precision
def forward_op(
    image: Tensor, text: Tensor, scale: Tensor, pair_id: Tensor | None, impl: str, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics (8, N), kept, unit) for compute-dtype scale and embeddings of any float dtype.

    With `keep`, which Triton serves without ids: all products as int16 (N, N) times the 0-d unit, LEFT_OUT own pairs.
    """
    x, y, triton = tile_operands(image, text, scale, impl)
    kept, unit = _room(image, scale, keep=keep)
    positives = tiles.Positives(pair_id, pair_id, 0)
    if triton:
        from . import triton_contrastive

        products = (kept, unit) if keep else None
        terms, statistics = triton_contrastive.contrastive_forward(x, y, scale, positives, kept=products)
    else:
        row_ref, col_ref, rows, cols = tiles.contrastive_references(x, y, scale, positives)
        terms = tiles.contrastive_terms(rows, row_ref, positives.row_count).sum()
        terms = terms + tiles.contrastive_terms(cols, col_ref, positives.col_count).sum()
        refs = torch.stack([row_ref.expand(len(x)), col_ref.expand(len(x))])
        statistics = torch.cat([refs, rows, cols])
    return (terms / (2 * len(x))).to(scale.dtype), statistics, kept, unit


def _room(image: Tensor, scale: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    n = image.shape[0]
    return image.new_empty((n, n) if keep else (0,), dtype=torch.int16), scale.new_empty(())


@forward_op.register_fake
def _(image, text, scale, pair_id, impl, keep=False):
    return scale.new_empty(()), scale.new_empty(STATISTICS, image.shape[0]), *_room(image, scale, keep=keep)


def _weights(statistics: Tensor, pair_id: Tensor | None, *, vectors: bool) -> tiles.Weights:
    """Statistics as the backward needs them, with one shared reference where there is one, unless `vectors` is set."""
    row_ref, col_ref = statistics[0], statistics[1]
    if not vectors and statistics.device.type == "cpu" and bool((statistics[:2] == statistics[0, 0]).all()):
        row_ref = col_ref = statistics[0, 0]
    return tiles.Weights(row_ref, col_ref, statistics[2:5], statistics[5:8], tiles.Positives(pair_id, pair_id, 0))


@torch.library.custom_op("vlscale::contrastive_backward", mutates_args=())
@full_precision
def backward_op(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pair_id: Tensor | None,
    statistics: Tensor,
    impl: str,
    want_image: bool,
    want_text: bool,
    kept: Tensor | None = None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text (empty where not wanted) and scale."""
    x, y, triton = tile_operands(image, text, scale, impl)
    weights = _weights(statistics, pair_id, vectors=triton)
    mean = grad / (2 * len(x))
    if triton:
        from . import triton_contrastive

        want = {"want_x": want_image, "want_y": want_text}
        products = None if kept is None else (kept, unit)
        dx, dy, along = triton_contrastive.contrastive_gradients(
            x, y, scale, weights, None, **want, factor=mean * scale, dtype=image.dtype, kept=products
        )
        along = along / scale
    else:
        use_rows = want_image or not want_text
        dx, dy = tiles.contrastive_gradients(x, y, scale, weights, want_x=use_rows, want_y=want_text)
        along = ((dx * x).sum(1) if use_rows else (dy * y).sum(1)).sum(dtype=torch.float64)
        dx = dx.mul_(mean * scale).to(image.dtype) if want_image else None
        dy = dy.mul_(mean * scale).to(text.dtype) if want_text else None
    d_scale = (along * mean).to(scale.dtype)
    return dx if want_image else image.new_empty(0), dy if want_text else text.new_empty(0), d_scale


@backward_op.register_fake
def _(grad, image, text, scale, pair_id, statistics, impl, want_image, want_text, kept=None, unit=None):
    d_image = torch.empty_like(image, memory_format=torch.contiguous_format) if want_image else image.new_empty(0)
    d_text = torch.empty_like(text, memory_format=torch.contiguous_format) if want_text else text.new_empty(0)
    return d_image, d_text, torch.empty_like(scale)


@torch.library.custom_op("vlscale::contrastive_double_backward", mutates_args=())
@full_precision
def double_backward_op(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pair_id: Tensor | None,
    statistics: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of grad, image, text and scale, from the cotangents u, v, w of the three gradients."""
    x, y, triton = tile_operands(image, text, scale, impl)
    x, y, u, v = double_tiles.contrastive_double_operands(x, y, u, v)
    weights = _weights(statistics, pair_id, vectors=triton)
    passes = double_tiles
    if triton:
        from . import triton_contrastive_double as passes
    own = double_tiles.contrastive_own_direction(x, y, u, v, scale, w)
    sums = passes.contrastive_double_statistics(x, y, u, v, scale, w, weights, (own, own))
    xb, yb, scale_bar, along = passes.contrastive_double_gradients(x, y, u, v, scale, w, weights, (own, own), sums)
    mean = grad / (2 * len(x))
    return (
        along / (2 * len(x)),
        xb.mul_(mean).to(image.dtype),
        yb.mul_(mean).to(text.dtype),
        scale_bar * mean,
    )


@double_backward_op.register_fake
def _(u, v, w, grad, image, text, scale, pair_id, statistics, impl):
    like = {"memory_format": torch.contiguous_format}
    return torch.empty_like(grad), torch.empty_like(image, **like), torch.empty_like(text, **like), scale.clone()


def _save_forward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what comes with the loss
    kept = output[2:] if inputs[5] else (None, None)
    ctx.save_for_backward(*inputs[:4], output[1], *kept)
    ctx.impl = inputs[4]


def _backward(ctx, grad, *_):
    if grad is None:  # a second derivative, which the gradient's own op has taken
        return (None,) * 6
    needed = ctx.needs_input_grad[:3]
    *saved, kept, unit = ctx.saved_tensors
    grads = backward_op(grad, *saved, ctx.impl, *needed[:2], kept, unit)
    return *(g if want else None for g, want in zip(grads, needed, strict=True)), None, None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.impl, *ctx.wanted = inputs[6:9]


def _double_backward(ctx, u, v, w):
    saved = ctx.saved_tensors  # once, as under checkpointing
    image, text = saved[1:3]
    u = u if ctx.wanted[0] else torch.zeros_like(image)
    v = v if ctx.wanted[1] else torch.zeros_like(text)
    grads = double_backward_op(u, v, w, *saved, ctx.impl)
    return *(g if want else None for g, want in zip(grads, ctx.needs_input_grad[:4], strict=True)), *[None] * 7


forward_op.register_autograd(_backward, setup_context=_save_forward)
backward_op.register_autograd(_double_backward, setup_context=_save_backward)


def contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: float | Tensor,
    *,
    pair_id: Tensor | None = None,
    keep_products: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies over all pairs, 0-d.

    image_emb, text_emb (N, D), used as given (inside autocast on a GPU in its dtype); logit_scale multiplies the
    products (1 / temperature); pair_id (N,) int64 makes equal ids positives of each other. Differentiable twice in
    every float argument, in O(N) memory (`reference`: O(N^2)). A single pair, or a batch whose ids are all equal at
    equal embeddings, has its exact minimum. keep_products: 2 N^2 bytes more, for a backward that computes no logits
    again, 3 products in place of 4; Triton's, of 16-bit embeddings without pair_id, elsewhere it changes nothing.
    """
    check_embeddings("image_emb", image_emb)
    check_embeddings("text_emb", text_emb)
    check_same("text_emb", text_emb, "image_emb", image_emb)
    check_pair_id(pair_id, image_emb.shape[0], image_emb.device)
    dtype = compute_dtype(image_emb)
    scale = as_scalar("logit_scale", logit_scale, image_emb, dtype, positive=True)
    impl = choose_impl(impl, image_emb.device)
    if impl == "reference":
        with without_autocast(image_emb.device):
            return reference.contrastive_loss(image_emb.to(dtype), text_emb.to(dtype), scale, pair_id)
    refuse_tangents(impl, image_emb, text_emb, scale)
    image_emb, text_emb = as_autocast(impl, image_emb, text_emb)
    keep = keep_products and impl == "triton" and image_emb.dtype in HALF and pair_id is None
    keep = keep and torch.is_grad_enabled() and any(t.requires_grad for t in (image_emb, text_emb, scale))
    return forward_op(image_emb, text_emb, scale, pair_id, impl, keep)[0]
