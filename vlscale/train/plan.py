"""Several runs in one launch: stages first, then variants, each in its own folder, in the same process group."""

from pathlib import Path

from vlscale.config import STAGE_PREFIX, PlannedRun
from vlscale.data.urls import expand
from vlscale.distributed import Ranks
from vlscale.models.hf_folder import quiet
from vlscale.sections import Config
from vlscale.train.disk_faults import check_writable, told
from vlscale.train.engine import start_ranks
from vlscale.train.finished import is_complete
from vlscale.train.loop import Job, train_run
from vlscale.train.setup import check_sizes
from vlscale.train.sources import check_models


def train_plan(plan: list[PlannedRun], out: Path, *, resume: bool) -> None:
    """Train every run of the plan, in order, under `out`. With `resume`, complete runs are left alone and the first
    incomplete one continues."""
    _check_out(plan, out, resume)
    runs = [(run.name, with_stage_folders(run, plan, out)) for run in plan]
    for _, config in runs:
        check_sizes(config)
    quiet()
    ranks = start_ranks(runs[0][1].engine)
    _check_places(plan, out, ranks)
    for name, config in runs:
        train_run(Job(config, out / name, ranks, name or out.name), resume=resume)


def _check_out(plan: list[PlannedRun], out: Path, resume: bool) -> None:
    try:
        used = [out / run.name for run in plan if (out / run.name / "config.yaml").exists()]
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"output folder {out} cannot be used: {told(error)}; choose another --out") from None
    if out.is_file():
        raise ValueError(f"output folder {out} is a file; choose another --out")
    if used and not resume:
        raise ValueError(
            f"output folder {used[0]} already holds a run; continue it with --resume or choose another --out"
        )


def _check_places(plan: list[PlannedRun], out: Path, ranks: Ranks) -> None:
    """Before anything heavy, for every run that is not complete: that its folder takes files, and that the models which
    it starts from and its shards are there. The first rank looks, and all raise the same ValueError."""
    fault = None
    if ranks.first:
        try:
            todo = [run for run in plan if not is_complete(out / run.name)]
            for run in todo:
                check_writable(out / run.name)
            for run in todo:
                check_models(run.config, made_under=out)
                for what in ("train", "val"):
                    if getattr(run.config.data, what) is not None:
                        expand(getattr(run.config.data, what), f"data.{what}", pipes=run.config.data.pipes)
        except ValueError as error:
            fault = str(error)
    fault = ranks.from_first(fault)
    if fault is not None:
        raise ValueError(fault)


def with_stage_folders(run: PlannedRun, plan: list[PlannedRun], out: Path) -> Config:
    """The run's config with `stage:NAME` replaced by the folder of that earlier run."""
    earlier = [each.name for each in plan[: plan.index(run)]]

    def folder(key: str, value: str | None) -> str | None:
        if value is None or not value.startswith(STAGE_PREFIX):
            return value
        name = value.removeprefix(STAGE_PREFIX)
        if name not in earlier:
            raise ValueError(
                f"{key}={value}: no earlier stage has that name; there are: {', '.join(earlier) or 'none'}"
            )
        return str(out / name)

    config = run.config
    teacher = {key: folder(f"teacher.{key}", getattr(config.teacher, key)) for key in ("image", "text")}
    model = {"init_from": folder("model.init_from", config.model.init_from)}
    return config.model_copy(
        update={"teacher": config.teacher.model_copy(update=teacher), "model": config.model.model_copy(update=model)}
    )
