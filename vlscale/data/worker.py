"""Loading in processes: each owns a run of the rank's lanes and sends its parts through a socket, in order.

There is no shared memory and no named resource, so nothing is left behind however a process ends: a worker whose
trainer is gone fails to send and ends, and a trainer whose worker is gone reads the end of the socket and says so. A
worker is one part ahead and then waits in its send, which bounds the memory.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from vlscale.data.loader import LoaderJob, Part, PartLoader

_PATIENCE = 5.0  # seconds that a worker gets to end by itself


class WorkerPool:
    """As PartLoader, with the lanes dealt to `workers` processes."""

    def __init__(self, job: LoaderJob, workers: int):
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        try:
            for own in job.split(workers):
                self._workers.append(_start(own))
        except BaseException:
            self.close()
            raise

    def next(self) -> Part:
        return Part.join([_receive(process, pipe) for process, pipe in self._workers])

    def close(self) -> None:
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers.clear()


def work(pipe: Connection) -> None:
    """The life of a worker: takes its job, sends parts until nobody listens; a failure is sent and ends it."""
    try:
        loader = PartLoader(pickle.loads(pipe.recv_bytes()))
        while True:
            pipe.send_bytes(pickle.dumps(loader.next(), protocol=5))
    except (BrokenPipeError, ConnectionResetError, EOFError):
        return
    except Exception as error:
        pipe.send_bytes(pickle.dumps(error))


def _start(job: LoaderJob) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    # A fresh interpreter: a fork would copy the trainer's threads' locks, multiprocessing's spawn would run its script.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlscale.data.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    pipe = Connection(ours.detach())
    pipe.send_bytes(pickle.dumps(job, protocol=5))
    return process, pipe


def _receive(process: subprocess.Popen, pipe: Connection) -> Part:
    try:
        received = pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        code = process.wait()
        raise RuntimeError(
            f"a data worker ended unexpectedly (exit code {code}); -9 often means too little memory"
        ) from None
    if isinstance(received, Exception):
        raise received
    return received


if __name__ == "__main__":
    # These are the trainer's, which may want more batches before it saves and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    work(Connection(int(sys.argv[1])))
