"""Whether ranks and machines reach each other, and how fast.

Started by torchrun or deepspeed, all ranks measure together; alone, only a hostfile's machines are tried.
"""

import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from vlscale.distributed import Ranks
from vlscale.train.doctor import Finding

NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of the reduced vector: 16 MiB, 256 MiB
ROUNDS = 5
SSH_SECONDS = 10


def examine_ranks(ranks: Ranks) -> list[Finding]:
    """Called by all ranks together."""
    if ranks.group is None:
        change = "start it as the job will be: torchrun --nproc-per-node N -m vlscale doctor"
        return [Finding("ranks", "1, alone: nothing to measure between ranks", "ok", change)]
    facts = ranks.gather_objects(
        (socket.gethostname(), torch.__version__, version("deepspeed"), version("transformers"))
    )
    hosts = [host for host, *_ in facts]
    found = [Finding("ranks", f"{ranks.size} on {len(set(hosts))} machines: {', '.join(dict.fromkeys(hosts))}")]
    backend = dist.get_backend(ranks.group)
    slow = backend == "gloo" and torch.cuda.is_available()
    change = "NCCL is what GPUs need; see that torch is a CUDA build" if slow else None
    found.append(Finding("backend", backend, "fail" if slow else "ok", change))
    other = next((rank for rank, own in enumerate(facts) if own[1:] != facts[0][1:]), None)
    if other is not None:
        value = f"rank {other} ({hosts[other]}) has {facts[other][1:]}, rank 0 ({hosts[0]}) has {facts[0][1:]}"
        found.append(Finding("versions of ranks", value, "fail", "install the same constraints.txt on every machine"))
    return [*found, *_bandwidth(ranks)]


def _bandwidth(ranks: Ranks) -> list[Finding]:
    """all_reduce over all ranks: a vector moves 2 (W-1)/W of itself through every rank, W ranks."""
    device = ranks.device.type
    large = torch.ones(NUMBERS[device], device=ranks.device)
    seconds, wait = _median_seconds(ranks, large), _median_seconds(ranks, large[:1].clone())
    size = large.numel() * large.element_size()
    rate = 2 * (ranks.size - 1) / ranks.size * size / seconds
    return [
        Finding("bandwidth between ranks", f"{rate / 1e9:.2f} GB/s a rank, all_reduce of {size >> 20} MiB"),
        Finding("latency between ranks", f"{wait * 1e6:.0f} us, all_reduce of one number"),
    ]


def _median_seconds(ranks: Ranks, values: torch.Tensor) -> float:
    """The slowest rank's median round; the first one sets up connections and is not counted."""
    rounds = []
    for _ in range(ROUNDS + 1):
        values.fill_(1.0)
        ranks.barrier()
        started = time.perf_counter()
        ranks.sum(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        rounds.append(time.perf_counter() - started)
    return max(ranks.gather_objects(statistics.median(rounds[1:])))


def examine_hostfile(path: Path) -> list[Finding]:
    """Every machine of a DeepSpeed hostfile, tried by ssh, and what starts ranks on several of them. DeepSpeed itself
    tries only the first one."""
    hosts = read_hostfile(path)
    found = try_hosts(hosts)
    try:
        check_pdsh(hosts)
    except ValueError as error:
        value, change = str(error).removeprefix("pdsh: ").split("; ", 1)
        found.append(Finding("pdsh", value, "fail", change))
    return found


def check_pdsh(hosts: Sequence[str]) -> None:
    if len(hosts) > 1 and shutil.which("pdsh") is None:
        raise ValueError(
            "pdsh: not found; install pdsh, through which deepspeed starts ranks on several machines, or give it "
            "another --launcher"
        )


def check_hosts(hosts: Sequence[str], port: int | None = None) -> None:
    """Raises ValueError that names every machine which ssh does not reach."""
    said = unreached(hosts, port)
    if said is not None:
        raise ValueError(f"hostfile: {said}")


def unreached(hosts: Sequence[str], port: int | None = None) -> str | None:
    """The machines that ssh does not reach, why, and what to change for the first; None where it reaches all."""
    faults = [found for found in try_hosts(hosts, port) if found.level == "fail"]
    return "; ".join([*(f"{found.name} {found.value}" for found in faults), faults[0].change]) if faults else None


def try_hosts(hosts: Sequence[str], port: int | None = None) -> list[Finding]:
    """By ssh, at once."""
    with ThreadPoolExecutor(max_workers=min(64, max(len(hosts), 1))) as pool:
        return list(pool.map(partial(_reach, port=port), hosts))


def read_hostfile(path: Path) -> list[str]:
    """Names of the machines; lines are `NAME slots=N`."""
    if not path.is_file():
        raise ValueError(f"hostfile {path} does not exist; see launch/hostfile.example")
    hosts: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit() or not words[1].startswith("slots="):
            raise ValueError(f"hostfile {path}, line {number}: expected `NAME slots=N`, got {line.strip()!r}")
        if words[0] in hosts:
            raise ValueError(f"hostfile {path}, line {number}: {words[0]} is named twice; add its slots up in one line")
        hosts.append(words[0])
    if not hosts:
        raise ValueError(f"hostfile {path} names no machine: expected lines `NAME slots=N`")
    return hosts


def _reach(host: str, port: int | None = None) -> Finding:
    """Without a password and without asking, as DeepSpeed's launcher will."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}"]
    options += [] if port is None else ["-p", str(port)]
    command = ["ssh", *options, host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SSH_SECONDS)
        fault = (
            None
            if done.returncode == 0
            else (done.stderr.strip().splitlines() or [f"ssh ended with {done.returncode}"])[-1]
        )
    except FileNotFoundError:
        fault = "there is no ssh here"
    except subprocess.TimeoutExpired:
        fault = f"no answer in {2 * SSH_SECONDS} s"
    if fault is None:
        return Finding(f"host {host}", "reached")
    change = f"make `{' '.join(command)}` work without a password, or take {host} out of the hostfile"
    return Finding(f"host {host}", f"not reached: {fault}", "fail", change)
