"""Checkpoints of whole runs that end badly: killed inside the asynchronous write, a disk that one of two ranks finds
full, four ranks then two, one and four again. All processes of the file are forked from one."""

import json
from pathlib import Path

import pytest

from tests.train.forked_ranks import Group, run_groups, said
from vlscale.config import load_plan
from vlscale.train.checkpoint_folder import by_step, fault_of
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

EVERY = ["log.progress=false", "train.checkpoint_every=1", "train.keep_checkpoints=2"]
KILL = """
import importlib, os, signal
module, attribute, there, call = {at!r}
owner = importlib.import_module(module)
*inside, name = attribute.split(".")
for each in inside:
    owner = getattr(owner, each)
real, calls = getattr(owner, name), []
def killer(*arguments, **named):
    if os.path.isdir({checkpoints!r} + "/" + there):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(owner, name, killer)
"""
MOMENTS = {  # a function, and the call of it in which the process ends, counted from when that folder is there
    "while the state is copied": ("vlscale.train.checkpoint_files", "HostBuffers.copy", ".step-3.partial", 5),
    "inside a file": ("vlscale.train.checkpoint_files", "_Hashed.write", ".step-3.partial", 20),
    "between two files": ("os", "fsync", ".step-3.partial", 3),
    "all files whole, nothing agreed": ("vlscale.train.checkpoint", "Checkpoints._advance", ".step-3.partial", 1),
    "manifest written, not yet renamed": ("os", "fsync", ".step-3.partial", 7),  # after four files, manifest, a folder
    "renamed, older ones not yet removed": ("vlscale.train.checkpoint", "remove_all_but", "step-3", 1),
}
FULL = """
import os
from vlscale.train import checkpoint_files
real = checkpoint_files.write_file
def write_file(path, content):
    if os.environ["RANK"] == "1" and "step-2.partial" in str(path):
        raise OSError(28, "No space left on device", str(path))
    return real(path, content)
checkpoint_files.write_file = write_file
"""
STOP = """
import pathlib
run = pathlib.Path({out!r})
run.mkdir(exist_ok=True)
(run / "stop").touch()
"""
ELASTIC = ["log.progress=false", "train={max_steps: 5, elastic: true, global_batch_size: 32, checkpoint_every: 9}"]
WORLD_SIZES = (4, 2, 1, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def codes(tiny_config, place) -> dict[str, list[int]]:
    """Of all groups, by name."""

    def words(out: str, *keys: str) -> list[str]:
        return [str(tiny_config), "--out", str(place / out), "--resume", *keys]

    groups = {
        name: Group(words(name, *EVERY), before=KILL.format(at=at, checkpoints=str(place / name / "checkpoints")))
        for name, at in MOMENTS.items()
    }
    for policy in ("continue", "stop"):
        groups[policy] = Group(words(policy, *EVERY, f"train.disk_full={policy}"), 2, FULL)
    for number, ranks in enumerate(WORLD_SIZES):
        before = STOP.format(out=str(place / "elastic")) if number < 3 else ""
        groups[f"elastic {number}"] = Group(words("elastic", *ELASTIC), ranks, before)
    return dict(zip(groups, run_groups(place, list(groups.values())), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tiny_config, place) -> Path:
    train(tiny_config, place / "undisturbed", *EVERY)
    return place / "undisturbed"


def train(config: Path, out: Path, *keys: str) -> None:
    train_plan(load_plan(config, list(keys)), out, resume=True)


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def lines(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_inside_the_write_it_resumes_to_the_same_bytes(codes, undisturbed, tiny_config, place, moment):
    run = place / moment
    assert codes[moment] == [-9] and not (run / "final").exists()
    whole = by_step(run / "checkpoints")
    assert whole and [fault_of(folder) for folder in whole] == [None] * len(whole)
    partial = [path.name for path in (run / "checkpoints").glob(".step-*")]
    assert partial == ([] if moment.startswith("renamed") else [".step-3.partial"])
    train(tiny_config, run, *EVERY)
    assert weights(run) == weights(undisturbed) and lines(run) == lines(undisturbed)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]


def test_a_full_disk_on_one_rank_leaves_out_that_checkpoint_on_both(codes, place, undisturbed):
    assert codes["continue"] == [0, 0]
    told = said(place, list(codes).index("continue"))
    assert "checkpoint of step 2 cannot be written: rank 1: No space left on device" in told
    assert "the newest checkpoint is step-1; training goes on (train.disk_full=continue)" in told
    assert told.count("cannot be written") == 1
    assert sorted(path.name for path in (place / "continue" / "checkpoints").iterdir()) == ["step-5", "step-6"]
    assert [line["keys"] for line in lines(place / "continue")] == [line["keys"] for line in lines(undisturbed)]


def test_a_full_disk_on_one_rank_stops_both_with_one_line(codes, place):
    assert codes["stop"] == [1, 1]
    told = [said(place, list(codes).index("stop"), rank) for rank in range(2)]
    assert "Traceback" not in "".join(told) and "cannot be written" not in told[1]
    (line,) = [line for line in told[0].splitlines() if "cannot be written" in line]
    assert line.endswith("make room and continue with --resume, or set train.disk_full=continue")
    assert [path.name for path in (place / "stop" / "checkpoints").iterdir()] == ["step-1"]
    assert fault_of(place / "stop" / "checkpoints" / "step-1") is None


def test_four_two_one_four_ranks_follow_the_undisturbed_run(codes, place, tiny_config):
    assert [codes[f"elastic {number}"] for number in range(4)] == [[75] * 4, [75] * 2, [75], [0] * 4]
    train(tiny_config, place / "alone", *ELASTIC)
    found, expected = lines(place / "elastic"), lines(place / "alone")
    assert [line["keys"] for line in found] == [line["keys"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    manifest = json.loads((place / "elastic" / "checkpoints" / "step-5" / "manifest.json").read_text())
    assert manifest["layout"]["world_size"] == 4
