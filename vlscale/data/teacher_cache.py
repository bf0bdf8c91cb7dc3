"""Teacher embeddings on disk: a header, and a file for each shard of the corpus whose rows are found by sample key.

    DIR/header.json               which teachers, how they were prepared, how their embeddings are kept
    DIR/SHARD-DIGEST.safetensors  the rows of the shard whose index has that digest; complete, or not there

A shard's file holds, for its n samples with T captions, ordered by the hash of their keys:

    key_hash      (n,) int64, ascending      key_end, key_bytes   the keys themselves
    first_caption (n + 1,) int64             caption_check        (T,) uint32, CRC-32 of each caption
    image         (n, D) float16 or bfloat16, unit rows           text (T, D_text) likewise
    left_out      int64, ascending: hashes of the keys of samples that the teachers could not be shown

Since files are named by the content of their shard, a cache serves any corpus made of shards that it holds, in any
order and wherever they lie. Files are mapped, not read: what is in memory is what was asked for. A finished cache may
lie below an url (`teacher_files`).
"""

import itertools
import json
import mmap
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vlscale.data.faults import BadShard
from vlscale.data.keyed import hash64
from vlscale.data.storage import partial_of
from vlscale.data.teacher_files import Place, content_of, head_of, name_of

HEADER = "header.json"
DTYPES = {"fp16": "F16", "bf16": "BF16"}
_FORMAT = "vlscale teacher cache 1"
_NUMPY = {"I64": "<i8", "U32": "<u4", "U8": "u1", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16: its bits
_NAMES = ("key_hash", "key_end", "key_bytes", "first_caption", "caption_check", "image", "text", "left_out")
_LENGTH_ERROR = 0.02  # of a unit row's squared length; rounding to bfloat16 makes 0.004


class BadTeacherCache(ValueError):
    """A cache that is damaged, incomplete, or of something else than the run."""


@dataclass(frozen=True)
class TeacherFacts:
    """Which teacher: hashes of its weights and of its preprocessing (image processor or tokenizer with its bound)."""

    source: str  # as it was named
    weights: str
    preprocessing: str
    width: int


@dataclass(frozen=True)
class CacheHeader:
    """What a cache is of."""

    image: TeacherFacts
    text: TeacherFacts
    dtype: str  # fp16 | bf16, of what is kept
    compute: str  # fp32 | bf16, of the teachers' weights
    captions: str  # all | first: which captions of a sample are kept
    caption_key: str
    image_keys: list[str]
    corpus: str  # manifest hash of the corpus that was asked for last

    @cached_property
    def stamp(self) -> str:
        """Equal for caches whose rows may stand side by side, whatever the corpus and wherever the teachers lay."""
        told = asdict(self) | {"corpus": ""}
        for name in ("image", "text"):
            told[name]["source"] = ""
        return blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = partial_of(folder / HEADER)
        partial.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1))
        os.replace(partial, folder / HEADER)


@dataclass(frozen=True)
class TeacherRows:
    """What the teachers say of one shard: n samples, T captions, m samples left out."""

    keys: list[str]  # (n,)
    captions: list[list[str]]  # (n,), those of each sample, T together
    image: np.ndarray  # (n, D) float32
    text: np.ndarray  # (T, D_text) float32
    left_out: list[str]  # (m,)


def read_header(folder: Place) -> CacheHeader:
    where = name_of(folder, HEADER)
    try:
        file = head_of(folder, HEADER)
        told = json.loads(file.read(0, file.size))
        file.close()
        image, text = (TeacherFacts(**told[name]) for name in ("image", "text"))
        rest = {field.name: told[field.name] for field in fields(CacheHeader)} | {"image": image, "text": text}
        header = CacheHeader(**rest)
        known = told["format"] == _FORMAT and header.dtype in DTYPES
    except FileNotFoundError:
        raise BadTeacherCache(
            f"{folder} holds no teacher cache: expected {HEADER} there, as `vlscale data teach` writes it"
        ) from None
    except BadShard as error:
        raise BadTeacherCache(f"{where} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise BadTeacherCache(f"{where} is damaged or of another version; run `vlscale data teach` again")
    if not (image.width > 0 and text.width > 0):
        raise BadTeacherCache(
            f"{where} says widths {image.width} (image) and {text.width} (text): expected above 0; "
            "run `vlscale data teach` again"
        )
    return header


def shard_name(digest: str) -> str:
    return f"{digest}.safetensors"


def shard_file(folder: Path, digest: str) -> Path:
    return folder / shard_name(digest)


def write_shard_file(folder: Path, header: CacheHeader, digest: str, url: str, rows: TeacherRows) -> None:
    """The file appears whole. Raises ValueError when two samples of the shard have one key."""
    hashes = np.array([key_hash(key) for key in rows.keys], dtype="<i8")
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(np.diff(hashes[order]) == 0)
    if len(twice):
        raise ValueError(
            f"shard {url} has two samples with the key {rows.keys[order[twice[0]]]!r}: embeddings are kept by key; "
            "give each sample of a shard a key of its own"
        )
    counts = np.array([len(captions) for captions in rows.captions], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    text_order = [row for i in order for row in range(starts[i], starts[i + 1])]
    encoded = [_bytes(rows.keys[i]) for i in order]
    checks = [caption_check(caption) for i in order for caption in rows.captions[i]]
    arrays = {
        "key_hash": ("I64", hashes[order]),
        "key_end": ("I64", np.cumsum([len(key) for key in encoded], dtype="<i8")),
        "key_bytes": ("U8", np.frombuffer(b"".join(encoded), dtype="u1")),
        "first_caption": ("I64", np.concatenate([[0], np.cumsum(counts[order])]).astype("<i8")),
        "caption_check": ("U32", np.array(checks, dtype="<u4")),
        "image": (DTYPES[header.dtype], _narrow(rows.image[order], header.dtype)),
        "text": (DTYPES[header.dtype], _narrow(rows.text[text_order], header.dtype)),
        "left_out": ("I64", np.sort(np.array([key_hash(key) for key in rows.left_out], dtype="<i8"))),
    }
    path = shard_file(folder, digest)
    partial = partial_of(path)
    _save(partial, arrays, {"stamp": header.stamp, "digest": digest, "shard": url})
    os.replace(partial, path)


class ShardHead:
    """What the head of a shard's file tells: how much it holds. Raises BadTeacherCache for a file that is damaged or of
    another cache or shard, FileNotFoundError where there is none."""

    def __init__(self, folder: Place, header: CacheHeader, digest: str):
        name = shard_name(digest)
        self.path, self.dtype = name_of(folder, name), header.dtype
        try:
            self._layout = self._read(folder, name)
        except FileNotFoundError:
            raise
        except BadShard as error:
            raise BadTeacherCache(f"teacher cache file {self.path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None
        metadata, shape = self._layout.metadata, self._layout.shapes
        if metadata.get("stamp") != header.stamp:
            raise BadTeacherCache(
                f"teacher cache file {self.path} was made by another teacher or preprocessing than {HEADER} beside it "
                "names; run `vlscale data teach` into a new folder"
            )
        (n,), (captions,), (ends,), (firsts,) = (
            shape[i] for i in ("key_hash", "caption_check", "key_end", "first_caption")
        )
        shapes = (ends, firsts - 1, *shape["image"], *shape["text"])
        expected = (n, n, n, header.image.width, captions, header.text.width)
        if metadata.get("digest") != digest or shapes != expected:
            raise self._damaged(f"its arrays do not fit together: {shapes}")

    def __len__(self) -> int:
        """Samples with rows."""
        return self._layout.shapes["key_hash"][0]

    @property
    def left_out(self) -> int:
        return self._layout.shapes["left_out"][0]

    def _read(self, folder: Place, name: str) -> "_Layout":
        file = head_of(folder, name)
        try:
            return _Layout.read(file.read, file.size)
        finally:
            file.close()

    def _damaged(self, why: str) -> BadTeacherCache:
        return BadTeacherCache(
            f"teacher cache file {self.path} is damaged ({why}); delete it and run the same `vlscale data teach` again"
        )


class ShardFile(ShardHead):
    """One shard's rows, mapped."""

    def __init__(self, folder: Place, header: CacheHeader, digest: str):
        super().__init__(folder, header, digest)
        a = self._arrays
        ends = (a["first_caption"][-1], a["key_end"][-1] if len(self) else 0)
        if ends != (len(a["caption_check"]), len(a["key_bytes"])):
            raise self._damaged(f"its arrays do not fit together: {ends}")

    def _read(self, folder: Place, name: str) -> "_Layout":
        content = content_of(folder, name)
        layout = _Layout.read(lambda start, size: content[start : start + size], len(content))
        self._arrays = layout.arrays(content)
        return layout

    def keys(self) -> list[str]:
        raw, ends = self._arrays["key_bytes"].tobytes(), [0, *self._arrays["key_end"].tolist()]
        return [raw[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise(ends)]

    def is_left_out(self, key: str) -> bool:
        return _find(self._arrays["left_out"], key_hash(key)) is not None

    def find(self, key: str) -> int | None:
        """The row of `key`; None when there is none."""
        row = _find(self._arrays["key_hash"], key_hash(key))
        if row is None:
            return None
        ends = self._arrays["key_end"]
        start = int(ends[row - 1]) if row else 0
        return row if self._arrays["key_bytes"][start : int(ends[row])].tobytes() == _bytes(key) else None

    def checks(self, row: int) -> np.ndarray:
        """`caption_check` of the row's captions."""
        first, end = self._arrays["first_caption"][row : row + 2]
        return self._arrays["caption_check"][first:end]

    def image(self, row: int) -> np.ndarray:
        """(D,) float32."""
        return self._row("image", row)

    def text(self, row: int, caption: int) -> np.ndarray:
        """(D_text,) float32."""
        return self._row("text", int(self._arrays["first_caption"][row]) + caption)

    def _row(self, name: str, row: int) -> np.ndarray:
        wide = _widen(self._arrays[name][row], self.dtype)
        if not abs(float(wide @ wide) - 1) < _LENGTH_ERROR:  # also for what is no number
            raise self._damaged(f"{name} row {row} has length {float(wide @ wide) ** 0.5:.3g}, expected 1")
        return wide


def key_hash(key: str) -> int:
    """63 bits, so that it fits an int64."""
    return hash64(key) >> 1


def caption_check(caption: str) -> int:
    return zlib.crc32(_bytes(caption))


def _save(path: Path, arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> None:
    """A safetensors file: 8 bytes with the length of the header, the header as json, the arrays' bytes. Written by hand
    since safetensors' own functions take bfloat16 from torch alone, which processes that load data do not import."""
    told, at = {"__metadata__": metadata}, 0
    for name, (kind, array) in arrays.items():
        told[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    head = json.dumps(told).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


@dataclass(frozen=True)
class _Layout:
    """Where the arrays of a safetensors file lie."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    starts: dict[str, int]

    @classmethod
    def read(cls, read: Callable[[int, int], bytes], size: int) -> "_Layout":
        """`read(at, size)` reads the file of `size` bytes. Raises ValueError where it does not hold its arrays."""
        short = ValueError(f"cut short at {size} bytes")
        start = 8 + int.from_bytes(read(0, min(8, size)), "little")
        if start > size:
            raise short
        told = json.loads(read(8, start - 8))
        if not isinstance(told["__metadata__"], dict):
            raise ValueError("its metadata is no object")
        layout = cls(told["__metadata__"], {}, {}, {})
        for name in _NAMES:
            first, end = told[name]["data_offsets"]
            layout.shapes[name], layout.starts[name] = tuple(told[name]["shape"]), start + first
            if len(layout.shapes[name]) != 1 + (name in ("image", "text")) or min(layout.shapes[name]) < 0:
                raise ValueError(f"{name} of shape {layout.shapes[name]}")
            layout.dtypes[name] = np.dtype(_NUMPY[told[name]["dtype"]])
            if start + end > size or end - first != layout._count(name) * layout.dtypes[name].itemsize:
                raise short
        return layout

    def arrays(self, content: mmap.mmap | bytes) -> dict[str, np.ndarray]:
        return {
            name: np.frombuffer(content, self.dtypes[name], self._count(name), self.starts[name]).reshape(shape)
            for name, shape in self.shapes.items()
        }

    def _count(self, name: str) -> int:
        return int(np.prod(self.shapes[name], dtype=np.int64))


def _find(sorted_hashes: np.ndarray, wanted: int) -> int | None:
    row = int(np.searchsorted(sorted_hashes, wanted))
    return row if row < len(sorted_hashes) and sorted_hashes[row] == wanted else None


def _narrow(rows: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to float16, or to the bits of bfloat16, rounded to the nearest, ties to even."""
    if dtype == "fp16":
        return rows.astype("<f2")
    bits = np.ascontiguousarray(rows, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _widen(row: np.ndarray, dtype: str) -> np.ndarray:
    return row.astype(np.float32) if dtype == "fp16" else (row.astype("<u4") << 16).view("<f4")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
