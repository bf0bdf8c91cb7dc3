"""One run: from a config and a folder to `final/`, through checkpoints. Every rank runs this together."""

import time
from contextlib import closing
from pathlib import Path

from vlscale.config import Config
from vlscale.data.samples import open_corpus
from vlscale.data.stream import TrainStream
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.models.hf_folder import save_folder
from vlscale.train.checkpoint import Layout, load_checkpoint, save_checkpoint
from vlscale.train.engine import Engine
from vlscale.train.key_hash import batch_key_hash
from vlscale.train.metrics_file import MetricsFile
from vlscale.train.progress import StepProgress
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import Parts, build_parts, build_stream, claim_folder
from vlscale.train.step import joint_step
from vlscale.train.validate import Validation


def train_run(config: Config, folder: Path, ranks: Ranks, *, resume: bool, name: str) -> None:
    """Train to `config.train.max_steps`; a run whose `final/` exists is complete and left alone."""
    if resume and (folder / "final").is_dir():
        get_logger().info("%s: complete, nothing to do", name)
        return
    manifest = open_corpus(config.data.train, config.data, "data.train")
    parts = build_parts(config, folder, ranks)
    engine = Engine(parts.model, config, ranks)
    layout = Layout(ranks.size, config.engine.zero_stage, config.engine.dtype, manifest.hash)
    restored = load_checkpoint(folder / "checkpoints", layout, engine.load, ranks)
    stream = build_stream(config, parts, ranks, restored and restored.stream_state)
    claim_folder(folder, config, parts.tokenizer, ranks)
    try:
        _steps(config, folder, ranks, parts, stream, engine, layout, restored.step if restored else 0, name)
        weights = engine.weights()
        if ranks.first:
            save_folder(folder / "final", parts.model, weights, parts.tokenizer, parts.image_processor)
            get_logger().info("%s: finished, model in %s", name, folder / "final")
        ranks.barrier()
    finally:
        engine.close()


def _steps(
    config: Config,
    folder: Path,
    ranks: Ranks,
    parts: Parts,
    stream: TrainStream,
    engine: Engine,
    layout: Layout,
    first_step: int,
    name: str,
) -> None:
    if first_step:
        get_logger().info("%s: continuing after step %d", name, first_step)
    metrics = MetricsFile(folder / "metrics.jsonl", keep_until=first_step) if ranks.first else None
    validation = Validation(config, folder, parts, ranks, keep_until=first_step)
    train = config.train
    with (
        closing(iter(stream)) as batches,
        StepProgress(name, first_step, train.max_steps, config.log, shown=ranks.first) as progress,
    ):
        for step in range(first_step + 1, train.max_steps + 1):
            started = time.perf_counter()
            batch = next(batches)
            lr = learning_rate(config.optim, step, train.max_steps)
            values = joint_step(engine, parts.inputs, batch, config.objective, ranks, lr)
            keys = batch_key_hash(batch.keys, batch.positions, ranks)
            seconds = time.perf_counter() - started
            if metrics is not None:
                samples = step * train.global_batch_size
                line = {"step": step} | values | {"lr": lr, "samples": samples, "seconds": seconds, "keys": keys}
                metrics.write(line | {"epoch": batch.epoch, "skipped": batch.skipped})
            progress.step(step, values["loss"], train.global_batch_size)
            if validation.due(step):
                validation.run(step, engine.module)
            if step == train.max_steps or step % train.checkpoint_every == 0:
                keep = train.keep_checkpoints
                save_checkpoint(folder / "checkpoints", step, layout, batch.state, engine.save, ranks, keep)
    if metrics is not None:
        metrics.close()
