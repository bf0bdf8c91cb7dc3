"""Annotation files and folders of pictures to shards: Karpathy's splits, and lists of {image, caption}, as
JSON or as a table with a header.

An item is one picture with its captions; a picture that several entries of a list name becomes one sample.
"""

import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlscale.data.faults import MOST_TOLD
from vlscale.data.folders import new_folder
from vlscale.data.writer import write_shard
from vlscale.logging import get_logger
from vlscale.progress import Progress

_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")  # a split, which becomes the name of a file
_TABLES = {".csv": ",", ".tsv": "\t"}
_COLUMNS = {"image": ("image", "filepath", "path"), "caption": ("caption", "title", "text")}  # first that a table has
_NO_EXTENSION = "jpg"  # readers go by the content; the name has to be one that they look for


@dataclass
class Item:
    image: str  # path below the picture folder
    captions: list[str]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class ImportCount:
    samples: Counter = field(default_factory=Counter)  # by split
    missing: list[str] = field(default_factory=list)  # pictures that are not there
    captionless: int = 0

    def tell(self, image: str, why: str) -> None:
        skipped = len(self.missing) + self.captionless
        if skipped <= MOST_TOLD:
            get_logger().warning("skipped %s: %s", image, why)
        elif skipped == MOST_TOLD + 1:
            get_logger().warning("more are skipped, which the last line counts")


def karpathy_items(path: str | Path, *, restval: bool = True) -> dict[str, list[Item]]:
    """Items by split of a dataset_*.json; `restval` joins the training part, as most papers do, or is left out."""
    entries = _read(path)
    images = entries.get("images") if isinstance(entries, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{path}: expected Karpathy's format, an object with a list `images`")
    splits: dict[str, list[Item]] = {}
    for number, entry in enumerate(images):
        try:
            captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
            name, split, folder = entry["filename"], entry["split"], entry.get("filepath") or ""
            if not (isinstance(name, str) and isinstance(folder, str) and _PLAIN.fullmatch(split)):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: images[{number}] lacks filename, split (a plain word) or sentences with raw text; expected "
                "Karpathy's format"
            ) from None
        if split == "restval" and not restval:
            continue
        meta = {key: entry[key] for key in ("imgid", "cocoid", "sentids") if key in entry}
        item = Item(f"{folder}/{name}" if folder else name, captions, meta)
        splits.setdefault("train" if split == "restval" else split, []).append(item)
    return splits


def list_items(path: str | Path) -> list[Item]:
    """Items of a list of {image, caption}, `caption` a text or a list of texts, `image_id` kept; VizWiz's file too, and
    the rows of a .csv or .tsv whose header names both, also as open_clip does (filepath, title)."""
    entries = _rows(Path(path)) if Path(path).suffix.lower() in _TABLES else _read(path)
    if isinstance(entries, dict) and {"images", "annotations"} <= entries.keys():
        entries = _from_tables(path, entries)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of {{image, caption}}, got a {type(entries).__name__}")
    items: dict[str, Item] = {}
    for number, entry in enumerate(entries):
        image = entry.get("image") if isinstance(entry, dict) else None
        captions = entry.get("caption") if isinstance(entry, dict) else None
        captions = [captions] if isinstance(captions, str) else captions
        if (
            not isinstance(image, str)
            or not isinstance(captions, list)
            or not all(isinstance(c, str) for c in captions)
        ):
            raise ValueError(f"{path}: entry {number} is no {{image: path, caption: text or list of texts}}")
        item = items.setdefault(image, Item(image, []))
        item.captions += [caption.strip() for caption in captions]
        if "image_id" in entry:
            item.meta["image_id"] = entry["image_id"]
    return list(items.values())


def write_items(
    splits: dict[str, list[Item]],
    image_root: str | Path,
    out: str | Path,
    *,
    shard_size: int = 1000,
    progress: bool = True,
) -> ImportCount:
    """Writes `out/SPLIT-*.tar`. Pictures are copied as they are; a missing one is logged, and all are counted."""
    root, count = Path(image_root), ImportCount()
    if not root.is_dir():
        raise ValueError(f"picture folder {root} does not exist")
    total = sum(map(len, splits.values()))
    with new_folder(out) as folder, Progress("importing", total, "pictures", shown=progress) as bar:
        for split, items in splits.items():
            samples = _samples(items, root, count, bar)
            for number in range(-(-len(items) // shard_size)):
                path = folder / f"{split}-{number:06d}.tar"
                written = write_shard(path, itertools.islice(samples, shard_size))
                count.samples[split] += written
                if not written:
                    path.unlink()
        if not count.samples.total():
            first = f"; the first missing one is {root / count.missing[0]}" if count.missing else ""
            raise ValueError(
                f"none of the {total} pictures can be imported from {root}{first}; check the picture folder"
            )
    return count


def _samples(items: list[Item], root: Path, count: ImportCount, bar: Progress) -> Iterator[dict]:
    for number, item in enumerate(items):
        bar.advance()
        captions = [caption for caption in item.captions if caption]
        if not captions:
            count.captionless += 1
            count.tell(item.image, "no caption")
            continue
        path = _below(root, item.image)
        try:
            picture = path.read_bytes()
        except (OSError, ValueError):  # a name may hold what no file's name can
            count.missing.append(item.image)
            count.tell(item.image, f"no such picture in {root}")
            continue
        extension = _EXTENSIONS.get(Path(item.image).suffix.lower(), _NO_EXTENSION)
        yield {
            "__key__": f"{number:08d}",
            extension: picture,
            "txt": captions[0],
            "json": {"captions": captions, "image": item.image, **item.meta},
        }


def _below(root: Path, image: str) -> Path:
    """Annotations come from elsewhere; they must not have other files of this machine copied into shards."""
    path = Path(os.path.normpath(root / image))
    if not path.is_relative_to(os.path.normpath(root)):
        raise ValueError(f"picture {image!r} lies outside of the picture folder {root}; expected a path below it")
    return path


def _from_tables(path: str | Path, entries: dict) -> list[dict]:
    """COCO's and VizWiz's two tables as a list; annotations that VizWiz marks as rejected are left out."""
    try:
        names = {image["id"]: image["file_name"] for image in entries["images"]}
        kept = (entry for entry in entries["annotations"] if not entry.get("is_rejected"))
        return [{"image": names[entry["image_id"]], "caption": entry["caption"]} for entry in kept]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: expected images with id and file_name, annotations with image_id and caption"
        ) from None


def _rows(path: Path) -> list[dict]:
    """A table as a list; a line has as many fields as its header."""
    separator = _TABLES[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ValueError(f"annotations {path} cannot be read: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"annotations {path} are no table: {error}") from None
    chosen = {key: next((name for name in names if name in header), None) for key, names in _COLUMNS.items()}
    for key, name in chosen.items():
        if name is None:
            raise ValueError(
                f"{path}: expected a header with a column {' or '.join(_COLUMNS[key])}, got "
                f"{', '.join(header) or 'nothing'}; separated by {'tabs' if separator == chr(9) else 'commas'}"
            )
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}: line {line} has not as many fields as the header, {len(header)}; quote its texts"
            )
    return [{key: row[name] for key, name in chosen.items()} for _, row in rows]


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"annotations {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotations {path} are not valid JSON: {error}") from None
