"""Worlds of a test: ranks that meet over gloo on the CPU or, where there is a GPU for each, over NCCL. No tests here.

A file of cases has one function of `Ranks` that makes all of them; `meet` runs it on every rank of a world. What is
computed lies on `ranks.device`, what it is compared with on the CPU.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.forked import begin, server
from vlscale.distributed import Ranks

DEVICES = {"gloo": "cpu", "nccl": "cuda"}  # by backend


@dataclass(frozen=True)
class World:
    size: int
    backend: str = "gloo"

    def __str__(self) -> str:
        return f"{self.size}-{self.backend}"


def worlds(*sizes: int) -> list:
    """To parametrize by: each size by each backend, NCCL skipped where there are fewer GPUs than ranks."""
    made = []
    for world in (World(size, backend) for backend in DEVICES for size in sizes):
        short = DEVICES[world.backend] == "cuda" and torch.cuda.device_count() < world.size
        reason = f"NCCL between {world.size} ranks takes a GPU each, there are {torch.cuda.device_count()}"
        made.append(pytest.param(world, id=str(world), marks=[pytest.mark.skip(reason=reason)] if short else []))
    return made


def meet(work: Callable[[Ranks], dict[Any, Any]], world: World, folder: Path) -> list[dict[Any, Any]]:
    """What `work` finds on each rank, tensors on the CPU. `folder` is new and empty."""
    given, method = (work, world, str(folder), dict(os.environ)), "spawn"  # a GPU is not for the children of a fork
    if DEVICES[world.backend] == "cpu":
        server()
        method = "forkserver"
    multiprocessing.start_processes(_on_rank, given, nprocs=world.size, start_method=method)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(world.size)]


def _on_rank(rank: int, work: Callable[[Ranks], dict[Any, Any]], world: World, folder: str, environment: dict) -> None:
    begin(environment)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if DEVICES[world.backend] == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 of convolutions is then float32, as that of products is
    join = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": world.size}
    dist.init_process_group(world.backend, **join)
    torch.save(work(Ranks(rank, world.size, device, dist.group.WORLD)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
