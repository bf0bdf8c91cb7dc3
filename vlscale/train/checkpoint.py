"""Checkpoints that are either complete or not there, written while training goes on.

    RUN/checkpoints/step-N/    engine/            DeepSpeed's own files (weights, optimizer states, one file a rank)
                               rank-R.pt          random states and data-stream state of rank R
                               full/              with train.elastic: the same for any world size and ZeRO stage
                               manifest.json      written last: step, world size, size and SHA-256 of every file

At a step boundary each rank copies its state to host memory; a thread writes, hashes and flushes it into
`.step-N.partial`. At a later boundary, when no rank is writing any more, all agree that every file is whole, and a
thread of rank 0 writes the manifest and renames the folder. Threads never use a process group: the main threads meet in
the sum that signals need at every step, and tell each other there whether they still write. One copy at most is on its
way, so a save waits for the one before. With train.checkpoint_async=false the same threads write the state itself, and
training waits for them.
"""

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
from vlscale.train.background import Job, wait_for_all
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.checkpoint_files import Files, HostBuffers, Sums
from vlscale.train.checkpoint_folder import (
    begin,
    by_step,
    commit,
    newest_complete,
    partial_of,
    read_manifest,
    remove_all_but,
    remove_partial,
    size_of,
)
from vlscale.train.checkpoint_remote import Remote
from vlscale.train.disk_faults import free_bytes, shown, stop, told
from vlscale.train.elastic import FULL

STOP_WAIT = 8.0  # seconds for a copy elsewhere, of the 20 that a stop may take


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
    size: int = 0  # bytes on disk


class Saved(Protocol):
    """An engine."""

    def save(self, folder: Path, files: Files) -> None: ...

    def load(self, folder: Path) -> None: ...

    def save_full(self, files: Files) -> None: ...

    def load_full(self, folder: Path) -> None: ...


@dataclass
class _Saving:
    """A checkpoint on its way, the same on every rank but for the job."""

    step: int
    job: Job
    committing: bool = False  # else the ranks write their files


class Checkpoints:
    """Those of one run. Every method is called by all ranks together; `remote` is rank 0's, and so are `facts`, what
    else each manifest says."""

    def __init__(
        self,
        root: Path,
        layout: Layout,
        engine: Saved,
        ranks: Ranks,
        train: TrainConfig,
        remote: Remote | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self.root, self.layout, self.engine, self.ranks, self.train = root, layout, engine, ranks, train
        self._remote, self._facts = remote, facts or {}
        self._buffers = HostBuffers() if train.checkpoint_async else None
        self._saving: _Saving | None = None
        self._size = 0  # of the last one known, on disk
        self._failed = False  # the last save

    @property
    def busy(self) -> bool:
        """Whether this rank has work under way."""
        return self._saving is not None and self._saving.job.running

    def save(self, step: int, stream_state: Any, bad_steps: BadSteps) -> None:
        """Returns when the state may change again; `poll` and `wait` do the rest."""
        self.wait()
        self._failed = False
        fault = self.ranks.from_first(self._begin(step) if self.ranks.first else None)
        if fault is not None:
            self._give_up(step, fault)
            return
        partial, files = partial_of(self.root, step), Files(self._buffers)
        self.engine.save(partial, files)
        if self.train.elastic:
            self.engine.save_full(files)
        own = {"stream": stream_state, "random": _random_state(), "bad_steps": vars(bad_steps)}
        files.add(f"rank-{self.ranks.rank}.pt", own)
        files.settle()
        self._saving = _Saving(step, Job(lambda: files.write(partial)))
        if not self.train.checkpoint_async:
            self.wait()

    def poll(self, *, busy_anywhere: bool) -> None:
        """At a step boundary, with whether any rank is busy: moves a checkpoint on that waits for all of them."""
        if self._saving is not None and not busy_anywhere:
            self._advance()

    def wait(self) -> None:
        """Until nothing is on its way."""
        while self._saving is not None:
            wait_for_all(self._saving.job, self.ranks)
            self._advance()

    def finish(self, *, stopping: bool = False) -> None:
        """Before the run ends: nothing is on its way any more. A run that was asked to stop has saved, or says that it
        could not; it has little time, so a copy elsewhere is waited for no longer than that."""
        self.wait()
        if stopping and self._failed:
            stop("stopped, but not saved; --resume continues from the newest checkpoint that there is", self.ranks)
        if self.train.checkpoint_remote is not None:
            job = self._remote.job if self._remote is not None else Job(None)
            wait_for_all(job, self.ranks, STOP_WAIT if stopping else None)

    def close(self) -> None:
        """After the run, however it ended. One rank alone can finish what it has begun; several cannot be asked."""
        if self.ranks.size == 1:
            self.wait()
        if self._remote is not None:
            self._remote.give_up()

    def load(self, before: int | None = None) -> Restored | None:
        """The newest complete one, of a step below `before`."""
        self.wait()
        load_full = self.engine.load_full
        restored = load_checkpoint(self.root, self.layout, self.engine.load, self.ranks, load_full, before)
        self._size = restored.size if restored else self._size
        return restored

    def _begin(self, step: int) -> str | None:
        """On rank 0: room for the files. Returns what stands against it."""
        try:
            remove_partial(self.root)
            free = free_bytes(self.root)
            if self._size and free is not None and free < self._size:
                return "there is no room"
            begin(self.root, step)
        except OSError as error:
            return told(error)
        return None

    def _advance(self) -> None:
        """Every rank's job has ended."""
        saving, ranks = self._saving, self.ranks
        outcomes = ranks.gather_objects((saving.job.result, saving.job.error and _said(saving.job.error)))
        self._saving = None
        fault = next(((rank, *error) for rank, (_, error) in enumerate(outcomes) if error is not None), None)
        if fault is not None:
            rank, of_disk, message = fault
            if not of_disk:
                raise RuntimeError(f"rank {rank} could not write the checkpoint of step {saving.step}: {message}")
            self._give_up(saving.step, message if ranks.size == 1 else f"rank {rank}: {message}")
        elif not saving.committing:
            sums = {name: sum_ for own, _ in outcomes for name, sum_ in own.items()}
            work = (lambda: self._commit(saving.step, sums)) if ranks.first else None
            self._saving = _Saving(saving.step, Job(work), committing=True)
        else:
            self._size = outcomes[0][0]
            if self._remote is not None:
                self._remote.send(self.root / f"step-{saving.step}")

    def _commit(self, step: int, sums: Sums) -> int:
        """In rank 0's thread. Returns the checkpoint's size."""
        about = {"step": step, "layout": vars(self.layout), **self._facts}
        commit(partial_of(self.root, step), self.root / f"step-{step}", about, sums)
        remove_all_but(self.root, self.train.keep_checkpoints, self._remote and self._remote.sending)
        return sum(size for size, _ in sums.values())

    def _give_up(self, step: int, fault: str) -> None:
        """The older ones stay; on all ranks together."""
        newest, self._failed = None, True
        if self.ranks.first:
            shutil.rmtree(partial_of(self.root, step), ignore_errors=True)
            newest = next(iter(by_step(self.root)), None)
        needed = f"it needs about {shown(self._size)}, " if self._size else ""
        message = (
            f"checkpoint of step {step} cannot be written: {fault}; {needed}{shown(free_bytes(self.root))} are free in "
            f"{self.root}; the newest checkpoint is {newest.name if newest else 'none'}"
        )
        if self.train.disk_full == "stop":
            stop(f"{message}; make room and continue with --resume, or set train.disk_full=continue", self.ranks)
        if self.ranks.first:
            get_logger().warning("%s; training goes on (train.disk_full=continue); the next one is tried", message)


def _said(error: Exception) -> tuple[bool, str]:
    """Whether the disk is at fault, and what it says."""
    return (True, told(error)) if isinstance(error, OSError) else (False, f"{type(error).__name__}: {error}")


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
    look = Job((lambda: newest_complete(root, before)) if ranks.first else None)
    wait_for_all(look, ranks)
    if look.error is not None:
        raise look.error
    folder = ranks.from_first(look.result)
    if folder is None:
        return None
    manifest = read_manifest(folder)
    changed = [name for name, value in vars(layout).items() if manifest["layout"][name] != value]
    elastic = "dtype" not in changed and (folder / FULL).is_dir() and load_full is not None
    if changed and not elastic:
        name = changed[0]
        raise ValueError(
            f"checkpoint {folder}: made with {name} {manifest['layout'][name]}, got {vars(layout)[name]}; "
            f"continue with the same {name}, or start another run with model.init_from"
            + ("" if name == "dtype" else "; checkpoints made with train.elastic=true continue at any")
        )
    size = size_of(manifest)
    if not changed:
        load_engine(folder)
        own = _own(folder, ranks.rank)
        _set_random_state(own["random"])
        return Restored(manifest["step"], own["stream"], BadSteps(**own.get("bad_steps", {})), size)
    load_full(folder / FULL)
    everyone = [_own(folder, rank) for rank in range(manifest["layout"]["world_size"])]
    if ranks.rank < len(everyone):
        _set_random_state(everyone[ranks.rank]["random"])
    stream_state = merge_states([own["stream"] for own in everyone])
    return Restored(manifest["step"], stream_state, BadSteps(**everyone[0].get("bad_steps", {})), size)


def _own(folder: Path, rank: int) -> dict[str, Any]:
    """Our own file: it holds Python's and NumPy's random states, which the weights-only reader does not know."""
    return torch.load(folder / f"rank-{rank}.pt", weights_only=False)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
