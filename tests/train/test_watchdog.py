"""What takes too long is written down with its stacks; which errors mean that another rank is gone."""

import time

import torch.distributed as dist

from vlscale.distributed import Ranks
from vlscale.train.watchdog import Watchdog, lost_a_rank


def test_a_slow_phase_is_reported_once_with_rank_phase_and_stack(caplog, tmp_path):
    with Watchdog(tmp_path, Ranks(), seconds=0.2) as watchdog:
        watchdog.enter("step", 7)
        _asleep_for_a_while()
        watchdog.enter("data", 8)
    text = (tmp_path / "watchdog-rank-0.txt").read_text()
    assert text.count("rank 0: step of step 7") == 1 and "data of step 8" not in text and "_asleep_for_a_while" in text
    assert "rank 0: step of step 7 takes longer than engine.step_timeout_seconds=0.2" in caplog.text


def _asleep_for_a_while() -> None:
    time.sleep(1.0)


def test_without_a_time_nothing_watches(tmp_path):
    with Watchdog(tmp_path, Ranks(), seconds=None) as watchdog:
        watchdog.enter("step", 1)
    assert list(tmp_path.iterdir()) == []


def test_only_failures_of_collectives_mean_that_a_rank_is_gone():
    assert lost_a_rank(dist.DistBackendError("NCCL timeout"))
    assert lost_a_rank(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not lost_a_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_a_rank(ValueError("gloo"))
