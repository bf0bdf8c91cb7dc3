"""Groups of ranks, forked from one process that has imported everything: what a launcher does, without its minutes.

A group is a training by some ranks, each a process of its own, which may change something first (`before`, Python code)
and end as it likes. Groups run one after the other.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import ROOT
from vlscale.cli.launcher import free_port

NURSERY = """
import json, os, sys, traceback
import deepspeed
import vlscale.train.plan
from vlscale.cli import main

def rank_of(group, rank, folder):
    file = os.open(folder + f"/group-{group['number']}-rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    of_ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group["ranks"], "LOCAL_WORLD_SIZE": group["ranks"]}
    os.environ.update({name: str(value) for name, value in of_ranks.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(group["port"])})
    try:
        exec(group["before"], {})
        main(["train", *group["words"]])
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

codes = []
for group in json.loads(sys.argv[2]):
    children = []
    for rank in range(group["ranks"]):
        child = os.fork()
        if child == 0:
            rank_of(group, rank, sys.argv[1])
        children.append(child)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Group:
    words: list[str]  # of `vlscale train`
    ranks: int = 1
    before: str = ""


def run_groups(folder: Path, groups: list[Group]) -> list[list[int]]:
    """Exit codes by group and rank; what they said is in `folder`, see `said`."""
    asked = [asdict(group) | {"number": number, "port": free_port()} for number, group in enumerate(groups)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # ranks may be more than GPUs
    command = [sys.executable, "-c", NURSERY, str(folder), json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def said(folder: Path, group: int, rank: int = 0) -> str:
    return (folder / f"group-{group}-rank-{rank}.txt").read_text()
