"""Copies of complete checkpoints at another place, through fsspec: `train.checkpoint_remote: URL`.

    URL/RUN/step-N/...    RUN is the name of the run's folder; manifest.json comes last, so a copy without one is none

Rank 0 sends each checkpoint in a thread after it is complete here; where sending takes longer than saving, the newest
goes next and those between are left out. A copy that fails is a warning. Its files are pickles as the run's own are:
the place has to be trusted as the run's folder is.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import TrainConfig
from vlscale.train.background import Job, wait_for_all
from vlscale.train.checkpoint_folder import FORMAT, MANIFEST, begin, fault_of, newest_complete

TRIES = 4
FIRST_WAIT = 0.5  # seconds; doubles with each try
Result = TypeVar("Result")


def open_remote(root: Path, train: TrainConfig, name: str, ranks: Ranks, *, resume: bool) -> "Remote | None":
    """The place for the copies of run `name`, on rank 0. With `resume`, its newest copy is fetched where `root` has no
    complete checkpoint; without, a place that has copies is refused: the new run's would mix with them."""
    if train.checkpoint_remote is None:
        return None

    def work() -> Remote:
        remote = Remote(train.checkpoint_remote, name, train.keep_checkpoints)
        if not resume and remote.steps():
            raise ValueError(
                f"train.checkpoint_remote: {remote.url} already holds checkpoints of a run; continue it with --resume, "
                "or choose another --out or train.checkpoint_remote"
            )
        if resume and newest_complete(root) is None:
            remote.fetch_newest(root)
        return remote

    job = Job(work if ranks.first else None)
    wait_for_all(job, ranks)
    fault = ranks.from_first(job.error and _unread(job.error))
    if fault is not None:
        raise ValueError(fault)
    return job.result


def _unread(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return f"train.checkpoint_remote cannot be read: {_brief(error)}; look at the url, the network and the credentials"


class Remote:
    """The copies of one run, of which the newest `keep` stay."""

    def __init__(self, url: str, name: str, keep: int):
        import fsspec

        self.url, self._keep = f"{url.rstrip('/')}/{name}", keep
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"train.checkpoint_remote={url}: {error}; give an url that fsspec knows here") from None
        self._lock = threading.Lock()
        self._next: Path | None = None
        self.job = Job(None)
        self._closing = threading.Event()
        self.sending: Path | None = None  # the folder that has to stay meanwhile

    def send(self, folder: Path) -> None:
        """In a thread, after what is being sent now."""
        with self._lock:
            self._next = folder
            if self.sending is None:
                self.sending = folder
                self.job.join()
                self.job = Job(self._send_all, abandoned=True)

    def give_up(self) -> None:
        """What is still being sent is left as it is: without its manifest, it is none."""
        if self.job.running:
            self._closing.set()
            get_logger().warning("%s: a copy is not complete yet and is given up; the checkpoint is here", self.url)

    def steps(self) -> list[int]:
        """Of the copies that have a manifest, newest first."""
        found = [PurePosixPath(path).name for path in self._listed(self._root)]
        numbers = [int(name.removeprefix("step-")) for name in found if _is_step(name)]
        return [step for step in sorted(numbers, reverse=True) if self._try(lambda at=step: self._complete(at))]

    def fetch_newest(self, root: Path) -> Path | None:
        """The newest copy whose files all come as its manifest says, as `root/step-N`; None where there is none."""
        root.parent.mkdir(parents=True, exist_ok=True)
        for step in self.steps():
            partial = begin(root, step)
            try:
                self._fetch(step, partial)
                fault = fault_of(partial)
            except _FAULTS as error:
                fault = _brief(error)
            if fault is None:
                partial.rename(root / f"step-{step}")
                get_logger().info("checkpoint step-%d is fetched from %s", step, self.url)
                return root / f"step-{step}"
            shutil.rmtree(partial)
            get_logger().warning("checkpoint %s/step-%d is passed over: %s", self.url, step, fault)
        return None

    def _send_all(self) -> None:
        while True:
            with self._lock:
                folder, self._next = self._next, None
                self.sending = folder
            if folder is None or self._closing.is_set():
                return
            try:
                self._send(folder)
                self._remove_old()
            except Exception as error:  # whatever a store's library raises: training does not end for a copy
                get_logger().warning("%s: %s is not copied there (%s)", self.url, folder.name, _brief(error))

    def _send(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        there = f"{self._root}/{folder.name}"
        if self._complete(step := manifest["step"]):  # of an earlier try at the same step: complete no more
            self._files.rm(self._manifest(step))
        for name in [*manifest["files"], MANIFEST]:
            if self._closing.is_set():
                return
            self._try(lambda name=name: self._put(folder / name, f"{there}/{name}"))

    def _put(self, own: Path, there: str) -> None:
        self._files.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
        self._files.put_file(str(own), there)

    def _remove_old(self) -> None:
        """The manifest first, so that nothing is ever half there; then what never got one."""
        steps = self.steps()
        for step in steps[self._keep :]:
            self._files.rm(self._manifest(step))
        kept = {f"step-{step}" for step in steps[: self._keep]}
        for path in self._listed(self._root):
            if _is_step(name := PurePosixPath(path).name) and name not in kept:
                self._files.rm(path, recursive=True)

    def _fetch(self, step: int, partial: Path) -> None:
        at = f"{self._root}/step-{step}"
        manifest = json.loads(self._try(lambda: self._files.cat_file(f"{at}/{MANIFEST}")))
        if manifest.get("format") != FORMAT:
            raise ValueError(f"its format is {manifest.get('format')}, expected {FORMAT}")
        for name in manifest["files"]:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"its manifest names {name!r}, outside of it")
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            self._try(lambda name=name: self._files.get_file(f"{at}/{name}", str(partial / name)))
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def _manifest(self, step: int) -> str:
        return f"{self._root}/step-{step}/{MANIFEST}"

    def _complete(self, step: int) -> bool:
        return self._files.exists(self._manifest(step))

    def _listed(self, path: str) -> list[str]:
        self._files.invalidate_cache()

        def listed() -> list[str]:
            try:
                return [found.rstrip("/") for found in self._files.ls(path, detail=False)]
            except FileNotFoundError:
                return []

        return self._try(listed)

    def _try(self, action: Callable[[], Result]) -> Result:
        wait = FIRST_WAIT
        for _ in range(TRIES - 1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except Exception as error:
                get_logger().warning("%s: %s; next try in %.1f s", self.url, _brief(error), wait)
            if self._closing.wait(wait):
                break
            wait *= 2
        return action()


_FAULTS = (OSError, ValueError, KeyError, TypeError)


def _is_step(name: str) -> bool:
    return name.startswith("step-") and name.removeprefix("step-").isdigit()


def _brief(error: Any) -> str:
    """One line; a store's library may put a signed address into it, whose secret is what follows the question mark."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {' '.join(word.split('?')[0] for word in first.split())}"
