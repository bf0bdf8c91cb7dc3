"""Curves for other tools: what is written, what a resumed run replaces, and what is refused."""

import csv
from pathlib import Path

import pytest
import torch

from vlscale.sections import LogConfig
from vlscale.train.loop import device_memory
from vlscale.train.monitors import Monitors, check_monitors


def write(folder: Path, log: LogConfig, steps: range, offset: float = 0.0) -> None:
    monitors = Monitors(log, folder, "a-run", keep_until=steps.start - 1)
    for step in steps:
        values = {"step": step, "loss": step + offset, "keys": "a1b2", "lost": float("nan"), "skipped": 0}
        monitors.write(step, values)
        if step % 2 == 0:
            monitors.write(step, {"step": step, "protocol": "pairs", "i2t/r@1": 10.0 * step}, "eval")
    monitors.close()


def rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "monitors" / "metrics.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_on_a_gpu_every_step_tells_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7_000_000_000)
    assert device_memory(torch.device("cpu")) == {} and asked == []
    assert device_memory(torch.device("cuda", 1)) == {"peak_memory": 7_000_000_000}
    assert asked == [torch.device("cuda", 1)]


def test_csv_holds_every_number_once_also_after_a_resume(tmp_path):
    write(tmp_path, LogConfig(csv=True), range(1, 4))
    (tmp_path / "monitors" / "metrics.csv").open("a").write("3,train/lo")  # killed while writing
    write(tmp_path, LogConfig(csv=True), range(3, 5), offset=0.5)
    assert rows(tmp_path) == [
        ("step", "name", "value"),
        ("1", "train/loss", "1.0"),
        ("1", "train/skipped", "0.0"),
        ("2", "train/loss", "2.0"),
        ("2", "train/skipped", "0.0"),
        ("2", "eval/i2t/r@1", "20.0"),
        ("3", "train/loss", "3.5"),
        ("3", "train/skipped", "0.0"),
        ("4", "train/loss", "4.5"),
        ("4", "train/skipped", "0.0"),
        ("4", "eval/i2t/r@1", "40.0"),
    ]


def test_nothing_is_made_where_nothing_is_asked_for(tmp_path):
    write(tmp_path, LogConfig(), range(1, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (LogConfig(tensorboard=True), "log.tensorboard=true needs the package tensorboard, which is not installed"),
        (LogConfig(wandb="offline"), "log.wandb=offline needs the package wandb, which is not installed: pip install"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_built(monkeypatch, tmp_path, log, said):
    monkeypatch.setattr("vlscale.train.monitors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=said):
        check_monitors(log)
    with pytest.raises(ValueError, match=said):
        Monitors(log, tmp_path, "a-run", keep_until=0)
    assert list(tmp_path.iterdir()) == []
    check_monitors(LogConfig(csv=True))


def test_tensorboard_reads_the_curves_back(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, LogConfig(tensorboard=True), range(1, 4))
    write(tmp_path, LogConfig(tensorboard=True), range(3, 5), offset=0.5)
    found = events.EventAccumulator(str(tmp_path / "monitors" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    assert [(e.step, e.value) for e in found.Scalars("eval/i2t/r@1")] == [(2, 20.0), (4, 40.0)]
    assert "train/lost" not in found.Tags()["scalars"]


def test_wandb_offline_keeps_one_id_a_run_folder(tmp_path):
    pytest.importorskip("wandb")
    write(tmp_path, LogConfig(wandb="offline"), range(1, 4))
    write(tmp_path, LogConfig(wandb="offline"), range(3, 5), offset=0.5)
    name = (tmp_path / "monitors" / "wandb-id").read_text()
    written = sorted((tmp_path / "monitors" / "wandb").glob("offline-run-*"))
    assert written and all(folder.name.endswith(name) for folder in written)
    contents = b"".join(file.read_bytes() for folder in written for file in folder.glob("*.wandb"))
    assert b"train/loss" in contents and b"eval/i2t/r@1" in contents and b"a-run" in contents
