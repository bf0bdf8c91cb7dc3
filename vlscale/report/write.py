"""The page: everything the runs have to show, gathered for the template and written as one file."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.paired import ENOUGH
from vlscale.evaluate.table import notes
from vlscale.logging import without_secrets
from vlscale.report import charts, study
from vlscale.report.gallery import galleries
from vlscale.report.relations import relations
from vlscale.report.runs import RunReport, check_runs, number
from vlscale.report.tables import sections
from vlscale.report.verdict import changes, endpoints, headline, reach, training_line

TEMPLATES = Path(__file__).parent / "templates"
PARTS = {  # parts of the loss in metrics.jsonl -> title
    "contrastive": "Consistency across modalities",
    "relation_image": "Relations between pictures",
    "relation_text": "Relations between captions",
    "view": "Two views of a picture",
    "caption": "Two captions of a sample",
    "iic": "Pictures with their teacher's",
    "ttc": "Captions with their teacher's",
    "itm": "Pictures and captions matched by the fusion encoder",
    "mlm": "Masked words of the captions",
    "kd": "Relations to the mixture of the teachers'",
    "kd_image": "The image teacher's relations to the mixture",
    "kd_text": "The text teacher's relations to the mixture",
}
DIAGNOSTICS = {  # of the probe batch, see vlscale.train.diagnostics
    "probe_gradient_cosine": "Gradients: cosine, consistency with relations (below 0 they conflict)",
    "probe_rank_correlation_image": "Pictures: rank correlation of relations with the teacher's",
    "probe_rank_correlation_text": "Captions: rank correlation of relations with the teacher's",
    "probe_relation_change_image": "Pictures: mean change of a relation from the teacher's",
    "probe_relation_change_text": "Captions: mean change of a relation from the teacher's",
    "probe_rank_correlation_fused": "Fused pairs: rank correlation of relations with the teachers' mixture",
    "probe_relation_change_fused": "Fused pairs: mean change of a relation from the teachers' mixture",
    "probe_image_strength": "Share of the captions in the change (above 0.5: they give way)",
    "probe_entropy_image": "Pictures: entropy of relations",
    "probe_entropy_text": "Captions: entropy of relations",
    "probe_teacher_entropy_image": "Image teacher: entropy of relations",
    "probe_teacher_entropy_text": "Text teacher: entropy of relations",
    "probe_entropy_fused": "Fused pairs: entropy of relations",
    "probe_teacher_entropy_fused": "Teachers' mixture: entropy of relations",
    "probe_modality_gap": "Distance of the modalities' means",
    "mixture_text": "Share of the text teacher in the mixture",
    "inner_lr": "Inner rate of the meta step",
    "inner_grad_norm": "Norm of the meta step's inner gradient",
    "shift_cosine": "Meta step: intended against realised shift",
}
BOOKKEEPING = {"step", "loss", "lr", "samples", "seconds", "keys", "epoch", "skipped"}  # of no chart by its name


@dataclass(frozen=True)
class RunFacts:
    name: str
    trained: str
    config: str  # its config.yaml, empty where there is none
    drawn: bool  # whether it has curves


def write_report(
    path: str | Path,
    runs: list[RunReport],
    title: str = "Retrieval report",
    teacher: EmbeddedCorpus | None = None,
    before: str | None = None,
    against: str | None = None,
    methods: study.Study | None = None,
) -> Path:
    """Write the runs' report to `path`: one HTML file that needs nothing else.

    Tables and curves show all runs; the first screen and the galleries compare the last one with the one named
    `against`, by default the one before it.
    The galleries also show the run named `before`, such as the model that fine-tuning started from. `teacher` holds the
    teachers' embeddings of the same samples, for the pictures of relation matrices; `methods` a study of methods, for a
    section of its own.
    """
    check_runs(runs, teacher)
    results = {run.name: run.result for run in runs}
    pair = [run for run in runs[:-1] if run.name == against] + runs[-1:] if against else runs[-2:]
    found = changes(pair[0].result, pair[1].result) if len(pair) > 1 else []
    main_curves, diagnostics, further_curves = curves(runs)
    html = (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            headline=headline(pair),
            pair=[run.name for run in pair],
            runs=[RunFacts(run.name, training_line(run), _config(run.folder), bool(run.metrics)) for run in runs],
            changes=found,
            reach=reach(found),
            reached=[(endpoint, runs[0].result[name]) for endpoint, name in endpoints(runs[0].result)],
            curves=main_curves,
            diagnostics=diagnostics,
            further_curves=further_curves,
            sections=sections(results),
            relations=relations(runs, teacher),
            galleries=galleries([run for run in runs if run not in pair] + pair, before),
            notes=notes(results),
            study=methods,
        )
    )
    return _write(path, html)


def write_study_page(path: str | Path, methods: study.Study, title: str = "Methods compared") -> Path:
    """The study alone, as a page of its own."""
    return _write(path, environment().get_template("study_page.html").render(title=title, study=methods))


def _write(path: str | Path, html: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path


def environment() -> Environment:
    """Every value is escaped: captions, keys and names come from outside."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals["axes"] = {
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.WIDTH - charts.RIGHT,
        "study_width": study.WIDTH,
        "study_left": study.LEFT,
        "enough": ENOUGH,
    }
    return env


def curves(runs: list[RunReport]) -> tuple[list[charts.Chart], list[charts.Chart], list[charts.Chart]]:
    """Loss, its parts where there is more than one, learning rate, speed; what happened to relations; and whatever else
    the runs recorded. All runs on the same axes."""

    def drawn(
        title: str, values: Callable[[list[dict]], list[float]], unit: str = "", **how: bool
    ) -> charts.Chart | None:
        series = [
            charts.Series(place, run.name, [number(line["step"]) for line in run.metrics], values(run.metrics))
            for place, run in enumerate(runs)
        ]
        return charts.line_chart(title, unit, series, **how)

    def recorded(name: str, title: str, **how: bool) -> charts.Chart | None:
        return drawn(title, lambda lines: [number(line.get(name)) for line in lines], **how)

    names = dict.fromkeys(name for run in runs for line in run.metrics for name in line)
    parts = [name for name in PARTS if name in names]
    main = [
        recorded("loss", "Loss"),
        *(recorded(name, PARTS[name]) for name in (parts if len(parts) > 1 else [])),
        recorded("lr", "Learning rate", from_zero=True, smooth=False),
        drawn("Speed", _speed, "pairs a second", from_zero=True),
    ]
    diagnostics = [recorded(name, title, smooth=False) for name, title in DIAGNOSTICS.items() if name in names]
    others = [name for name in names if name not in PARTS and name not in DIAGNOSTICS and name not in BOOKKEEPING]
    further = [recorded(name, name.replace("_", " ").capitalize()) for name in others]
    main, diagnostics, further = (
        [chart for chart in group if chart is not None] for group in (main, diagnostics, further)
    )
    return main, diagnostics, further


def _speed(lines: list[dict]) -> list[float]:
    """Pairs a second at each step; `samples` counts from the start."""
    seen = [0.0, *(number(line.get("samples")) for line in lines)]
    seconds = [number(line.get("seconds")) for line in lines]
    return [
        (after - before) / spent if spent > 0 else float("nan")
        for before, after, spent in zip(seen, seen[1:], seconds, strict=False)
    ]


def _config(folder: Path) -> str:
    path = Path(folder) / "config.yaml"
    return without_secrets(path.read_text(encoding="utf-8")) if path.is_file() else ""
