"""Fixtures of the kernel tests. Without a GPU the Triton kernels run in Triton's interpreter, chosen at its import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 16 x 24, so that small problems have many, ragged ones."""
    from vlscale.kernels import chunked_contrastive, chunked_contrastive_double, chunked_relation, chunked_sigmoid

    for module in (chunked_contrastive, chunked_contrastive_double, chunked_relation, chunked_sigmoid):
        monkeypatch.setattr(module, "ROWS", 16)
        monkeypatch.setattr(module, "COLUMNS", 24)
