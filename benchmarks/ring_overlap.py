"""Whether a ring hides its transfers: losses over ranks on a wire of known speed, in a ring and gathered.

    vlscale bench ring [--ranks 4] [--pairs 1024] [--width 512] [--rounds 3] [--write]

Ranks are processes of one thread over gloo, in a network namespace whose loopback lets through so many bits a second
(iproute2's tbf; needs the right to make one). Each loss is timed with its gradients on a wire without a limit and on
slower ones, turn about; the slowest rank counts, the median of the rounds. `beside` is what the slower wire adds,
against the time that the bytes counted take on it alone: 1 where nothing is hidden, 0 where all of it is. Bytes that
take longer than the loss on a free wire cannot all be hidden: `at best`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.common import RESULTS, provenance, today  # noqa: E402
from vlscale.distributed import Ranks  # noqa: E402
from vlscale.distributed.traffic import count_traffic  # noqa: E402
from vlscale.objectives.sharded_contrastive import sharded_contrastive_loss  # noqa: E402
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss  # noqa: E402

COMMS = {"contrastive": ("gather", "ring"), "relation_kl": ("gather", "ring", "half_ring")}
SHARES = (0.5, 1.0, 2.0)  # of the time that the ring takes on a free wire, what its bytes shall take alone
PORT = "29411"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1024, help="of each rank")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that --write writes to")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        return on_rank(given)
    rows = in_namespace(given)
    text = page(rows, given)
    print(text)
    if given.write:
        place = given.out / f"{today()}-ring-overlap"
        place.with_suffix(".md").write_text(text)
        place.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def in_namespace(given: argparse.Namespace) -> list[dict]:
    """What rank 0 found, the ranks being in a network namespace of their own."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        sys.exit("error: iproute2: expected `ip` and `tc`, found neither or one; install iproute2")
    name = f"vlscale-ring-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"error: network namespaces are not allowed here: {made.stderr.strip()}")
    inside = ["ip", "netns", "exec", name]
    running: list[subprocess.Popen] = []
    try:
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        words = [f"--{key}={getattr(given, key)}" for key in ("ranks", "pairs", "width", "rounds")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
        for rank in range(given.ranks):
            command = [*inside, sys.executable, __file__, *words, f"--rank={rank}"]
            out = subprocess.PIPE if rank == 0 else None
            running.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
        found = running[0].communicate()[0]
        if any(process.wait() for process in running):
            sys.exit("error: a rank failed; see above")
        return json.loads(found)
    finally:
        for process in running:
            process.kill()
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_rank(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=given.rank, world_size=given.ranks)
    ranks = Ranks(given.rank, given.ranks, torch.device("cpu"), dist.group.WORLD)
    torch.manual_seed(given.rank)
    x, y = torch.nn.functional.normalize(torch.randn(2, given.pairs, given.width), dim=2).unbind()
    losses = {
        "contrastive": lambda a, comm: sharded_contrastive_loss(a, y, 20.0, ranks=ranks, comm=comm),
        "relation_kl": lambda a, comm: sharded_relation_kl_loss(
            a, y, student_temperature=0.05, teacher_temperature=0.05, ranks=ranks, comm=comm
        ),
    }
    rows = [row for name, loss in losses.items() for row in measure(name, loss, x, ranks, given.rounds)]
    if ranks.first:
        print(json.dumps(rows))
    dist.destroy_process_group()


def measure(name: str, loss, x: torch.Tensor, ranks: Ranks, rounds: int) -> list[dict]:
    runs = {comm: partial(loss, comm=comm) for comm in COMMS[name]}
    for run in runs.values():
        timed(run, x, ranks)
    moved = {comm: counted(run, x, ranks) for comm, run in runs.items()}
    free = timed(runs["ring"], x, ranks)
    rates = [None] + [8 * moved["ring"] / (share * free) for share in SHARES]  # bits a second
    seconds: dict = {(comm, rate): [] for comm in runs for rate in rates}
    for _ in range(rounds):
        for rate in rates:
            limit(rate, ranks)
            for comm, run in runs.items():
                seconds[comm, rate].append(timed(run, x, ranks))
    limit(None, ranks)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "loss": name,
            "comm": comm,
            "megabits": None if rate is None else rate / 1e6,
            "seconds": median[comm, rate],
            "alone": 0.0 if rate is None else 8 * moved[comm] / rate,
            "free": median[comm, None],
        }
        for rate in rates
        for comm in runs
    ]


def timed(run, x: torch.Tensor, ranks: Ranks) -> float:
    """Seconds of loss and gradient on the slowest rank."""
    rows = x.clone().requires_grad_()
    ranks.barrier()
    begun = time.perf_counter()
    run(rows).backward()
    return max(ranks.gather_objects(time.perf_counter() - begun))


def counted(run, x: torch.Tensor, ranks: Ranks) -> int:
    """Bytes that all ranks receive, which share the wire."""
    with count_traffic() as traffic:
        run(x.clone().requires_grad_()).backward()
    return sum(ranks.gather_objects(sum(traffic.values())))


def limit(rate: float | None, ranks: Ranks) -> None:
    """The namespace's loopback at so many bits a second; None: as it is without."""
    ranks.barrier()
    if ranks.first:
        subprocess.run(["tc", "qdisc", "delete", "dev", "lo", "root"], capture_output=True)
        if rate is not None:
            tbf = ["tbf", "rate", f"{rate:.0f}bit", "burst", "256kb", "latency", "5s"]
            subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", *tbf], check=True)
    ranks.barrier()


def page(rows: list[dict], given: argparse.Namespace) -> str:
    words = f"--ranks {given.ranks} --pairs {given.pairs} --width {given.width} --rounds {given.rounds} --write"
    lines = [
        f"# A ring's transfers under its tiles, {today()}",
        "",
        provenance(f"vlscale bench ring {words}"),
        "",
        f"{given.ranks} ranks of one thread, {given.pairs:,} pairs each of {given.width} features, float32, loss and "
        "gradient, gloo on a wire that all ranks share. Alone: what the bytes counted take on that wire. Beside: how "
        "much of it the slower wire adds to the time on a free one; at best: if all that fits under it were hidden.",
        "",
        "| loss | comm | wire, Mbit/s | seconds | on a free wire | bytes alone | beside | at best |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        wire = "free" if row["megabits"] is None else f"{row['megabits']:,.0f}"
        beside = best = ""
        if row["alone"]:
            beside = f"{(row['seconds'] - row['free']) / row['alone']:.2f}"
            best = f"{max(0.0, 1 - row['free'] / row['alone']):.2f}"
        lines.append(
            f"| {row['loss']} | {row['comm']} | {wire} | {row['seconds']:.2f} | {row['free']:.2f} | "
            f"{row['alone']:.2f} | {beside} | {best} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
