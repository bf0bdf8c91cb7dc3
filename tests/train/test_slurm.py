"""launch/slurm.sbatch on one machine: `srun` and `scontrol` are stand-ins that start two nodes of one rank here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlscale.cli.launcher import free_port
from vlscale.resources import launch_folder
from vlscale.train.metrics_file import read_metrics

SCRIPT = launch_folder() / "slurm.sbatch"
SRUN = """#!/usr/bin/env bash
# One copy of the command a node; signals go to all of them; the exit code is the largest.
echo "$*" >> "$CALLS/srun"
for argument in "$@"; do case $argument in --ntasks=*) nodes=${argument#*=};; esac; done
while [[ $1 == --* ]]; do shift; done
pids=()
for _ in $(seq "$nodes"); do "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
largest=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while [ "$code" -eq 138 ] && kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
    [ "$code" -gt "$largest" ] && largest=$code
done
exit "$largest"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$CALLS/scontrol"
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\n127.0.0.2\\n'; fi
"""
SIGNAL_BY = 240.0  # seconds until two steps are made; a bound for a busy machine


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job on two nodes; what the stand-ins were called with is kept in CALLS."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    port = free_port()
    own = {"CALLS": str(tmp_path), "OMP_NUM_THREADS": "1", "VLSCALE_RANKS_PER_NODE": "1"}
    own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"SLURM_JOB_ID": str(port - 20000 if 20000 <= port < 40000 else port % 20000), "SLURM_JOB_NUM_NODES": "2"}
    own |= {"SLURM_JOB_NODELIST": "node-[01-02]", "SLURM_SUBMIT_DIR": str(launch_folder().parent)}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | own | {"PATH": path, "VIRTUAL_ENV": sys.prefix}


def test_its_syntax_is_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_outside_a_job_it_says_how_to_start_it():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "start this file with sbatch" in done.stderr


def test_a_checkout_that_is_not_there_is_named(cluster, tmp_path):
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=cluster | {"VLSCALE_ROOT": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"{tmp_path} holds no launch/train.py" in done.stderr
    assert not (tmp_path / "srun").exists()


def test_a_job_is_requeued_after_the_signal_and_then_runs_to_its_end(cluster, tiny_config, tmp_path):
    """Two nodes meet by the environment alone; SIGUSR1 to the batch shell ends in a checkpoint, exit code 75 and one
    requeue; the same job again goes on from there, ends with 0 and asks for nothing."""
    out, calls = tmp_path / "run", tmp_path / "scontrol"
    command = ["bash", str(SCRIPT), str(tiny_config), "--out", str(out)]
    command += ["train.max_steps=80", "train.checkpoint_every=80", "log.progress=false"]
    with subprocess.Popen(command, env=cluster, stderr=subprocess.PIPE, text=True) as job:
        limit = time.monotonic() + SIGNAL_BY
        while len(read_metrics(out / "metrics.jsonl")) < 2 and job.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=SIGNAL_BY)[1]
    assert job.returncode == 75, said[-3000:]
    stopped = len(read_metrics(out / "metrics.jsonl"))
    assert 2 <= stopped < 80 and (out / "checkpoints" / f"step-{stopped}" / "rank-1.pt").is_file()
    assert calls.read_text().splitlines() == ["show hostnames node-[01-02]", f"requeue {cluster['SLURM_JOB_ID']}"]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=2 * SIGNAL_BY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continuing after step {stopped}" in done.stderr and (out / "final" / "model.safetensors").is_file()
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, 81))
    assert calls.read_text().count("requeue") == 1
    port = 20000 + int(cluster["SLURM_JOB_ID"]) % 20000
    asked = (tmp_path / "srun").read_text()
    assert f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}" in asked
