"""Relations of this rank's rows with one block of columns: how `Block` maps onto the kernels' sweeps.

Legend: b rows of this rank, n columns of a block, K teachers, F features of all segments.

The sweeps of both implementations take the same arguments, but for the two sides: a `Relation` each for PyTorch's, an
`Operand` each for Triton's, which keeps bfloat16 as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlscale.distributed import Block, Blocks
from vlscale.kernels import primitives as p

if TYPE_CHECKING:
    from vlscale.kernels.triton_relation import Operand, OperandGradient


def describe_relation(student: Tensor, teachers: Sequence[Tensor]) -> list[str]:
    """What ranks must agree on."""
    return [f"width {emb.shape[1]} {emb.dtype}" for emb in (student, *teachers)]


def on_triton(impl: str, dtype: torch.dtype) -> bool:
    """Whether Triton's sweeps serve this compute dtype; float64 is the blockwise PyTorch form's on every impl."""
    return impl == "triton" and dtype == torch.float32


def kl_sweeps(triton: bool) -> ModuleType:
    """Where relation_maxima, relation_kl_statistics and relation_kl_gradients of these sides are."""
    if not triton:
        return p
    from vlscale.kernels import triton_relation_kl

    return triton_relation_kl


@dataclass(frozen=True)
class Side:
    """One side's embeddings: this rank's rows (b, F), weights (K,) in the compute dtype, segment widths."""

    rows: Tensor
    weights: Tensor
    widths: list[int]
    kind: str
    triton: bool

    def alone(self) -> "p.Relation | Operand":
        """Against this rank's own rows."""
        return self._relation(self.rows, self.rows)

    def against(self, columns: Tensor, block: Block) -> "p.Relation | Operand":
        """The block's rows against its columns (n, F), which came as they travelled."""
        rows = self.rows[block.rows]
        return self._relation(rows, rows if block.role == "triangle" else columns)

    def _relation(self, rows: Tensor, columns: Tensor) -> "p.Relation | Operand":
        if self.triton:
            from vlscale.kernels.triton_relation import Operand

            return Operand.of(rows, columns, self.weights, self.widths, self.kind)
        wide = rows.to(self.weights.dtype)
        columns = wide if columns is rows else columns.to(wide.dtype)
        return p.Relation(wide, columns, self.weights, self.widths, self.kind)


class Collected:
    """A side's gradient as it comes in: rows (b, F) from every block, weights (K,) this rank's part."""

    def __init__(self, side: Side):
        self.rows = side.weights.new_zeros(side.rows.shape)
        self.weights = torch.zeros_like(side.weights)

    def add(self, gradient: "p.RelationGradient | OperandGradient", block: Block) -> list[Tensor]:
        """Returns what belongs to the columns' owner: (n, F), or nothing where they are not served."""
        rows, columns, weights = gradient.finish()
        if rows is not None:
            self.rows[block.rows] += rows
        self.weights += weights
        return [] if columns is None else [columns]


def collect(
    blocks: Blocks, held: Sequence[Tensor], riding: Sequence[Tensor], visit, sides: Sequence[Collected]
) -> None:
    """Sweep; what other ranks computed for this rank's rows is added to `sides`, in the order `visit` answered."""
    returned = blocks.sweep(held, riding, visit)
    for side, rows in zip(sides, returned, strict=bool(returned)):
        side.rows += rows
