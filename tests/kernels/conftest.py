"""Fixtures of the kernel tests."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter changes its language for the time of a call, and once more for every call of a device
    function within, which then has nothing to change but takes a quarter of the time to find that out."""
    if not find_spec("triton"):
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, changed = interpreter._patch_lang, set()  # what the kernel that runs has changed

    def patch_once(function):
        seen = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if changed and seen <= changed:
            return interpreter._LangPatchScope()
        scope = patch_lang(function)
        if not changed:
            changed.update(seen)
            restore = scope.restore
            scope.restore = lambda: (changed.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture
def watched_kernels() -> Iterator[None]:
    """Every memory access of the test's kernels is checked, where they run in the interpreter."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    from tests.kernels.watched import watched

    with watched():
        yield


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
