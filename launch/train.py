"""What `deepspeed` and `torchrun` start: exactly `vlscale train`, on every rank.

deepspeed launch/train.py CONFIG --out DIR [--resume] [key=value ...]
torchrun --nproc-per-node 8 launch/train.py CONFIG --out DIR
"""

import ctypes
import os
import signal
import sys

from vlscale.cli import main

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """A launcher that is killed cannot end its ranks: they are told by the kernel, as by SIGTERM, and save first."""
    if "RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


if __name__ == "__main__":
    end_with_launcher()
    main(["train", *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
