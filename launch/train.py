"""What `deepspeed` and `torchrun` start: exactly `vlscale train`, on every rank.

deepspeed launch/train.py CONFIG --out DIR [--resume] [key=value ...]
torchrun --nproc-per-node 8 launch/train.py CONFIG --out DIR
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from threading import Thread

import psutil

from vlscale.cli import main

PR_SET_PDEATHSIG = 1  # of Linux's prctl
DEEPSPEED = "deepspeed.launcher.launch"  # its inner launcher


def end_with_launcher() -> None:
    """A launcher that is killed cannot end its ranks: they are told as by SIGTERM, and save first. By the kernel, of
    their parent; DeepSpeed's has a parent of its own, the command that was typed."""
    if "RANK" not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    with suppress(psutil.Error):
        inner = psutil.Process().parent()  # None, and so the next, for the first process of a container
        outer = inner and inner.parent()
        if outer and DEEPSPEED in inner.cmdline() and any("deepspeed" in word for word in outer.cmdline()):
            Thread(target=_end_after, args=[outer], name="launcher", daemon=True).start()


def _end_after(process: psutil.Process) -> None:
    process.wait()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with_launcher()
    main(["train", *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
