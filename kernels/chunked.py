"""Blockwise PyTorch: what the `chunked` implementations of all families share.

Every all-pairs quantity is built from tiles of (rows x columns) that live in a few preallocated buffers, so the extra
memory is a constant plus O(N). On a CPU a tile must stay in cache between the product that makes it and the passes
that consume it; the sizes below were chosen by measurement (benchmarks/kernels_cpu.py).
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

ROWS, COLUMNS = 512, 2048  # a 4 MB tile in float32
SUM_BITS = {torch.float32: 102, torch.float64: 970}  # a sum under N 2^-bits may have lost terms to underflow
REACH = {torch.float32: 70.0, torch.float64: 600.0}  # exp(reach) times 2^20 terms stays finite
HALF = torch.bfloat16, torch.float16  # what tensor cores multiply exactly, adding up in float32
WIDENED = 1 << 23  # elements of embeddings that are copied to the compute dtype at once, 32 MB in float32


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows (rows, width) in blocks of WIDENED elements: what prepares embeddings never copies all of them."""
    for place in spans(0, rows, max(1, WIDENED // width)):
        yield slice(*place)


class Scratch:
    """`count` reusable tile buffers of up to `elements` values each."""

    def __init__(self, count: int, elements: int, like: Tensor):
        self.buffers = [torch.empty(elements, dtype=like.dtype, device=like.device) for _ in range(count)]

    def tile(self, which: int, rows: int, columns: int) -> Tensor:
        return self.buffers[which][: rows * columns].view(rows, columns)


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left right^T; left (m, D), right (n, D)."""
    return torch.mm(left, right.T, out=out)


def fixed_reference(bound: Tensor, dtype: torch.dtype, reach: float | None = None) -> Tensor:
    """The reference c that every exponential subtracts: logits are at most `bound`, so exp(logit - c) is finite.

    One constant for all rows and columns makes partial sums plain sums; it stays 0 while that is safe.
    """
    return (bound - (REACH[dtype] if reach is None else reach)).clamp_min(0)


def sums_are_sound(n: int, *sums: Tensor) -> bool:
    """Whether sums of exponentials over a fixed reference kept all terms that matter.

    True iff each is finite and at least n 2^-102 (float32): then everything flushed to zero together is under 2^-24
    of it. "Greater than zero" would not do. Reads the values, so only CPU code asks.
    """
    floor = math.ldexp(max(n, 1), -SUM_BITS[sums[0].dtype])
    return all(bool(((s >= floor) & (s < torch.inf)).all()) for s in sums)


def diagonal_part(rows: tuple[int, int], columns: tuple[int, int], offset: int) -> tuple[int, int] | None:
    """The global indices g with row g - offset and column g inside this tile, as a range; None when there are none."""
    first, last = max(rows[0] + offset, columns[0]), min(rows[1] + offset, columns[1])
    return (first, last) if first < last else None


def tile_diagonal(tile: Tensor, part: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], offset: int):
    """A view of the tile's elements whose global row equals their global column."""
    block = tile[part[0] - offset - rows[0] : part[1] - offset - rows[0], part[0] - columns[0] : part[1] - columns[0]]
    return block.diagonal()


def same_id_count(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """How many columns share each row's id, (b,); sorted lookups, nothing read back."""
    ordered = column_ids.sort().values
    return torch.searchsorted(ordered, row_ids, right=True) - torch.searchsorted(ordered, row_ids)


def tile_operands(image: Tensor, text: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor, bool]:
    """(x, y, whether Triton takes them, which has bfloat16 and float16 as they are; the rest in the compute dtype).

    float64 has no tensor cores to win anything on, and is computed by the chunked tiles whatever the impl.
    """
    triton = impl == "triton" and scale.dtype == torch.float32
    if triton and image.dtype in HALF:
        return image.contiguous(), text.contiguous(), True
    return image.to(scale.dtype).contiguous(), text.to(scale.dtype).contiguous(), triton


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A caller's autocast must not turn fp32 products into bf16 ones. Meta tensors have none to turn off."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def refuse_tangents(impl: str, *tensors: Tensor) -> None:
    """An op without a forward-mode formula drops its inputs' tangents: the derivative would silently be 0."""
    if torch.compiler.is_compiling() or all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors):
        return
    raise ValueError(
        f"impl: expected reference for forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors), got {impl!r};"
        " take it, or reverse mode"
    )


def full_precision(function):
    """Run an op's body without autocast."""

    @functools.wraps(function)
    def body(*args, **kwargs):
        with without_autocast(next(a.device for a in args if isinstance(a, Tensor))):
            return function(*args, **kwargs)

    return body
