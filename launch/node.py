"""torchrun for one node of a job, as SLURM starts it: `python launch/node.py TORCHRUN_ARGUMENTS launch/train.py ...`.

Two things that torchrun alone does not do: SIGUSR1 and SIGTERM reach the ranks and are theirs to answer (torchrun would
die of the first and leave them behind, and end with 1 after the second), and the exit code is that of the first rank
that ended badly, so that 75, saved and to be continued, can be told from a failure.
"""

import signal
import sys

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def pass_on(number: int, frame: object) -> None:
    for rank in psutil.Process().children():
        rank.send_signal(number)


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
