"""`vlscale eval`: the retrieval table of a model on shards."""

import os
from pathlib import Path
from typing import Annotated, get_args

import typer

from vlscale.cli.outputs import prepare
from vlscale.sections import Protocol


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, its final/, or an exported folder.")],
    data: Annotated[list[str], typer.Option(help="Shard urls; repeat for more.")],
    protocol: Annotated[str, typer.Option(help=", ".join(get_args(Protocol)))] = "auto",
    label: Annotated[list[str] | None, typer.Option(help="Json field whose equal values are relevant.")] = None,
    caption_key: Annotated[str | None, typer.Option(help="As data.caption_key.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    annotations: Annotated[Path | None, typer.Option(help="Folder of CxC's csv files.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps ROUGE-L relevance.")] = None,
    rerank: Annotated[
        int | None, typer.Option(min=1, help="Nearest of each query that the fusion encoder scores.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write every number, with intervals, to this file.")] = None,
) -> None:
    """Cross-modal, single-modal and mixed retrieval."""
    from rich.console import Console

    from vlscale.evaluate.run import EvalRequest, evaluate_model
    from vlscale.evaluate.table import render
    from vlscale.progress import LINE_SECONDS, Progress

    prepare("--json", json)
    request = EvalRequest(model, data, protocol, label, caption_key, batch_size, annotations, cache, rerank)
    with Progress(f"embedding {Path(model).name}", None, "samples", line_seconds=LINE_SECONDS) as progress:
        _, result = evaluate_model(request, progress)
    if json is not None:
        partial = json.with_name(f".{json.name}.partial")
        partial.write_text(result.to_json())
        os.replace(partial, json)
    Console(width=None if Console().is_terminal else 100).print(render({Path(model).name: result}))
