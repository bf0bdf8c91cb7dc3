"""Fixtures of the kernel tests."""

import pytest


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 16 x 24, so that small problems have many, ragged ones."""
    from vlscale.kernels import chunked_contrastive, chunked_contrastive_double, chunked_relation, chunked_sigmoid

    for module in (chunked_contrastive, chunked_contrastive_double, chunked_relation, chunked_sigmoid):
        monkeypatch.setattr(module, "ROWS", 16)
        monkeypatch.setattr(module, "COLUMNS", 24)
