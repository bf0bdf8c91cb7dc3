"""Pictures of a folder and lines of a text file, as samples: what is embedded without making shards.

A picture's key is its path below the folder, so that no two have the same one. Hidden files and folders are left out.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePath

from vlscale.data.reader import Sample
from vlscale.logging import get_logger

PICTURE_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class PlainFiles:
    """Pictures first, then texts; a text's sample has its line alone, neither key nor picture."""

    root: Path | None
    pictures: list[str]  # paths below `root`, in order
    texts: list[str]

    @property
    def num_samples(self) -> int:
        return len(self.pictures) + len(self.texts)

    @cached_property
    def hash(self) -> str:
        """Of the texts, and of the pictures' paths, sizes and times of change."""
        stamps = []
        for name in self.pictures:
            try:
                found = os.stat(self.root / name)
                stamps.append((name, found.st_size, found.st_mtime_ns))
            except OSError:  # told when it is read
                stamps.append((name, -1, -1))
        return blake2b(json.dumps([stamps, self.texts]).encode(), digest_size=16).hexdigest()

    def read(self, part: int, parts: int) -> Iterator[Sample]:
        """Part `part` of `parts`, a contiguous run; pictures whose file cannot be read are logged."""
        for place in range(self.num_samples * part // parts, self.num_samples * (part + 1) // parts):
            if place >= len(self.pictures):
                yield Sample("", b"", [self.texts[place - len(self.pictures)]])
                continue
            name = self.pictures[place]
            try:
                encoded = (self.root / name).read_bytes()
            except OSError as error:
                get_logger().warning("skipped picture %s of %s: %s", name, self.root, error.strerror)
                continue
            yield Sample(name, encoded, [])


def plain_files(images: Path | None, texts: Path | None) -> PlainFiles:
    """Raises ValueError, with the option to change, where there is nothing to embed."""
    return PlainFiles(images, [] if images is None else _pictures(images), [] if texts is None else _lines(texts))


def read_pictures(root: Path, keys: Iterable[str]) -> dict[str, bytes]:
    """The pictures of a folder by their keys; those that are not below it, or cannot be read, are left out."""
    if not root.is_dir():
        raise ValueError(f"the folder of pictures {root} is not there; name the one where it is now with --data")
    found = {}
    for key in keys:
        path = PurePath(key)
        if not key or path.is_absolute() or ".." in path.parts:  # an index may come from anybody
            continue
        try:
            found[key] = (root / path).read_bytes()
        except OSError:
            continue
    return found


def _pictures(root: Path) -> list[str]:
    if not root.is_dir():
        raise ValueError(
            f"--images {root} is {'no folder' if root.exists() else 'not there'}; name a folder of pictures"
        )
    names, seen, other = [], set(), 0
    for folder, below, files in os.walk(root, followlinks=True, onerror=_tell_unreadable):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real in seen:  # a link back to where it lies in
            continue
        seen.add(real)
        for name in files:
            if name.startswith("."):
                continue
            if PurePath(name).suffix.lower() in PICTURE_NAMES:
                names.append((Path(folder) / name).relative_to(root).as_posix())
            else:
                other += 1
    if not names:
        holds = f"{other:,} other files" if other else "nothing"
        shards = "; shards go to --data" if any(root.glob("*.tar")) else ""
        raise ValueError(f"--images {root} holds no picture ({', '.join(PICTURE_NAMES)}), but {holds}{shards}")
    return sorted(names)


def _tell_unreadable(error: OSError) -> None:
    get_logger().warning("left out the folder %s: %s", error.filename, error.strerror)


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--texts {path} cannot be read: {error.strerror}; name a file with one text a line") from None
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"--texts {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"--texts {path} holds no text; expected one a line")
    return texts
