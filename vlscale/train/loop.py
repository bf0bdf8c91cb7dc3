"""One run: from a config and a folder to `final/`, through checkpoints. Every rank runs this together."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from vlscale.data.batch import Batch
from vlscale.data.samples import check_caption_field, open_corpus
from vlscale.data.stream import open_train_corpus
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.models.hf_folder import save_folder
from vlscale.progress import Progress
from vlscale.sections import Config
from vlscale.train.bad_numbers import BadSteps, StoppedByBadNumbers
from vlscale.train.best import Best
from vlscale.train.checkpoint import Checkpoints, Layout, Restored
from vlscale.train.checkpoint_folder import CHECKPOINTS
from vlscale.train.checkpoint_remote import Remote, open_remote
from vlscale.train.diagnostics import Diagnostics
from vlscale.train.disk_faults import CannotWrite, optional, stop, written_by_first
from vlscale.train.engine import Engine
from vlscale.train.epochs import check_same_steps, tell_steps, with_steps
from vlscale.train.finished import asked_otherwise, is_complete, misfit, tell_changes
from vlscale.train.frozen_teachers import stamp_facts
from vlscale.train.key_hash import batch_facts
from vlscale.train.metrics_file import MetricsFile
from vlscale.train.monitors import Monitors, check_monitors
from vlscale.train.setup import (
    Parts,
    build_parts,
    build_probe,
    build_stream,
    check_begun_data,
    check_same_data,
    check_teachers,
    claim_folder,
    corpus_of,
)
from vlscale.train.stop import StoppedBySignal, StopWatch
from vlscale.train.stragglers import Stragglers
from vlscale.train.teacher_reliability import weighed
from vlscale.train.terminal import Note
from vlscale.train.trainer import Trainer
from vlscale.train.validate import Validation
from vlscale.train.watchdog import Watchdog


@dataclass(frozen=True)
class Job:
    """What one run is to do, where, and who takes part; `name` is what the log calls it."""

    config: Config
    folder: Path
    ranks: Ranks
    name: str


@dataclass(frozen=True)
class Opened:
    """A run ready for its next step."""

    job: Job
    parts: Parts
    engine: Engine
    checkpoints: Checkpoints
    restored: Restored | None
    batches: Iterator[Batch]

    @property
    def step(self) -> int:
        """The last one that was made."""
        return self.restored.step if self.restored else 0

    def trainer(self) -> Trainer:
        job, bad = self.job, self.restored.bad_steps if self.restored else BadSteps()
        config = weighed(job.config, self.parts, job.ranks)
        return Trainer(config, job.folder, self.parts, self.engine, self.checkpoints, job.ranks, bad)

    def save_model(self, folder: Path) -> None:
        weights, parts, ranks = self.engine.weights(), self.parts, self.job.ranks
        with written_by_first(folder, ranks):
            if ranks.first:
                save_folder(folder, parts.model, weights, parts.tokenizer, parts.image_processor)


@contextmanager
def open_run(job: Job, before: int | None = None, remote: Remote | None = None) -> Iterator[Opened]:
    """From its newest complete checkpoint, of a step below `before`, or from the start. Nothing is written. `remote`:
    where its checkpoints are copied."""
    config, folder, ranks = job.config, job.folder, job.ranks
    manifest = open_train_corpus(config.data, ranks.rank, ranks.size)
    check_same_data(manifest, ranks)  # what is wrong with the data is said before a model is built
    check_caption_field(manifest, config.data)
    check_monitors(config.log)
    config = with_steps(config, manifest.num_samples)
    tell_steps(job.name, config, manifest.num_samples)
    job = replace(job, config=config)
    parts = build_parts(config, folder, ranks, manifest)
    engine = Engine(parts.model, config, ranks)
    layout = Layout(ranks.size, config.engine.zero_stage, config.engine.dtype)
    facts = parts.stamp and {"teachers": stamp_facts(parts.stamp)}
    checkpoints = Checkpoints(folder / CHECKPOINTS, layout, engine, ranks, config.train, remote, facts)
    try:
        try:
            restored = checkpoints.load(before)
        except (RuntimeError, LookupError, AssertionError, TypeError) as error:  # of DeepSpeed, torch
            raise misfit(folder, job.config, error) from None
        stream = build_stream(config, parts, ranks, restored and restored.stream_state)
        if restored is not None:
            began = ranks.from_first((corpus_of(folder) or {}).get("samples") if ranks.first else None)
            check_same_steps(config.train, began, manifest.num_samples)
        elif config.data.changed_shards == "refuse":
            check_begun_data(manifest, folder, ranks)
        with closing(iter(stream)) as batches:
            yield Opened(job, parts, engine, checkpoints, restored, batches)
    finally:
        checkpoints.close()
        engine.close()


def train_run(job: Job, *, resume: bool) -> None:
    """Train to the last step; a run whose `final/` exists is complete and left alone."""
    config, folder, ranks, name = job.config, job.folder, job.ranks, job.name
    if resume and is_complete(folder):
        get_logger().info("%s: complete, nothing to do%s", name, asked_otherwise(folder, config))
        return
    if config.data.val is not None:  # which the first evaluation opens, perhaps hours later
        check_caption_field(open_corpus(config.data.val, config.data, tell=False), config.data)
    remote = open_remote(folder / CHECKPOINTS, config.train, name, ranks, resume=resume)
    timeouts = config.engine.timeout_seconds, min(config.engine.timeout_seconds, config.engine.warm_timeout_seconds)
    with (
        Watchdog(folder, ranks, config.engine.step_timeout_seconds, timeouts) as watchdog,
        open_run(job, remote=remote) as run,
        watchdog.ending_at_once(),
    ):
        watchdog.enter("data", run.step + 1)
        first = next(run.batches)
        check_teachers(run.parts, config.objective, first, ranks)
        try:
            with written_by_first(folder, ranks):
                if ranks.first:
                    tell_changes(name, folder, config)
                    claim_folder(folder, run.job.config, run.parts)
            _steps(run, chain([first], run.batches), watchdog)
            watchdog.enter("saving after the last", run.job.config.train.max_steps)
            run.save_model(folder / "final")
            run.checkpoints.finish()
        except CannotWrite as fault:
            stop(f"{fault}; make room, and continue with --resume", ranks)
        if ranks.first:
            get_logger().info("%s: finished, model in %s", name, folder / "final")


def device_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that tensors took on a GPU so far: rank 0's, of metrics.jsonl."""
    return {"peak_memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _steps(run: Opened, batches: Iterator[Batch], watchdog: Watchdog) -> None:
    config, folder, ranks, name = run.job.config, run.job.folder, run.job.ranks, run.job.name
    train, first_step, engine = config.train, run.step, run.engine
    if first_step:
        get_logger().info("%s: continuing after step %d", name, first_step)
    with written_by_first(folder, ranks):
        metrics = MetricsFile(folder / "metrics.jsonl", keep_until=first_step) if ranks.first else None
        monitors = Monitors(config.log, folder, name, keep_until=first_step) if ranks.first else None
        validation = Validation(config, folder, run.parts, ranks, keep_until=first_step)
        best = Best(folder, train, ranks, keep_until=first_step) if train.keep_best else None
    trainer = run.trainer()
    diagnostics = Diagnostics(trainer.step_parts, build_probe(config, run.parts, ranks), config.log.diagnostics_every)
    stragglers = Stragglers(ranks, config.log.every)
    draws, note = trainer.draws(batches), Note()
    with (
        StopWatch(ranks, folder, train.checkpoint_minutes) as stop_watch,
        Progress(
            name,
            train.max_steps,
            "pairs",
            shown=ranks.first and config.log.progress,
            done=first_step,
            lines_every=config.log.every,
        ) as progress,
    ):
        for step in range(first_step + 1, train.max_steps + 1):
            started = time.perf_counter()
            stragglers.begin()
            watchdog.enter("data", step)
            drawn = next(draws)
            watchdog.enter("step", step)
            try:
                values = trainer.step(step, drawn)
            except StoppedByBadNumbers:
                run.checkpoints.wait()  # the one of a good step before
                raise
            if diagnostics.due(step):
                values |= diagnostics.run()
            facts = batch_facts(drawn, ranks)
            seconds = time.perf_counter() - started
            values |= stragglers.compare(step)
            if metrics is not None:
                line = {"step": step} | values | {"lr": trainer.rate(step), "samples": step * train.pairs_a_step}
                line |= {"seconds": seconds, "epoch": drawn.last.epoch} | device_memory(ranks.device) | facts
                metrics.write(line)
                with optional("what monitors show"):
                    monitors.write(step, line)
            progress.advance(units=train.pairs_a_step, note=note.of(values))
            if validation.due(step):
                watchdog.enter("validation", step)
                measured = validation.run(step, engine.module)
                if monitors is not None:
                    with optional("what monitors show"):
                        monitors.write(step, measured, "eval")
                    note.validated(step, measured)
                if best is not None:
                    best.consider(step, measured, run.save_model)
            asked = stop_watch.asked(busy=run.checkpoints.busy)
            run.checkpoints.poll(busy_anywhere=asked.busy)
            if asked.save or step == train.max_steps or step % train.checkpoint_every == 0:
                watchdog.enter("checkpoint", step)
                run.checkpoints.save(step, drawn.last.state, trainer.bad_steps)
                if asked.by:
                    run.checkpoints.finish(stopping=step < train.max_steps)
                stop_watch.saved(stopping=bool(asked.by))
            if asked.by and step < train.max_steps:
                get_logger().info("%s: stopped by %s after step %d; continue with --resume", name, asked.by, step)
                raise StoppedBySignal
        run.checkpoints.wait()
    if metrics is not None:
        metrics.close()
        with optional("what monitors show"):
            monitors.close()
