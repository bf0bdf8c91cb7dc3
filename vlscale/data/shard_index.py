"""The index of one shard as a file: where each sample's members lie, and a summary that is read alone.

The summary stands first, so that a manifest of many shards reads a few hundred bytes of each.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.data.storage import partial_of

ROW = np.dtype(
    [
        ("image", "<u8"), ("image_size", "<u4"),
        ("text", "<u8"), ("text_size", "<u4"),
        ("json", "<u8"), ("json_size", "<u4"),
        ("key", "<u4"), ("key_size", "<u2"),
    ]
)  # fmt: skip
_MAGIC = b"vlscale-index-3\n"
_HASH = 16
_MAX_NAMED = 1000


@dataclass(frozen=True)
class ShardSummary:
    """What a manifest keeps of a shard."""

    size: int  # bytes of the shard
    version: int  # of its storage: the time of change, or what the server says
    count: int  # complete samples
    digest: str  # of the index's content: the same bytes in another folder have the same
    skipped: dict[str, int]  # left-out samples by reason
    named: list[str]  # the first of them, each with its reason

    @classmethod
    def parse(cls, values: Any) -> "ShardSummary | None":
        """From a file's json; None for anything else than what was written."""
        kinds = {"size": int, "version": int, "count": int, "digest": str, "skipped": dict, "named": list}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            return None
        if not all(isinstance(values[name], kind) for name, kind in kinds.items()) or values["count"] < 0:
            return None
        return cls(**values)


@dataclass
class ShardIndex:
    """Rows of the complete samples (n of them), their keys, and what was left out with the reason."""

    size: int
    version: int
    rows: np.ndarray  # (n,) ROW
    key_bytes: bytes
    skipped: Counter = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        *_, start, size = self.rows[i].item()
        return self.key_at(start, size)

    def key_at(self, start: int, size: int) -> str:
        return self.key_bytes[start : start + size].decode("utf-8", "surrogateescape")

    @cached_property
    def digest(self) -> str:
        content = self.size.to_bytes(8, "little") + self.rows.tobytes() + self.key_bytes
        return blake2b(content, digest_size=_HASH).hexdigest()

    def summary(self) -> ShardSummary:
        named = self.named[:_MAX_NAMED]
        return ShardSummary(self.size, self.version, len(self), self.digest, dict(self.skipped), named)

    def save(self, path: Path) -> None:
        """Written under another name first, so that a reader never sees half of it."""
        head = json.dumps(asdict(self.summary())).encode() + b"\n"
        partial = partial_of(path)
        partial.write_bytes(
            _MAGIC + blake2b(head, digest_size=_HASH).digest() + head + self.rows.tobytes() + self.key_bytes
        )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex | None":
        """None when the file is absent or not a whole index of this version."""
        summary = load_summary(path)
        if summary is None:
            return None
        data = path.read_bytes()
        start = data.index(b"\n", len(_MAGIC) + _HASH) + 1
        end = start + summary.count * ROW.itemsize
        if len(data) < end:
            return None
        rows = np.frombuffer(data, dtype=ROW, count=summary.count, offset=start)
        index = cls(summary.size, summary.version, rows, data[end:], Counter(summary.skipped), summary.named)
        return index if index.digest == summary.digest else None


def load_summary(path: Path) -> ShardSummary | None:
    """The summary alone, or None."""
    try:
        with path.open("rb") as file:
            start, head = file.read(len(_MAGIC) + _HASH), file.readline()
    except OSError:
        return None
    if start != _MAGIC + blake2b(head, digest_size=_HASH).digest():
        return None
    return ShardSummary.parse(json.loads(head))
