"""`vlscale train`: every run that a config asks for."""

from pathlib import Path
from typing import Annotated

import typer

from vlscale.config import load_plan


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue, start, or exit when complete.")] = False,
) -> None:
    """Train; one process here, all of them under `deepspeed launch/train.py` or torchrun."""
    plan = load_plan(config, overrides or [])
    from vlscale.train.plan import train_plan  # torch and transformers load only once the config is right

    train_plan(plan, out, resume=resume)
