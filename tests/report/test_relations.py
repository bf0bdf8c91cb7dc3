"""Relation matrices: one order for all, agreement by rank, and nothing where there is nothing to compare with."""

import base64
import dataclasses
import io

import pytest
import torch
from PIL import Image

from tests.report.conftest import teacher
from vlscale.evaluate import evaluate_corpus
from vlscale.report.relations import PROBE, _alike_together, relations


def pixels(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")


def test_truth_teacher_and_every_run_among_pictures_and_captions(runs):
    found = relations(runs, teacher(runs))
    assert [group.title for group in found] == ["Among pictures", "Among captions"]
    for group in found:
        assert [matrix.name for matrix in group.matrices] == ["truth", "teacher", *(run.name for run in runs)]
        assert group.against == "truth" and group.matrices[0].agreement is None
        for matrix in group.matrices:
            picture = pixels(matrix.picture)
            assert picture.size == (PROBE, PROBE)
            assert max(picture.getpixel((n, n)) for n in range(PROBE)) < 40  # the diagonal is darkest
    captions = found[1].matrices
    assert captions[3].agreement > captions[2].agreement  # as the fixture's noise has it


def test_a_run_that_knows_the_teacher_agrees_with_it(runs):
    plain = [dataclasses.replace(run, result=evaluate_corpus(run.corpus, "pairs", bootstrap=0)) for run in runs]
    found = relations(plain, runs[0].corpus)
    assert found[0].against == "teacher"
    assert found[0].matrices[1].agreement == pytest.approx(1)
    assert found[0].matrices[2].agreement < 0.9
    assert found[0].matrices[0].picture == found[0].matrices[1].picture


def test_nothing_to_hold_the_runs_against(runs):
    plain = [dataclasses.replace(run, result=evaluate_corpus(run.corpus, "pairs", bootstrap=0)) for run in runs]
    assert relations(plain, None) == []


def test_alike_samples_stand_side_by_side():
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    table = (group[:, None] == group).float() + 0.01 * torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    order = _alike_together(table)
    assert sorted(order.tolist()) == list(range(9))
    assert sum(a != b for a, b in zip(group[order][:-1], group[order][1:], strict=True)) == 2
