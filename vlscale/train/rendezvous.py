"""How ranks find each other; where some do not come, one line that names the machine if that can be known."""

import base64
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import psutil
import torch.distributed as dist

WORLD = "--world_info="  # what DeepSpeed's inner launcher is given of a hostfile


def join(backend: str, rank: int, size: int, seconds: float) -> None:
    """The process group that the launcher describes in the environment. ValueError where not all ranks come in time."""
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise ValueError(_what_is_wrong(size, seconds, str(error))) from None


@contextmanager
def groups_within(seconds: float) -> Iterator[None]:
    """Around what makes process groups and names no timeout for them, as DeepSpeed does. torch's own is 30 minutes with
    gloo and 10 with NCCL, and making a group does not notice a peer that is gone."""
    new_group = dist.new_group
    dist.new_group = partial(new_group, timeout=timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.new_group = new_group


def launched_hosts() -> list[str]:
    """Machines of the hostfile that DeepSpeed started this rank by; none under other launchers, or on one machine."""
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher else []
    given = [word.removeprefix(WORLD) for word in words if word.startswith(WORLD)]
    hosts = list(json.loads(base64.urlsafe_b64decode(given[0]))) if given else []
    return hosts if len(hosts) > 1 else []


def _what_is_wrong(size: int, seconds: float, error: str) -> str:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    came = re.search(r"(\d+)/\d+ clients joined", error)
    if came is None:  # the port is taken, or not reached
        return f"ranks meet at {address}, which failed: {error.splitlines()[0]}; see that rank 0 runs, and its port"
    said = f"{came[1]} of {size} ranks came to {address} within {seconds:g} s"
    from vlscale.train.doctor_ranks import unreached  # which is needed by no run that starts

    unknown = "the others' own output says why, and `vlscale doctor` on each machine what it lacks"
    return f"{said}; {unreached(launched_hosts()) or unknown}"
