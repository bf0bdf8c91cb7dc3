"""One rank's files of a checkpoint: copied to host memory at a step boundary, written while training goes on.

A copy goes into buffers that the next one uses again, so a rank holds one copy of its state at most, and only the first
one pays for fresh memory. DeepSpeed builds its own files; `handed_over` takes them before it would write them.

Files are hashed as they are written: nothing is read back but safetensors, whose writer takes a path.
"""

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

Sums = dict[str, tuple[int, str]]  # file name inside a checkpoint: size, SHA-256
PIECE = 4 << 20  # bytes hashed and written at a time, while they are in the cache


@dataclass(frozen=True)
class Tensors:
    """The content of a safetensors file; its tensors are on the host and nobody changes them."""

    by_name: dict[str, torch.Tensor]


class HostBuffers:
    """Memory for one copy of a rank's state, page-locked where the state is on a GPU."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.dtype, torch.Size], list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the host, once `settle` was called."""
        free = self._free.get((tensor.dtype, tensor.shape))
        own = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._used.append(own)
        return own.copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        if any(own.is_pinned() for own in self._used if torch.cuda.is_available()):
            torch.cuda.synchronize()

    def release(self) -> None:
        """The copy is written; what it did not use is given back."""
        self._free = {}
        for own in self._used:
            self._free.setdefault((own.dtype, own.shape), []).append(own)
        self._used = []


class Files:
    """Collected by `add`, written by `write`. Without buffers the contents stay where they are: nothing may change them
    before `write` has ended."""

    def __init__(self, buffers: HostBuffers | None = None):
        self._buffers = buffers
        self._contents: dict[str, Any] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that will change, for `Tensors`."""
        return tensor.detach().cpu().clone() if self._buffers is None else self._buffers.copy(tensor)

    def add(self, name: str, content: bytes | Tensors | Any) -> None:
        """`name` inside the checkpoint. What is neither bytes nor Tensors is for `torch.load`."""
        if self._buffers is not None and not isinstance(content, bytes | Tensors):
            content = _on_host(content, self._buffers.copy)
        self._contents[name] = content

    def settle(self) -> None:
        """Returns when every copy is made, and training may go on."""
        if self._buffers is not None:
            self._buffers.settle()

    def write(self, folder: Path) -> Sums:
        """Each file on disk when this returns; their folders are flushed by who commits the checkpoint."""
        try:
            return {name: write_file(folder / name, content) for name, content in self._contents.items()}
        finally:
            self._contents = {}
            if self._buffers is not None:
                self._buffers.release()


def write_file(path: Path, content: bytes | Tensors | Any) -> tuple[int, str]:
    """Size and SHA-256. The folder above that of `path` has to exist."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, Tensors):
        try:
            save_file(content.by_name, path)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from None
        sync(path)
        return path.stat().st_size, sha256(path)
    with path.open("wb") as file:
        hashed = _Hashed(file)
        if isinstance(content, bytes):
            hashed.write(content)
        else:
            _torch_save(content, hashed)
        if hashed.error is not None:
            raise hashed.error
        file.flush()
        os.fsync(file.fileno())
        return hashed.size, hashed.sum.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _torch_save(content: Any, file: "_Hashed") -> None:
    """Without the archive's CRC-32, which holds the interpreter's lock for its whole time: training would stand still.
    The manifest has a SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(before)


class _Hashed:
    """What `torch.save` writes to. It answers an exception with one of its own, so the first one is kept here."""

    def __init__(self, file: BinaryIO):
        self._file, self.sum, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            if self.error is not None:
                break
            piece = view[start : start + PIECE]
            self.sum.update(piece)
            try:
                self._file.write(piece)
            except OSError as error:
                self.error = error
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """The file is flushed when it is whole."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, copy: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__(file)
        self._copy, self.places, self.tensors = copy, {}, []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append((value, self._copy(value)))  # the first is held, so that no other takes its id
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> torch.Tensor:
        return self._tensors[place][1]


def _on_host(state: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`state` with every tensor, however deep, replaced by its copy, and everything else copied too."""
    skeleton = io.BytesIO()
    pickler = _Pickler(skeleton, copy)
    pickler.dump(state)
    skeleton.seek(0)
    return _Unpickler(skeleton, pickler.tensors).load()


class _Collector:
    """In the place of DeepSpeed's checkpoint engine."""

    def __init__(self, folder: Path, files: Files):
        self._folder, self._files = folder, files

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self._files.add(str(Path(path).relative_to(self._folder)), state_dict)

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


@contextmanager
def handed_over(engine: Any, folder: Path, files: Files) -> Iterator[None]:
    """DeepSpeed's `save_checkpoint` inside the block writes nothing into `folder`: its files go to `files`.

    Its recovery script is left out, which `python -m deepspeed.utils.zero_to_fp32` is too."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = _Collector(folder, files)
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script
