"""Fixtures of the kernel tests."""

import pytest


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 16 x 24, so that small problems have many, ragged ones."""
    from vlscale.kernels import (
        chunked_contrastive,
        chunked_contrastive_double,
        chunked_relation,
        chunked_sigmoid,
        chunked_sigmoid_double,
    )

    pairs = chunked_contrastive, chunked_contrastive_double, chunked_sigmoid, chunked_sigmoid_double
    for module in (*pairs, chunked_relation):
        monkeypatch.setattr(module, "ROWS", 16)
        monkeypatch.setattr(module, "COLUMNS", 24)
