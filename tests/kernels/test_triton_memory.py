"""What the contrastive loss holds in Triton at N = 10^6, counted on the meta device with the tiles of an H200.

The bound is the gradients and 1.5 GB. With bfloat16 embeddings of more than 256 features one side is summed in float32
over all blocks of columns, and N D 2 bytes of it are more than the gradient that it becomes.
"""

import pytest
import torch

from tests.kernels import cases as k
from tests.kernels.live_bytes import LiveBytes, body, without_kernels

pytest.importorskip("triton")

N = 10**6
BESIDE = 1.5e9


@pytest.fixture
def on_paper(monkeypatch):
    without_kernels(monkeypatch)


def peaks(width: int, dtype: torch.dtype, *, ids: bool, want: tuple[bool, bool]) -> tuple[int, int, int]:
    """(forward's peak, backward's, what is left of the backward: the gradients), bytes beside the inputs."""
    from vlscale.kernels import contrastive

    x, y = torch.empty(2, N, width, dtype=dtype, device="meta").unbind()
    scale, grad = torch.empty(2, device="meta").unbind()
    pair_id = torch.empty(N, dtype=torch.int64, device="meta") if ids else None
    with LiveBytes(x, scale, pair_id) as forward:
        statistics = body(contrastive.forward_op)(x, y, scale, pair_id, "triton")[1]
    assert forward.live < 9 * 4 * N  # eight statistics a pair, and the loss
    with LiveBytes(x, scale, pair_id, statistics) as backward:
        gradients = body(contrastive.backward_op)(grad, x, y, scale, pair_id, statistics, "triton", *want)
    assert [len(g) for g in gradients[:2]] == [N if wanted else 0 for wanted in want]
    return forward.peak, backward.peak, backward.live


@pytest.mark.parametrize(
    ("width", "dtype", "ids", "want", "float32_sums"),
    [
        (512, torch.bfloat16, False, (True, True), 1),
        (512, torch.bfloat16, True, (True, True), 1),
        (512, torch.bfloat16, False, (True, False), 1),
        (512, torch.bfloat16, False, (False, True), 0),
        (512, torch.float32, False, (True, True), 0),
        (256, torch.bfloat16, False, (True, True), 0),
    ],
)
def test_extra_memory_at_a_million_pairs(on_paper, width, dtype, ids, want, float32_sums):
    forward, backward, gradients = peaks(width, dtype, ids=ids, want=want)
    of_results = sum(want) * N * width * dtype.itemsize
    assert of_results <= gradients < of_results + 100
    assert forward <= BESIDE
    assert backward <= of_results + BESIDE + float32_sums * N * width * 2
    assert backward > of_results + BESIDE / 5  # blocks of weights were counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extra_memory_of_the_second_order(on_paper, dtype):
    """Both results are summed in float32; blocks of weights are 8 bytes a pair, two numbers of 4 or four of 2."""
    from vlscale.kernels import contrastive

    width = 512
    x, y, u, v = torch.empty(4, N, width, dtype=dtype, device="meta").unbind()
    scale, grad, w = torch.empty(3, device="meta").unbind()
    statistics = torch.empty(contrastive.STATISTICS, N, device="meta")
    given = u, v, w, grad, x, y, scale, None, statistics
    with LiveBytes(x, scale, statistics) as memory:
        found = body(contrastive.double_backward_op)(*given, "triton")
    of_results = 2 * N * width * dtype.itemsize
    assert of_results <= memory.live < of_results + 100
    sums = 2 * N * width * 4
    assert sums + BESIDE <= memory.peak <= sums + (of_results // 2 if dtype == torch.bfloat16 else 0) + 2 * BESIDE
    assert all(value.dtype == dtype for value in found[1:3])


def test_what_is_counted():
    given = torch.empty(1000, device="meta")
    with LiveBytes(given) as bytes_of:
        view = given[10:]
        made = view + 1
        part = made[:10]
        assert bytes_of.live == bytes_of.peak == 990 * 4
        del made
        assert bytes_of.live == 990 * 4  # its view holds it
        del part
    assert (bytes_of.live, bytes_of.peak) == (0, 990 * 4)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("case", [k.contrastive_case, k.sigmoid_case])
def test_embeddings_widened_in_several_blocks(monkeypatch, case, ids):
    """Float32 rows to the same bits as all at once; in bfloat16 the mean's sum has another order."""
    from vlscale.kernels import chunked

    pair_id = torch.arange(70) // 3 if ids else None
    problem = case(*k.embeddings("cone", 70, 40), 14.3, pair_id)
    whole = problem.run("triton", torch.float32)
    monkeypatch.setattr(chunked, "WIDENED", 16 * 40)
    blocks = problem.run("triton", torch.float32)
    assert all(torch.equal(blocks[name], whole[name]) for name in whole)
    k.check_budget(problem, "triton", torch.bfloat16)
