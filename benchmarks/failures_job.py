"""A training that is to be disturbed: real processes on a small corpus, watched from outside through their files.

Every process of a job carries a mark in its environment, so that what is left of it can be found whoever its parent is.
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import yaml

from vlscale.cli.launcher import free_port
from vlscale.data.synth import make_corpus, synth_config
from vlscale.resources import launch_folder
from vlscale.train.metrics_file import read_metrics

MARK = "VLSCALE_FAILURES"
SAVE_EVERY, EVALUATE_EVERY, BATCH = 3, 4, 32  # steps, steps, pairs
PATIENCE = 600.0  # seconds until a job that should end is called hung; the machine may be busy
LEFT = 20.0  # seconds that processes and shared memory may outlive the launcher
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Place:
    """Where everything of one call lies: corpus, recipe, undisturbed runs, trials."""

    root: Path

    @property
    def corpus(self) -> Path:
        folder = self.root / "corpus"
        if not folder.is_dir():
            make_corpus(folder, synth_config(pairs=256, val_pairs=24, shard_size=64), processes=1, progress=False)
        return folder

    def recipe(self, steps: int, corpus: Path | None = None, name: str = "recipe") -> Path:
        corpus = corpus or self.corpus
        path = self.root / f"{name}-{steps}.yaml"
        values = {
            "data": {
                "caption_key": "json:captions",
                "train": [f"{corpus}/train-*.tar"],
                "val": [f"{self.corpus}/val-*.tar"],
            },
            "model": {
                "embed_dim": 16,
                "dropout": 0.1,  # so that random states matter
                "vision": {"config": {"model_type": "vit", "image_size": 32, "patch_size": 8, **TOWER}},
                "text": {"max_length": 24, "vocab_size": 300, "config": {"model_type": "bert", **TOWER}},
            },
            "train": {"global_batch_size": BATCH, "max_steps": steps, "checkpoint_every": SAVE_EVERY},
            "engine": {"threads": 1, "timeout_seconds": 300},
            "eval": {"every": EVALUATE_EVERY},
            "log": {"progress": False},
        }
        path.write_text(yaml.safe_dump(values))
        return path

    def undisturbed(self, ranks: int, steps: int, *overrides: str) -> Path:
        """The run that all others have to equal; made once."""
        name = "-".join(["undisturbed", str(ranks), str(steps), *overrides]).replace("=", "-")
        run = self.root / name
        if not (run / "final").is_dir():
            with Job(self.recipe(steps), run, ranks, overrides) as job:
                if (code := job.wait()) != 0:
                    raise RuntimeError(f"the undisturbed run ended with {code}: {job.said()}")
        return run


@dataclass
class Job:
    """One start of one command; `with` ends whatever is left of it, which `leftovers` would have told before.

    `began` is by the clock, as files' times are; `ended_at` counts from nowhere."""

    recipe: Path
    run: Path
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    script: Path = field(default_factory=lambda: launch_folder() / "train.py")
    launcher: str = "torchrun"  # or deepspeed
    obeys_modes: bool = False  # root too is kept from writing where the mode says so

    def __enter__(self) -> "Job":
        self.mark = uuid.uuid4().hex
        self.began, self.ended_at = time.time(), 0.0
        self.shared = self.run.with_name(f"{self.run.name}.shm")
        self.shared.mkdir(parents=True, exist_ok=True)
        self.log = self.run.with_name(f"{self.run.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(self.recipe), "--out", str(self.run), "--resume", *self.overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
                                    "HF_HUB_OFFLINE": "1", MARK: self.mark}  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*_own_shared_memory(self.shared), *self._command(), *arguments],
                env=environment | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_obey_modes if self.obeys_modes else None,
            )
        return self

    def _command(self) -> list[str]:
        port = str(free_port())
        if self.ranks == 1:
            return [sys.executable, str(self.script)]
        if self.launcher == "deepspeed":
            started = ["deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(self.ranks)]
            return [sys.executable, "-m", *started, "--master_port", port, str(self.script)]
        several = ["--nproc-per-node", str(self.ranks), "--master-port", port]
        return [sys.executable, str(launch_folder() / "node.py"), *several, str(self.script)]

    def __exit__(self, *exception: object) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        shutil.rmtree(self.shared, ignore_errors=True)

    def said(self) -> str:
        """The end of what the job wrote, on one line."""
        return " ".join(self.log.read_text(errors="replace").split())[-600:]

    def alive(self) -> list[psutil.Process]:
        """Processes of this start, ended ones that nobody has asked after left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank, not its data workers; None while it is not there yet."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                own = [word for word in process.cmdline() if word == str(self.script)]
                same = self.ranks == 1 or process.environ().get("RANK") == str(number)
                if own and same:
                    return process
        return None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, None where it did not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
            self.ended_at = time.monotonic()
            return code
        return None

    def until(self, ready: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Waits, looking a thousand times a second; False where the job has ended before, or time has passed."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def leftovers(self) -> list[str]:
        """What outlives the job: processes, and files in its shared memory."""
        deadline = time.monotonic() + LEFT
        while time.monotonic() < deadline and (self.alive() or os.listdir(self.shared)):
            time.sleep(0.1)
        return [f"process {process.pid} is left" for process in self.alive()] + [
            f"/dev/shm/{name} is left" for name in sorted(os.listdir(self.shared))
        ]


def _obey_modes() -> None:
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@cache
def _can_bind() -> bool:
    test = ["unshare", "--mount", "mount", "--bind", "/tmp", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(test, capture_output=True).returncode == 0


def _own_shared_memory(folder: Path) -> list[str]:
    """A command's first words, by which `folder` is its /dev/shm: what other programs leave there is not the job's.
    None where this machine lets nobody mount; shared memory is then not looked at."""
    bind = 'mount --bind "$0" /dev/shm && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", bind, str(folder)] if _can_bind() else []


def last_step(file: Path) -> int:
    return max((line["step"] for line in read_metrics(file)), default=0)


def moment(run: Path, since: float) -> str:
    """What the job is doing now, told by its files."""
    for partial in run.glob("checkpoints/.step-*.partial"):
        with contextlib.suppress(OSError):
            if partial.stat().st_mtime >= since:
                return "rename" if (partial / "manifest.json").is_file() else "save"
    steps = last_step(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else 0
    if steps == 0 or (run / "metrics.jsonl").stat().st_mtime < since:
        return "start"
    if steps % EVALUATE_EVERY == 0 and last_step(run / "eval.jsonl") < steps:
        return "evaluation"
    return "step"


def wait_for(job: Job, wanted: str, dice: random.Random) -> bool:
    """Until the job is in the wanted moment, at a random place of it; `any` is a random time. False: it has ended."""
    run, since = job.run, job.began
    if wanted == "start":
        time.sleep(dice.uniform(0.5, 6))
        return job.process.poll() is None
    if not job.until(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_mtime > since):
        return False
    if wanted in ("any", "step"):
        first = last_step(run / "metrics.jsonl")
        if not job.until(lambda: last_step(run / "metrics.jsonl") > first):
            return False
        time.sleep(dice.uniform(0, 1.0 if wanted == "any" else 0.1))
        return job.process.poll() is None
    met = job.until(lambda: moment(run, since) == wanted, 30)
    if met and wanted in ("save", "evaluation"):
        time.sleep(dice.uniform(0, 0.05))
    return job.process.poll() is None


def difference(run: Path, undisturbed: Path, *, exact: bool = True) -> list[str]:
    """How a complete run differs from the undisturbed one: keys of every batch, weights (else losses to 1e-5), and
    what it has left lying in its folder."""
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, undisturbed))
    lost = []
    if [line["step"] for line in found] != [line["step"] for line in expected]:
        lost.append("steps are missing or doubled")
    if [line["keys"] for line in found] != [line["keys"] for line in expected]:
        lost.append("other samples")
    models = [folder / "final" / "model.safetensors" for folder in (run, undisturbed)]
    if not models[0].is_file():
        lost.append("no final model")
    elif exact and models[0].read_bytes() != models[1].read_bytes():
        lost.append("other weights")
    pairs = zip(found, expected, strict=False)
    if not exact and any(abs(a["loss"] - b["loss"]) > 1e-5 * abs(b["loss"]) for a, b in pairs):
        lost.append("other losses")
    partial = [path.relative_to(run) for path in run.rglob("*") if ".partial" in path.name]
    return lost + [f"{path} is left" for path in partial]


def start_of(run: Path, undisturbed: Path) -> list[str]:
    """The same of a run that is not complete: no batch other than the undisturbed run's."""
    expected = {line["step"]: line["keys"] for line in read_metrics(undisturbed / "metrics.jsonl")}
    try:
        found = read_metrics(run / "metrics.jsonl")
    except (ValueError, json.JSONDecodeError) as error:
        return [f"metrics.jsonl cannot be read: {error}"]
    return ["other samples"] if any(expected.get(line["step"]) != line["keys"] for line in found) else []


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """`folder` as a file system of its own where this machine lets us mount one; False where it does not."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def kill(process: psutil.Process | None, number: int = signal.SIGKILL) -> None:
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
