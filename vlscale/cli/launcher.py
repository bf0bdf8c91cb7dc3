"""Start `launch/train.py` on several ranks of this machine through DeepSpeed's own launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from vlscale.resources import launch_folder


def launch_training(config: Path, out: Path, overrides: list[str], ranks: int) -> None:
    """Run to the end on the CPU; a failed launch ends this command with the same exit code."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port())]
    command += [str(launch_folder() / "train.py"), str(config), "--out", str(out), *overrides]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        print(f"error: training ended with exit code {code}; its own message stands above", file=sys.stderr)
        sys.exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
