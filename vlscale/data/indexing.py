"""Indexing many shards at once, in processes. What is done stays done: a second run takes up where the first ended."""

from vlscale.data.manifest import Manifest, build_manifest, shard_index
from vlscale.data.processes import core_count, in_processes
from vlscale.progress import Progress
from vlscale.sections import DataConfig


def index_shards(
    shards: list[str], data: DataConfig, *, processes: int | None = None, progress: bool = True
) -> Manifest:
    """The manifest of the shards; each shard's index is a file as soon as it is made."""
    jobs = [(shard, data) for shard in shards]
    with Progress("indexing", len(shards), "shards", shown=progress) as bar:
        for _ in in_processes(_index, jobs, min(processes or core_count(), len(shards))):
            bar.advance()
    return build_manifest(shards, data)


def _index(shard: str, data: DataConfig) -> None:
    """Returns nothing: the index is on disk, and need not travel."""
    shard_index(shard, data)
