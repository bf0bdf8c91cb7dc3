"""Fixtures of the kernel tests."""

from collections.abc import Callable

import pytest


@pytest.fixture
def tiles_of(monkeypatch) -> Callable[[int, int], None]:
    """Sets the size of the chunked tiles."""
    from vlscale.kernels import (
        chunked_contrastive,
        chunked_contrastive_double,
        chunked_relation,
        chunked_sigmoid,
        chunked_sigmoid_double,
    )

    pairs = chunked_contrastive, chunked_contrastive_double, chunked_sigmoid, chunked_sigmoid_double

    def set_sizes(rows: int, columns: int) -> None:
        for module in (*pairs, chunked_relation):
            monkeypatch.setattr(module, "ROWS", rows)
            monkeypatch.setattr(module, "COLUMNS", columns)

    return set_sizes


@pytest.fixture
def small_tiles(tiles_of) -> None:
    """Tiles of 16 x 24, so that small problems have many, ragged ones."""
    tiles_of(16, 24)
