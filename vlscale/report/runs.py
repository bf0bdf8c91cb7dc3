"""What the report is made of: a run's training curve, its evaluation, and the embeddings and pictures behind it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.result import EvalResult
from vlscale.train.metrics_file import read_metrics

Images = Callable[[str], bytes] | Mapping[str, bytes]  # sample key -> an encoded picture


@dataclass(frozen=True)
class RunReport:
    name: str
    folder: Path
    metrics: list[dict[str, Any]]  # a step each: step, loss, parts, lr, samples (so far), seconds (of this step)
    result: EvalResult
    corpus: EmbeddedCorpus
    images: Images
    cache: Path | None = None  # as eval.cache

    def picture(self, key: str) -> bytes | None:
        """The sample's encoded picture, None where there is none."""
        try:
            return self.images(key) if callable(self.images) else self.images[key]
        except (KeyError, OSError):
            return None


def load_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The training steps of a run folder, in order, each step once."""
    steps = {line["step"]: line for line in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in line}
    return [steps[step] for step in sorted(steps)]


def check_runs(runs: list[RunReport], teacher: EmbeddedCorpus | None) -> None:
    """Runs can stand side by side only when they were measured on the same samples."""
    if not runs:
        raise ValueError("a report needs at least one run, got none")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs of a report need different names, got: {', '.join(names)}")
    first = runs[0].corpus
    others = [(f"run {run.name!r}", run.corpus) for run in runs[1:]]
    for name, corpus in [*others, *([("the teacher", teacher)] if teacher is not None else [])]:
        if corpus.keys != first.keys or corpus.captions != first.captions:
            raise ValueError(
                f"run {runs[0].name!r} and {name} were evaluated on different samples "
                f"({len(first.keys)} and {len(corpus.keys)}): evaluate both on the same shards"
            )


def number(value: Any) -> float:
    """A value of metrics.jsonl, where what is not finite stands as text; NaN for anything that is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
