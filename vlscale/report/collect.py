"""Gather what a report shows of a run: its metrics, its measures and embeddings, the pictures."""

from dataclasses import replace
from pathlib import Path

from vlscale.data.samples import read_samples
from vlscale.evaluate.run import EvalRequest, evaluate_model, run_config
from vlscale.progress import Progress
from vlscale.report.runs import RunReport, load_metrics
from vlscale.sections import Config


def collect_run(name: str, run: Path, data: list[str], progress: Progress | None = None) -> RunReport:
    """Evaluate a finished run on the shards `data` by the protocol of its own config."""
    config = run_config(str(run)) or Config()
    annotations, cache = (path and Path(path) for path in (config.eval.annotations, config.eval.cache))
    request = EvalRequest(
        str(run), data, config.eval.protocol, config.eval.labels, annotations=annotations, cache=cache,
        rerank=config.eval.rerank,
    )  # fmt: skip
    corpus, result = evaluate_model(request, progress)
    alone = replace(corpus, reranked=None)  # galleries show what the dual encoder finds
    return RunReport(name, run, load_metrics(run), result, alone, read_images(data, config))


def read_images(data: list[str], config: Config) -> dict[str, bytes]:
    """The encoded picture of every sample, by key."""
    return {sample.key: sample.image for sample in read_samples(data, config.data)}
