"""Samples by their place: shard number and row to key, picture bytes, captions and json. Reads by offset."""

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlscale.data.faults import BadSample, BadShard
from vlscale.data.manifest import Manifest
from vlscale.data.pipes import open_source
from vlscale.data.shard_index import ShardIndex
from vlscale.data.storage import Shard
from vlscale.sections import DataConfig

_OPEN_SHARDS = 128
_BETWEEN = 1 << 16  # bytes: reading so many in vain costs less than another read


@dataclass
class Sample:
    key: str
    image: bytes
    captions: list[str]
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's json


class SampleReader:
    """Keeps the shards used last open. One a thread or process."""

    def __init__(self, manifest: Manifest, data: DataConfig):
        self.manifest, self.data = manifest, data
        self.caption_field = data.caption_key.removeprefix("json:") if data.caption_key.startswith("json:") else None
        self._open: OrderedDict[int, tuple[ShardIndex, Shard]] = OrderedDict()

    def key(self, shard: int, row: int) -> str:
        return self._shard(shard)[0].key(row)

    def read(self, shard: int, row: int, *, with_json: bool) -> Sample:
        """Raises BadSample for what is wrong with the sample, BadShard for what is wrong with the file."""
        index, file = self._shard(shard)
        image, image_size, text, text_size, meta_at, meta_size, key, key_size = index.rows[row].item()
        places = ((image, image_size), (text, text_size))
        if with_json and meta_size:
            places += ((meta_at, meta_size),)
        picture, raw, *rest = _read_members(file, places)
        meta = parse_json(rest[0]) if rest else {}
        captions = parse_captions(meta or parse_json(raw), self.caption_field) if self.caption_field else [_decode(raw)]
        captions = [caption for caption in map(str.strip, captions) if caption]
        if not captions:
            raise BadSample("empty caption", f"{self.data.caption_key} holds no text")
        return Sample(index.key_at(key, key_size), picture, captions, meta)

    def read_json(self, shard: int, row: int) -> dict[str, Any]:
        """Of a sample that has one. Raises as `read`."""
        index, file = self._shard(shard)
        at, size = index.rows[row][["json", "json_size"]].item()
        return parse_json(file.read(at, size))

    def text_sizes(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Bytes of the captions' members, (m,)."""
        return self._shard(shard)[0].rows["text_size"][rows]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1][1].close()

    def _shard(self, shard: int) -> tuple[ShardIndex, Shard]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)[1][1].close()
        index, url = self.manifest.index(shard), self.manifest.urls[shard]
        file = open_source(url, self.data)
        if file.size != index.size:
            file.close()
            raise BadShard(
                f"shard {url} has {file.size} bytes, its index was made with {index.size}: "
                "it changed while it is read; put it back or start a new run"
            )
        self._open[shard] = index, file
        return index, file


def _read_members(file: Shard, places: tuple[tuple[int, int], ...]) -> list[bytes]:
    """The members at (start, size), in one read, unless something large that nobody asked for lies between them."""
    (start, wanted), *others = places
    end = start + wanted
    for at, size in others:
        start, end, wanted = min(start, at), max(end, at + size), wanted + size
    if end - start > wanted + _BETWEEN:
        return [file.read(at, size) for at, size in places]
    span = file.read(start, end - start)
    return [span[at - start : at - start + size] for at, size in places]


def parse_json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("broken json", str(error)) from None
    if not isinstance(value, dict):
        raise BadSample("broken json", f"expected an object, got a {type(value).__name__}")
    return value


def parse_captions(meta: dict[str, Any], name: str) -> list[str]:
    """The captions in a json field: a string, or a list of strings."""
    value = meta.get(name)
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample(
            "no caption", f"json field {name!r} is {type(value).__name__}, expected text or a list of texts"
        )
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise BadSample("caption not UTF-8", "a lone surrogate in the json") from None
    return captions


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("caption not UTF-8", str(error)) from None
