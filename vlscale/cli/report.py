"""`vlscale report`: one HTML page of one or several runs."""

from pathlib import Path
from typing import Annotated

import typer

from vlscale.cli.outputs import prepare


def report(
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, exported folders, folders or hub names of other models; in the order to compare."),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Shard urls; the first run's data.val by default.")] = None,
    protocol: Annotated[str | None, typer.Option(help="As eval.protocol, for all; the first run's by default.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="As eval.labels, likewise; repeat for more.")] = None,
    caption_key: Annotated[str | None, typer.Option(help="As data.caption_key, likewise.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="As eval.annotations, likewise.")] = None,
    cache: Annotated[Path | None, typer.Option(help="As eval.cache, likewise.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="Cells of a method study; alone, or beside the runs.", metavar="FILE.json")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Of the runs, the one that the last is compared with; that before it by default.")
    ] = None,
    title: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Curves, retrieval tables, galleries, and a method study, in one self-contained file. All runs and models are
    measured alike: the same shards, captions and protocol."""
    from vlscale.progress import LINE_SECONDS, Progress
    from vlscale.report import collect
    from vlscale.report.study import read_study, study_of
    from vlscale.report.write import write_report, write_study_page

    prepare("--out", out)
    names = collect.short_names(runs) if runs else []
    collect.check_models(runs or [])
    if against is not None and against not in (runs or [])[:-1]:
        raise ValueError(
            f"--against {against}: expected one of the runs before the last: {', '.join((runs or [])[:-1])}"
        )
    titled = {} if title is None else {"title": title}
    methods = None if study is None else study_of(read_study(study))
    if not runs:
        if methods is None:
            raise ValueError("report: got neither runs nor --study; name run folders, or the cells of a study")
        print(f"report: {write_study_page(out, methods, **titled).resolve()}")
        return
    like = collect.shared_settings(
        runs,
        protocol=protocol,
        labels=label,
        caption_key=caption_key,
        annotations=annotations and str(annotations),
        cache=cache and str(cache),
    )
    data = data or like.data.val
    if not data:
        raise ValueError(f"report: no data.val in {', '.join(runs)}; give the shards to evaluate on with --data")
    reports = []
    for name, run in zip(names, runs, strict=True):
        images = reports[0].images if reports else None
        with Progress(f"embedding {name}", None, "samples", line_seconds=LINE_SECONDS) as progress:
            reports.append(collect.collect_run(name, run, data, progress, like=like, images=images))
    chosen = names[runs.index(against)] if against else None
    print(f"report: {write_report(out, reports, against=chosen, methods=methods, **titled).resolve()}")
