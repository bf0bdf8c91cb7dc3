"""`vlscale demo`: the whole story on a synthetic corpus, on CPU."""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_OUT = Path("runs/demo")
MARKER = "demo.json"  # stands in a folder that `vlscale demo` made and may replace
RANKS = 2
PRESET = "clean"
SHOWN = {  # run to its name in the table and the report, in the order of the story
    "teachers": "teachers (no pairing)",
    "pretrain": "pretrained",
    "contrastive": "contrastive only",
    "joint": "relations, jointly",
    "rvlr": "RVLR",
    "covlr": "CoVLR, meta step",
}


def demo(
    out: Annotated[Path | None, typer.Option(help=f"Folder to make; {DEFAULT_OUT} by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller corpus and fewer steps.")] = False,
) -> None:
    """Data, teachers, pretraining, fine-tuning with and without relations, evaluation, report."""
    started = time.monotonic()
    folder = claim_folder(out)
    from rich.console import Console

    from vlscale.cli.launcher import launch_training
    from vlscale.data.synth import make_corpus, synth_config
    from vlscale.evaluate.table import render
    from vlscale.progress import Progress
    from vlscale.report.collect import collect_run
    from vlscale.report.write import write_report
    from vlscale.resources import configs_folder

    def say(text: str) -> None:
        Console(stderr=True).print(f"[bold]{text}", highlight=False)

    say("1/4  making a corpus: procedural scenes, five captions each")
    data = folder / "data"
    make_corpus(data, synth_config(PRESET, pairs=4000 if quick else 12_000, val_pairs=400 if quick else 1000))

    say(f"2/4  training teachers, then pretraining, fine-tuning four ways, on {RANKS} ranks under DeepSpeed ZeRO-2")
    config = configs_folder() / ("demo-quick.yaml" if quick else "demo.yaml")
    launch_training(config, folder / "runs", [f"data.train={data}/train-*.tar"], RANKS)

    say("3/4  evaluating on scenes that no run has seen")
    val = [f"{data}/val-*.tar"]
    reports = []
    for run, name in SHOWN.items():
        with Progress(f"embedding {name}", None, "samples") as progress:
            reports.append(collect_run(name, folder / "runs" / run, val, progress))

    say("4/4  writing the report")
    results = {report.name: report.result for report in reports}
    (folder / "results.json").write_text(json.dumps({name: r.to_dict() for name, r in results.items()}, indent=1))
    compared = {"before": SHOWN["pretrain"], "against": SHOWN["contrastive"]}
    page = write_report(folder / "report.html", reports, title="vlscale demo", **compared)
    Console(width=None if Console().is_terminal else 100).print(render(results))
    print(f"report: {page.resolve()}")
    print(f"models: {(folder / 'runs').resolve()}/{{{','.join(SHOWN)}}}/final")
    print(f"took {time.monotonic() - started:.0f} s")


def claim_folder(out: Path | None) -> Path:
    """A new folder, or the default one in place of an earlier demo's; any other existing folder is refused."""
    folder = out or DEFAULT_OUT
    if folder.exists():
        if out is not None:
            raise ValueError(f"--out {folder} exists; choose a new folder")
        if not (folder / MARKER).is_file():
            raise ValueError(f"{folder} exists and was not made by vlscale demo; move it away or give --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"made_by": "vlscale demo"}) + "\n")
    return folder
