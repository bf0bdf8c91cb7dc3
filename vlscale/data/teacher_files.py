"""Files of a teacher cache: in a folder, or below an url, from where they are copied to data.cache_dir to be read.

The copies share that folder's bound with shards. One that is dropped while it is mapped stays readable; where none can
be kept, which is told, the file is read into memory.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.faults import BadShard
from vlscale.data.storage import SCHEMES, LocalShard, RemoteShard, Shard, cached_copy, path_of, scheme_of
from vlscale.sections import DataConfig


@dataclass(frozen=True)
class RemoteFolder:
    url: str
    copies: Path  # folder on a local disk
    bound: int  # of that folder, in bytes

    def __str__(self) -> str:
        return self.url

    def url_of(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"


Place = Path | RemoteFolder


def cache_place(named: str, data: DataConfig) -> Place:
    """Where `teacher.cache` points to."""
    scheme = scheme_of(named)
    if scheme in (None, "file"):
        return Path(path_of(named)).expanduser()
    if scheme not in SCHEMES:
        raise ValueError(
            f"teacher.cache: scheme {scheme!r} of {named} is not allowed; expected a folder or {', '.join(SCHEMES)}"
        )
    if data.cache_dir is None:
        raise ValueError(
            f"teacher.cache={named} is remote and needs data.cache_dir, a local folder where its files are copied to "
            "be read; set it, or copy the cache"
        )
    return RemoteFolder(named, Path(data.cache_dir).expanduser(), int(data.cache_gb * 1e9))


def name_of(place: Place, name: str) -> str:
    """For people."""
    return place.url_of(name) if isinstance(place, RemoteFolder) else str(place / name)


def content_of(place: Place, name: str) -> mmap.mmap | bytes:
    """All of a file, mapped where it lies on a local disk. Raises FileNotFoundError where there is none."""
    if isinstance(place, Path):
        return _mapped(place / name)
    url = place.url_of(name)
    copy = _found(lambda: cached_copy(url, place.copies, place.bound))
    try:
        if copy is not None:
            return _mapped(copy)
    except FileNotFoundError:
        pass  # another process made room meanwhile
    shard = RemoteShard(url)
    return shard.read(0, shard.size)


def head_of(place: Place, name: str) -> Shard:
    """The file, to read little of. Raises FileNotFoundError where there is none."""
    if isinstance(place, RemoteFolder):
        return _found(lambda: RemoteShard(place.url_of(name)))
    return _found(lambda: LocalShard(str(place / name), str(place / name)))


def _found(ask: Callable):
    try:
        return ask()
    except BadShard as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        raise


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
