"""What is made ahead of its use: a queue between two threads, bounded in items and in bytes."""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """At most `most` items and `most_bytes` bytes wait in it; one item always may, however large."""

    def __init__(self, most: int, most_bytes: float):
        self._most, self._most_bytes = most, most_bytes
        self._waiting: deque[tuple[Item, int]] = deque()
        self._bytes, self._closed = 0, False
        self._changed = threading.Condition()

    def put(self, item: Item, size: int) -> bool:
        """Waits for room. False when the queue was closed, and the item is not wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(size))
            if self._closed:
                return False
            self._waiting.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return True

    def get(self) -> Item:
        """The next item; waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            item, size = self._waiting.popleft()
            self._bytes -= size
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Nothing is taken any more: who waits to put is let go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        fits = len(self._waiting) < self._most and self._bytes + size <= self._most_bytes
        return fits or not self._waiting
