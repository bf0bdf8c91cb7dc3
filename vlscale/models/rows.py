"""Rows of embeddings, and the precision that sums over them need."""

import torch
import torch.nn.functional as F


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows of length one, computed in float32 at least, returned in their own dtype."""
    return F.normalize(wide(rows), dim=-1).to(rows.dtype)
