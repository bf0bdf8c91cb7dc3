"""The index of one shard: where each complete sample's members lie, from one walk over the tar headers.

Members are grouped as webdataset groups them: a name up to the first dot of its last part is the key, the rest the
extension, and neighbours with one key are one sample. The walk checks every header, so a cut or damaged tar is an
error here and is never taken for a short one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from vlscale.data.faults import DamagedShard
from vlscale.data.shard_index import ROW, ShardIndex
from vlscale.data.storage import ReadAhead, Shard

_BLOCK = 512
_REGULAR, _LONG_NAME, _PAX, _PAX_GLOBAL = b"0\0", b"L", b"x", b"g"
_LONGEST_NAME = 1 << 16  # bytes
_LARGEST = {"picture": 1 << 29, "caption": 1 << 24, "json": 1 << 24}  # bytes; more is no sample but an accident
NO_SAMPLE = "not named key.extension"  # a member's fault, not a sample's
PICKLES = ("pyd", "pickle", "pkl", "pth", "pt")


@dataclass(frozen=True)
class MemberKeys:
    """Which extensions hold the picture and the caption; `caption` is an extension or `json:FIELD`."""

    image: tuple[str, ...]
    caption: str

    @property
    def caption_extension(self) -> str:
        return "json" if self.caption.startswith("json:") else self.caption

    def digest(self) -> str:
        return blake2b(repr((self.image, self.caption_extension)).encode(), digest_size=4).hexdigest()


def index_shard(shard: Shard, url: str, keys: MemberKeys, version: int = 0) -> ShardIndex:
    """Walks the headers of an open tar; `version` is kept with the index."""
    if shard.size == 0:
        raise DamagedShard(f"shard {url} is empty: expected a tar of samples")
    collector = _Collector(keys)
    for name, offset, size in walk_members(ReadAhead(shard).read, shard.size, url):
        collector.add(name, offset, size)
    collector.close()
    rows = np.array(collector.rows, dtype=ROW)
    return ShardIndex(shard.size, version, rows, b"".join(collector.keys), collector.skipped, collector.named)


def walk_members(read: Callable[[int, int], bytes], total: int, path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, size) of every regular member; `read(at, size)` reads the tar of `total` bytes."""
    at = 0
    override: dict[str, bytes] = {}
    while True:
        header = read(at, _BLOCK)
        if len(header) < _BLOCK:
            where = f"ends at byte {total} without the tar's end mark" if at else "is no tar"
            raise DamagedShard(f"shard {path} {where}: it is cut short or not a tar; write or download it again")
        if not header.strip(b"\0"):
            return
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 256:
            what = f"has a damaged header at byte {at}" if at else "is no tar (its first header does not check)"
            raise DamagedShard(f"shard {path} {what}; write or download it again")
        size = _number(override.pop("size", b"") or header[124:136])
        kind, start = header[156:157], at + _BLOCK
        at = start + -(-size // _BLOCK) * _BLOCK
        if size < 0 or at > total:
            raise DamagedShard(
                f"shard {path} is cut short: a member at byte {start} needs {size} bytes, the file has {total}"
            )
        if kind == _LONG_NAME:
            override["path"] = read(start, min(size, _LONGEST_NAME)).rstrip(b"\0")
        elif kind == _PAX:
            override.update(_pax_records(read(start, min(size, _LONGEST_NAME))))
        elif kind in _REGULAR:
            name = override.pop("path", b"") or _name(header)
            override.clear()
            yield name.decode("utf-8", "surrogateescape"), start, size
        elif kind != _PAX_GLOBAL:
            override.clear()


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` to (`a/b`, `seg.png`); None for names that belong to no sample."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or dot == len(name) - 1 or name[slash:].startswith("__"):
        return None
    return name[:dot], name[dot + 1 :].lower()


class _Collector:
    """Groups members into samples and keeps the complete ones."""

    def __init__(self, keys: MemberKeys):
        self.member_keys = keys
        self.rows: list[tuple] = []
        self.keys: list[bytes] = []
        self.key_bytes = 0
        self.skipped: Counter = Counter()
        self.named: list[str] = []
        self.key: str | None = None
        self.members: dict[str, tuple[int, int]] = {}
        self.fault: str | None = None

    def add(self, name: str, offset: int, size: int) -> None:
        parts = split_name(name)
        if parts is None:
            if not name.rpartition("/")[2].startswith("__"):  # webdataset's own notes
                self._leave_out(name, NO_SAMPLE)
            return
        key, extension = parts
        if key != self.key:
            self.close()
            self.key = key
        if extension in self.members:
            self.fault = f"two members .{extension}"
        elif len(name) >= _LONGEST_NAME // 4:
            self.fault = "name too long"
        elif extension.rpartition(".")[2] in PICKLES:
            self.fault = f"holds a pickle (.{extension})"
        self.members[extension] = (offset, size)

    def close(self) -> None:
        """Ends the sample that is open."""
        if self.key is None:
            return
        image = next((self.members[e] for e in self.member_keys.image if e in self.members), None)
        text = self.members.get(self.member_keys.caption_extension)
        found = {"picture": image, "caption": text, "json": self.members.get("json", (0, 0))}
        faults = [self.fault, *(_member_fault(name, member) for name, member in found.items())]
        fault = next(filter(None, faults), None)
        if fault:
            self._leave_out(self.key, fault)
        else:
            encoded = self.key.encode("utf-8", "surrogateescape")
            self.keys.append(encoded)
            self.rows.append((*image, *text, *found["json"], self.key_bytes, len(encoded)))
            self.key_bytes += len(encoded)
        self.key, self.members, self.fault = None, {}, None

    def _leave_out(self, name: str, fault: str) -> None:
        self.skipped[fault.split(" (")[0]] += 1
        self.named.append(f"{name}: {fault}")


def _member_fault(name: str, member: tuple[int, int] | None) -> str | None:
    if member is None:
        return f"no {name}"
    return f"{name} too large ({member[1]} bytes)" if member[1] > _LARGEST[name] else None


def _number(raw: bytes) -> int:
    """Octal text, or base 256 where the first bit is set; -1 for anything else."""
    if raw[:1] >= b"\x80":
        return int.from_bytes(raw[1:], "big") if raw[:1] == b"\x80" else -1
    text = raw.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(raw: bytes) -> dict[str, bytes]:
    """`path` and `size` of an extended header; size as octal text, as the plain header has it."""
    records: dict[str, bytes] = {}
    while raw:
        length, space, rest = raw.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(raw):
            break
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if name == b"path":
            records["path"] = value
        elif name == b"size" and value.isdigit():
            records["size"] = b"%o" % int(value)
        raw = raw[int(length) :]
    return records
