"""One run: from a config and a folder to `final/`, through checkpoints. Every rank runs this together."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vlscale.data.batch import Batch
from vlscale.data.samples import open_corpus
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.models.hf_folder import save_folder
from vlscale.progress import Progress
from vlscale.sections import Config
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.best import Best
from vlscale.train.checkpoint import Checkpoints, Layout, Restored
from vlscale.train.diagnostics import Diagnostics
from vlscale.train.engine import Engine
from vlscale.train.key_hash import batch_facts
from vlscale.train.metrics_file import MetricsFile
from vlscale.train.monitors import Monitors, check_monitors
from vlscale.train.setup import (
    Parts,
    build_parts,
    build_probe,
    build_stream,
    check_same_data,
    check_teachers,
    claim_folder,
)
from vlscale.train.stop import StoppedBySignal, StopWatch
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
        return Trainer(job.config, job.folder, self.parts, self.engine, self.checkpoints, job.ranks, bad)

    def save_model(self, folder: Path) -> None:
        weights, parts = self.engine.weights(), self.parts
        if self.job.ranks.first:
            save_folder(folder, parts.model, weights, parts.tokenizer, parts.image_processor)
        self.job.ranks.barrier()


@contextmanager
def open_run(job: Job, before: int | None = None) -> Iterator[Opened]:
    """From its newest complete checkpoint, of a step below `before`, or from the start. Nothing is written."""
    config, folder, ranks = job.config, job.folder, job.ranks
    open_corpus(config.data.train, config.data, "data.train")  # what is wrong with it is said before a model is built
    check_monitors(config.log)
    parts = build_parts(config, folder, ranks)
    engine = Engine(parts.model, config, ranks)
    try:
        layout = Layout(ranks.size, config.engine.zero_stage, config.engine.dtype)
        checkpoints = Checkpoints(folder / "checkpoints", layout, engine, ranks, config.train)
        restored = checkpoints.load(before)
        stream = build_stream(config, parts, ranks, restored and restored.stream_state)
        check_same_data(stream.manifest.hash, ranks)
        with closing(iter(stream)) as batches:
            yield Opened(job, parts, engine, checkpoints, restored, batches)
    finally:
        engine.close()


def train_run(job: Job, *, resume: bool) -> None:
    """Train to `train.max_steps`; a run whose `final/` exists is complete and left alone."""
    config, folder, ranks, name = job.config, job.folder, job.ranks, job.name
    if resume and (folder / "final").is_dir():
        get_logger().info("%s: complete, nothing to do", name)
        return
    with Watchdog(folder, ranks, config.engine.step_timeout_seconds) as watchdog, open_run(job) as run:
        watchdog.enter("data", run.step + 1)
        first = next(run.batches)
        check_teachers(run.parts, first, ranks)
        claim_folder(folder, config, run.parts.tokenizer, ranks)
        _steps(run, chain([first], run.batches), watchdog)
        watchdog.enter("saving after the last", config.train.max_steps)
        run.save_model(folder / "final")
        if ranks.first:
            get_logger().info("%s: finished, model in %s", name, folder / "final")


def _steps(run: Opened, batches: Iterator[Batch], watchdog: Watchdog) -> None:
    config, folder, ranks, name = run.job.config, run.job.folder, run.job.ranks, run.job.name
    train, first_step, engine = config.train, run.step, run.engine
    if first_step:
        get_logger().info("%s: continuing after step %d", name, first_step)
    metrics = MetricsFile(folder / "metrics.jsonl", keep_until=first_step) if ranks.first else None
    monitors = Monitors(config.log, folder, name, keep_until=first_step) if ranks.first else None
    validation = Validation(config, folder, run.parts, ranks, keep_until=first_step)
    best = Best(folder, train.keep_best, ranks, keep_until=first_step) if train.keep_best else None
    trainer = run.trainer()
    diagnostics = Diagnostics(trainer.step_parts, build_probe(config, run.parts, ranks), config.log.diagnostics_every)
    pairs = trainer.with_test_batch(batches)
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
            watchdog.enter("data", step)
            batch, test_batch = next(pairs)
            watchdog.enter("step", step)
            values = trainer.step(step, batch, test_batch)
            if diagnostics.due(step):
                values |= diagnostics.run()
            facts = batch_facts(batch, ranks)
            seconds = time.perf_counter() - started
            if metrics is not None:
                line = {"step": step} | values | {"lr": trainer.rate(step), "samples": step * train.global_batch_size}
                line |= {"seconds": seconds, "epoch": batch.epoch} | facts
                metrics.write(line)
                monitors.write(step, line)
            progress.advance(units=train.global_batch_size, note=f"loss {values['loss']:.4f}")
            if validation.due(step):
                watchdog.enter("validation", step)
                measured = validation.run(step, engine.module)
                if monitors is not None:
                    monitors.write(step, measured, "eval")
                if best is not None:
                    best.consider(step, measured, run.save_model)
            asked = stop_watch.asked()
            if asked.save or step == train.max_steps or step % train.checkpoint_every == 0:
                watchdog.enter("checkpoint", step)
                run.checkpoints.save(step, batch.state, trainer.bad_steps)
                stop_watch.saved(stopping=bool(asked.by))
            if asked.by and step < train.max_steps:
                get_logger().info("%s: stopped by %s after step %d; continue with --resume", name, asked.by, step)
                raise StoppedBySignal
    if metrics is not None:
        metrics.close()
        monitors.close()
