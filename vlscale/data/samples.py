"""Every sample once, in order: what evaluation, checks and tokenizer training read."""

from collections.abc import Callable, Iterator

import numpy as np

from vlscale.data.faults import BadSample, BadShard
from vlscale.data.images import ImageSpec, decode_eval
from vlscale.data.manifest import Manifest, build_manifest
from vlscale.data.reader import Sample, SampleReader
from vlscale.data.urls import expand
from vlscale.logging import get_logger
from vlscale.sections import DataConfig

__all__ = [
    "ImageSpec",
    "Sample",
    "check_caption_field",
    "decode_eval",
    "open_corpus",
    "read_manifest",
    "read_samples",
]

_LOOKED_AT = 100  # samples


def open_corpus(
    urls: list[str] | str | None, data: DataConfig, what: str = "data.val", *, tell: bool = True
) -> Manifest:
    """The manifest of the shards that `urls` name; `what` is the config key to speak of in errors, `tell` whether the
    log says what was left out."""
    return build_manifest(expand(urls, what, pipes=data.pipes), data, tell=tell)


def check_caption_field(manifest: Manifest, data: DataConfig) -> None:
    """Raises ValueError when no sample has the json field that data.caption_key names, else all of a corpus would be
    left out one after another. Looks at samples all over it, until one has the field."""
    if not data.caption_key.startswith("json:"):
        return
    field, reader, known, looked = data.caption_key.removeprefix("json:"), SampleReader(manifest, data), set(), 0
    try:
        ends = manifest.counts.cumsum()
        for place in np.unique(np.linspace(0, manifest.num_samples - 1, _LOOKED_AT, dtype=np.int64)):
            shard = int(np.searchsorted(ends, place, side="right"))
            row = int(place - ends[shard] + manifest.counts[shard])
            try:
                meta = reader.read_json(shard, row)
            except BadSample:
                continue
            except BadShard:
                return  # told where the samples are read, by whose policy it goes
            if field in meta:
                return
            known, looked = known | meta.keys(), looked + 1
    finally:
        reader.close()
    if looked:
        raise ValueError(
            f"data.caption_key={data.caption_key}: none of {looked} samples has the field {field!r} in its json; "
            f"expected one of {', '.join(sorted(known)) or 'those that your data has, and these have none'}"
        )


def read_samples(
    urls: list[str] | str | None, data: DataConfig, *, shard: tuple[int, int] = (0, 1), what: str = "data.val"
) -> Iterator[Sample]:
    """Part `shard[0]` of `shard[1]` of the corpus, a contiguous run of it; samples that cannot be read are logged."""
    yield from read_manifest(open_corpus(urls, data, what), data, shard=shard)


def read_manifest(
    manifest: Manifest,
    data: DataConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    first_time: Callable[[str], bool] = lambda said: True,
) -> Iterator[Sample]:
    """As read_samples. `first_time` says whether what is wrong with a sample is to be logged, or has been."""
    part, parts = shard
    start, end = manifest.num_samples * part // parts, manifest.num_samples * (part + 1) // parts
    reader, first = SampleReader(manifest, data), 0
    try:
        for number, count in enumerate(manifest.counts.tolist()):
            for row in range(max(start - first, 0), min(end - first, count)):
                try:
                    sample = reader.read(number, row, with_json=True)
                except BadSample as fault:
                    said = f"{reader.key(number, row)} of {manifest.urls[number]}: {fault}"
                    if first_time(said):
                        get_logger().warning("skipped sample %s", said)
                    continue
                yield sample
            first += count
    finally:
        reader.close()
