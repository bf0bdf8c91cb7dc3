"""Shards written with webdataset's own writer: equal samples give equal bytes."""

from collections.abc import Iterable
from pathlib import Path

from webdataset import TarWriter


def write_shard(path: Path, samples: Iterable[dict]) -> int:
    """Samples are webdataset dicts (`__key__`, then extension: bytes, text or json). Returns how many."""
    count = 0
    with open(path, "wb") as file, TarWriter(file, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)
            count += 1
    return count
