"""A disk that is full, read-only or gone: real ones where a tmpfs can be mounted, and the folder itself taken away."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlscale.cli import main
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.sections import TrainConfig
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.checkpoint import Checkpoints, Layout
from vlscale.train.checkpoint_files import Tensors
from vlscale.train.checkpoint_folder import fault_of
from vlscale.train.disk_faults import StoppedByDisk
from vlscale.train.metrics_file import MetricsFile, read_metrics
from vlscale.train.plan import train_plan
from vlscale.train.trainer import Trainer

LAYOUT = Layout(world_size=1, zero_stage=2, dtype="fp32")


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A megabyte."""
    mount(tmp_path / "disk", "size=1m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


class Weights:
    """An engine with files of both kinds, `size` bytes each."""

    def __init__(self):
        self.size = 0

    def save(self, folder, files):
        files.add("engine/weights.pt", {"module": torch.ones(self.size // 4)})
        files.add("full/part-0.safetensors", Tensors({"weight": files.copy(torch.ones(self.size // 4))}))


def checkpoints(root: Path, policy: str, *, later: bool) -> Checkpoints:
    return Checkpoints(root, LAYOUT, Weights(), Ranks(), TrainConfig(disk_full=policy, checkpoint_async=later))


def save(into: Checkpoints, step: int, size: int) -> None:
    into.engine.size = size
    into.save(step, {"at": step}, BadSteps())
    into.wait()


@pytest.mark.parametrize("later", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("size", [300_000, 500_000], ids=["in the second file", "in the first file"])
def test_a_full_disk_leaves_the_older_ones_and_the_next_save_tries_again(caplog, disk, later, size):
    into = checkpoints(disk, "continue", later=later)
    save(into, 2, 100_000)
    save(into, 4, 400_000 + size)
    assert sorted(path.name for path in disk.iterdir()) == ["step-2"] and fault_of(disk / "step-2") is None
    (said,) = [record.message for record in caplog.records]
    assert "checkpoint of step 4 cannot be written: " in said and "No space left on device" in said
    assert "it needs about 216." in said and "the newest checkpoint is step-2; training goes on" in said
    save(into, 6, 200_000)
    assert sorted(path.name for path in disk.iterdir()) == ["step-2", "step-6"] and fault_of(disk / "step-6") is None


def test_too_little_room_is_seen_before_anything_is_written(caplog, disk, monkeypatch):
    into = checkpoints(disk, "stop", later=True)
    save(into, 2, 300_000)
    monkeypatch.setattr(Weights, "save", lambda *_: pytest.fail("it was written"))
    with pytest.raises(StoppedByDisk) as stopped:
        save(into, 4, 300_000)
    (said,) = [record.message for record in caplog.records]
    assert stopped.value.code == 1 and "there is no room; it needs about 61" in said and "kB are free in" in said
    assert sorted(path.name for path in disk.iterdir()) == ["step-2"]


def test_a_folder_that_is_gone_is_one_line(caplog, tmp_path):
    (tmp_path / "run").mkdir()
    into = checkpoints(tmp_path / "run" / "checkpoints", "stop", later=True)
    save(into, 2, 1000)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoppedByDisk):
        save(into, 4, 1000)
    assert "No such file or directory" in caplog.text and not (tmp_path / "run").exists()


def test_a_line_that_finds_no_room_follows_later(caplog, disk):
    metrics = MetricsFile(disk / "metrics.jsonl", keep_until=0)
    metrics.write({"step": 1, "text": "a" * 100})
    fill(disk / "filler")
    for step in (2, 3):
        metrics.write({"step": step, "text": "b" * 9000})
    assert [line["step"] for line in read_metrics(disk / "metrics.jsonl")] == [1]
    (disk / "filler").unlink()
    metrics.write({"step": 4})
    metrics.close()
    assert [line["step"] for line in read_metrics(disk / "metrics.jsonl")] == [1, 2, 3, 4]
    assert caplog.text.count("metrics.jsonl cannot be written (No space left on device") == 1


def fill(filler: Path) -> None:
    """Until nothing more goes in, whatever else is written meanwhile."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_a_run_goes_on_over_a_disk_that_is_full_for_a_while(caplog, tiny_config, tmp_path, monkeypatch):
    """Steps 2 to 4 find no room: their checkpoints are left out, their lines follow, the weights are the same."""
    keys = ["log.progress=false", "train.checkpoint_every=1", "train.disk_full=continue"]
    train_plan(load_plan(tiny_config, keys), tmp_path / "undisturbed", resume=False)
    mount(tmp_path / "disk", "size=64m")
    try:
        run, filler, real = tmp_path / "disk" / "run", tmp_path / "disk" / "filler", Trainer.step

        def step(self, number, *arguments):
            if number == 2:
                fill(filler)
            elif number == 5:
                filler.unlink()
            return real(self, number, *arguments)

        monkeypatch.setattr(Trainer, "step", step)
        train_plan(load_plan(tiny_config, keys), run, resume=False)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]
        final = Path("final") / "model.safetensors"
        assert (run / final).read_bytes() == (tmp_path / "undisturbed" / final).read_bytes()
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
        assert "the newest checkpoint is" in caplog.text
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("inside", ["file", "read-only"])
def test_an_output_folder_that_cannot_be_written_is_one_line(capsys, tiny_config, tmp_path, inside):
    if inside == "file":
        (tmp_path / "file").touch()
    else:
        mount(tmp_path / "read-only", "ro,size=1m")
    try:
        with pytest.raises(SystemExit) as ended:
            main(["train", str(tiny_config), "--out", str(tmp_path / inside / "run")])
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and len(told) == 1 and "cannot be written" in told[0]
    finally:
        if inside != "file":
            subprocess.run(["umount", "-l", str(tmp_path / inside)], check=True)
