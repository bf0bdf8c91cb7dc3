"""The faults: each disturbs a training once, and tells in which moment and what was lost.

A trial starts a training, disturbs it, and continues it by the same command until it is complete; the result has to
equal the undisturbed run. `kill` and `sigterm` are chains: all their trials hit one training after the other start, as
long as it is not complete.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from failures_job import Job, Place, difference, kill, last_step, moment, small_disk, start_of, wait_for

from vlscale.train.metrics_file import read_metrics
from vlscale.train.stop import EXIT_CODE, STOP_FILE
from vlscale.train.watchdog import WARM_AFTER

STEPS = 8  # of a training that is disturbed once
MOMENTS = ("step", "save", "rename", "evaluation", "any", "start")
GIVE_UP = 60  # seconds that a rank is waited for outside of warm steps, where it is to be given up
STOPS_WITHIN = 20.0  # seconds from SIGTERM to the end


@dataclass(frozen=True)
class Outcome:
    moment: str
    lost: list[str]
    trials: int = 1  # 0: the training was complete before it could be disturbed


@dataclass(frozen=True)
class Fault:
    what: str
    run: Callable[[Place, int, random.Random, int], Outcome]  # place, trial, dice, trials asked for
    finish: Callable[[Place, int], list[str]] | None = None  # of a chain: the last run to its end


def complete(job: Job, undisturbed: Path, *, exact: bool = True) -> list[str]:
    """The same command again until the end: what is lost."""
    again = Job(job.recipe, job.run, job.ranks, job.overrides)
    with again:
        code = again.wait()
        if code != 0:
            return [f"the run did not continue (exit code {code}): {again.said()}"]
        return again.leftovers() + difference(job.run, undisturbed, exact=exact)


def ended(job: Job, codes: tuple[int, ...] | None = None, within: float = 120.0) -> list[str]:
    """Waits for the disturbed start to end; it has to leave nothing, and end with one of `codes`."""
    code = job.wait(within)
    if code is None:
        return [f"the job hangs: {job.said()}"]
    wrong = codes is not None and code not in codes
    return ([f"exit code {code}, expected {codes}: {job.said()}"] if wrong else []) + job.leftovers()


def chain_steps(trials: int) -> int:
    """Of the one training that all trials of a chain hit."""
    return max(24, 6 * trials)


def _chain(place: Place, name: str, trials: int) -> tuple[Path, Path]:
    """The training that is hit, and the undisturbed one."""
    undisturbed = place.undisturbed(2, chain_steps(trials))
    folder = place.root / name
    done = len([run for run in folder.glob("training-*") if (run / "final").is_dir()])
    return folder / f"training-{done + 1}", undisturbed


def kill_nine(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A random rank, every fifth time all processes at once, every tenth torchrun alone; half of the trials have data
    workers, a quarter DeepSpeed's launcher."""
    run, undisturbed = _chain(place, "kill", trials)
    overrides = (f"data.workers={trial % 2}",)
    launcher = "deepspeed" if trial % 4 == 3 and trial % 10 != 9 else "torchrun"
    with Job(place.recipe(chain_steps(trials)), run, 2, overrides, launcher=launcher) as job:
        if not wait_for(job, MOMENTS[trial % len(MOMENTS)], dice):
            lost = ended(job, (0,))
            return Outcome("complete", lost + (difference(run, undisturbed) if not lost else []), trials=0)
        if trial % 10 == 9:
            victims = [psutil.Process(job.process.pid)]
        else:
            victims = job.alive() if trial % 5 == 4 else [job.rank(dice.randrange(2))]
        for victim in victims:
            kill(victim)
        hit = moment(run, job.began)
        return Outcome(hit, ended(job) + start_of(run, undisturbed))


def kill_nine_finish(place: Place, trials: int) -> list[str]:
    run, undisturbed = _chain(place, "kill", trials)
    return complete(Job(place.recipe(chain_steps(trials)), run, 2, ("data.workers=0",)), undisturbed)


def sigterm(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """SIGTERM to the job as the cluster sends it, or SIGUSR1 to one rank: saved and ended with 75 within 20 seconds,
    except while it starts."""
    run, undisturbed = _chain(place, "sigterm", trials)
    with Job(place.recipe(chain_steps(trials)), run, 2) as job:
        if not wait_for(job, MOMENTS[trial % len(MOMENTS)], dice):
            lost = ended(job, (0,))
            return Outcome("complete", lost + (difference(run, undisturbed) if not lost else []), trials=0)
        hit = moment(run, job.began)
        sent = time.monotonic()
        if trial % 2:
            kill(job.rank(dice.randrange(2)), signal.SIGUSR1)
        else:
            kill(psutil.Process(job.process.pid), signal.SIGTERM)
        lost = ended(job, None if hit == "start" else _codes(run, trials, EXIT_CODE))
        if hit != "start" and not lost and job.ended_at - sent > STOPS_WITHIN:
            lost.append(f"it took {job.ended_at - sent:.0f} seconds to stop")
        return Outcome(hit, lost + start_of(run, undisturbed))


def _codes(run: Path, trials: int, code: int) -> tuple[int, ...]:
    """A signal that comes in the last step finds a run that completes."""
    late = last_step(run / "metrics.jsonl") >= chain_steps(trials) - 1
    return (code, 0) if late else (code,)


def sigterm_finish(place: Place, trials: int) -> list[str]:
    run, undisturbed = _chain(place, "sigterm", trials)
    return complete(Job(place.recipe(chain_steps(trials)), run, 2), undisturbed)


def full_disk(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A small file system that fills up while training; where none can be mounted, a bound on the size of files."""
    undisturbed, after = place.undisturbed(1, STEPS), dice.randrange(1, STEPS - 2)
    with small_disk(place.root / f"full-disk-{trial}", 64) as mounted:
        run = place.root / f"full-disk-{trial}" / "run"
        with Job(place.recipe(STEPS), run) as job:
            if not job.until(lambda: last_step(run / "metrics.jsonl") >= after):
                return Outcome("complete", ended(job, (0,)))
            hit = moment(run, job.began)
            if mounted:
                ballast = max(0, shutil.disk_usage(run).free - dice.randrange(200_000))
                with contextlib.suppress(OSError), (run.parent / "ballast").open("wb", buffering=0) as file:
                    file.write(bytes(ballast))  # full at the latest when the run itself takes some of it
            else:
                bound = dice.randrange(1_000, 100_000)
                resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (bound, bound))
            lost = ended(job)
        (run.parent / "ballast").unlink(missing_ok=True)
        lost += complete(job, undisturbed)
    return Outcome(f"{hit}, {'disk' if mounted else 'file size'}", lost)


def read_only(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """The run's folders lose their write permission in the middle."""
    undisturbed, run = place.undisturbed(1, STEPS), place.root / f"read-only-{trial}"
    after = dice.randrange(1, STEPS - 2)
    with Job(place.recipe(STEPS), run, obeys_modes=True) as job:
        if not job.until(lambda: last_step(run / "metrics.jsonl") >= after):
            return Outcome("complete", ended(job, (0,)))
        hit = moment(run, job.began)
        folders = [run, *(path for path in run.iterdir() if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        lost = ended(job)
        for folder in folders:
            folder.chmod(0o755)
    return Outcome(hit, lost + complete(job, undisturbed))


def damaged(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A file of the newest checkpoint is cut, gets a bit flipped, or is gone; the one before serves."""
    undisturbed, run = place.undisturbed(1, STEPS), place.root / f"damaged-{trial}"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "final")
    newest = max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name[5:]))
    victim = dice.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(victim.read_bytes())
    how = ("cut", "bit flip", "gone")[trial % 3]
    if how == "gone":
        victim.unlink()
    elif how == "cut":
        victim.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        victim.write_bytes(content)
    return Outcome(how, complete(Job(place.recipe(STEPS), run), undisturbed))


def lost_shard(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A shard is cut short under a training that reads it, or is gone when the training continues; then it is back."""
    undisturbed, corpus = place.undisturbed(1, STEPS), place.root / f"lost-shard-{trial}-shards"
    run = place.root / f"lost-shard-{trial}"
    shutil.copytree(place.corpus, corpus, dirs_exist_ok=True)
    shard = dice.choice(sorted(corpus.glob("train-*.tar")))
    recipe = place.recipe(STEPS, corpus, name=f"lost-shard-{trial}-recipe")
    how = ("cut", "gone")[trial % 2]
    with Job(recipe, run) as job:
        if not job.until(lambda: last_step(run / "metrics.jsonl") >= 2):
            return Outcome("complete", ended(job, (0,)))
        kept, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
        if how == "cut":
            os.truncate(shard, dice.randrange(len(kept) // 2))
        else:
            shard.unlink()
            kill(psutil.Process(job.process.pid))
        lost = ended(job)
    if how == "gone":
        with Job(recipe, run) as without:
            lost += ended(without, (2,))
    shard.write_bytes(kept)
    os.utime(shard, ns=(stamp, stamp))
    return Outcome(how, lost + complete(job, undisturbed))


def asleep(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A rank is stopped for some seconds and goes on: nothing happens."""
    undisturbed, run = place.undisturbed(2, STEPS), place.root / f"asleep-{trial}"
    with Job(place.recipe(STEPS), run, 2) as job:
        if not wait_for(job, "any", dice):
            return Outcome("complete", ended(job, (0,)))
        hit, sleeper = moment(run, job.began), job.rank(dice.randrange(2))
        kill(sleeper, signal.SIGSTOP)
        time.sleep(dice.uniform(1, 4))
        kill(sleeper, signal.SIGCONT)
        lost = ended(job, (0,), within=600)
    return Outcome(hit, lost + (difference(run, undisturbed) if not lost else []))


def asleep_for_ever(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """A rank stops answering: the others give up after engine.warm_timeout_seconds, in a save or an evaluation after
    engine.timeout_seconds, and the launcher ends it."""
    undisturbed, run = place.undisturbed(2, STEPS), place.root / f"asleep-for-ever-{trial}"
    timeouts = "engine.warm_timeout_seconds=8", f"engine.timeout_seconds={GIVE_UP}"
    with Job(place.recipe(STEPS), run, 2, timeouts) as job:
        if not wait_for(job, "step", dice):
            return Outcome("complete", ended(job, (0,)))
        warm = last_step(run / "metrics.jsonl") + WARM_AFTER
        job.until(lambda: last_step(run / "metrics.jsonl") >= warm)
        hit = moment(run, job.began)
        kill(job.rank(dice.randrange(2)), signal.SIGSTOP)
        lost = ended(job, (1,), within=180)
    return Outcome(hit, lost + complete(Job(job.recipe, run, 2), undisturbed))


CLOCK_RANKS = 2
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_JUMP"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *place) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (place) *place = exact.tv_sec;
    return exact.tv_sec;
}
"""


def clock_jumps(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """The time of day jumps back and forth by up to a day while training: a library in front of the system's clock."""
    undisturbed, run = place.undisturbed(CLOCK_RANKS, STEPS), place.root / f"clock-{trial}"
    source, library, offset = (place.root / f"clock.{end}" for end in ("c", "so", "offset"))
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    offset.write_text("0")
    environment = {"LD_PRELOAD": str(library), "CLOCK_JUMP": str(offset)}
    jumps = 0
    with Job(place.recipe(STEPS), run, CLOCK_RANKS, environment=environment) as job:
        while job.process.poll() is None:
            time.sleep(0.2)
            offset.write_text(str(dice.choice([0, 3600, -3600, 86_400, -86_400, 1, -1])))
            jumps += 1
        lost = ended(job, (0,), within=600)
    return Outcome("step", lost + (difference(run, undisturbed) if not lost else []))


NAN = """
import os, sys
from vlscale.cli import main
from vlscale.train.inputs import Inputs
real, calls = Inputs.student, []
def student(self, batch):
    inputs = real(self, batch)
    calls.append(1)
    if len(calls) == int(os.environ["SPOIL"]) and os.environ.get("RANK", "0") == "0":
        inputs["pixels"] = inputs["pixels"] * float("nan")
    return inputs
Inputs.student = student
main(["train", *sys.argv[1:]])
"""


def not_a_number(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """Pictures of one step are NaN: `stop` ends with 1 and saves nothing of it; without the fault the run goes on."""
    undisturbed, run = place.undisturbed(1, STEPS), place.root / f"nan-{trial}"
    script, step = place.root / "nan.py", dice.randrange(1, STEPS + 1)
    script.write_text(NAN)
    with Job(place.recipe(STEPS), run, environment={"SPOIL": str(step)}, script=script) as job:
        lost = ended(job, (1,), within=600)
        if not (run / f"bad-{step}.json").is_file():
            lost.append(f"no bad-{step}.json: {job.said()}")
    with contextlib.suppress(OSError):
        (run / f"bad-{step}.json").unlink()
    return Outcome(f"step {step}", lost + complete(job, undisturbed))


def other_world_sizes(place: Place, trial: int, dice: random.Random, trials: int) -> Outcome:
    """4, 2, 1 and 4 ranks over one training, each ended by the stop file: the same batches, losses to 1e-5."""
    steps, still = 12, "model.dropout=0"  # ranks that were not there before draw other dropout
    undisturbed, run = place.undisturbed(1, steps, still), place.root / f"ranks-{trial}"
    overrides, lost, sizes = ("train.elastic=true", still), [], []
    for ranks in (4, 2, 1):
        before = last_step(run / "metrics.jsonl") if run.is_dir() else 0
        with Job(place.recipe(steps), run, ranks, overrides) as job:
            job.until(lambda: last_step(run / "metrics.jsonl") > before)  # noqa: B023
            (run / STOP_FILE).touch()
            lost += ended(job, (EXIT_CODE,), within=600)
        sizes.append(f"{ranks}: {len(read_metrics(run / 'metrics.jsonl'))} steps")
    return Outcome(
        ", ".join(sizes), lost + complete(Job(place.recipe(steps), run, 4, overrides), undisturbed, exact=False)
    )


FAULTS = {
    "kill": Fault("kill -9 of a rank, of all, of the launcher", kill_nine, kill_nine_finish),
    "sigterm": Fault("SIGTERM to the job, SIGUSR1 to a rank", sigterm, sigterm_finish),
    "full-disk": Fault("the disk is full", full_disk),
    "read-only": Fault("the folder becomes read-only", read_only),
    "damaged": Fault("the newest checkpoint is damaged", damaged),
    "lost-shard": Fault("a shard is cut short or gone", lost_shard),
    "asleep": Fault("a rank sleeps for seconds", asleep),
    "asleep-for-ever": Fault("a rank never answers again", asleep_for_ever),
    "clock": Fault("the clock jumps by up to a day", clock_jumps),
    "nan": Fault("NaN at a step", not_a_number),
    "ranks": Fault("4, 2, 1, 4 ranks over one training", other_world_sizes),
}
