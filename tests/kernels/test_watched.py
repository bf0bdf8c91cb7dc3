"""What watches the kernels in the interpreter finds what it is there for: kernels with a fault each and a sound one."""

import pytest
import torch

from tests.kernels.watched import watched

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")

N = 13  # two programs of 8, the second with three elements too many


@triton.jit
def sound(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    tl.debug_barrier()
    tl.store(out_ptr + i, tl.load(out_ptr + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def beyond_the_end(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < n)


@triton.jit
def before_the_start(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + i - 1, 0.0, mask=i < n)


@triton.jit
def written_by_two(x_ptr, out_ptr, n):
    tl.store(out_ptr + tl.arange(0, 8), 1.0)


@triton.jit
def read_and_written(x_ptr, out_ptr, n):
    program = tl.program_id(0)
    tl.store(out_ptr + program, 1.0 + tl.load(out_ptr + (program + 1) % 2))


@triton.jit
def without_a_barrier(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + i, 1.0, mask=i < n)
    tl.store(out_ptr + i, tl.load(out_ptr + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def twice_in_a_store(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + i // 2, 1.0, mask=i < n)


@triton.jit
def added_by_atomics(x_ptr, out_ptr, n):
    tl.atomic_add(out_ptr, 1.0)


FAULTS = [
    (beyond_the_end, "touches memory of no tensor"),
    (before_the_start, "touches memory of no tensor"),
    (written_by_two, "writes where another program wrote"),
    (read_and_written, "(writes what another program read|reads what another program wrote)"),
    (without_a_barrier, "reads what it wrote, with no barrier"),
    (twice_in_a_store, "writes one place twice"),
    (added_by_atomics, "atomics are not watched"),
]


@pytest.mark.parametrize(("kernel", "found"), FAULTS, ids=[kernel.__name__ for kernel, _ in FAULTS])
def test_a_fault_is_found(kernel, found):
    with watched(), pytest.raises(Exception, match=found):
        kernel[2,](torch.ones(N), torch.empty(N), N)


def test_a_sound_kernel_passes_and_is_counted():
    out = torch.empty(16)[:N]
    with watched() as watch:
        sound[2,](torch.arange(N).float(), out, N)
    assert torch.equal(out, torch.arange(N) + 1.0)
    assert watch.kernels == {"sound"} and watch.read == 2 * N and watch.written == 2 * N


def test_slack_between_rows_is_outside():
    """`sound` takes rows for one run of elements; these have two of slack after every three."""
    with watched(), pytest.raises(Exception, match="between the elements of a tensor"):
        sound[2,](torch.ones(5, 5)[:, :3], torch.empty(N), N)


@triton.jit
def sum_of_all_lanes(x_ptr, out_ptr, n):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + i, mask=i < n), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_masked_lane_without_other_and_memory_that_nobody_wrote_are_not_zero(dtype):
    x = torch.ones(N, dtype=dtype)
    with watched():
        out = torch.empty(3, dtype=dtype)
        sum_of_all_lanes[2,](x, out, N)
    assert out[0] == 8
    for wrong in out[1:]:
        assert wrong.isnan() if dtype.is_floating_point else wrong > 2**40


def test_the_order_of_programs_changes_and_a_seed_repeats_it(monkeypatch):
    from triton.runtime import interpreter

    seen, place = [], interpreter.InterpreterBuilder.set_grid_idx

    def recorded(self, x, y, z):
        seen.append((x, y, z))
        place(self, x, y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", recorded)
    orders = []
    for seed in (0, 0, 1):
        seen.clear()
        with watched(seed):
            sound[4, 1, 1](torch.ones(32), torch.empty(32), 32)
        orders.append(list(seen))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == [(program, 0, 0) for program in range(4)]
