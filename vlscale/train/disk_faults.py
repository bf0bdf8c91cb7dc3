"""When the run's folder cannot be written: full, read-only or gone. What is said, and what ends.

Weights are never given up for a line of a log: a line that cannot be written waits in memory for the next one, or is
left out with a warning (`optional`). A checkpoint that cannot be written is dealt with by `train.disk_full`.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vlscale.distributed import Ranks
from vlscale.logging import get_logger

_said: set[tuple[str, int | None]] = set()


class StoppedByDisk(SystemExit):
    """Ends the process with exit code 1, after rank 0 has said why: the config may be right, the machine is not."""

    def __init__(self) -> None:
        super().__init__(1)


class CannotWrite(OSError):
    """Raised on all ranks together."""


def check_writable(folder: Path) -> None:
    """Before anything is built: raises ValueError unless the run's folder takes a file. Tried, since permissions do not
    tell of a full disk, a quota or a server's own rules; nothing is left behind."""
    made: list[Path] = []
    try:
        missing = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vlscale-") as file:
            file.write(b" ")
            file.flush()
    except OSError as error:
        raise ValueError(f"output folder {folder} cannot be written: {told(error)}; choose another --out") from None
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


@contextmanager
def written_by_first(what: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, rank 0 writes. A fault of the disk there is CannotWrite on every rank; nobody leaves before."""
    fault = None
    try:
        yield
    except SafetensorError as error:
        fault = str(error)
    except OSError as error:
        fault = told(error)
    fault = ranks.from_first(fault)
    if fault is not None:
        raise CannotWrite(f"{what} cannot be written: {fault} ({shown(free_bytes(what))} are free)")


def stop(message: str, ranks: Ranks) -> None:
    """On all ranks together."""
    if ranks.first:
        get_logger().error("%s", message)
    ranks.barrier()  # the launcher ends all ranks with the first
    raise StoppedByDisk


def told(error: OSError) -> str:
    """What the system says, with the file where it names one."""
    said = error.strerror or str(error)
    return f"{said}: {error.filename}" if error.filename and str(error.filename) not in said else said


def free_bytes(folder: Path) -> int | None:
    """For this user, on the file system of `folder` or of the nearest one above it; None where nothing tells."""
    there = next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), None)
    try:
        return shutil.disk_usage(there).free if there is not None else None
    except OSError:
        return None


def shown(size: float | None) -> str:
    if size is None:
        return "an unknown size"
    unit = next((unit for unit in ("bytes", "kB", "MB", "GB") if size < 1000 ** (_UNITS.index(unit) + 1)), "TB")
    return f"{size / 1000 ** _UNITS.index(unit):.4g} {unit}"


_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@contextmanager
def optional(what: str) -> Iterator[None]:
    """A file that training can do without: a fault of the disk inside is a warning, said once for each kind."""
    try:
        yield
    except OSError as error:
        if (what, error.errno) not in _said:
            _said.add((what, error.errno))
            get_logger().warning("%s cannot be written (%s); training goes on without", what, told(error))
