"""`vlscale doctor`: what works here, what will not, and what to change."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlscale.config import load_plan

MARKS = {"ok": "  ", "warn": "! ", "fail": "X "}


def doctor(
    config: Annotated[Path | None, typer.Option(help="Also look whether this config can run here.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks that the config is for; by default those here.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Also try every machine of this hostfile by ssh.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of lines.")] = False,
) -> None:
    """Versions, devices, limits, decode speed; ranks and their bandwidth under torchrun or deepspeed. Exit code 2 when
    something is in the way."""
    plan = load_plan(config, overrides or []) if config else None
    if overrides and not config:
        raise ValueError(f"doctor: {overrides[0]} changes a config, and there is none; give it with --config")
    from vlscale.distributed import Ranks
    from vlscale.train.doctor import examine_machine
    from vlscale.train.doctor_config import examine_config
    from vlscale.train.doctor_ranks import examine_hostfile, examine_ranks

    ranks = Ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from vlscale.sections import EngineConfig
        from vlscale.train.engine import start_ranks

        ranks = start_ranks(plan[0].config.engine if plan else EngineConfig())
    findings = examine_ranks(ranks)
    if not ranks.first:
        return
    findings += examine_machine()
    findings += examine_config(plan, world_size or ranks.size) if plan else []
    findings += examine_hostfile(hostfile) if hostfile else []
    usable = all(finding.level != "fail" for finding in findings)
    if as_json:
        print(json.dumps({"usable": usable, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{MARKS[finding.level]}{finding.name:<26} {finding.value}")
            if finding.change:
                print(f"    {'':<24} -> {finding.change}")
        print("usable" if usable else "not usable as it is: see the lines marked X")
    if not usable:
        raise typer.Exit(2)
