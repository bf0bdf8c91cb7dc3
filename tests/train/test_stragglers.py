"""A rank that the others wait for is named; timeouts of collectives are short while steps are warm."""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vlscale.cli.launcher import free_port
from vlscale.distributed import Ranks
from vlscale.distributed.agree import Agreement
from vlscale.train.stragglers import Stragglers
from vlscale.train.watchdog import WARM_AFTER, Watchdog, lost_a_rank

RANKS = 3


def _work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if dist.is_initialized():  # by a test before the fork
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=300))
    dist.new_group(list(range(RANKS)))  # DeepSpeed has groups of its own, too
    ranks = Ranks(rank, RANKS, torch.device("cpu"), dist.group.WORLD)
    stragglers, told = Stragglers(ranks, every=2), []
    with Watchdog(Path(folder), ranks, None, (300.0, 3.0)) as watchdog:
        for step in range(1, 5):
            watchdog.enter("data", step)
            stragglers.begin()
            watchdog.enter("step", step)
            time.sleep(0.6 if rank == 1 and step <= 2 else 0.05)
            with Agreement("loss", ranks) as agreement:
                agreement.offer(1, ["float32"])
            if rank == 2:
                time.sleep(0.4)  # after the losses: the others' wait for this one is not in their own time
            ranks.barrier()
            told.append(stragglers.compare(step))
        if rank == 0:
            torch.save(told, f"{folder}/told.pt")
        watchdog.enter("step", 5)
        started = time.monotonic()
        if rank == 1:
            time.sleep(12)
        else:
            try:
                ranks.barrier()
            except RuntimeError as error:
                assert lost_a_rank(error)
            Path(folder, f"waited-{rank}").write_text(str(time.monotonic() - started))
    os._exit(0)


def test_a_slow_rank_is_named_and_a_silent_one_given_up_soon(tmp_path):
    mp.start_processes(_work, (free_port(), str(tmp_path)), nprocs=RANKS, start_method="fork")
    first, second, third, fourth = torch.load(tmp_path / "told.pt", weights_only=True)
    assert first == third == {} and second["slowest_rank"] == 1 and 2 < second["slowest_ratio"] < 30
    assert fourth == {}, "the second comparison starts anew"
    for rank in (0, 2):
        assert 2.5 < float((tmp_path / f"waited-{rank}").read_text()) < 10


def test_one_rank_is_compared_with_nobody():
    stragglers = Stragglers(Ranks(), every=1)
    stragglers.begin()
    assert stragglers.compare(1) == {}


def test_it_is_said_once(caplog):
    stragglers = Stragglers(Ranks(0, 2), every=1)
    assert stragglers._tell(1, [0.1, 0.4]) == stragglers._tell(2, [0.1, 0.4]) == {
        "slowest_rank": 1, "slowest_ratio": 4.0
    }  # fmt: skip
    assert caplog.text.count("rank 1 is the slowest: 0.400 s") == 1
    assert stragglers._tell(3, [0.001, 0.004]) == {}, "milliseconds are worth no word"
    assert stragglers._tell(4, [0.0, 0.4]) == {}, "a step without losses over ranks"


def test_timeouts_are_long_until_steps_are_warm_and_outside_of_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vlscale.train.watchdog.set_timeouts", seen.append)
    with Watchdog(tmp_path, Ranks(0, 2), None, (600.0, 30.0)) as watchdog:
        for step in range(1, WARM_AFTER + 3):
            watchdog.enter("data", step)
            watchdog.enter("step", step)
        assert seen == [600.0, 30.0], "changed only where it changes"
        watchdog.enter("validation", step)
        watchdog.enter("checkpoint", step)
        watchdog.enter("data", step + 1)
    assert seen == [600.0, 30.0, 600.0, 30.0]
