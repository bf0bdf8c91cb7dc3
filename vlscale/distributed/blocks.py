"""How a rank's rows meet the columns of all ranks: one `sweep`, whatever moves, and the rule that chooses what moves.

Legend: W ranks, b rows a rank, N = W b, each row also a column.

An all-pairs quantity over ranks is always the same program: tensors of the columns come to the rows, the rows use them,
and what was computed for the columns goes back to the columns' owner. `gather` brings all columns at once, `ring` one
rank's block after another, `half_ring` only half of the blocks, each unordered pair of blocks meeting once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from vlscale.distributed.collectives import all_gather, reduce_scatter
from vlscale.distributed.ranks import Ranks

COMMS = ("auto", "gather", "ring", "half_ring")
GATHER_BUDGET = 1 << 30  # bytes that a rank may spend on other ranks' rows and on gradients of them, at least
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Block:
    """One meeting of rows with columns.

    `role` is the name of the kernels' sweep for relations, where row and column are of one kind: `rows` (only the rows
    are served: the pair is met again the other way round), `triangle` (rows and columns are this rank's own) or `pair`
    (met once, so both sides are served).
    """

    role: Literal["rows", "triangle", "pair"]
    rows: slice  # which of this rank's rows take part
    columns: slice  # global indices
    offset: int | None  # column of this block that is row 0 itself; may lie outside; None: no row meets itself
    held: Tensors
    riding: Tensors


Visit = Callable[[Block], Tensors]


class Blocks(Protocol):
    """A way to bring columns to rows."""

    def hold(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        """What this rank keeps of the columns between sweeps, from its own rows of them."""

    def sweep(self, held: Tensors, riding: Tensors, visit: Visit, *, largest: bool = False) -> list[torch.Tensor]:
        """Visit every column once; `riding` (b, ...) are this rank's rows of what the columns bring this time only.

        `visit` answers with tensors (columns of the block, ...); returned is their sum (or the largest) over all
        ranks for this rank's own columns, (b, ...) each.
        """


class Gather:
    """All columns at once: one all_gather that is kept for the backward, gradients by reduce_scatter."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def hold(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        return [all_gather(part, self.ranks) for part in rows]

    def sweep(self, held: Tensors, riding: Tensors, visit: Visit, *, largest: bool = False) -> list[torch.Tensor]:
        everyone = len(held[0])
        rows = everyone // self.ranks.size
        arrived = [all_gather(part, self.ranks) for part in riding]
        block = Block("rows", slice(0, rows), slice(0, everyone), self.ranks.rank * rows, held, arrived)
        return [reduce_scatter(part, self.ranks, largest=largest) for part in visit(block)]


def choose_comm(comm: str, bytes_gathered: int, *, relation: bool, budget: int = GATHER_BUDGET) -> str:
    """gather, ring or half_ring, for one loss.

    `auto`: gather while all ranks' rows and their gradients take at most `budget` bytes on this rank (it sends the
    columns once, and is the only way to a second derivative); beyond that half_ring for relations and ring for the
    rest. A run asks this once for all its losses, with the budget of its ranks' memory (`vlscale.train.comm`). Losses
    that are no relation have no symmetry to use: half_ring, set for a whole run, means ring for them.
    """
    if comm not in COMMS:
        raise ValueError(f"comm: expected one of {', '.join(COMMS)}, got {comm!r}")
    if comm == "auto":
        comm = "gather" if bytes_gathered <= budget else "half_ring"
    return "ring" if comm == "half_ring" and not relation else comm
