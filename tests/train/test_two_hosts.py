"""Two hosts on one machine: network namespaces joined by a veth pair, one rank in each, one job over the wire.

Everything happens inside the two namespaces made here; where they are not allowed the test skips.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vlscale.config import load_plan
from vlscale.resources import launch_folder
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # set aside for documentation: nobody's network
SECONDS = 240


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other at ADDRESSES."""
    if shutil.which("ip") is None:
        pytest.skip("there is no iproute2 here")
    names = [f"vlscale-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"vls{os.getpid() % 100000}{side}" for side in "ab"]  # at most 15 letters
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/30", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:  # its end of the pair goes with it, and with one end the other
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def received(host: str) -> int:
    """Bytes that came over the wire into a namespace, its own loopback not counted."""
    command = ["ip", "netns", "exec", host, "cat", "/proc/net/dev"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()
    (own,) = [line for line in lines if line.strip().startswith("vls")]
    return int(own.split(":")[1].split()[0])


def test_one_job_over_the_wire_equals_one_process(hosts, tiny_config, tmp_path):
    """torchrun on each, rendezvous at the first one's address; gradients cross the wire and nothing else differs.

    Of a model of 4 MB, beside which what launchers and libraries say to each other is little, the first host gets 5.5
    times its size in three steps: 1.5 of weights, half of them a step, and 3 of gradients, reduced whole over gloo.
    Either sent twice would make 7 or more."""
    overrides = ["train.max_steps=3", "train.checkpoint_every=3", "log.progress=false"]
    overrides += [f"model.{tower}.config.intermediate_size=8192" for tower in ("vision", "text")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "two-hosts"]
    job = [str(launch_folder() / "train.py"), str(tiny_config), "--out", str(tmp_path / "two"), *overrides]
    running = []
    for number, (host, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
        here = ["ip", "netns", "exec", host, *torchrun, "--local-addr", address]
        here += ["--rdzv-conf", f"is_host={int(number == 0)}", *job]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["GLOO_SOCKET_IFNAME"] = f"vls{os.getpid() % 100000}{'ab'[number]}"
        running.append(subprocess.Popen(here, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said[0][-2000:] + said[1][-2000:]
    over_the_wire = min(received(host) for host in hosts)
    train_plan(load_plan(tiny_config, overrides), tmp_path / "one", resume=False)
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["keys"] for line in two] == [line["keys"] for line in one] and len(two) == 3
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    parameters = (tmp_path / "two" / "final" / "model.safetensors").stat().st_size
    assert 2 * parameters < over_the_wire < 6.5 * parameters
