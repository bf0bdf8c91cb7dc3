"""Gather what a report shows of runs and models: metrics, measures and embeddings, the pictures."""

import os
from dataclasses import replace
from pathlib import Path

from vlscale.config import validate
from vlscale.data.samples import read_samples
from vlscale.evaluate.run import EvalRequest, evaluate_model, run_config
from vlscale.logging import get_logger
from vlscale.models.dual_encoder import final_folder
from vlscale.models.hub_names import check_source
from vlscale.models.towers import check_weights
from vlscale.progress import Progress
from vlscale.report.runs import Images, RunReport, load_metrics
from vlscale.sections import Config


def collect_run(
    name: str,
    model: str | Path,
    data: list[str],
    progress: Progress | None = None,
    *,
    like: Config | None = None,
    images: Images | None = None,
) -> RunReport:
    """Evaluate a finished run, or a model, on the shards `data`, which are read and measured as the config `like` says:
    what is to stand side by side shares one. By default the run's own. `images`: the pictures, where they were read
    before."""
    own = run_config(str(model)) or Config()
    like = like or own
    annotations, cache = (path and Path(path) for path in (like.eval.annotations, like.eval.cache))
    request = EvalRequest(
        str(model), data, like.eval.protocol, like.eval.labels, annotations=annotations, cache=cache,
        rerank=own.eval.rerank, reading=like.data,
    )  # fmt: skip
    corpus, result = evaluate_model(request, progress)
    alone = replace(corpus, reranked=None)  # galleries show what the dual encoder finds
    folder = run_folder(str(model))
    images = read_images(data, like) if images is None else images
    return RunReport(name, folder, load_metrics(folder), result, alone, images, cache)


def read_images(data: list[str], config: Config) -> dict[str, bytes]:
    """The encoded picture of every sample, by key."""
    return {sample.key: sample.image for sample in read_samples(data, config.data)}


def run_folder(model: str) -> Path:
    """The run that a `final/` lies in, else the folder itself."""
    path = Path(model)
    return path.parent if path.name == "final" and (path.parent / "config.yaml").is_file() else path


def check_models(models: list[str]) -> None:
    """All of them before any is embedded: raises ValueError for what is neither a finished run, a model's folder nor
    the name of one on the hub."""
    for model in models:
        here, hub_name = Path(model), not model.startswith((".", "~", "/")) and model.count("/") == 1
        if not here.is_dir() and (not hub_name or here.parent.is_dir()):
            raise ValueError(f"report: {model} is no folder; expected runs, or models in Hugging Face's form")
    for model in models:
        check_source("report", model)
        if Path(model).is_dir():
            check_weights(final_folder(model))


def short_names(models: list[str]) -> list[str]:
    """The last parts of their paths, as many as tell them apart; `final/` is called as its run."""
    places = [os.path.abspath(run_folder(model)) for model in models]
    twice = next((model for model, place in zip(models, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"report: {twice} is named twice; name each run or model once")
    parts = [Path(place).parts for place in places]
    tails = [["/".join(each[-length:]) for each in parts] for length in range(1, max(map(len, parts)) + 1)]
    return next(names for names in tails if len(set(names)) == len(names))


def shared_settings(models: list[str], **chosen) -> Config:
    """How all of them are read and measured: as the first run says, but for what is `chosen` (keys of `eval`, and
    caption_key; None: not chosen). Runs that say otherwise are named."""
    configs = {model: config for model in models if (config := run_config(model)) is not None}
    first = next(iter(configs.values()), Config())
    chosen = {key: value for key, value in chosen.items() if value is not None}
    parts = {"data": first.data.model_dump(), "eval": first.eval.model_dump()}
    for key, value in chosen.items():
        parts["data" if key == "caption_key" else "eval"][key] = value
    like = validate(first.model_dump() | parts, "report")
    for model, config in configs.items():
        for section, key in (("data", "caption_key"), ("eval", "protocol"), ("eval", "labels")):
            own, shared = (getattr(getattr(each, section), key) for each in (config, like))
            if own != shared and key not in chosen:
                get_logger().info("%s has %s.%s=%s; here all are measured by %s", model, section, key, own, shared)
    return like
