"""An index on disk: the embeddings of a corpus, what they belong to, and which model made them.

    image_emb   (I, D) float16 or float32, rows of length one
    text_emb    (T, D) likewise
    text_image  (T,) int64, the image each caption belongs to; -1 for a text of its own
    keys        (I,) sample keys; of pictures of a folder, their paths in it
    captions    (T,)
    header      JSON: model, model_hash, data, data_hash, ...

`.npz` holds these arrays under these names (plain numpy, no pickle; the embeddings are stored uncompressed); `.parquet`
holds one row an image and needs pyarrow. Both are written part by part: memory is that of one part.
"""

import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = (".npz", ".parquet")


@dataclass(frozen=True)
class Header:
    """What an index is of. Two indexes with equal headers hold the same."""

    model: str  # as it was named
    model_hash: str
    data: list[str]  # urls
    data_hash: str
    caption_key: str
    image_keys: list[str]
    dtype: str  # float16 | float32
    embed_dim: int
    pictures: str | None = None  # the folder that keys are paths in; None: samples of shards, or texts alone

    def to_json(self) -> str:
        return json.dumps({"format": "vlscale index 1", **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Raises KeyError or ValueError for what is none."""
        tree = {"pictures": None, **json.loads(text)}  # earlier indexes are all of shards
        return cls(**{field.name: tree[field.name] for field in fields(cls)})

    def same_content(self, other: "Header") -> bool:
        """Whether both describe the same embeddings, wherever model and data were read from."""
        anywhere = {"model": "", "data": [], "pictures": None}
        return asdict(self) | anywhere == asdict(other) | anywhere


@dataclass(frozen=True)
class Rows:
    """Embeddings of a run of samples; `counts` (I,) captions of each image. Captions after those belong to none."""

    keys: np.ndarray
    captions: np.ndarray
    counts: np.ndarray
    image_emb: np.ndarray
    text_emb: np.ndarray

    @property
    def samples(self) -> int:
        return len(self.keys) + len(self.captions) - int(self.counts.sum())

    def save(self, path: Path) -> None:
        np.savez(path, **self.__dict__)

    @classmethod
    def load(cls, path: Path) -> "Rows":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Index:
    header: Header
    keys: np.ndarray
    captions: np.ndarray
    text_image: np.ndarray
    image_emb: np.ndarray
    text_emb: np.ndarray


def check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise ValueError(f"index {path}: expected a name that ends in {' or '.join(FORMATS)}, got {path.suffix!r}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"index {path}: parquet needs pyarrow, which is not installed; install it or name a .npz file")


def write_index(path: Path, header: Header, parts: Callable[[], Iterator[Rows]]) -> None:
    """`parts()` walks over all rows in order, each time anew."""
    if path.suffix == ".parquet":
        from vlscale.export.parquet import write_parquet

        write_parquet(path, header, parts())
    else:
        _write_npz(path, header, parts)


def read_header(path: Path) -> Header:
    return _read(path, only_header=True)["header"]


def read_index(path: Path) -> Index:
    return Index(**_read(path, only_header=False))


def _read(path: Path, only_header: bool) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"index {path} does not exist; make it with `vlscale embed`")
    check_format(path)
    try:
        if path.suffix == ".parquet":
            from vlscale.export.parquet import read_parquet

            return read_parquet(path, only_header)
        with np.load(path, allow_pickle=False) as arrays:
            header = Header.from_json(str(arrays["header"]))
            names = () if only_header else ("keys", "captions", "text_image", "image_emb", "text_emb")
            return {"header": header} | {name: arrays[name] for name in names}
    except (KeyError, ValueError, EOFError, OSError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"index {path} is none that `vlscale embed` wrote, or is damaged: {type(error).__name__}"
        ) from None


def _write_npz(path: Path, header: Header, parts: Callable[[], Iterator[Rows]]) -> None:
    images = captions = 0
    widths = {"keys": 1, "captions": 1}  # numpy's text arrays are as wide as their longest entry
    for rows in parts():
        images, captions = images + len(rows.keys), captions + len(rows.captions)
        widths = {name: max(width, getattr(rows, name).dtype.itemsize // 4) for name, width in widths.items()}
    shapes = {
        "image_emb": (header.dtype, (images, header.embed_dim)),
        "text_emb": (header.dtype, (captions, header.embed_dim)),
        "text_image": ("int64", (captions,)),
        "keys": (f"U{widths['keys']}", (images,)),
        "captions": (f"U{widths['captions']}", (captions,)),
    }
    with zipfile.ZipFile(path, "w") as archive:
        told = np.array(header.to_json())
        _write_array(archive, "header", told.dtype, (), [told])
        for name, (dtype, shape) in shapes.items():
            blocks = _text_images(parts()) if name == "text_image" else (getattr(rows, name) for rows in parts())
            _write_array(archive, name, np.dtype(dtype), shape, blocks)


def _text_images(parts: Iterator[Rows]) -> Iterator[np.ndarray]:
    first = 0
    for rows in parts:
        owned = np.repeat(np.arange(first, first + len(rows.keys)), rows.counts)
        yield np.concatenate([owned, np.full(len(rows.captions) - len(owned), -1)])
        first += len(rows.keys)


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    """A member as numpy writes it, block by block. Text is deflated: most of a text array is padding."""
    member = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date: equal content gives equal bytes
    member.compress_type = zipfile.ZIP_DEFLATED if dtype.kind == "U" else zipfile.ZIP_STORED
    with archive.open(member, "w", force_zip64=True) as stream:
        plain = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(stream, plain)
        for block in blocks:
            stream.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
