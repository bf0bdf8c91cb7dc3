"""`sigmoid_loss`: SigLIP's pairwise loss over a global batch, without the N x N logits.

    z_ij = logit_scale image_i . text_j + logit_bias
    loss = sum_ij softplus(-y_ij z_ij) / N,  y_ij = 1 for pairs of equal pair_id, else -1

Loss and gradients come out of one pass over the tiles; the backward only multiplies. Three ops, each with a fake and
the next as its gradient: forward, backward, double backward. The last one runs the PyTorch tiles, also for `triton`. A
third derivative is refused by autograd.
"""

import torch
from torch import Tensor

from . import chunked_sigmoid as tiles
from . import chunked_sigmoid_double as double_tiles
from . import reference
from .checks import as_autocast, as_scalar, check_embeddings, check_pair_id, check_same, choose_impl, compute_dtype
from .chunked import full_precision, refuse_tangents, tile_operands, without_autocast
from .chunked_contrastive import Positives


@torch.library.custom_op("vlscale::sigmoid_forward", mutates_args=())
@full_precision
def forward_op(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pair_id: Tensor | None, want: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, d image, d text, d scale, d bias); `want` says which gradients, the others come back empty."""
    n = len(image)
    x, y, triton = tile_operands(image, text, scale, impl)
    positives = Positives(pair_id, pair_id, 0)
    if triton:
        from . import triton_sigmoid

        loss, dx, dy, total, along = triton_sigmoid.sigmoid_sweep(
            x, y, scale, bias, positives, want_x=want[0], want_y=want[1], want_scalars=any(want[2:])
        )
    else:
        want_rows = want[0] or (any(want) and not want[1])
        loss, dx, dy, total = tiles.sigmoid_sweep(x, y, scale, bias, positives, want_x=want_rows, want_y=want[1])
        along = total
        if want[2]:
            along = ((dx * x).sum(1) if want_rows else (dy * y).sum(1)).sum(dtype=torch.float64)
    none = scale.new_empty(0)
    return (
        (loss / n).to(scale.dtype),
        dx.mul_(scale / n) if want[0] else none,
        dy.mul_(scale / n) if want[1] else none.clone(),
        (along / n).to(scale.dtype) if want[2] else none.clone(),
        (total / n).to(scale.dtype) if want[3] else none.clone(),
    )


@forward_op.register_fake
def _(image, text, scale, bias, pair_id, want, impl):
    shapes = (tuple(image.shape), tuple(text.shape), (), ())
    return scale.new_empty(()), *(
        scale.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, want, strict=True)
    )


@torch.library.custom_op("vlscale::sigmoid_backward", mutates_args=())
@full_precision
def backward_op(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pair_id: Tensor | None,
    made: list[Tensor],
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, scale and bias from those `made` for a unit cotangent; empty where not wanted. It takes
    the inputs along since its own gradient depends on them."""
    found = zip(made, (image, text, scale, bias), want, strict=True)
    return tuple((g * grad).to(like.dtype) if wanted else like.new_empty(0) for g, like, wanted in found)


@backward_op.register_fake
def _(grad, image, text, scale, bias, pair_id, made, want):
    found = zip(made, (image, text, scale, bias), want, strict=True)
    return tuple(torch.empty_like(g, dtype=like.dtype) if wanted else like.new_empty(0) for g, like, wanted in found)


@torch.library.custom_op("vlscale::sigmoid_double_backward", mutates_args=())
@full_precision
def double_backward_op(
    u: Tensor,
    v: Tensor,
    w: Tensor,
    t: Tensor,
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pair_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of grad, image, text, scale and bias, from the cotangents u, v, w, t of the four gradients."""
    x, y, u, v = (rows.to(scale.dtype).contiguous() for rows in (image, text, u, v))
    xb, yb, sums = double_tiles.sigmoid_double_sweep(x, y, u, v, scale, bias, w, t, Positives(pair_id, pair_id, 0))
    mean = grad / len(x)
    of_scale, of_bias, along = (sums / len(x)).unbind()
    return (
        along.to(grad.dtype),
        xb.mul_(mean).to(image.dtype),
        yb.mul_(mean).to(text.dtype),
        (of_scale * grad).to(scale.dtype),
        (of_bias * grad).to(bias.dtype),
    )


@double_backward_op.register_fake
def _(u, v, w, t, grad, image, text, scale, bias, pair_id):
    like = {"memory_format": torch.contiguous_format}
    rows = torch.empty_like(image, **like), torch.empty_like(text, **like)
    return torch.empty_like(grad), *rows, torch.empty_like(scale), torch.empty_like(bias)


def _save_forward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what comes with the loss
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _backward(ctx, grad, *_):
    if grad is None:  # a second derivative, which the gradient's own op has taken
        return (None,) * 7
    saved = ctx.saved_tensors  # once: checkpointing unpacks what was saved a single time
    inputs, made = saved[:5], saved[5:]
    needed = list(ctx.needs_input_grad[:4])
    grads = backward_op(grad, *inputs, list(made), needed)
    return *(g if want else None for g, want in zip(grads, needed, strict=True)), None, None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.wanted = inputs[7]


def _double_backward(ctx, *cotangents):
    saved = ctx.saved_tensors
    found = zip(cotangents, saved[1:5], ctx.wanted, strict=True)
    cotangents = [given if wanted else torch.zeros_like(like) for given, like, wanted in found]
    grads = double_backward_op(*cotangents, *saved)
    needed = ctx.needs_input_grad[:5]
    return *(g if want else None for g, want in zip(grads, needed, strict=True)), None, [None] * 4, None


forward_op.register_autograd(_backward, setup_context=_save_forward)
backward_op.register_autograd(_double_backward, setup_context=_save_backward)


def sigmoid_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    pair_id: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum over all pairs of the logistic loss, divided by N, 0-d.

    image_emb, text_emb (N, D), used as given; z = logit_scale * product + logit_bias; pair_id (N,) int64 makes equal
    ids positives. Differentiable twice in every float argument, in O(N) memory (`reference`: any order, O(N^2)).
    """
    check_embeddings("image_emb", image_emb)
    check_embeddings("text_emb", text_emb)
    check_same("text_emb", text_emb, "image_emb", image_emb)
    check_pair_id(pair_id, image_emb.shape[0], image_emb.device)
    dtype = compute_dtype(image_emb)
    scale = as_scalar("logit_scale", logit_scale, image_emb, dtype, positive=True)
    bias = as_scalar("logit_bias", logit_bias, image_emb, dtype, positive=False)
    impl = choose_impl(impl, image_emb.device)
    if impl == "reference":
        with without_autocast(image_emb.device):
            return reference.sigmoid_loss(image_emb.to(dtype), text_emb.to(dtype), scale, bias, pair_id)
    refuse_tangents(impl, image_emb, text_emb, scale, bias)
    image_emb, text_emb = as_autocast(impl, image_emb, text_emb)
    want = [t.requires_grad and torch.is_grad_enabled() for t in (image_emb, text_emb, scale, bias)]
    return forward_op(image_emb, text_emb, scale, bias, pair_id, want, impl)[0]
