"""All shards of a corpus: how many samples each holds, and one hash that stands for content and order.

Indexes are files, made once: beside the shards in `.vlscale-index/`, or in the user's cache where that folder cannot
be written, or in `data.manifest_dir`. An index is made again when its shard's size or time has changed.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from vlscale.data.faults import MOST_TOLD, BadShard, DamagedShard
from vlscale.data.pipes import discard_copy, is_pipe, open_source, pipe_stamp
from vlscale.data.shard_index import ShardIndex, ShardSummary, load_summary
from vlscale.data.storage import partial_of, scheme_of, stamp
from vlscale.data.tar import MemberKeys, index_shard
from vlscale.logging import get_logger
from vlscale.sections import DataConfig

INDEX_FOLDER = ".vlscale-index"
_ENOUGH = 100  # shards without any sample: it is not they that are wrong
DAMAGED = "damaged"  # in place of the digest of a shard that is left out


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
        if index is None or index.digest != self.digests[shard]:
            raise BadShard(
                f"index {self.index_paths[shard]} of shard {self.urls[shard]} is gone or changed; start again"
            )
        return index


def member_keys(data: DataConfig) -> MemberKeys:
    return MemberKeys(
        tuple(key.lower().removeprefix(".") for key in data.image_keys), data.caption_key.removeprefix(".")
    )


def build_manifest(
    shards: list[str],
    data: DataConfig,
    *,
    first: int = 0,
    tell: bool = True,
    on_shard: Callable[[int], None] = lambda samples: None,
) -> Manifest:
    """Indexes what is not indexed yet and puts the shards together.

    `first` is the shard to begin with: ranks that begin at different ones share the work, since each takes what
    another has finished. `tell`: whether the log says what was left out. `on_shard` is told the samples of every shard
    as it is done.
    """
    known = _remembered(shards, data)
    found: dict[int, tuple[ShardSummary, Path]] = {}
    for shard in [*range(first, len(shards)), *range(first)]:
        found[shard] = known.get(shards[shard]) or shard_index(shards[shard], data)
        on_shard(found[shard][0].count)
        if len(found) == _ENOUGH:
            _check_not_empty([summary for summary, _ in found.values()], data, f"first {_ENOUGH} of {len(shards)}")
    summaries = [found[shard][0] for shard in range(len(shards))]
    manifest = Manifest(
        shards,
        np.array([summary.count for summary in summaries], dtype=np.int64),
        [summary.digest for summary in summaries],
        [found[shard][1] for shard in range(len(shards))],
        sum((Counter(summary.skipped) for summary in summaries if summary.skipped), Counter()),
    )
    if len(known) < len(shards) > 1:
        _remember(manifest, summaries, data)
    _check_not_empty(summaries, data, str(len(summaries)))
    if tell:
        _tell(manifest, summaries)
    return manifest


def shard_index(url: str, data: DataConfig) -> tuple[ShardSummary, Path]:
    """The shard's index, found or made: its summary, and where it lies."""
    keys, now = member_keys(data), pipe_stamp(url, data) if is_pipe(url) else stamp(url)
    places = _places(url, keys, data.manifest_dir)
    for place in places:
        summary = load_summary(place)
        if summary is not None and (summary.size, summary.version) == (now.size, now.version):
            return summary, place
    shard = open_source(url, data)
    try:
        index = index_shard(shard, url, keys, now.version)
    except DamagedShard as error:
        if is_pipe(url):
            discard_copy(url, data)
        if data.damaged_shards == "stop":
            raise
        return ShardSummary(now.size, now.version, 0, DAMAGED, {"damaged shard": 1}, [str(error)]), places[0]
    finally:
        shard.close()
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            index.save(place)
            return index.summary(), place
        except OSError as error:
            problem = error
    raise ValueError(
        f"the index of shard {url} cannot be written ({problem}); set data.manifest_dir to a writable folder"
    )


def _remembered(shards: list[str], data: DataConfig) -> dict[str, tuple[ShardSummary, Path]]:
    """What the manifest's own file tells of the shards: one read instead of one a shard.

    Local shards that have changed since are left out. Remote ones are not asked, as a corpus may have 100,000 of them;
    a changed one is met by its size when it is opened.
    """
    for folder in _folders(shards[0], data.manifest_dir):
        try:
            digest, _, entries = (folder / _manifest_name(shards, data)).read_bytes().partition(b"\n")
        except OSError:
            continue
        if digest != _check(entries):
            continue
        found = {url: (ShardSummary.parse(summary), Path(place)) for url, place, summary in json.loads(entries)}
        return {url: (summary, place) for url, (summary, place) in found.items() if _is_as_it_was(url, summary, place)}
    return {}


def _is_as_it_was(url: str, summary: ShardSummary, place: Path) -> bool:
    if not place.is_file():
        return False
    if scheme_of(url):
        return True
    now = stamp(url)
    return (now.size, now.version) == (summary.size, summary.version)


def _remember(manifest: Manifest, summaries: list[ShardSummary], data: DataConfig) -> None:
    entries = [
        (url, str(place), asdict(summary))
        for url, place, summary in zip(manifest.urls, manifest.index_paths, summaries, strict=True)
        if summary.digest != DAMAGED
    ]
    content = json.dumps(entries).encode()
    for folder in _folders(manifest.urls[0], data.manifest_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _manifest_name(manifest.urls, data)
            partial = partial_of(path)
            partial.write_bytes(_check(content) + b"\n" + content)
            os.replace(partial, path)
            return
        except OSError:
            continue  # it only saves time, and another folder may do


def _check(content: bytes) -> bytes:
    """Stands before the entries: what a damaged file tells must not pass for the corpus."""
    return blake2b(content, digest_size=16).hexdigest().encode()


def _manifest_name(shards: list[str], data: DataConfig) -> str:
    placed = [url if scheme_of(url) else os.path.abspath(url) for url in shards]
    digest = blake2b("\n".join([member_keys(data).digest(), *placed]).encode(), digest_size=8).hexdigest()
    return f"manifest-{digest}.json"


def _folders(url: str, folder: str | None) -> list[Path]:
    """Where indexes may lie, the first choice first."""
    if folder is not None:
        return [Path(folder).expanduser()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlscale" / "index"
    return [cache] if scheme_of(url) else [Path(url).resolve().parent / INDEX_FOLDER, cache]


def _places(url: str, keys: MemberKeys, folder: str | None) -> list[Path]:
    """Files that may hold the shard's index; in a folder that corpora share, the name tells the shard's place."""
    place = url if scheme_of(url) else str(Path(url).resolve())
    name = place.rsplit("/", 1)[-1][-80:]
    located = f"{name}.{blake2b(place.encode(), digest_size=6).hexdigest()}.{keys.digest()}.idx"
    beside = f"{name}.{keys.digest()}.idx"
    return [root / (beside if root.name == INDEX_FOLDER else located) for root in _folders(url, folder)]


def _tell(manifest: Manifest, summaries: list[ShardSummary]) -> None:
    """A log line for each of the first left-out samples and for all by their reason."""
    named = ((line, url) for summary, url in zip(summaries, manifest.urls, strict=True) for line in summary.named)
    for line, url in islice(named, MOST_TOLD):
        get_logger().warning("left out %s (%s)", line, url)
    if manifest.skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.skipped.most_common())
        more = f"; `vlscale data check` names more than {MOST_TOLD}" if manifest.skipped.total() > MOST_TOLD else ""
        get_logger().warning("left out when indexing: %s%s", reasons, more)


def _check_not_empty(summaries: list[ShardSummary], data: DataConfig, which: str) -> None:
    if any(summary.count for summary in summaries):
        return
    skipped = sum((Counter(summary.skipped) for summary in summaries), Counter())
    found = f" (left out: {dict(skipped)})" if skipped else ""
    raise ValueError(
        f"the {which} shards hold no sample with a picture ({', '.join(data.image_keys)}) "
        f"and a caption ({data.caption_key}){found}; check data.image_keys and data.caption_key"
    )
