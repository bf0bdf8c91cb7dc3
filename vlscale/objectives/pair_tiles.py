"""The kernels of image-text losses on one block of columns, by either implementation: what the forms over ranks use.

Legend: b rows of this rank, n columns of a block, N of all blocks, D width. Letters and results are those of
vlscale.kernels.primitives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.distributed import Block, Ranks, choose_comm
from vlscale.kernels import primitives as p
from vlscale.kernels.checks import check_embeddings, check_pair_id, check_same, choose_impl
from vlscale.kernels.chunked import same_id_count, tile_operands
from vlscale.objectives.sharded import gathered_bytes


def check_pairs(
    image: Tensor, text: Tensor, pair_id: Tensor | None, ranks: Ranks, comm: str, impl: str
) -> tuple[str, str]:
    """(impl, comm) as chosen for this rank's pairs; ValueError for what no impl accepts."""
    check_embeddings("image_emb", image)
    check_embeddings("text_emb", text)
    check_same("text_emb", text, "image_emb", image)
    check_pair_id(pair_id, len(image), image.device)
    return choose_impl(impl, image.device), choose_comm(comm, gathered_bytes(ranks, text), relation=False)


def describe_pairs(image: Tensor, pair_id: Tensor | None) -> tuple[str, ...]:
    """What ranks must agree on."""
    return f"width {image.shape[1]}", str(image.dtype), "no pair_id" if pair_id is None else "pair_id"


@dataclass(frozen=True)
class Ids:
    """Every rank's pair ids, (N,), and how many share each; this rank's are at `own`."""

    everyone: Tensor
    count: Tensor
    own: slice

    @classmethod
    def of(cls, everyone: Tensor, rank: int, rows: int) -> "Ids":
        return cls(everyone, same_id_count(everyone, everyone), slice(rank * rows, (rank + 1) * rows))


@dataclass(frozen=True)
class Statistics:
    """Finished sums of this rank's rows and of its own columns, (3, b) each: pos, off, target.

    The references are 0-d, one for all ranks, or (b,) each.
    """

    row_ref: Tensor
    col_ref: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def shared(self) -> bool:
        return self.row_ref.dim() == 0

    def riding(self, ids: Ids | None) -> list[Tensor]:
        """What other ranks need to know of this rank's columns: (b,) or, with ids, (b, 2); and their references."""
        sums = self.cols[0] + self.cols[1] if ids is None else self.cols[:2].T.contiguous()
        return [sums] if self.shared else [sums, self.col_ref]


@dataclass(frozen=True)
class Tiles:
    """This rank's rows (b, D) against blocks of columns; `scale` 0-d in the compute dtype."""

    rows: Tensor
    scale: Tensor
    ids: Ids | None
    impl: str

    @property
    def triton(self) -> bool:
        return self.impl == "triton" and self.scale.dtype == torch.float32

    def operands(self, block: Block) -> tuple[Tensor, Tensor]:
        return tile_operands(self.rows, block.held[0], self.scale, self.impl)[:2]

    def own(self, block: Block) -> slice | None:
        """Where this rank's own columns are in the block, if they are."""
        inside = 0 <= block.offset < len(block.held[0])
        return slice(block.offset, block.offset + len(self.rows)) if inside else None

    def positives(self, block: Block) -> p.Positives:
        if self.ids is not None:
            rows, cols = self.ids.own, block.columns
            ids, count = self.ids.everyone, self.ids.count
            return p.Positives(ids[rows], ids[cols], block.offset, (count[rows], count[cols]))
        if self.triton and self.own(block) is None:
            # Triton's kernels look up each row's own column, and there is none here: ids that never meet say so
            b = len(self.rows)
            ids = torch.arange(b + len(block.held[0]), device=self.rows.device)
            ones = torch.ones_like(ids)
            return p.Positives(ids[:b], ids[b:], block.offset, (ones[:b], ones[b:]))
        return p.Positives(None, None, block.offset)

    def maxima(self, block: Block) -> tuple[Tensor, Tensor]:
        """Largest logit of each row (b,) and column (n,) of the block."""
        x, y = self.operands(block)
        if self.triton:
            from vlscale.kernels import triton_contrastive

            return triton_contrastive.contrastive_maxima(x, y, self.scale, _flag(x, True))
        return p.contrastive_maxima(x, y, self.scale)

    def statistics(self, block: Block, row_ref: Tensor, col_ref: Tensor) -> tuple[Tensor, Tensor]:
        """(3, b) and (3, n) sums over the block; the references both 0-d, or (b,) and (n,)."""
        x, y = self.operands(block)
        arguments = x, y, self.scale, row_ref, col_ref, self.positives(block)
        if self.triton:
            from vlscale.kernels import triton_contrastive

            return triton_contrastive.contrastive_statistics(*arguments, _flag(x, True))
        return p.contrastive_statistics(*arguments)

    def weights(self, block: Block, statistics: Statistics) -> p.Weights:
        """The block's gradient weights; it carries `statistics.riding` of its columns."""
        sums, *refs = block.riding
        cols = self.scale.new_zeros(3, len(block.held[0]))
        if self.ids is not None:
            cols[:2] = sums.T
        else:
            cols[0] = sums
            if own := self.own(block):
                cols[:, own] = statistics.cols
        row_ref, col_ref = statistics.row_ref, refs[0] if refs else statistics.col_ref
        if self.triton and statistics.shared:  # its gradients read a reference for each row and column
            row_ref, col_ref = row_ref.expand(len(self.rows)).contiguous(), col_ref.expand(len(sums)).contiguous()
        return p.Weights(row_ref, col_ref, statistics.rows, cols, self.positives(block))

    def gradients(
        self, block: Block, statistics: Statistics, *, want_rows: bool, want_columns: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(G y (b, D), G^T x (n, D), <G, products> 0-d) of the block; None where not wanted."""
        x, y = self.operands(block)
        weights = self.weights(block, statistics)
        if self.triton:
            from vlscale.kernels import triton_contrastive

            dx, dy, along = triton_contrastive.contrastive_gradients(
                x, y, self.scale, weights, _flag(x, not statistics.shared), want_x=want_rows, want_y=want_columns
            )
            return dx, dy, along / self.scale
        use_rows = want_rows or not want_columns
        dx, dy = p.contrastive_gradients(x, y, self.scale, weights, want_x=use_rows, want_y=want_columns)
        return dx if want_rows else None, dy, _along(dx, x) if use_rows else _along(dy, y)

    def sigmoid(
        self, block: Block, bias: Tensor, want: tuple[bool, bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """((3,) loss sum, <n, products>, sum n; n y (b, D); n^T x (n, D)), None where not wanted.

        `want`: the gradients of rows, columns, scale and bias.
        """
        x, y = self.operands(block)
        arguments = x, y, self.scale, bias, self.positives(block)
        if self.triton:
            from vlscale.kernels import triton_sigmoid

            loss, dx, dy, total, along = triton_sigmoid.sigmoid_sweep(
                *arguments, want_x=want[0], want_y=want[1], want_scalars=any(want[2:])
            )
            return torch.stack([loss, along, total]), dx, dy
        use_rows = want[0] or (any(want) and not want[1])
        loss, dx, dy, total = p.sigmoid_sweep(*arguments, want_x=use_rows, want_y=want[1])
        along = torch.zeros_like(total)
        if want[2]:
            along = _along(dx, x) if use_rows else _along(dy, y)
        return torch.stack([loss, along, total]), dx if want[0] else None, dy


def _along(gradient: Tensor, rows: Tensor) -> Tensor:
    return (gradient * rows).sum(1).sum(dtype=torch.float64)


def _flag(like: Tensor, value: bool) -> Tensor:
    """Triton's kernels for vector references return at once where this is 0."""
    return torch.full((), int(value), dtype=torch.int32, device=like.device)
