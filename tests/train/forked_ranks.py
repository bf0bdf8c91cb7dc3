"""Groups of ranks, forked from one process that has imported everything: what a launcher does, without its minutes.

A group is a training by some ranks, each a process of its own, which may change something first (`before`, Python code)
and end as it likes. Groups run one after the other.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.forked import ON_CPU, Command, start_command
from vlscale.cli.launcher import free_port


@dataclass(frozen=True)
class Group:
    words: list[str]  # of `vlscale train`
    ranks: int = 1
    before: str = ""


def run_groups(folder: Path, groups: list[Group]) -> list[list[int]]:
    """Exit codes by group and rank; what they said is in `folder`, see `said`."""
    codes = []
    for number, group in enumerate(groups):
        port, ranks = free_port(), []
        for rank in range(group.ranks):
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group.ranks, "LOCAL_WORLD_SIZE": group.ranks}
            of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | ON_CPU | {name: str(value) for name, value in of_rank.items()}
            told, words = _told(folder, number, rank), ["train", *group.words]
            ranks.append(start_command(Command(words, told, told, Path.cwd(), environment, group.before)))
        for rank in ranks:
            rank.join()
        codes.append([rank.exitcode for rank in ranks])
    return codes


def _told(folder: Path, group: int, rank: int) -> Path:
    return folder / f"group-{group}-rank-{rank}.txt"


def said(folder: Path, group: int, rank: int = 0) -> str:
    return _told(folder, group, rank).read_text()
