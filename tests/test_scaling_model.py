"""The model of step time from 1 to 4,096 GPUs: what it assumes, how its times add up, and what its files say."""

import itertools
from pathlib import Path

import pytest
import yaml

from benchmarks import scaling_model

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
