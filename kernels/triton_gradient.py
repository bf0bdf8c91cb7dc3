"""One side's gradient on its way out of a sweep: products of stored weights with embeddings, and what is added to them.

A sweep over N^2 pairs sums in float32, in place. The side whose rows it meets once (the rows of a block of columns, all
the rows of a wave) is finished a block at a time, so of all float32 copies of (N, D) only the sums of the other side
are held.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import HALF
from .triton_passes import centred, finished_gradient, largest_deviations


def stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """How a block of gradient weights for embeddings like x is kept: float16 for those of 16 bits, else `dtype`.

    float16 has the tensor cores' speed and 3 more bits than bfloat16; times 2^12, weights (at most 4, near 1/N when
    diffuse) fit its range for any N. A positive's weight, the largest of its row, is rounded by 2^-12 of itself.
    """
    return torch.float16 if x.dtype in HALF else dtype


class Centred:
    """Embeddings as the right factor of G products: with float16 weights, apart from their mean and of length <= 1.

    Gradient weights sum to nearly nothing over a row, so what embeddings share (most of a vector on a cone) cancels;
    rounded weights would leave their rounding there. The mean's part takes the float32 sums of the weights instead.
    Nothing of all rows is ever held in float32 on the way.
    """

    def __init__(
        self, emb: Tensor, dtype: torch.dtype, stored: torch.dtype, about: tuple[Tensor, Tensor] | None = None
    ):
        """`about`: its mean (D,) and largest deviation 0-d, where they are known."""
        self.emb, self.dtype, self.stored = emb, dtype, stored
        self.mean = self.reach = None
        if stored == torch.float16:
            if about is None:
                mean = emb.mean(0, dtype=dtype)
                about = mean, largest_deviations((emb, mean))[0]
            self.mean, self.reach = about

    @classmethod
    def both(cls, x: Tensor, y: Tensor, dtype: torch.dtype, stored: torch.dtype) -> tuple["Centred", "Centred"]:
        """Of two sides of one width, measured together."""
        if stored != torch.float16:
            return cls(x, dtype, stored), cls(y, dtype, stored)
        means = x.mean(0, dtype=dtype), y.mean(0, dtype=dtype)
        reaches = largest_deviations((x, means[0]), (y, means[1]))
        sides = zip((x, y), means, reaches, strict=True)
        return tuple(cls(emb, dtype, stored, (mean, reach)) for emb, mean, reach in sides)

    def part(self, rows: slice) -> Tensor:
        """These rows as the right factor, in the stored dtype."""
        if self.mean is None:
            return self.emb[rows].to(self.dtype)
        return centred(self.emb[rows], self.mean, self.reach, self.stored)

    def whole(self) -> Tensor:
        """All rows as the right factor, for sweeps that come back to them."""
        return self.part(slice(None))


def add_product(sums: Tensor, g: Tensor, part: Tensor, *, first: bool) -> None:
    """Weights g (m, n) times a part (n, D) on top of the float32 sums (m, D), or, `first`, in their place."""
    beta = 0 if first else 1
    if g.dtype not in HALF:
        torch.addmm(sums, g, part, beta=beta, out=sums)
    elif g.device.type == "cpu":
        torch.addmm(sums, g.float(), part.float(), beta=beta, out=sums)
    else:
        torch.addmm(sums, g, part, beta=beta, out=sums, out_dtype=torch.float32)


@dataclass(frozen=True)
class OwnPairs:
    """Row first + p takes weight[p] partner[p], for the b own pairs: added apart, in float32."""

    weight: Tensor  # (b,)
    partner: Tensor  # (b, D)
    first: int

    @staticmethod
    def of_sides(weight: Tensor, x: Tensor, y: Tensor, offset: int) -> tuple["OwnPairs", "OwnPairs"]:
        """For x's gradient and for y's."""
        return OwnPairs(weight, y[offset : offset + len(x)], 0), OwnPairs(weight, x, offset)


class SideGradient:
    """One side's gradient (rows, D) in `dtype`: products with the other side's parts, finished; own pairs; a factor.

    `right` is that other side, `factor` 0-d. Rows are finished a block at a time, each once, or all by `result` from
    what `new_sums` gave.
    """

    def __init__(
        self,
        rows: Tensor,
        right: Centred,
        dtype: torch.dtype,
        own: OwnPairs | None = None,
        factor: Tensor | None = None,
    ) -> None:
        self.shape, self.device = rows.shape, rows.device
        self.right, self.dtype, self.own, self.factor = right, dtype, own, factor
        self.held: tuple[Tensor, Tensor] | None = None
        self.out: Tensor | None = None  # not before it is needed: a sweep holds its largest buffers until then

    def new_sums(self) -> tuple[Tensor, Tensor]:
        """Room for the products of all rows, which becomes the result where it has that dtype, and for their totals."""
        sums = torch.empty(self.shape, dtype=self.right.dtype, device=self.device)
        self.held = sums, sums.new_empty(len(sums))
        return self.held

    def finish(self, start: int, sums: Tensor, totals: Tensor) -> None:
        """The rows from `start` on, from their products (r, D) or (parts, r, D) and their weights' sums, likewise."""
        if self.out is None:
            whole = sums.dtype == self.dtype and sums.shape == self.shape
            self.out = sums if whole else torch.empty(self.shape, dtype=self.dtype, device=self.device)
        own = (None, None, 0) if self.own is None else (self.own.weight, self.own.partner, self.own.first)
        finished_gradient(sums, totals, self.right.mean, self.right.reach, *own, self.factor, start, self.out)

    def result(self) -> Tensor:
        if self.held is not None:
            self.finish(0, *self.held)
            self.held = None
        return self.out
