"""Sums and means over ranks that autograd sees through, any number of times.

The transpose of a sum over ranks is the sum over ranks of what each makes of it. So a program of W ranks built from
these and from `gather_rows` differentiates as one: every rank's tensors get the gradient of the sum of all ranks'
losses, at every order, and an engine's average over ranks turns that into the gradient of the loss.
"""

import torch

from vlscale.distributed.collectives import all_reduce
from vlscale.distributed.ranks import Ranks


def sum_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Element by element, the same on every rank; differentiable."""
    return value if ranks.group is None else _Sum.apply(value, ranks)


def mean_over_ranks(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """What an engine does to a gradient, as a function that can itself be differentiated."""
    return sum_over_ranks(value, ranks) / ranks.size


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return all_reduce(value, ranks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _Sum.apply(grad, ctx.ranks), None
