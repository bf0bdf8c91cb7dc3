"""What the forms of losses over ranks share: how columns travel, what autograd sees, and what ranks must agree on.

Legend: W ranks, b rows a rank, N = W b.

Gradients: taken over all ranks, each form is one function of every rank's rows and scalars whose W outputs are the same
loss L. Its transpose, which is what the backward computes, gives a rank's rows (sum of all ranks' cotangents) x dL/dx,
and a rank's copy of a scalar its part of (the same sum) x dL/ds. After an engine's average over ranks every parameter
has the gradient of L, at every order (`sum_over_ranks` says why).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.distributed import Blocks, Gather, HalfRing, Ranks, Ring, all_reduce

WAYS = {"gather": Gather, "ring": Ring, "half_ring": HalfRing}
Computed = tuple[Tensor, Sequence[Tensor | None]]


def make_blocks(comm: str, ranks: Ranks) -> Blocks:
    return WAYS[comm](ranks)


def gathered_bytes(ranks: Ranks, *rows: Tensor) -> int:
    """What `gather` costs a rank: all ranks' rows as they travel, and float32 of them to work on or as gradients."""
    return ranks.size * sum(part.numel() * (part.element_size() + 4) for part in rows)


def made_in_forward(compute: Callable[[], Computed], inputs: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The loss of `compute`, which returns it with the gradients of `inputs` (None: not wanted); differentiable once.

    The gradients are this rank's part for a unit cotangent on the loss.
    """
    return _MadeInForward.apply(compute, ranks, *inputs)


class _MadeInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Callable[[], Computed], ranks: Ranks, *inputs: Tensor) -> Tensor:
        ctx.ranks = ranks
        with torch.autocast(device_type=inputs[0].device.type, enabled=False):
            loss, gradients = compute()
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        total = all_reduce(grad, ctx.ranks)
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(None if part is None else (part * total).to(dtype) for part, dtype in found)
