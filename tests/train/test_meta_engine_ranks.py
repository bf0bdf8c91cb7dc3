"""The meta steps over engines of two ranks: after an error in between, each rank holds what it held, bit for bit."""

import json
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from tests.train.forked_ranks import Group, run_groups, said
from tests.train.test_meta_engine import FAILURES, failing, held, masters, same
from vlscale.config import load_plan
from vlscale.data.batch import Batch
from vlscale.train import meta_shift
from vlscale.train.engine import Engine, start_ranks
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS

RANKS = 2
ENGINES = [(2, "bf16"), (3, "fp32"), (3, "bf16")]  # stage 2 in fp32 holds what one rank would
BROKEN = list(product(FAILURES[::3], ("forward", "backward")))  # first_order, and finite_difference at its last call


def on_rank(config: str, folder: str) -> None:
    """Of every engine and failure, whether there was something to put back and whether it was put back, to a file."""
    found = {}
    for stage, dtype in ENGINES:
        own = [f"engine.zero_stage={stage}", f"engine.dtype={dtype}", "teacher.source=frozen_copy"]
        (run,) = load_plan(Path(config), [*own, "objective.name=covlr", "meta.inner_lr=0.05"])
        ranks = start_ranks(run.config.engine)
        parts = build_parts(run.config, Path(folder, "run"), ranks)
        engine = Engine(parts.model, run.config, ranks)
        with closing(iter(build_stream(run.config, parts, ranks, None))) as batches:
            batch = next(batches)
        step_parts = StepParts(engine, parts.inputs, run.config.objective, run.config.meta, ranks, None)
        engine.set_rates(1e-3, 1)
        STEPS["joint"](step_parts, batch, batch)  # master weights are then between the numbers of bf16
        found |= {f"ZeRO-{stage} {dtype}: {what}": told for what, told in after_errors(step_parts, batch).items()}
        engine.close()
    Path(folder, f"found-{ranks.rank}.json").write_text(json.dumps(found))


def after_errors(parts: StepParts, batch: Batch) -> dict[str, list[bool]]:
    engine, found = parts.engine, {}
    before, weights = [value.clone() for value in held(engine)], masters(engine)
    for (mode, name, at), where in BROKEN:
        told = found[f"{mode}, call {at} of {name}, {where}"] = []
        loss = failing(
            getattr(meta_shift, name), at, where, lambda told=told: told.append(not same(held(engine), before))
        )
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(meta_shift, name, loss)
            STEPS[mode](parts, batch, batch)
        now = masters(engine)  # of all ranks together
        told.append(same(held(engine), before) and same(now, weights))
    return found


def test_every_rank_holds_what_it_held_after_an_error(tiny_config, tmp_path):
    before = f"from {__name__} import on_rank\non_rank({str(tiny_config)!r}, {str(tmp_path)!r})\nraise SystemExit"
    (codes,) = run_groups(tmp_path, [Group([], RANKS, before)])
    assert codes == [0] * RANKS, said(tmp_path, 0)
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert len(found) == len(ENGINES) * len(BROKEN)
        assert [what for what, told in found.items() if told != [True, True]] == [], rank
