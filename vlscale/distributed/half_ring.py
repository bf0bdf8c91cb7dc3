"""Half a ring, for symmetric relations: every unordered pair of blocks meets once and serves both sides.

Legend: W ranks, b rows a rank. Rank r visits its own triangle, then the blocks of ranks r-1 .. r-W/2; what it computed
for a block is sent straight to the owner while the next tiles are computed. At even W the last pair is met from both
ends: the lower rank takes the first half of its rows, the higher one the rest of the lower's, so that all work alike.

Bytes received: floor(W/2) b of what is held and rides, and at most as many rows of the contributions.
"""

import torch

from vlscale.distributed.blocks import Block, Tensors, Visit
from vlscale.distributed.collectives import Transfer
from vlscale.distributed.ranks import Ranks
from vlscale.distributed.ring import COLUMNS, RETURNS, pass_on


class HalfRing:
    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def hold(self, *rows: torch.Tensor) -> list[torch.Tensor]:
        return list(rows)

    def sweep(self, held: Tensors, riding: Tensors, visit: Visit, *, largest: bool = False) -> list[torch.Tensor]:
        assert not largest, "only sums travel in a half ring"
        size, rank, rows = self.ranks.size, self.ranks.rank, len(held[0])
        columns = [*held, *riding]
        following = pass_on(columns, self.ranks, COLUMNS)
        everything = slice(0, rows)
        visit(Block("triangle", everything, self._place(rank, everything, rows), 0, held, riding))
        sums: list[torch.Tensor] = []
        returning: tuple[Transfer, slice] | None = None
        for step in range(1, size // 2 + 1):
            columns = following.wait()
            if step < size // 2:
                following = pass_on(columns, self.ranks, COLUMNS)
            owner = (rank - step) % size
            mine, theirs = self._shares(step, rank, owner, rows)
            cut = [part[theirs] for part in columns]
            place = self._place(owner, theirs, rows)
            parts = visit(Block("pair", mine, place, None, cut[: len(held)], cut[len(held) :]))
            sums = sums or [part.new_zeros((rows, *part.shape[1:])) for part in parts]
            self._add(sums, returning)
            returning = self._give_back(parts, step, owner, rows)
        self._add(sums, returning)
        return sums

    def _shares(self, step: int, visitor: int, owner: int, rows: int) -> tuple[slice, slice]:
        """(which of the visitor's rows, which of the owner's) meet at this step."""
        if 2 * step != self.ranks.size:
            return slice(0, rows), slice(0, rows)
        half = rows // 2
        return (slice(0, half), slice(0, rows)) if visitor < owner else (slice(0, rows), slice(half, rows))

    @staticmethod
    def _place(owner: int, part: slice, rows: int) -> slice:
        return slice(owner * rows + part.start, owner * rows + part.stop)

    def _give_back(self, parts: Tensors, step: int, owner: int, rows: int) -> tuple[Transfer, slice]:
        """Send what was computed for the owner; meanwhile this rank's own visitor sends what it computed here."""
        visitor = (self.ranks.rank + step) % self.ranks.size
        _, here = self._shares(step, visitor, self.ranks.rank, rows)
        arriving = [part.new_empty((here.stop - here.start, *part.shape[1:])) for part in parts]
        return Transfer(parts, owner, arriving, visitor, self.ranks, RETURNS), here

    @staticmethod
    def _add(sums: Tensors, returning: tuple[Transfer, slice] | None) -> None:
        if returning is not None:
            transfer, here = returning
            for total, part in zip(sums, transfer.wait(), strict=True):
                total[here] += part
