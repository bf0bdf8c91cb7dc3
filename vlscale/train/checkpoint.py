"""Checkpoints that are either complete or not there.

    RUN/checkpoints/step-N/    engine/            DeepSpeed's own files (weights, optimizer states, one file a rank)
                               rank-R.pt          random states and data-stream state of rank R
                               full/              with train.elastic: the same for any world size and ZeRO stage
                               manifest.json      written last: step, world size, size and SHA-256 of every file

Everything is written into `.step-N.partial`, flushed to disk, and renamed. A folder whose manifest is missing or does
not match its files is named in the log and passed over for the one before it.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vlscale.data.lanes import merge_states
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import TrainConfig
from vlscale.train.bad_numbers import BadSteps

MANIFEST = "manifest.json"
FULL = "full"
FORMAT = 1


@dataclass(frozen=True)
class Layout:
    """What a checkpoint must agree on with the run that loads it; the stream's state checks its data itself."""

    world_size: int
    zero_stage: int
    dtype: str


@dataclass(frozen=True)
class Restored:
    step: int
    stream_state: Any
    bad_steps: BadSteps


class Saved(Protocol):
    """An engine."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def save_full(self, folder: Path) -> None: ...

    def load_full(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run. Every method is called by all ranks together."""

    root: Path
    layout: Layout
    engine: Saved
    ranks: Ranks
    train: TrainConfig

    def save(self, step: int, stream_state: Any, bad_steps: BadSteps) -> None:
        def write(folder: Path) -> None:
            self.engine.save(folder)
            if self.train.elastic:
                self.engine.save_full(folder / FULL)

        keep = self.train.keep_checkpoints
        save_checkpoint(self.root, step, self.layout, stream_state, write, self.ranks, keep, bad_steps)

    def load(self, before: int | None = None) -> Restored | None:
        """The newest complete one, of a step below `before`."""
        load_full = self.engine.load_full
        return load_checkpoint(self.root, self.layout, self.engine.load, self.ranks, load_full, before)


def save_checkpoint(
    root: Path,
    step: int,
    layout: Layout,
    stream_state: Any,
    save_engine: Callable[[Path], None],
    ranks: Ranks,
    keep: int,
    bad_steps: BadSteps | None = None,
) -> Path:
    """Write `root/step-N` for all ranks together, then remove all but the newest `keep`."""
    partial, final = root / f".step-{step}.partial", root / f"step-{step}"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    save_engine(partial)
    own = {"stream": stream_state, "random": _random_state(), "bad_steps": vars(bad_steps or BadSteps())}
    torch.save(own, partial / f"rank-{ranks.rank}.pt")
    ranks.barrier()
    if ranks.first:
        manifest = {"format": FORMAT, "step": step, "layout": vars(layout), "files": _checksums(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(partial)
        if final.exists():  # an older, damaged one of the same step
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
        for old in _by_step(root)[keep:]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def load_checkpoint(
    root: Path,
    layout: Layout,
    load_engine: Callable[[Path], None],
    ranks: Ranks,
    load_full: Callable[[Path], None] | None = None,
    before: int | None = None,
) -> Restored | None:
    """Continue from the newest complete checkpoint under `root`, of a step below `before`; None when there is none.

    Where the world size or the stage has changed, `load_full` is given the form that any of them can read.
    """
    folder = ranks.from_first(newest_complete(root, before) if ranks.first else None)
    if folder is None:
        return None
    manifest = json.loads((folder / MANIFEST).read_text())
    changed = [name for name, value in vars(layout).items() if manifest["layout"][name] != value]
    elastic = "dtype" not in changed and (folder / FULL).is_dir() and load_full is not None
    if changed and not elastic:
        name = changed[0]
        raise ValueError(
            f"checkpoint {folder}: made with {name} {manifest['layout'][name]}, got {vars(layout)[name]}; "
            f"continue with the same {name}, or start another run with model.init_from"
            + ("" if name == "dtype" else "; checkpoints made with train.elastic=true continue at any")
        )
    if not changed:
        load_engine(folder)
        own = _own(folder, ranks.rank)
        _set_random_state(own["random"])
        return Restored(manifest["step"], own["stream"], BadSteps(**own.get("bad_steps", {})))
    load_full(folder / FULL)
    everyone = [_own(folder, rank) for rank in range(manifest["layout"]["world_size"])]
    if ranks.rank < len(everyone):
        _set_random_state(everyone[ranks.rank]["random"])
    stream_state = merge_states([own["stream"] for own in everyone])
    return Restored(manifest["step"], stream_state, BadSteps(**everyone[0].get("bad_steps", {})))


def _own(folder: Path, rank: int) -> dict[str, Any]:
    """Our own file: it holds Python's and NumPy's random states, which the weights-only reader does not know."""
    return torch.load(folder / f"rank-{rank}.pt", weights_only=False)


def newest_complete(root: Path, before: int | None = None) -> Path | None:
    for folder in _by_step(root):
        if before is not None and _step_of(folder) >= before:
            continue
        fault = _fault(folder)
        if fault is None:
            return folder
        get_logger().warning("checkpoint %s is passed over: %s", folder, fault)
    return None


def _by_step(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, expected {FORMAT}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        if _sha256(path) != digest:
            return f"{name} has another checksum"
    return None


def _checksums(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, _sha256(p)) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
