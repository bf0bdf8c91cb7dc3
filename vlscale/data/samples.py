"""Every sample once, in order: what evaluation, checks and tokenizer training read."""

from collections.abc import Iterator

from vlscale.data.faults import BadSample
from vlscale.data.images import ImageSpec, decode_eval
from vlscale.data.manifest import Manifest, build_manifest
from vlscale.data.reader import Sample, SampleReader
from vlscale.data.urls import expand
from vlscale.logging import get_logger
from vlscale.sections import DataConfig

__all__ = ["ImageSpec", "Sample", "decode_eval", "open_corpus", "read_manifest", "read_samples"]


def open_corpus(urls: list[str] | str | None, data: DataConfig, what: str = "data.val") -> Manifest:
    """The manifest of the shards that `urls` name; `what` is the config key to speak of in errors."""
    return build_manifest(expand(urls, what, pipes=data.pipes), data)


def read_samples(
    urls: list[str] | str | None, data: DataConfig, *, shard: tuple[int, int] = (0, 1), what: str = "data.val"
) -> Iterator[Sample]:
    """Part `shard[0]` of `shard[1]` of the corpus, a contiguous run of it; samples that cannot be read are logged."""
    yield from read_manifest(open_corpus(urls, data, what), data, shard=shard)


def read_manifest(manifest: Manifest, data: DataConfig, *, shard: tuple[int, int] = (0, 1)) -> Iterator[Sample]:
    part, parts = shard
    start, end = manifest.num_samples * part // parts, manifest.num_samples * (part + 1) // parts
    reader, first = SampleReader(manifest, data), 0
    try:
        for number, count in enumerate(manifest.counts.tolist()):
            for row in range(max(start - first, 0), min(end - first, count)):
                try:
                    sample = reader.read(number, row, with_json=True)
                except BadSample as fault:
                    key = reader.key(number, row)
                    get_logger().warning("skipped sample %s of %s: %s", key, manifest.urls[number], fault)
                    continue
                yield sample
            first += count
    finally:
        reader.close()
