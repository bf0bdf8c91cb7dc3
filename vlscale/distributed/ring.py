"""Columns in a ring: each rank's block visits every rank, and what is computed for it follows one step behind.

Legend: W ranks, b rows a rank. Step t of rank r visits the block of rank r - t. The next block is under way before this
one's tiles are computed; contributions to a block are added up as they pass from visitor to visitor, each sum arriving
while the next tiles are computed, and come home after W steps.

Bytes received: (W-1) b of what is held and rides, W b of the contributions.
"""

import torch

from vlscale.distributed.blocks import Block, Tensors, Visit
from vlscale.distributed.collectives import Transfer
from vlscale.distributed.ranks import Ranks

COLUMNS, SUMS, RETURNS = 1, 2, 3  # tags of what may be under way at once


def pass_on(tensors: Tensors, ranks: Ranks, tag: int) -> Transfer:
    """Send to the next rank, receive the like from the one before."""
    arriving = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in tensors]
    return Transfer(tensors, ranks.rank + 1, arriving, ranks.rank - 1, ranks, tag)


class Ring:
    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def hold(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        return list(rows)

    def sweep(self, held: Tensors, riding: Tensors, visit: Visit, *, largest: bool = False) -> list[torch.Tensor]:
        size, rank, rows = self.ranks.size, self.ranks.rank, len(held[0])
        columns, sums = [*held, *riding], None
        for step in range(size):
            following = pass_on(columns, self.ranks, COLUMNS) if step + 1 < size else None
            owner = (rank - step) % size
            place = slice(owner * rows, (owner + 1) * rows)
            block = Block(
                "rows",
                slice(0, rows),
                place,
                (rank - owner) * rows,
                columns[: len(held)],
                columns[len(held) :],
            )
            parts = visit(block)
            if sums is not None:
                join = torch.maximum if largest else torch.add
                parts = [join(before, part) for before, part in zip(sums.wait(), parts, strict=True)]
            sums = pass_on(parts, self.ranks, SUMS)
            if following is not None:
                columns = following.wait()
        return sums.wait()
