"""A `vlscale` command whose processes are forked from one that has imported everything: a tenth of a second each.

Each is a process of its own, with its own folder, environment, output and exit code, as when it is started anew: by
`start_command` from a test, and by the script of `vlscale_command` from a shell.
"""

import functools
import gc
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # read when libraries load
PRELOADED = ["deepspeed", "matplotlib.pyplot", "vlscale.train.plan", "vlscale.report.write", "vlscale.export.folder"]
PRELOADED += ["vlscale.export.teach", "vlscale.objectives", "vlscale.cli", "tests.forked"]
# What a run imports as it goes, a second of it.
PRELOADED += ["transformers.models.bert.modeling_bert", "transformers.models.vit.modeling_vit"]
PRELOADED += ["deepspeed.module_inject.auto_ep_layer", "torch._inductor.compile_fx"]


@functools.cache
def server() -> ForkServerContext:
    """One for all tests of this process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ON_CPU | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Command:
    words: list[str]
    out: Path
    error: Path
    folder: Path
    environment: dict[str, str]
    before: str = ""  # Python code that changes something first


def start_command(command: Command) -> BaseProcess:
    """Its `exitcode` is that of the command, or of the signal that killed it."""
    process = server().Process(target=_become, args=(command,))
    process.start()
    return process


def begin(environment: dict[str, str]) -> None:
    """What a forked process does first."""
    gc.freeze()  # closing an engine then looks through its own objects, not all imported ones
    os.environ.clear()
    os.environ.update(environment)


def _become(command: Command) -> None:
    begin(command.environment)
    for number, path in ((1, command.out), (2, command.error)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.chdir(command.folder)
    code = 0
    try:
        exec(command.before, {})
        from vlscale.cli import main

        main(command.words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(words: list[str], folder: Path | None = None, before: str = "") -> subprocess.CompletedProcess:
    """`vlscale WORDS` in `folder`, to its end. Where there is a GPU it is started anew: no fork's child gets one."""
    if torch.cuda.is_available():
        code = f"{before}\nfrom vlscale.cli import main\nmain()"
        return subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as place:
        out, error = Path(place, "stdout.txt"), Path(place, "stderr.txt")
        process = start_command(Command(words, out, error, folder or Path.cwd(), dict(os.environ), before))
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), error.read_text())


SERVER = """
import gc, importlib, json, os, socket, sys, traceback
from tests.forked import PRELOADED
for name in PRELOADED:
    importlib.import_module(name)
from vlscale.cli import main
gc.freeze()
with socket.socket(socket.AF_UNIX) as server:
    server.bind(sys.argv[1])
    server.listen()
    print("ready", flush=True)
    while True:
        asked, _ = server.accept()
        message, streams, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if os.fork() == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            request, code = json.loads(message), 0
            os.environ.clear()
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            try:
                main(request["words"])
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        for stream in streams:
            os.close(stream)
        _, status = os.wait()
        asked.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        asked.close()
"""


@contextmanager
def vlscale_command(folder: Path) -> Iterator[Path]:
    """`folder`, with the command in it, for as long as it is open."""
    address = str(folder / "socket")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SERVER, address]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        script = folder / "vlscale"
        script.write_text(f"#!{sys.executable} -SE\n{CLIENT.format(address=address)}")
        script.chmod(0o755)
        try:
            yield folder
        finally:
            server.kill()


CLIENT = """
import json, os, socket, sys
request = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16)))
"""
