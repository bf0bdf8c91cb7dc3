"""The model of step time from 1 to 4,096 GPUs: what it assumes, how its times add up, and what its files say."""

import itertools
from pathlib import Path

import pytest
import yaml

from benchmarks import scaling_model
from vlscale.config import PlannedRun
from vlscale.train.memory_plan import plan_run

ASSUMPTIONS = Path(__file__).resolve().parents[1] / "benchmarks" / "scaling_assumptions.yaml"
TOWER = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}


@pytest.fixture(scope="module")
def assumed() -> dict:
    """The table of benchmarks/scaling_model.py with one small model in it."""
    table = scaling_model.load(ASSUMPTIONS)
    small = {"embed_dim": 64, "vision": {"config": TOWER | {"model_type": "vit", "image_size": 224, "patch_size": 32}}}
    small["text"] = {"max_length": 16, "vocab_size": 500, "config": TOWER | {"model_type": "bert"}}
    table["losses"]["contrastive"]["value"][64] = 0.5
    return table | {"models": {"small": small}}


@pytest.fixture(scope="module")
def steps(assumed) -> list[scaling_model.Step]:
    return scaling_model.sweep(assumed)


@pytest.fixture(scope="module")
def page(steps, tmp_path_factory) -> Path:
    return scaling_model.write(steps, ASSUMPTIONS, tmp_path_factory.mktemp("scaling"))


def test_it_says_that_it_is_a_model(assumed, steps, page):
    """More GPUs are never slower at these sizes, times add up, and every file is marked."""
    for batch in assumed["sweep"]["batches"]:
        own = [step for step in steps if step.batch == batch]
        assert own[0].efficiency == 1 and [step.gpus for step in own] == sorted(step.gpus for step in own)
        assert all(step.seconds == step.towers_s + step.loss_s + step.exchange_s + step.gradients_s for step in own)
        for before, after in itertools.pairwise(own):
            assert after.towers_s < before.towers_s and after.loss_s < before.loss_s
    loss = next(step for step in steps if (step.batch, step.gpus) == (32768, 8)).loss_s
    assert loss == pytest.approx(8 * 32768**2 * 64 / 8 / (790e12 * 0.5))
    assert page.read_text().count(scaling_model.MARK) >= 3 and page.with_suffix(".png").stat().st_size > 10_000
    rows = page.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == len(steps) + 1 and all(row.endswith(f'"{scaling_model.MARK}"') for row in rows[1:])


def test_a_batch_that_fits_on_no_few_gpus_begins_where_it_fits(assumed):
    tight = assumed | {"device": assumed["device"] | {"memory_gb": {"value": 4}}}
    own = [step for step in scaling_model.sweep(tight) if step.batch == 32768]
    assert own[0].gpus > 1 and own[0].efficiency == 1


def test_inputs_are_as_large_as_the_plan_says(assumed):
    """Pictures wait as bytes: a tower makes floats of them a chunk at a time."""
    traced = scaling_model.trace("small", assumed)
    plan = plan_run(PlannedRun("", traced.config), [PlannedRun("", traced.config)], 1)
    assert scaling_model.inputs(traced) == plan.memory["inputs"]


def test_the_page_names_every_assumption_with_its_source(page):
    page = page.read_text()
    assert "| device.tower_fraction | 0.5 | assumption; of product_tflops, towers at large batches |" in page
    assert "| losses.contrastive | 512: 0.6, 768: 0.65, 1024: 0.7 |" in page
    table = yaml.safe_load(ASSUMPTIONS.read_text())
    for section in ("device", "losses", "network"):
        for name, entry in table[section].items():
            assert f"| {section}.{name} | " in page and f" | {entry['from']} |\n" in page


@pytest.mark.parametrize(
    "entry",
    [
        "{value: 0.5, from: assumption; of product_tflops, towers at large batches}",
        "{value: 0.5}",
        "0.5",
        "[0.5, data]",
    ],
)
def test_an_entry_that_is_not_a_value_and_its_source_is_refused(tmp_path, entry):
    path = tmp_path / "table.yaml"
    lines = ASSUMPTIONS.read_text().splitlines()
    path.write_text("\n".join(f"  tower_fraction: {entry}" if "tower_fraction" in line else line for line in lines))
    with pytest.raises(
        ValueError, match=r"^table.yaml: device.tower_fraction: expected {value: ..., from: words}"
    ) as no:
        scaling_model.load(path)
    assert "\n" not in str(no.value)


def with_values(assumed: dict, **values: float) -> dict:
    """The table with other numbers."""
    changed = {section: dict(assumed[section]) for section in ("device", "network")}
    for name, value in values.items():
        (section,) = (section for section in changed if name in changed[section])
        changed[section][name] = {"value": value, "from": "a test"}
    return assumed | changed


def test_a_ring_by_hand():
    """Four ranks, of which each hop takes 5 or 1: tiles of 2 a block hide under the columns, tiles of 100 hide all but
    the sums that come home. Half a ring visits 1/2, 1 and 1/2 of a block and hops twice."""
    assert scaling_model.sweep_seconds("ring", 4, 4 * 2, 5, 1) == 5 + 6 + 6 + 2 + 1
    assert scaling_model.sweep_seconds("ring", 4, 4 * 100, 5, 1) == 400 + 1
    assert scaling_model.sweep_seconds("half_ring", 4, 2 * 2, 5, 1) == 5 + 5 + 1 + 1
    assert scaling_model.sweep_seconds("half_ring", 5, 2.5 * 2, 5, 1) == 5 + 5 + 2 + 1
    assert scaling_model.sweep_seconds("half_ring", 4, 2 * 100, 5, 1) == 200 + 1


@pytest.mark.parametrize("gpus", [8, 64, 4096])
def test_a_ring_pays_a_latency_for_every_hop_and_the_bytes_of_the_plan(assumed, gpus):
    """With products that take no time and a wire of any width: W - 1 hops of columns and W of sums in each of two
    sweeps, and the ids by a tree. Without latency: what `loss_traffic` counts."""
    traced = scaling_model.trace("small", assumed)
    at_once = {"product_tflops": 1e15, "memory_gb": 1e6}
    wide = {"inside_node_gbytes": 1e15, "between_nodes_gbytes": 1e15}
    batch, hops = 2**24, 2 * (2 * gpus - 1) + gpus.bit_length() - 1
    step = scaling_model.predict("small", traced, batch, gpus, with_values(assumed, **at_once, **wide, latency_us=12))
    assert step.comm == "ring" and step.exchange_s == pytest.approx(12e-6 * hops, rel=1e-3)
    step = scaling_model.predict("small", traced, batch, gpus, with_values(assumed, **at_once, latency_us=0))
    count = scaling_model.traffic(scaling_model.at_scale(traced, batch, gpus))["losses"]
    assert step.exchange_s == pytest.approx(count / (340e9 if gpus == 8 else 40e9), rel=0.01)


def test_efficiency_compares_equal_work(assumed):
    """Two GPUs hold all their pairs, one computes by chunks and so every forward twice: that is no gain of two."""
    steps = scaling_model.sweep(with_values(assumed, memory_gb=30))
    assert max(step.as_run for step in steps) > 1.2  # or nothing is shown here
    assert all(0 < step.efficiency <= 1 + 1e-9 for step in steps)
    assert all(step.efficiency <= step.as_run + 1e-9 for step in steps)
    once = [step for step in steps if step.batch == 32768 and step.chunk == step.pairs_a_gpu]
    twice = [step for step in steps if step.batch == 32768 and step.chunk < step.pairs_a_gpu]
    assert once and twice and once[0].efficiency > 0.9 and twice[-1].efficiency > 0.9


def test_the_sweep_has_every_power_of_two_to_4096(assumed):
    assert assumed["sweep"]["gpus"] == [2**k for k in range(13)]
