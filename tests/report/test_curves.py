"""Which curves a report draws: loss, its parts, rates, and whatever else the runs recorded."""

import dataclasses

import pytest

from tests.report.test_report import Page
from vlscale.config import load_plan
from vlscale.report import load_metrics, write_report
from vlscale.report.write import DIAGNOSTICS, PARTS, curves
from vlscale.train.plan import train_plan


def titles(charts) -> list[str]:
    return [chart.title for chart in charts]


def test_loss_parts_rates_and_further_records(runs):
    main, diagnostics, further = curves(runs)
    assert diagnostics == []
    assert titles(main) == [
        "Loss",
        "Consistency across modalities",
        "Relations between pictures",
        "Relations between captions",
        "Learning rate",
        "Speed",
    ]
    assert titles(further) == ["Logit scale"]
    assert len(main[0].lines) == 2 and len(main[2].lines) == 1  # only one run has relations


def test_a_single_part_is_the_loss_and_is_not_drawn_twice(runs):
    assert titles(curves(runs[:1])[0]) == ["Loss", "Learning rate", "Speed"]


def test_speed_is_pairs_by_seconds(runs):
    lines = [{"step": step, "loss": 1.0, "samples": 100 * step, "seconds": 0.5} for step in (1, 2, 3)]
    run = dataclasses.replace(runs[0], metrics=lines)
    assert curves([run])[0][-1].summary == f"Speed: {run.name} from 200 to 200"


@pytest.mark.parametrize("seconds", [0.0, "nan", None])
def test_a_step_without_a_duration_is_left_out(runs, seconds):
    lines = [{"step": s, "loss": 1.0, "samples": 10 * s, "seconds": 1.0} for s in (1, 2, 3, 4)]
    lines[1]["seconds"] = seconds
    chart = curves([dataclasses.replace(runs[0], metrics=lines)])[0][-1]
    assert chart.lines[0].smooth.count("L") == 2


def test_what_happened_to_relations_stands_together(runs):
    lines = [{"step": step, "loss": 1.0, "samples": step, "seconds": 1.0} for step in range(1, 6)]
    for line in lines[2:]:  # asked for when the run went on after its second step
        line |= {"probe_gradient_cosine": -0.1 * line["step"], "mixture_text": 0.5}
    _, diagnostics, further = curves([dataclasses.replace(runs[0], metrics=lines)])
    assert len(titles(diagnostics)) == 2 and "below 0 they conflict" in titles(diagnostics)[0] and further == []
    assert diagnostics[0].lines[0].smooth.count("L") == 2  # looked at in three steps of five


def test_what_real_runs_record_of_relations_and_of_the_loss_is_drawn_by_its_title(runs, tiny_config, tmp_path):
    """A meta step with a fusion encoder, and RVLR: together they record every diagnostic that there is."""
    bert = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
    fused = [f"model.text.config={{{bert}, initializer_range: 0.3}}", "model.fusion={source: text}"]
    common = ["teacher.source=frozen_copy", "log.diagnostics_every=1", "log.progress=false", "train.max_steps=2"]
    recorded = []
    for run, own in (
        (runs[0], [*fused, "objective.name=covlr", "objective.mlm_weight=0.5", "meta.mode=first_order"]),
        (runs[1], [*fused, "objective.name=rvlr"]),
    ):
        train_plan(load_plan(tiny_config, [*common, *own]), tmp_path / run.name, resume=False)
        recorded.append(dataclasses.replace(run, metrics=load_metrics(tmp_path / run.name)))
    keys = {name for run in recorded for line in run.metrics for name in line}
    assert {name for name in keys if name.startswith("probe_")} <= DIAGNOSTICS.keys() <= keys
    main, diagnostics, _ = curves(recorded)
    assert set(titles(diagnostics)) == set(DIAGNOSTICS.values())
    assert {PARTS[name] for name in ("itm", "mlm", "kd", "kd_image", "kd_text", "iic", "ttc")} <= set(titles(main))
    page = Page(write_report(tmp_path / "report.html", recorded).read_text())
    assert {*titles(main), *titles(diagnostics)} <= {text.strip() for text in page.text}
