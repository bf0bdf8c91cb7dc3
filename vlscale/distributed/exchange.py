"""Rows that other ranks hold, by their place in the global batch: only those that are asked for travel.

Legend: W ranks, b rows a rank, N = W b, m rows that this rank asks for.

Gradients go back the way the rows came and are added up where a row was asked for more than once. The contract is that
of `gather`: a rank's rows get the sum over ranks of what each made of them. Bytes received: forward the rows asked for
that others hold, backward as many as others asked for of this rank's; and 8 N to tell each other what is asked for.
"""

from dataclasses import dataclass

import torch

from vlscale.distributed.collectives import all_gather, all_to_all
from vlscale.distributed.ranks import Ranks


@dataclass(frozen=True)
class Exchange:
    """What goes where; made once by `plan_exchange`, good for any number of tensors with the same rows."""

    ranks: Ranks
    sent: torch.Tensor  # which of this rank's rows go out, by receiver
    arrived: torch.Tensor  # (m,) where each row asked for stands among those that arrive, which come by sender
    sent_counts: tuple[int, ...]  # (W,)
    arrived_counts: tuple[int, ...]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's (b, ...) to the rows asked for (m, ...); every rank calls it with the same trailing shape."""
        if self.ranks.group is None:
            return rows[self.sent]
        travelled = _AllToAll.apply(rows[self.sent], self.sent_counts, self.arrived_counts, self.ranks)
        return travelled[self.arrived]


def plan_exchange(wanted: torch.Tensor, rows: int, ranks: Ranks) -> Exchange:
    """`wanted`: (m,) places in the global batch in rank order, 0 to N - 1; m and `rows` (b) the same on every rank.

    One wait for the device: how much goes to whom is host business.
    """
    if ranks.group is None:
        return Exchange(ranks, wanted, wanted, (), ())
    everyone = all_gather(wanted, ranks)
    owner = everyone // rows
    asker = torch.arange(ranks.size, device=wanted.device).repeat_interleave(len(wanted))
    counts = torch.bincount(asker * ranks.size + owner, minlength=ranks.size**2).view(ranks.size, -1).tolist()
    sent_counts = tuple(asked[ranks.rank] for asked in counts)
    mine_first = (owner != ranks.rank).to(torch.uint8).argsort(stable=True)[: sum(sent_counts)]
    by_sender = (wanted // rows).argsort(stable=True)
    return Exchange(
        ranks, everyone[mine_first] - ranks.rank * rows, by_sender.argsort(), sent_counts, tuple(counts[ranks.rank])
    )


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, sent: tuple[int, ...], arriving: tuple[int, ...], ranks: Ranks):
        ctx.back = arriving, sent, ranks
        return all_to_all(rows, sent, arriving, ranks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _AllToAll.apply(grad, *ctx.back), None, None, None
