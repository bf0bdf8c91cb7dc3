"""A `vlscale` command whose processes are forked from one that has imported everything: a tenth of a second each.

Each is a process of its own, with its own folder, environment, output and exit code, as when it is started anew.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

SERVER = """
import json, os, socket, sys, traceback
import deepspeed, matplotlib.pyplot
import vlscale.report.write, vlscale.export.folder, vlscale.export.teach, vlscale.train.plan
from vlscale.cli import main
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
