"""Progress of embedding a corpus."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vlscale.data.progress import Progress


@contextmanager
def embedding_progress(name: str) -> Iterator[Callable[[int], None]]:
    """`with embedding_progress("model") as on_batch:`, called with the number of samples that were embedded."""
    with Progress(f"embedding {name}", None, "samples") as bar:
        yield bar.advance
