"""Two ranks: bad numbers on one rank only, other world sizes in one training; and under the real launchers, a killed
rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.train.forked_ranks import Group, run_groups, said
from vlscale.cli.launcher import free_port
from vlscale.config import load_plan
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

# Pictures are NaN on rank 1 in the second step, or it sleeps in a step
STUDENT = """
import os, time
from vlscale.train.inputs import Inputs
real = Inputs.student
spoil, sleep = int(os.environ.get("SPOIL", 0)), int(os.environ.get("SLEEP", 0))
def student(self, batch):
    inputs, step = real(self, batch), batch.state.samples // 32
    if step == spoil and os.environ["RANK"] == "1":
        inputs["pixels"] = inputs["pixels"] * float("nan")
    if step == sleep:
        time.sleep(600 if os.environ["RANK"] == "1" else 0)
    return inputs
Inputs.student = student
"""
SCRIPT = f"""{STUDENT}
import sys
from vlscale.cli import main
main(["train", *(word for word in sys.argv[1:] if not word.startswith("--local_rank"))])
"""


def start(folder: Path, *arguments: str, launcher: str = "deepspeed", **environment: str) -> subprocess.Popen:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = {
        "deepspeed": ["deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2", "--master_port"],
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    }[launcher]
    command = [sys.executable, "-m", *command, str(free_port()), str(script), *arguments]
    environment = (
        os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    )
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def train(folder: Path, *words: str, ends_with: int = 0, before: str = "") -> None:
    """Two ranks, forked."""
    (codes,) = run_groups(folder, [Group(list(words), 2, before)])
    assert codes == [ends_with] * 2, said(folder, 0)[-4000:]


def alone(config: Path, out: Path, *overrides: str) -> None:
    train_plan(load_plan(config, ["log.progress=false", *overrides]), out, resume=True)


def lines(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


def test_a_bad_rank_is_seen_by_both_at_stages_2_and_3(tiny_config, tmp_path):
    recipe = tmp_path / "stages.yaml"
    recipe.write_text(
        f"base: {tiny_config}\n"
        "train: {max_steps: 3, checkpoint_every: 1, keep_checkpoints: 9, elastic: true, bad_numbers: skip}\n"
        "variants:\n  two: {engine: {zero_stage: 2}}\n  three: {engine: {zero_stage: 3}}\n"
    )
    spoiling = f"import os\nos.environ['SPOIL'] = '2'\n{STUDENT}"
    train(tmp_path, str(recipe), "--out", str(tmp_path / "out"), before=spoiling)
    for name in ("two", "three"):
        run = tmp_path / "out" / name
        assert [line["skipped_steps"] for line in lines(run)] == [0, 1, 1]
        assert weights_at(run, 2) == weights_at(run, 1) != weights_at(run, 3)
        assert (run / "bad-2.json").is_file()


def weights_at(run: Path, step: int) -> tuple[bytes, ...]:
    folder = run / "checkpoints" / f"step-{step}" / "full"
    return tuple(path.read_bytes() for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("optim", ["{name: adamw}", "{name: sgd, lr: 0.05, weight_decay: 0}"], ids=["adamw", "sgd"])
def test_two_one_two_ranks_follow_the_undisturbed_run(tiny_config, tmp_path, optim):
    """Each part ends by the stop file, as a user would end it; the first step after a start always runs."""
    recipe = tmp_path / "elastic.yaml"
    recipe.write_text(f"base: {tiny_config}\ntrain: {{max_steps: 3, elastic: true}}\noptim: {optim}\n")
    alone(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / "stop").touch()
    train(tmp_path, str(recipe), "--out", str(out), "--resume", ends_with=75)
    (out / "stop").touch()
    with pytest.raises(SystemExit):
        alone(recipe, out)
    assert [line["step"] for line in lines(out)] == [1, 2]
    train(tmp_path, str(recipe), "--out", str(out), "--resume")
    found, expected = lines(out), lines(tmp_path / "whole")
    assert [line["keys"] for line in found] == [line["keys"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    if "sgd" in optim:
        moved = load_file(out / "final" / "model.safetensors")
        for name, value in load_file(tmp_path / "whole" / "final" / "model.safetensors").items():
            torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_when_a_rank_is_killed_all_end_and_no_process_is_left(launcher, tiny_config, tmp_path):
    """With one line that names it."""
    out = tmp_path / "out"
    slow = ["engine.timeout_seconds=20", "engine.step_timeout_seconds=1"]
    process = start(tmp_path, str(tiny_config), "--out", str(out), *slow, launcher=launcher, SLEEP="3")
    report = out / "watchdog-rank-1.txt"
    deadline = time.monotonic() + 600
    while not (report.is_file() and "step of step 3" in report.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = {child.environ().get("RANK"): child for child in children if "train.py" in " ".join(child.cmdline())}
    killed = time.monotonic()
    ranks["1"].send_signal(signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert said.count("rank 1 of 2 is gone (no sign of it for 5 s), noticed by rank 0 in step 3; see its own log") == 1


def test_a_rank_that_sleeps_for_ever_is_named_by_the_other_after_the_short_timeout(tiny_config, tmp_path):
    slow = ["engine.timeout_seconds=300", "engine.warm_timeout_seconds=5"]
    out = tmp_path / "out"
    with start(tmp_path, str(tiny_config), "--out", str(out), *slow, launcher="torchrun", SLEEP="3") as process:
        try:
            said = next((line for line in process.stderr if "no sign" in line), "")
        finally:
            for rank in psutil.Process(process.pid).children(recursive=True):
                rank.kill()  # torchrun would give the one that sleeps half a minute
    assert process.returncode != 0
    assert "rank 1 of 2 gives no sign (for 5 s), noticed by rank 0 in step 3; see its own log" in said


def test_when_the_deepspeed_command_is_killed_the_ranks_save_and_end(tiny_config, tmp_path):
    """Its inner launcher lives on, which must not train on behind a job that is over."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2"]
    command += [
        "--master_port",
        str(free_port()),
        str(ROOT / "launch" / "train.py"),
        str(tiny_config),
        "--out",
        str(out),
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "train.max_steps=100000"], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and lines(out)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, 60)[1]
    last = lines(out)[-1]["step"]
    assert (out / "checkpoints" / f"step-{last}" / "manifest.json").is_file()
