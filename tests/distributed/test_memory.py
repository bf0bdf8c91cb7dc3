"""A rank's memory: all of its GPU or its part of the host's, and how much of it rows of other ranks may take."""

import socket

import pytest
import torch

from vlscale.distributed import Ranks, agreed_memory, gather_budget, memory, rank_memory

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.mark.parametrize(("has", "may"), [(0, 1), (8, 1), (10, 1), (80, 8), (140, 14)])
def test_a_tenth_but_at_least_one_gib(has, may):
    assert gather_budget(has * GIB) == may * GIB


def test_ranks_on_the_cpu_share_the_host(monkeypatch):
    monkeypatch.setattr(memory, "_host_memory", lambda: 96 * GIB)
    assert rank_memory(CPU) == 96 * GIB and rank_memory(CPU, 8) == 12 * GIB


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP_LIMIT", str(tmp_path / "none"))
    whole = rank_memory(CPU)
    (tmp_path / "limit").write_text("1000000\n")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", str(tmp_path / "limit"))
    assert rank_memory(CPU) == 1_000_000 < whole
    (tmp_path / "limit").write_text("max\n")
    assert rank_memory(CPU) == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_whole_however_much_of_it_is_taken():
    device = torch.device("cuda", 0)
    before = rank_memory(device)
    taken = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert rank_memory(device, 8) == before == torch.cuda.mem_get_info(device)[1] and len(taken)


def test_the_rank_with_the_least_decides(monkeypatch):
    """Two machines, one of two ranks, one of one."""
    here = socket.gethostname()
    answers = iter([[here, here, "other"], [16 * GIB, 16 * GIB, 12 * GIB]])
    asked = []
    monkeypatch.setattr(memory, "_host_memory", lambda: 32 * GIB)
    monkeypatch.setattr(Ranks, "gather_objects", lambda ranks, value: asked.append(value) or next(answers))
    assert agreed_memory(Ranks(0, 3)) == 12 * GIB
    assert asked == [here, 16 * GIB]
