"""The real launcher, as a user starts it: two gloo ranks under `deepspeed`."""

import os
import subprocess
import sys
from pathlib import Path

from vlscale.cli.launcher import free_port
from vlscale.resources import launch_folder


def launch(config: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), str(launch_folder() / "train.py"), str(config), "--out", str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=1800)
