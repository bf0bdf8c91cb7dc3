"""Reliability of teachers: by hand, the same after a resume, and what it does to a run's relation weights."""

import re

import pytest
import torch
import torch.nn.functional as F

from vlscale.config import load_plan, validate
from vlscale.objectives.reliability import agreement
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

GIVEN = ["objective.name=covlr", "objective.relation_reliability=true", "teacher.source=frozen_copy",
         "log.progress=false"]  # fmt: skip


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_agreement_by_hand():
    first = rows(40, 8, 0)
    turned = first @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    assert agreement(first, turned) == pytest.approx(1, abs=1e-6)  # the same relations
    assert agreement(first, rows(40, 8, 2)) < 0.1
    noisy = [agreement(first, F.normalize(first + noise * rows(40, 8, 3), dim=1)) for noise in (0.3, 1.0, 3.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0
    assert agreement(first, torch.ones(40, 8) / 8**0.5) == 0  # all alike: nothing to agree with


def test_three_samples_by_hand():
    """Two relations of each row, so that a row agrees by +1 or by -1; the second and third sample are swapped."""
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 3**0.5 / 2]])
    second = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2], [0.0, 1.0]])
    assert agreement(first, first) == pytest.approx(1)
    assert agreement(first, second) == pytest.approx(1 / 3)  # (0, 1/2) as (1/2, 0), and two that rise as before


def lines_of(folder) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")


def test_a_run_weighs_its_relations_by_what_it_measures_and_a_resumed_one_by_the_same(tiny_config, tmp_path, caplog):
    given = [*GIVEN, "train.checkpoint_every=3", "objective.relation_weight=0.5"]
    train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=False)
    said = re.findall(r"reliability of the teachers' relations: image ([\d.]+), text ([\d.]+)", caplog.text)
    assert len(said) == 1
    image, text = map(float, said[0])
    assert 0 < text < 1 and 0 < image <= 1 and image != text
    whole = lines_of(tmp_path / "run")
    by_hand = [*given, f"objective.relation_weight_image={0.5 * image}", f"objective.relation_weight_text={0.5 * text}"]
    by_hand[1] = "objective.relation_reliability=false"
    train_plan(load_plan(tiny_config, by_hand), tmp_path / "by-hand", resume=False)
    assert [line["loss"] for line in lines_of(tmp_path / "by-hand")] == [line["loss"] for line in whole]
    (tmp_path / "run" / "final").rename(tmp_path / "gone")
    (tmp_path / "run" / "checkpoints" / "step-6").rename(tmp_path / "last")
    train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=True)
    assert re.findall(r"relations: image ([\d.]+), text ([\d.]+)", caplog.text) == [said[0]] * 2
    assert [line["loss"] for line in lines_of(tmp_path / "run")] == [line["loss"] for line in whole]


def test_one_caption_a_sample_is_told(tiny_config, tmp_path, caplog):
    given = [*GIVEN, "data.caption_key=txt", "train.max_steps=1"]
    train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=False)
    assert "no sample has two captions" in caplog.text and "text 1.000" in caplog.text


def test_a_cache_has_one_view():
    given = {"objective": {"name": "covlr", "relation_reliability": True}, "teacher": {"source": "cache", "cache": "x"}}
    with pytest.raises(ValueError, match="shows the teachers two views of each sample, and a cache has one"):
        validate(given, "x")
