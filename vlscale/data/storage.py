"""Where shards lie: local files, http(s), and object stores through fsspec, read by offset.

Remote shards are read by ranges, or copied to `data.cache_dir` first when that is set. Errors are tried again.
"""

import errno
import http.client
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from vlscale.data.faults import BadShard
from vlscale.data.retry import CacheFull, with_retries
from vlscale.logging import get_logger
from vlscale.sections import DataConfig

SCHEMES = ("file", "http", "https", "s3", "gs", "gcs", "abfs", "az", "hdfs", "memory")
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_TIMEOUT = 60.0  # seconds without an answer
_REFUSED = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError, 410: FileNotFoundError}
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
_ABANDONED = 3600.0  # seconds after which a partial copy belongs to nobody


@dataclass(frozen=True)
class Stamp:
    """What tells that a shard is the one that was indexed."""

    size: int
    version: int  # time of change in nanoseconds, or a hash of the server's


class Shard(Protocol):
    """An open shard."""

    size: int

    def read(self, start: int, size: int) -> bytes: ...
    def close(self) -> None: ...


def scheme_of(url: str) -> str | None:
    """`http` of an url, None of a path."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else None


def path_of(url: str) -> str:
    """A path, or what a `file:` url names."""
    return url.split(":", 1)[1].removeprefix("//") if scheme_of(url) == "file" else url


def stamp(url: str) -> Stamp:
    return with_retries(lambda: _store(url).stamp(), url)


def open_shard(url: str, data: DataConfig) -> Shard:
    """The shard, or its copy in the cache; read by ranges where there is no cache, or no room in it."""
    if scheme_of(url) is None:
        return LocalShard(url, url)
    if data.cache_dir is not None:
        copy = cached_copy(url, Path(data.cache_dir).expanduser(), int(data.cache_gb * 1e9))
        try:
            if copy is not None:
                return LocalShard(str(copy), url)
        except BadShard:
            if copy.exists():
                raise  # else another process made room meanwhile
    return RemoteShard(url)


class LocalShard:
    def __init__(self, path: str, url: str):
        self.url = url
        self._file = with_retries(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), url)
        self.size = os.fstat(self._file).st_size

    def read(self, start: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, start)
            if len(data) == size:
                return data
        except OSError:
            pass  # met again below, where it is told and tried again
        return with_retries(lambda: self._read_on(start, size), self.url)

    def close(self) -> None:
        os.close(self._file)

    def _read_on(self, start: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = os.pread(self._file, size - len(data), start + len(data))
            if not more:
                raise BadShard(f"shard {self.url} was cut short while it is read (byte {start})")
            data += more
        return data


class RemoteShard:
    def __init__(self, url: str):
        self.url, self._store = url, _store(url)
        self.size = with_retries(self._store.stamp, url).size

    def read(self, start: int, size: int) -> bytes:
        return with_retries(lambda: self._read_whole(start, size), self.url)

    def close(self) -> None:
        pass

    def _read_whole(self, start: int, size: int) -> bytes:
        data = self._store.read(start, size) if size else b""
        if len(data) != size:
            raise OSError(errno.EIO, f"{len(data)} bytes came of {size} from byte {start}")
        return data


class ReadAhead:
    """Small neighbouring reads of a shard, served from large ones: what the walk over headers needs."""

    def __init__(self, shard: Shard, span: int = 1 << 20):
        self._shard, self._span = shard, span
        self._start, self._data = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """As many bytes as there are, up to `size`."""
        size = max(0, min(size, self._shard.size - start))
        at = start - self._start
        if at < 0 or at + size > len(self._data):
            span = min(max(size, self._span), self._shard.size - start)
            self._start, self._data, at = start, self._shard.read(start, span), 0
        return self._data[at : at + size]


def cached_copy(url: str, folder: Path, bound: int) -> Path | None:
    """The local copy, made when absent; None when it cannot be kept, which is told.

    Copies appear whole or not at all, so any number of processes may share the folder; the ones used longest ago go
    first when the bound is met. A copy that goes while it is open stays readable until it is closed.
    """
    found = stamp(url)
    name = f"{blake2b(f'{url} {found.version}'.encode(), digest_size=8).hexdigest()}-{url.rsplit('/', 1)[-1][-80:]}"
    copy = folder / name
    try:
        if copy.is_file() and copy.stat().st_size == found.size:
            os.utime(copy)
            return copy
        folder.mkdir(parents=True, exist_ok=True)
        if not make_room(folder, found.size, bound):
            get_logger().warning("shard %s is larger than data.cache_gb; it is read without the cache", url)
            return None
        return with_retries(lambda: _copy(url, copy, found.size), url)
    except OSError as error:
        get_logger().warning("shard %s cannot be cached (%s); it is read without the cache", url, error.strerror)
        return None


def _copy(url: str, copy: Path, size: int) -> Path:
    partial = partial_of(copy)
    try:
        _store(url).download(partial)
        if partial.stat().st_size != size:
            raise OSError(errno.EIO, f"{partial.stat().st_size} bytes came of {size}")
        os.replace(partial, copy)
        return copy
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise CacheFull(error.errno, error.strerror) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """A name beside `path`, of this thread alone, to write under until it is whole."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")


def make_room(folder: Path, size: int, bound: int) -> bool:
    """Removes the copies used longest ago until `size` more bytes fit; False when they never can."""
    kept = []
    for path in folder.iterdir():
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # another process made room
        if path.name.endswith(".partial"):
            if time.time() - found.st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
            continue
        kept.append((found.st_mtime, found.st_size, path))
    total = sum(length for _, length, _ in kept)
    for _, length, path in sorted(kept):
        if total + size <= bound:
            break
        path.unlink(missing_ok=True)
        total -= length
    return total + size <= bound


def _store(url: str) -> "_File | _Http | _Fsspec":
    scheme = scheme_of(url)
    if scheme is None:
        return _File(url)
    return _Http(url) if scheme in ("http", "https") else _Fsspec(url)


@dataclass(frozen=True)
class _File:
    path: str

    def stamp(self) -> Stamp:
        found = os.stat(self.path)
        return Stamp(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class _Http:
    url: str

    def stamp(self) -> Stamp:
        with self._ask("HEAD") as answer:
            headers = answer.headers
        if not headers.get("Content-Length", "").isdigit():
            raise FileNotFoundError(errno.ENOENT, "the server does not tell its size (Content-Length)")
        marks = f"{headers.get('ETag', '')} {headers.get('Last-Modified', '')}"
        return Stamp(int(headers["Content-Length"]), _version(marks))

    def read(self, start: int, size: int) -> bytes:
        with self._ask("GET", {"Range": f"bytes={start}-{start + size - 1}"}) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                raise FileNotFoundError(errno.ENOENT, "the server does not serve ranges; set data.cache_dir")
            return self._body(answer.read)

    def download(self, path: Path) -> None:
        with self._ask("GET") as answer, path.open("wb") as file:
            self._body(lambda: shutil.copyfileobj(answer, file, 1 << 20))

    def _ask(self, method: str, headers: dict[str, str] | None = None):
        request = urllib.request.Request(self.url, headers=headers or {}, method=method)
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            kind = _REFUSED.get(error.code, OSError)
            raise kind(errno.EIO, f"the server answers {error.code} {error.reason}") from None

    @staticmethod
    def _body(take):
        try:
            return take()
        except http.client.HTTPException as error:  # such as an answer that ends early
            raise OSError(errno.EIO, repr(error)) from None


@dataclass(frozen=True)
class _Fsspec:
    url: str

    def stamp(self) -> Stamp:
        found = self._ask(lambda files, path: files.info(path))
        marks = [str(found.get(mark, "")) for mark in ("ETag", "etag", "LastModified", "mtime", "updated", "created")]
        return Stamp(int(found["size"]), _version(" ".join(marks)))

    def read(self, start: int, size: int) -> bytes:
        return self._ask(lambda files, path: files.cat_file(path, start=start, end=start + size))

    def download(self, path: Path) -> None:
        self._ask(lambda files, remote: files.get_file(remote, str(path)))

    def _ask(self, action: Callable[[Any, str], Any]) -> Any:
        """`action` of the store and the path in it. All its errors are an OSError, of whose kind none is tried again
        that another try would meet again."""
        import fsspec

        try:
            return action(*fsspec.core.url_to_fs(self.url))
        except ImportError as error:
            raise ValueError(f"{self.url}: {error}") from None
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "the store has no such object") from error
        except OSError:
            raise
        except Exception as error:  # each store's client has errors of its own
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _version(marks: str) -> int:
    return int.from_bytes(blake2b(marks.encode(), digest_size=7).digest(), "big")
