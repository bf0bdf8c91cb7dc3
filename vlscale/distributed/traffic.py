"""Bytes that this rank receives, by kind of collective: what the tests hold to the formulas, and costs nothing unasked.

A collective is charged what its bandwidth-optimal form receives (V bytes of the whole vector, W ranks): all_gather and
reduce_scatter (W-1)/W V, all_reduce twice that, a transfer between two ranks its own size, all_to_all what came from
other ranks.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_counters: list[Counter[str]] = []


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Bytes received while the context is open: `all_gather`, `reduce_scatter`, `all_reduce`, `transfer`,
    `all_to_all`."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def received(kind: str, whole: torch.Tensor, share: float = 1.0) -> None:
    """A collective over `whole`, of which this rank received the fraction `share`."""
    for counter in _counters:
        counter[kind] += round(share * whole.numel() * whole.element_size())
