"""How much memory a rank has, and how much of it rows of other ranks may take: what `engine.comm=auto` decides by.

Of all the memory there is, not of what happens to be free: every run on the same machines decides alike, and so does
one that continues.
"""

import os
import socket

import torch

from vlscale.distributed.blocks import GATHER_BUDGET
from vlscale.distributed.ranks import Ranks

SHARE = 10  # a tenth of a rank's memory: weights, optimizer states and activations want the rest
CGROUP_LIMIT = "/sys/fs/cgroup/memory.max"


def gather_budget(memory: int) -> int:
    """Bytes that rows of other ranks and gradients of them may take on a rank that has `memory`."""
    return max(GATHER_BUDGET, memory // SHARE)


def rank_memory(device: torch.device, ranks_here: int = 1) -> int:
    """Bytes: all of the rank's GPU, or its part of the host's memory that `ranks_here` ranks share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _host_memory() // ranks_here


def agreed_memory(ranks: Ranks) -> int:
    """Bytes that the rank with the least has, on every rank. Called by all ranks together, once a run."""
    names = ranks.gather_objects(socket.gethostname())
    return min(ranks.gather_objects(rank_memory(ranks.device, names.count(socket.gethostname()))))


def _host_memory() -> int:
    """Within the limit of this container."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open(CGROUP_LIMIT) as limit:
            return min(whole, int(limit.read()))
    except (OSError, ValueError):  # no limit: the file says `max`
        return whole
