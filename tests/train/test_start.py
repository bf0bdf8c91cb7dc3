"""What a run says at its start, and what it finds wrong there: once, in one line, before anything heavy."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from tests.train.launcher import launch
from vlscale.config import load_plan
from vlscale.train.plan import train_plan

EVERY_READER = [  # of the corpus at the start: the tokenizer, the teachers' reliability, the probe, the stream
    "objective={name: covlr, relation_reliability: true}", "teacher.source=frozen_copy", "log.diagnostics_every=1",
    "data.weights=[1]", "train.max_steps=1", "log.progress=false",
]  # fmt: skip


@pytest.fixture
def faulty(corpus, tmp_path) -> str:
    """A copy of the corpus's shards, the first without one picture."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    for shard in corpus.glob("train-*.tar"):
        shutil.copy(shard, folder)
    first = folder / "train-000000.tar"
    with tarfile.open(corpus / first.name) as whole, tarfile.open(first, "w") as lacking:
        for member in whole.getmembers()[1:]:
            lacking.addfile(member, whole.extractfile(member))
    return f"data.train={folder}/train-*.tar"


def left_out(text: str) -> Counter:
    return Counter(line[line.index("left out") :] for line in text.splitlines() if "left out" in line)


def test_what_was_left_out_is_told_once_whoever_reads_the_corpus(tiny_config, faulty, tmp_path, caplog):
    train_plan(load_plan(tiny_config, [faulty, *EVERY_READER]), tmp_path / "run", resume=False)
    told = left_out(caplog.text)
    assert len(told) == 2 and set(told.values()) == {1}, told


def test_what_was_left_out_is_told_once_by_two_ranks(tiny_config, faulty, tmp_path):
    done = launch(Path(tiny_config), tmp_path / "run", faulty, *EVERY_READER)
    assert done.returncode == 0, done.stderr[-4000:]
    told = left_out(done.stderr + done.stdout)
    assert len(told) == 2 and set(told.values()) == {1}, told
