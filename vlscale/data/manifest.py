"""All shards of a corpus: how many samples each holds, and one hash that stands for content and order.

Indexes are files, made once: beside the shards in `.vlscale-index/`, or in the user's cache where that folder cannot
be written, or in `data.manifest_dir`. An index is made again when its shard's size or time has changed.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vlscale.config import DataConfig
from vlscale.data.faults import BadShard
from vlscale.data.storage import open_shard, scheme_of, stamp
from vlscale.data.tar import MemberKeys, ShardIndex, index_shard
from vlscale.logging import get_logger

INDEX_FOLDER = ".vlscale-index"


@dataclass(frozen=True)
class Manifest:
    """S shards in order; `counts[s]` complete samples in shard s, whose index lies at `index_paths[s]`."""

    urls: list[str]
    counts: np.ndarray  # (S,) int64
    digests: list[str]
    index_paths: list[Path]
    skipped: Counter  # left-out samples by reason
    sources: np.ndarray | None = None  # (S,) int64, the source of each shard; None: all of one

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def hash(self) -> str:
        """Content and order of the shards, wherever they lie."""
        lines = self.digests if self.sources is None else [*self.digests, str(self.sources.tolist())]
        return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

    def source_counts(self) -> list[np.ndarray]:
        """For each source, the counts (S,) with those of the other sources' shards as 0."""
        if self.sources is None:
            return [self.counts]
        return [np.where(self.sources == source, self.counts, 0) for source in range(int(self.sources.max()) + 1)]

    def index(self, shard: int) -> ShardIndex:
        index = ShardIndex.load(self.index_paths[shard])
        if index is None or index.digest() != self.digests[shard]:
            raise BadShard(
                f"index {self.index_paths[shard]} of shard {self.urls[shard]} is gone or changed; start again"
            )
        return index


def member_keys(data: DataConfig) -> MemberKeys:
    return MemberKeys(
        tuple(key.lower().removeprefix(".") for key in data.image_keys), data.caption_key.removeprefix(".")
    )


def build_manifest(
    shards: list[str], data: DataConfig, *, first: int = 0, on_shard: Callable[[int], None] = lambda samples: None
) -> Manifest:
    """Indexes what is not indexed yet and puts the shards together.

    `first` is the shard to begin with: ranks that begin at different ones share the work, since each takes what
    another has finished. `on_shard` is told the samples of every shard as it is done.
    """
    found: dict[int, tuple[ShardIndex, Path]] = {}
    for shard in [*range(first, len(shards)), *range(first)]:
        found[shard] = shard_index(shards[shard], data)
        on_shard(len(found[shard][0]))
    indexes = [found[shard][0] for shard in range(len(shards))]
    manifest = Manifest(
        shards,
        np.array([len(index) for index in indexes], dtype=np.int64),
        [index.digest() for index in indexes],
        [found[shard][1] for shard in range(len(shards))],
        sum((index.skipped for index in indexes), Counter()),
    )
    _tell(manifest, indexes, data)
    return manifest


def shard_index(url: str, data: DataConfig) -> tuple[ShardIndex, Path]:
    """The shard's index, loaded or made, and where it lies."""
    keys, found = member_keys(data), stamp(url)
    places = _places(url, keys, data.manifest_dir)
    for place in places:
        index = ShardIndex.load(place)
        if index is not None and (index.size, index.version) == (found.size, found.version):
            return index, place
    shard = open_shard(url, data)
    try:
        index = index_shard(shard, url, keys, found.version)
    finally:
        shard.close()
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            index.save(place)
            return index, place
        except OSError as error:
            problem = error
    raise ValueError(
        f"the index of shard {url} cannot be written ({problem}); set data.manifest_dir to a writable folder"
    )


def _places(url: str, keys: MemberKeys, folder: str | None) -> list[Path]:
    """Where an index may lie, the first choice first."""
    remote = scheme_of(url) is not None
    place = url if remote else str(Path(url).resolve())
    name = place.rsplit("/", 1)[-1][-80:]
    located = f"{name}.{blake2b(place.encode(), digest_size=6).hexdigest()}.{keys.digest()}.idx"
    if folder is not None:
        return [Path(folder).expanduser() / located]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlscale" / "index" / located
    return [cached] if remote else [Path(place).parent / INDEX_FOLDER / f"{name}.{keys.digest()}.idx", cached]


def _tell(manifest: Manifest, indexes: list[ShardIndex], data: DataConfig) -> None:
    """One log line for every left-out sample that is named, and an error when nothing is left."""
    for index, url in zip(indexes, manifest.urls, strict=True):
        for line in index.named:
            get_logger().warning("skipped sample %s of %s", line, url)
    if manifest.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.most_common())
        get_logger().warning("left out %d samples when indexing: %s", manifest.skipped.total(), reasons)
    if manifest.num_samples == 0:
        found = f" (left out: {dict(manifest.skipped)})" if manifest.skipped else ""
        raise ValueError(
            f"the {len(manifest.urls)} shards hold no sample with a picture ({', '.join(data.image_keys)}) "
            f"and a caption ({data.caption_key}){found}; check data.image_keys and data.caption_key"
        )
