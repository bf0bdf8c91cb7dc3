"""What the Triton kernels share: tile configurations, one product tile, and which pairs are positives.

Every kernel covers a block of (rows x columns) with programs of (BLOCK_M x BLOCK_N); products accumulate in float32
over BLOCK_K-wide steps, so any width works. Indices are 64-bit where they meet a stride: N^2 passes 2^31 at N = 46341.
"""

import os
from dataclasses import dataclass, replace
from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import HALF
from .measured_tiles import FUSED_WIDTHS, measured_sizes

# Triton's interpreter multiplies bfloat16 operands as the integers that hold their bits: they are widened first there.
INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
STORED_SCALE = tl.constexpr(4096.0)  # of float16 gradient weights
LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """Compile-time tile sizes, and the sizes of the waves that the launchers cut a problem into.

    wave_rows x wave_columns is the largest block of gradient weights in memory at once (1 GB of bfloat16); splits is
    over how many programs one row tile's columns are spread in the forward pass.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    warps: int = 8
    stages: int = 3
    wave_rows: int = 8192
    wave_columns: int = 65536
    splits: int = 8

    def launch(self) -> dict:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


class Work(Enum):
    """How much a kernel keeps beside its accumulator, which decides the largest tile that does not spill."""

    LIGHT = "one exponential, sums of rows and columns; or weights, part after part of the tile"
    FULL = "weights to store, counts, or tiles of which a few hold positives by ids"
    NARROW = "weights from a reference a row"
    PARTS = "two products, worked on part after part of the tile"
    DOUBLE = "two products at once, with several teachers or whole tiles; lists of neighbours"
    CROWDED = "two products and a reference a row, the teacher's gradient or second order"


# What each compiles to: benchmarks/results/compile_table.md.
BF16 = {
    Work.LIGHT: Config(),
    Work.FULL: Config(block_n=128),
    Work.NARROW: Config(block_n=64),
    Work.PARTS: Config(block_n=128, wave_rows=4096),
    Work.DOUBLE: Config(block_n=64, wave_rows=4096),
    Work.CROWDED: Config(block_m=64, block_n=64, wave_rows=4096),
}
# Before 9.0 a block has 99 to 164 KB of shared memory and no 128 x 256 tile; 10.0 spills where 9.0 does not.
BEFORE_HOPPER = {Work.LIGHT: Work.FULL, Work.PARTS: Work.CROWDED, Work.DOUBLE: Work.CROWDED}
AFTER_HOPPER = {
    Work.LIGHT: Work.FULL,
    Work.FULL: Work.NARROW,
    Work.PARTS: Work.CROWDED,
    Work.DOUBLE: Work.CROWDED,
}
FP32_ONE = Config(block_m=64, block_n=64, block_k=32, warps=4, stages=2, wave_columns=32768)
FP32_TWO = replace(FP32_ONE, warps=8)
INTERPRETED = Config(block_m=32, block_n=64, block_k=32, wave_rows=96, wave_columns=128, splits=2)  # several of each


# Launches that may have measured sizes; the fused gradient's have work of their own.
WORK_OF = {
    "contrastive_forward": Work.LIGHT,
    "contrastive_backward": Work.LIGHT,
    "sigmoid": Work.LIGHT,
    "relation_kl_forward": Work.PARTS,
    "relation_kl_backward": Work.PARTS,
    "relation_mae": Work.PARTS,
    "ranks": Work.FULL,
    "neighbours": Work.DOUBLE,
}


def choose_config(x: Tensor, work: Work | str) -> Config:
    """Tile sizes for embeddings like x: by the work; or, for a launch's name, those measured, else its work's."""
    if isinstance(work, str):
        if sizes := measured_sizes(work, x.dtype, x.device):
            return Config(**sizes)
        work = WORK_OF[work]
    if x.device.type == "cpu":
        return INTERPRETED
    return config_for(x.dtype, torch.cuda.get_device_capability(x.device)[0], work)


def generation(capability: int) -> int:
    """8, 9 or 10: whose tiles serve a major compute capability. From 12 on, cards multiply and hold as much as at 8."""
    return 8 if capability < 9 or capability >= 12 else min(capability, 10)


def config_for(dtype: torch.dtype, capability: int, work: Work) -> Config:
    """Tile sizes by the major compute capability."""
    capability = generation(capability)
    if dtype == torch.float32:
        return FP32_TWO if work in (Work.PARTS, Work.DOUBLE, Work.CROWDED) else FP32_ONE
    smaller = BEFORE_HOPPER if capability < 9 else AFTER_HOPPER if capability > 9 else {}
    return BF16[smaller.get(work, work)]


# Rows' gradients in registers, by the features they hold (block_k) and by the major compute capability; the largest
# that do not spill.
FUSED = {
    8: {
        64: Config(block_m=64, block_n=64, block_k=64, warps=4),
        128: Config(block_m=64, block_n=64, block_k=128, stages=2),
        256: Config(block_m=64, block_n=32, block_k=256, stages=2),
    },
    9: {
        64: Config(block_n=128, block_k=64),
        128: Config(block_n=64, block_k=128),
        256: Config(block_n=32, block_k=256, stages=2),
    },
    10: {
        64: Config(block_n=64, block_k=64),
        128: Config(block_n=64, block_k=128),
        256: Config(block_m=64, block_n=64, block_k=256, stages=2),
    },
}
FUSED_INTERPRETED = replace(INTERPRETED, block_n=32)


def fused_config(x: Tensor) -> Config | None:
    """Tile sizes of the fused contrastive gradient, None where its waves serve embeddings like x (N, D).

    float32 has no tensor cores to pay for computing the logits again. The interpreter fuses up to 32 features, so that
    the tests' sizes take both ways.
    """
    features = triton.next_power_of_2(x.shape[1])
    if x.dtype not in HALF:
        return None
    sizes = measured_sizes(f"contrastive_fused_{max(FUSED_WIDTHS[0], features)}", x.dtype, x.device)
    if sizes is not None:
        return Config(**sizes) if sizes else None
    if x.device.type == "cpu":
        return replace(FUSED_INTERPRETED, block_k=max(16, features)) if features <= 32 else None
    capability = torch.cuda.get_device_capability(x.device)[0]
    return FUSED[generation(capability)].get(max(FUSED_WIDTHS[0], features))


@triton.jit
def store_weights(pointer, g, row_offset, column_offset, stride, mask):
    """Store a tile of gradient weights; 32-bit offsets reach over any wave (at most 2^29 elements)."""
    place = pointer + row_offset[:, None] * stride + column_offset[None, :]
    if pointer.dtype.element_ty == tl.float16:
        g = g * STORED_SCALE
    tl.store(place, g.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def product_tile(
    a_ptr,
    b_ptr,
    first_row,
    first_column,
    row_end,
    column_end,
    D,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a[first_row:] b[first_column:]^T of one tile in float32; rows past the ends and features past D are read as 0.

    The tile's base is 64-bit, offsets inside it 32-bit: 64-bit tensors of pointers would double their registers.
    """
    k = tl.arange(0, BLOCK_K)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    a = a_ptr + tl.cast(first_row, tl.int64) * stride_a + (row[:, None] * stride_a + k[None, :])
    b = b_ptr + tl.cast(first_column, tl.int64) * stride_b + (column[None, :] * stride_b + k[:, None])
    row_mask = (row < row_end - first_row)[:, None]
    column_mask = (column < column_end - first_column)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        left = tl.load(a + start, mask=row_mask & (k < D - start)[None, :], other=0.0)
        right = tl.load(b + start, mask=column_mask & (k < D - start)[:, None], other=0.0)
        if INTERPRETING:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def halves(tile):
    """A tile's left and right half, out of registers."""
    height: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (height, 2, width // 2)), (0, 2, 1)))


@triton.jit
def side_by_side(tile, WIDTH: tl.constexpr):
    """A tile's 1, 2, 4 or 8 parts of WIDTH columns, a tuple. What is made of one part after another needs fewer
    registers, so that the product may have a larger tile, which is fed more cheaply."""
    COUNT: tl.constexpr = tile.shape[1] // WIDTH
    if COUNT == 1:
        parts = (tile,)
    else:
        left, right = halves(tile)
        if COUNT == 2:
            parts = left, right
        else:
            first, second = halves(left)
            third, fourth = halves(right)
            if COUNT == 4:
                parts = first, second, third, fourth
            else:
                parts = halves(first) + halves(second) + halves(third) + halves(fourth)
    return parts


@triton.jit
def same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: equal ids, or without ids the row's own global index."""
    if HAS_IDS:
        left = tl.load(row_ids_ptr + rows, mask=rows < row_end, other=0)
        right = tl.load(column_ids_ptr + columns, mask=columns < column_end, other=0)
        return left[:, None] == right[None, :]
    return (rows + offset)[:, None] == columns[None, :]


@triton.jit
def some_left_out(first_row, first_column, row_end, column_end, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile reaches over an end or holds own pairs; few do, and the others need no masks."""
    ends = (first_row + BLOCK_M > row_end) | (first_column + BLOCK_N > column_end)
    own = first_row + offset
    return ends | ((own < first_column + BLOCK_N) & (first_column < own + BLOCK_M))


LEFT_OUT = tl.constexpr(-32768)  # among products that are kept in int16


@triton.jit
def some_positive(
    row_ids_ptr, column_ids_ptr, first_row, first_column, row_end, column_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile holds equal ids or reaches over an end; few do, and the others are all negatives."""
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    positive = same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, 0, True)
    ends = (first_row + BLOCK_M > row_end) | (first_column + BLOCK_N > column_end)
    return ends | (tl.max(tl.max(positive.to(tl.int32), 1), 0) > 0)


@triton.jit
def exponential(x, NARROW: tl.constexpr):
    """exp(x). For embeddings of 16 bits what is under 2^-126 is 0, as the references allow: half the instructions."""
    if NARROW:
        return tl.exp2(x * LOG2E)
    return tl.exp(x)
