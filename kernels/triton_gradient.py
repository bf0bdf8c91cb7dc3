"""One side's gradient on its way out of a sweep, and what own pairs add to it.

A sweep over N^2 pairs sums in float32. The side whose rows it meets once (the rows of a block of columns, all the rows
of a wave) is finished a block at a time, so of all float32 copies of (N, D) only the sums of the other side are held.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import row_blocks


def own_products(x: Tensor, y: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """x_p . y_(p + offset), (b,) in `dtype`."""
    mine = y[offset : offset + len(x)]
    own = torch.empty(len(x), dtype=dtype, device=x.device)
    for i in row_blocks(*x.shape):
        own[i] = (x[i].to(dtype) * mine[i].to(dtype)).sum(1)
    return own


@dataclass(frozen=True)
class OwnPairs:
    """Row first + p takes weight[p] partner[p], for the b own pairs: added apart, in float32."""

    weight: Tensor  # (b,)
    partner: Tensor  # (b, D)
    first: int

    def add_to(self, block: Tensor, start: int) -> None:
        """block (rows, D): the rows from `start` on."""
        low, high = max(start, self.first), min(start + len(block), self.first + len(self.weight))
        if low < high:
            pairs = slice(low - self.first, high - self.first)
            block[low - start : high - start].addcmul_(self.partner[pairs].to(block.dtype), self.weight[pairs, None])

    @staticmethod
    def of_sides(weight: Tensor, x: Tensor, y: Tensor, offset: int) -> tuple["OwnPairs", "OwnPairs"]:
        """For x's gradient and for y's."""
        return OwnPairs(weight, y[offset : offset + len(x)], 0), OwnPairs(weight, x, offset)


class SideGradient:
    """One side's gradient (rows, D) in `dtype`: sums of its rows and own pairs' part, times `factor` (0-d) if given.

    Rows are either finished a block at a time, each once, or added up in `new_sums` and finished by `result`.
    """

    def __init__(
        self, rows: Tensor, dtype: torch.dtype, own: OwnPairs | None = None, factor: Tensor | None = None
    ) -> None:
        self.shape, self.dtype, self.device = rows.shape, dtype, rows.device
        self.own, self.factor = own, factor
        self.sums: Tensor | None = None
        self.out: Tensor | None = None  # not before it is needed: a sweep holds its largest buffers until then

    def new_sums(self, dtype: torch.dtype) -> Tensor:
        """Zeros for the sums of all rows, which become the result where it has that dtype."""
        self.sums = torch.zeros(self.shape, dtype=dtype, device=self.device)
        return self.sums

    def finish(self, start: int, sums: Tensor) -> None:
        """The rows from `start` on from their sums, which are overwritten."""
        if self.out is None:
            self.out = sums if sums.dtype == self.dtype and sums is self.sums else self._empty()
        for i in row_blocks(*sums.shape):
            block = sums[i]
            if self.own is not None:
                self.own.add_to(block, start + i.start)
            if self.factor is not None:
                block.mul_(self.factor)
            if sums is not self.out:
                self.out[start + i.start : start + i.stop] = block

    def _empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def result(self) -> Tensor:
        if self.sums is not None:
            self.finish(0, self.sums)
            self.sums = None
        return self.out
