"""`vlscale report`: one HTML page of one or several runs."""

from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.outputs import prepare


def report(
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, in the order to compare them.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Shard urls; the first run's data.val by default.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="Cells of a method study; alone, or beside the runs.", metavar="FILE.json")
    ] = None,
    title: Annotated[str, typer.Option()] = "vlscale report",
) -> None:
    """Curves, retrieval tables, galleries, and a method study, in one self-contained file."""
    from vlscale.evaluate.run import run_config
    from vlscale.progress import LINE_SECONDS, Progress
    from vlscale.report.collect import collect_run
    from vlscale.report.study import read_study, study_of
    from vlscale.report.write import write_report, write_study_page

    prepare("--out", out)
    for run in runs or []:
        if not run.is_dir():
            raise ValueError(f"report: {run} is no folder; expected runs")
    methods = None if study is None else study_of(read_study(study))
    if not runs:
        if methods is None:
            raise ValueError("report: got neither runs nor --study; name run folders, or the cells of a study")
        print(f"report: {write_study_page(out, methods, title).resolve()}")
        return
    if data is None:
        config = run_config(str(runs[0]))
        data = config and config.data.val
    if not data:
        raise ValueError(f"report: {runs[0]} names no data.val; give the shards to evaluate on with --data")
    reports = []
    for run in runs:
        with Progress(f"embedding {run.name}", None, "samples", line_seconds=LINE_SECONDS) as progress:
            reports.append(collect_run(run.name, run, data, progress))
    print(f"report: {write_report(out, reports, title=title, methods=methods).resolve()}")
