"""The collectives themselves: no gradients, explicit groups, bytes reported. All that a loss communicates is in these.

Legend: W ranks, b rows a rank.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from vlscale.distributed.ranks import Ranks
from vlscale.distributed.traffic import received

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """(b, ...) of every rank to (W b, ...) in rank order."""
    everyone = rows.new_empty((ranks.size * rows.shape[0], *rows.shape[1:]))
    _all_gather(everyone, rows.contiguous(), group=ranks.group)
    received("all_gather", everyone, 1 - 1 / ranks.size)
    return everyone


def reduce_scatter(everyone: torch.Tensor, ranks: Ranks, *, largest: bool = False) -> torch.Tensor:
    """(W b, ...) of every rank to the sum (or the largest) over ranks of this rank's (b, ...)."""
    own = everyone.new_empty((everyone.shape[0] // ranks.size, *everyone.shape[1:]))
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    _reduce_scatter(own, everyone.contiguous(), op=op, group=ranks.group)
    received("reduce_scatter", everyone, 1 - 1 / ranks.size)
    return own


def all_reduce(values: torch.Tensor, ranks: Ranks, *, largest: bool = False) -> torch.Tensor:
    """The sum (or the largest) over ranks, element by element, as a new tensor."""
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=ranks.group)
    received("all_reduce", total, 2 - 2 / ranks.size)
    return total


def all_to_all(rows: torch.Tensor, sent: Sequence[int], arriving: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """Rows that stand by receiver, `sent` of them for each rank, to those of every rank for this one, by sender."""
    arrived = rows.new_empty((sum(arriving), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), list(arriving), list(sent), group=ranks.group)
    received("all_to_all", arrived, 1 - arriving[ranks.rank] / max(sum(arriving), 1))
    return arrived


class Transfer:
    """Tensors on their way to one rank while others arrive from another; `wait` hands over those that arrived.

    Every rank starts its transfers in the same order; `tag` separates two that are under way at once.
    """

    def __init__(
        self,
        sent: Sequence[torch.Tensor],
        to: int,
        arriving: Sequence[torch.Tensor],
        source: int,
        ranks: Ranks,
        tag: int,
    ):
        self._kept = [tensor.contiguous() for tensor in sent]  # until they are gone
        self._arriving = list(arriving)
        pairs = [(dist.isend, tensor, to) for tensor in self._kept]
        pairs += [(dist.irecv, tensor, source) for tensor in self._arriving]
        operations = [
            dist.P2POp(start, tensor, group=ranks.group, tag=tag, group_peer=peer % ranks.size)
            for start, tensor, peer in pairs
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        for tensor in self._arriving:
            received("transfer", tensor)

    def wait(self) -> list[torch.Tensor]:
        for work in self._works:
            work.wait()
        return self._arriving
