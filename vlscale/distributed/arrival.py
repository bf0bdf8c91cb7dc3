"""When this rank reaches the first collective of a step's losses: until there it has waited for nobody in them."""

from collections.abc import Callable

_expected: list[Callable[[], None]] = []


def on_arrival(act: Callable[[], None]) -> None:
    """Called once, at the next arrival."""
    _expected[:] = [act]


def arrived() -> None:
    while _expected:
        _expected.pop()()
