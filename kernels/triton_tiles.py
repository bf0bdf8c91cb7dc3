"""What the Triton kernels share: tile configurations, one product tile, and which pairs are positives.

Every kernel covers a block of (rows x columns) with programs of (BLOCK_M x BLOCK_N); products accumulate in float32
over BLOCK_K-wide steps, so any width works. Indices are 64-bit where they meet a stride: N^2 passes 2^31 at N = 46341.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter multiplies bfloat16 operands as the integers that hold their bits: widen them first there.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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


# Registers and shared memory of each: benchmarks/results/compile_table.md. float32 operands take twice the room.
BF16 = Config()
BF16_SMALL_SHARED = Config(block_n=128)  # sm_80 has 164 KB a block; 8 warps at 128 x 256 spill there
FP32 = Config(block_m=64, block_n=64, block_k=32, warps=4, stages=2, wave_columns=32768)
INTERPRETED = Config(block_m=32, block_n=64, block_k=32, wave_rows=96, wave_columns=128, splits=2)  # several of each


def choose_config(x: Tensor) -> Config:
    if x.device.type == "cpu":
        return INTERPRETED
    if x.dtype == torch.float32:
        return FP32
    if torch.cuda.get_device_capability(x.device)[0] < 9:
        return BF16_SMALL_SHARED
    return BF16


@triton.jit
def product_tile(
    a_ptr,
    b_ptr,
    rows,
    columns,
    row_end,
    column_end,
    D,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a[rows] b[columns]^T in float32; rows and columns past the end, and features past D, are read as 0."""
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + rows.to(tl.int64)[:, None] * stride_a + k[None, :]
    b = b_ptr + columns.to(tl.int64)[None, :] * stride_b + k[:, None]
    row_mask = (rows < row_end)[:, None]
    column_mask = (columns < column_end)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        left = tl.load(a + start, mask=row_mask & (k < D - start)[None, :], other=0.0)
        right = tl.load(b + start, mask=column_mask & (k < D - start)[:, None], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def same_pair(rows, columns, row_ids_ptr, column_ids_ptr, row_end, column_end, offset, HAS_IDS: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: equal ids, or without ids the row's own global index."""
    if HAS_IDS:
        left = tl.load(row_ids_ptr + rows, mask=rows < row_end, other=0)
        right = tl.load(column_ids_ptr + columns, mask=columns < column_end, other=0)
        return left[:, None] == right[None, :]
    return (rows + offset)[:, None] == columns[None, :]
