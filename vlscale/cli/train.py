"""`vlscale train`: every run that a config asks for, or what it would cost."""

import difflib
import os
from pathlib import Path
from typing import Annotated

import typer

from vlscale.config import PlannedRun, known_keys, load_plan

OPTIONS = ["--out", "--resume", "--plan", "--world-size", "--tflops", "--gigabytes", "--help"]


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    out: Annotated[Path | None, typer.Option(help="Run folder.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue, start, or exit when complete.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print memory and traffic of a rank; start nothing.")] = False,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks to plan for; by default those here.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0, help="For --plan: 10^12 operations a second, a rank.")] = None,
    gigabytes: Annotated[float | None, typer.Option(min=0, help="For --plan: 10^9 bytes a second, a rank.")] = None,
) -> None:
    """Train; one process here, all of them under `deepspeed launch/train.py` or torchrun."""
    for item in overrides or []:
        check_no_option(item)
    runs = load_plan(config, overrides or [])
    if plan:
        show_plan(runs, world_size, tflops, gigabytes)
        return
    if world_size or tflops or gigabytes:
        raise ValueError("--world-size, --tflops and --gigabytes belong to --plan; the launcher decides how many ranks")
    if out is None:
        raise ValueError("--out is not given: expected a folder for the run, for example --out runs/first")
    from vlscale.train.plan import train_plan  # torch and transformers load only once the config is right

    train_plan(runs, out, resume=resume)


def check_no_option(item: str) -> None:
    """What begins with a dash and is no option arrives here as an override."""
    if not item.startswith("-"):
        return
    name = item.lstrip("-").partition("=")[0]
    if name in known_keys():
        raise ValueError(f"{item}: a setting is given without dashes and with a sign: {name}=VALUE")
    close = difflib.get_close_matches(item.partition("=")[0], OPTIONS, n=1)
    raise ValueError(f"no such option: {item}" + (f"; did you mean {close[0]}?" if close else "; see --help"))


def show_plan(runs: list[PlannedRun], world_size: int | None, tflops: float | None, gigabytes: float | None) -> None:
    """On rank 0 alone, where a launcher started several."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    from vlscale.train.memory_plan import plan_runs
    from vlscale.train.memory_plan_text import Rates, render

    ranks = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    print(render(plan_runs(runs, ranks), Rates(tflops, gigabytes)))
