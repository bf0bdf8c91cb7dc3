"""Batches larger than memory: a tower by chunks of rows, its activations kept for one chunk at a time.

The embeddings of all chunks are kept, the activations of none; the objectives see the whole batch, and the backward
runs each chunk's forward again under the same random state (GradCache, arXiv 2101.06983, by way of activation
checkpointing). It is one graph: every parameter gets its gradient, and the engine its hook, once a step and not once a
chunk.

Cost: one more forward, 4/3 of the operations. Memory: activations of `chunk_size` rows, whatever the batch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def in_chunks(encode: Callable[..., torch.Tensor], chunk_size: int | None, *inputs: torch.Tensor) -> torch.Tensor:
    """`encode(*inputs)` (B, D), by `chunk_size` of its B rows at a time; one plain call where they fit in one chunk."""
    if chunk_size is None or len(inputs[0]) <= chunk_size:
        return encode(*inputs)
    chunks = zip(*(rows.split(chunk_size) for rows in inputs), strict=True)
    return torch.cat([checkpointed(encode, *chunk) for chunk in chunks])


def checkpointed(compute: Callable[..., T], *inputs: Any) -> T:
    """`compute(*inputs)`, of which the graph keeps nothing but its inputs and outputs."""
    # ZeRO-3 frees weights between the two forwards, so what is saved has another shape in each: no comparing of shapes.
    return checkpoint(compute, *inputs, use_reentrant=False, determinism_check="none")
