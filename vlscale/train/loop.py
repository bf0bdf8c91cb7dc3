"""One run: from a config and a folder to `final/`, through checkpoints. Every rank runs this together."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.samples import open_corpus
from vlscale.data.stream import TrainStream
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.models.hf_folder import save_folder
from vlscale.progress import Progress
from vlscale.sections import Config
from vlscale.train.checkpoint import Layout, load_checkpoint, save_checkpoint
from vlscale.train.engine import Engine
from vlscale.train.key_hash import batch_facts
from vlscale.train.metrics_file import MetricsFile
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import Parts, build_parts, build_stream, check_same_data, claim_folder
from vlscale.train.step import joint_step
from vlscale.train.stop import StoppedBySignal, StopWatch
from vlscale.train.validate import Validation


@dataclass(frozen=True)
class Job:
    """What one run is to do, where, and who takes part; `name` is what the log calls it."""

    config: Config
    folder: Path
    ranks: Ranks
    name: str


def train_run(job: Job, *, resume: bool) -> None:
    """Train to `train.max_steps`; a run whose `final/` exists is complete and left alone."""
    config, folder, ranks, name = job.config, job.folder, job.ranks, job.name
    if resume and (folder / "final").is_dir():
        get_logger().info("%s: complete, nothing to do", name)
        return
    open_corpus(config.data.train, config.data, "data.train")  # what is wrong with it is said before a model is built
    parts = build_parts(config, folder, ranks)
    engine = Engine(parts.model, config, ranks)
    layout = Layout(ranks.size, config.engine.zero_stage, config.engine.dtype)
    restored = load_checkpoint(folder / "checkpoints", layout, engine.load, ranks)
    stream = build_stream(config, parts, ranks, restored and restored.stream_state)
    check_same_data(stream.manifest.hash, ranks)
    claim_folder(folder, config, parts.tokenizer, ranks)
    try:
        _steps(job, parts, stream, engine, layout, first_step=restored.step if restored else 0)
        weights = engine.weights()
        if ranks.first:
            save_folder(folder / "final", parts.model, weights, parts.tokenizer, parts.image_processor)
            get_logger().info("%s: finished, model in %s", name, folder / "final")
        ranks.barrier()
    finally:
        engine.close()


def _steps(job: Job, parts: Parts, stream: TrainStream, engine: Engine, layout: Layout, first_step: int) -> None:
    config, folder, ranks, name = job.config, job.folder, job.ranks, job.name
    if first_step:
        get_logger().info("%s: continuing after step %d", name, first_step)
    metrics = MetricsFile(folder / "metrics.jsonl", keep_until=first_step) if ranks.first else None
    validation = Validation(config, folder, parts, ranks, keep_until=first_step)
    train = config.train
    with (
        StopWatch(ranks) as stop_watch,
        closing(iter(stream)) as batches,
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
            batch = next(batches)
            lr = learning_rate(config.optim, step, train.max_steps)
            values = joint_step(engine, parts.inputs, batch, config.objective, ranks, lr, train.chunk_size)
            facts = batch_facts(batch, ranks)
            seconds = time.perf_counter() - started
            if metrics is not None:
                samples = step * train.global_batch_size
                line = (
                    {"step": step} | values | {"lr": lr, "samples": samples, "seconds": seconds, "epoch": batch.epoch}
                )
                metrics.write(line | facts)
            progress.advance(units=train.global_batch_size, note=f"loss {values['loss']:.4f}")
            if validation.due(step):
                validation.run(step, engine.module)
            stopping = stop_watch.asked()
            if stopping or step == train.max_steps or step % train.checkpoint_every == 0:
                keep = train.keep_checkpoints
                save_checkpoint(folder / "checkpoints", step, layout, batch.state, engine.save, ranks, keep)
            if stopping and step < train.max_steps:
                get_logger().info("%s: stopped by a signal after step %d; continue with --resume", name, step)
                raise StoppedBySignal
    if metrics is not None:
        metrics.close()
