"""Shards that a command writes, as `pipe:aws s3 cp s3://bucket/a.tar -`; only with data.allow_pipe.

All of the command's output is copied to data.cache_dir before any of it is read: a shard is read by offset, and only a
command that has ended well has written a whole one.
"""

import errno
import os
import select
import shlex
import signal
import subprocess
import tempfile
from hashlib import blake2b
from pathlib import Path

from vlscale.data.faults import BadShard
from vlscale.data.retry import with_retries
from vlscale.data.storage import DISK_FAULTS, LocalShard, Shard, Stamp, make_room, open_shard, partial_of, scheme_of
from vlscale.sections import DataConfig

_SHELL = set("|&;<>()$`*?[]~#\n")  # what only a shell understands
_TIMEOUT = 300.0  # seconds without output
_SPAN = 1 << 20


def open_source(url: str, data: DataConfig) -> Shard:
    """A shard of any kind."""
    return open_pipe(url, data) if is_pipe(url) else open_shard(url, data)


def is_pipe(url: str) -> bool:
    return scheme_of(url) == "pipe"


def open_pipe(url: str, data: DataConfig) -> LocalShard:
    """The copy of what the command writes, made when absent."""
    while True:
        copy = _copy_path(url, data)
        if copy.is_file():
            os.utime(copy)
        else:
            with_retries(lambda: _run(url, copy, data), url)  # noqa: B023
        try:
            return LocalShard(str(copy), url)
        except BadShard:
            if copy.exists():
                raise  # else another process made room meanwhile


def pipe_stamp(url: str, data: DataConfig) -> Stamp:
    shard = open_pipe(url, data)
    shard.close()
    return Stamp(shard.size, _hash(url))


def discard_copy(url: str, data: DataConfig) -> None:
    """So that the command runs again: what it wrote is no shard."""
    _copy_path(url, data).unlink(missing_ok=True)


def _run(url: str, copy: Path, data: DataConfig) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(copy)
    try:
        with partial.open("wb") as file:
            _write_output(_arguments(url), file)
        if not make_room(copy.parent, partial.stat().st_size, int(data.cache_gb * 1e9)):
            raise BadShard(f"shard {url} is larger than data.cache_gb={data.cache_gb:g}; raise it")
        os.replace(partial, copy)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise BadShard(
                f"shard {url} cannot be copied to data.cache_dir={data.cache_dir}: {error.strerror}"
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _write_output(arguments: list[str], file) -> None:
    """Raises OSError unless the command writes something and ends with 0."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, f"there is no command {arguments[0]!r}") from None
        try:
            while True:
                if not select.select([process.stdout], [], [], _TIMEOUT)[0]:
                    raise OSError(errno.ETIMEDOUT, f"the command wrote nothing for {_TIMEOUT:g} seconds")
                span = os.read(process.stdout.fileno(), _SPAN)
                if not span:
                    break
                file.write(span)
            code = process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise OSError(errno.ETIMEDOUT, "the command closed its output and did not end") from None
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
        if code != 0 or file.tell() == 0:
            ended = f"the command ended with exit code {code}" if code else "the command wrote nothing"
            raise OSError(errno.EIO, f"{ended}{': ' + said[-1] if said else ''}")


def _arguments(url: str) -> list[str]:
    """Without a shell where the command needs none; else a shell in which every part of a pipeline has to succeed."""
    command = url.split(":", 1)[1].strip()
    if not command:
        raise ValueError(f"shard {url!r} names no command; expected pipe:COMMAND")
    if _SHELL & set(command):
        return ["bash", "-o", "pipefail", "-c", command]
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"shard {url!r}: the command cannot be read: {error}") from None


def _copy_path(url: str, data: DataConfig) -> Path:
    return Path(data.cache_dir).expanduser() / f"{_hash(url):014x}-pipe.tar"


def _hash(url: str) -> int:
    return int.from_bytes(blake2b(url.encode(), digest_size=7).digest(), "big")
