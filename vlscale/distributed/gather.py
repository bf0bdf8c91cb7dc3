"""All-gather of rows whose backward is the reduce-scatter: exact at any number of ranks, and differentiable twice.

Legend: W ranks, b rows a rank, N = W b.

The contract on gradients. Let rank r compute a loss L_r from the gathered rows. Autograd then gives rank r's rows
sum_k dL_k/dx_r, and a data-parallel engine averages every parameter's gradient over ranks. So the parameters receive
the gradient of mean_r L_r, whatever each rank computes: when every rank computes the whole loss L, that is dL/dtheta
exactly, for towers and for shared scalars alike. (A backward that only slices gives the towers 1/W of it.)
"""

import torch

from vlscale.distributed.collectives import all_gather, reduce_scatter
from vlscale.distributed.ranks import Ranks


def gather_rows(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """(b, ...) of every rank to (W b, ...) in rank order. Every rank must hold the same number of rows."""
    return rows if ranks.group is None else _GatherRows.apply(rows, ranks)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return all_gather(rows, ranks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _ReduceScatterRows.apply(grad, ctx.ranks), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, everyone: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return reduce_scatter(everyone, ranks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _GatherRows.apply(grad, ctx.ranks), None
