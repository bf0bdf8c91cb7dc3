"""Folders of checkpoints: which is complete, how one becomes so, which go.

A folder `step-N` appears by one rename of `.step-N.partial`, after its manifest, with the size and SHA-256 of every
file, is on disk. One whose manifest is missing or does not match its files is named in the log and passed over.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from vlscale.logging import get_logger
from vlscale.train.checkpoint_files import Sums, sha256, sync

CHECKPOINTS = "checkpoints"  # folder in a run
MANIFEST = "manifest.json"
FORMAT = 1


def partial_of(root: Path, step: int) -> Path:
    return root / f".step-{step}.partial"


def begin(root: Path, step: int) -> Path:
    """A new folder to write into. The run's folder, above `root`, has to exist."""
    root.mkdir(exist_ok=True)
    remove_partial(root)
    partial_of(root, step).mkdir()
    return partial_of(root, step)


def remove_partial(root: Path) -> None:
    """What an interrupted run left."""
    for left in root.glob(".step-*.partial"):
        shutil.rmtree(left)


def commit(partial: Path, final: Path, about: dict[str, Any], sums: Sums) -> None:
    """The manifest, then the name. `sums` of all ranks' files, each on disk already."""
    for name, (size, _) in sums.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != size:
            raise FileNotFoundError(f"{path}, of another rank, is not seen by rank 0: ranks need one folder")
    for path in sorted(partial.rglob("*")):  # what DeepSpeed writes itself, as with offload to NVMe
        name = str(path.relative_to(partial))
        if path.is_file() and name not in sums:
            sync(path)
            sums[name] = path.stat().st_size, sha256(path)
    manifest = {"format": FORMAT, **about, "files": dict(sorted(sums.items()))}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        sync(path)
    if final.exists():  # an older, damaged one of the same step
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def remove_all_but(root: Path, keep: int, spared: Path | None = None) -> None:
    """The newest `keep` stay, and the one that is being copied elsewhere. One that cannot be removed does no harm."""
    for old in by_step(root)[keep:]:
        if old != spared:
            shutil.rmtree(old, ignore_errors=True)


def newest_complete(root: Path, before: int | None = None) -> Path | None:
    for folder in by_step(root):
        if before is not None and step_of(folder) >= before:
            continue
        fault = fault_of(folder)
        if fault is None:
            return folder
        get_logger().warning("checkpoint %s is passed over: %s", folder, fault)
    return None


def by_step(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def size_of(manifest: dict[str, Any]) -> int:
    """Bytes of all files."""
    return sum(size for size, _ in manifest["files"].values())


def fault_of(folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, expected {FORMAT}"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is missing or has another size"
            if sha256(path) != digest:
                return f"{name} has another checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
