"""Every load and store of a kernel, watched in Triton's interpreter: what the interpreter forgives and a GPU may not.

A GPU runs programs together and in any order, and gives anything at all where a kernel reads what nothing was written
to. Inside `watched()` the programs of a launch run in a shuffled order, memory that `torch.empty` gives and lanes that
a mask leaves out without `other` hold NaN (integers: a large number), and a launch fails that reads or writes

- outside the elements of the tensors it was given (rows' slack is outside),
- what another program of the launch writes, or what the same program wrote with no barrier since,
- one place twice in one store.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch

NOBODY, SEVERAL = -1, -2


@dataclass
class Watch:
    """What was watched: kernels' names, and how many elements they read and wrote."""

    kernels: set[str] = field(default_factory=set)
    read: int = 0
    written: int = 0


def views(arguments) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from views(argument)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            yield argument


class Launch:
    """A shadow of the memory that one launch may touch, a place a byte: who wrote and who read an element there."""

    def __init__(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.name, self.program, self.barriers = name, 0, 0
        spans: list[list[int]] = []
        for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            size = (1 + sum((length - 1) * step for length, step in steps)) * tensor.element_size()
            start = tensor.data_ptr()
            if spans and start < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], start + size)
            else:
                spans.append([start, start + size])
        self.starts, self.ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        self.shift = np.concatenate([[0], np.cumsum(self.ends - self.starts)]).astype(np.int64)
        self.inside = np.zeros(self.shift[-1], dtype=bool)
        for tensor in tensors:
            place = self.places(np.array([tensor.data_ptr()]))[0]
            strides = [step * tensor.element_size() for step in tensor.stride()]
            np.lib.stride_tricks.as_strided(self.inside[place:], tensor.shape, strides)[...] = True
        self.writer, self.reader, self.written_at = (np.full(self.shift[-1], NOBODY, dtype=np.int32) for _ in range(3))

    def places(self, addresses: np.ndarray) -> np.ndarray:
        span = np.searchsorted(self.starts, addresses, side="right") - 1
        if (span < 0).any() or (addresses >= self.ends[span]).any():
            self.fail("touches memory of no tensor it was given")
        return addresses - self.starts[span] + self.shift[span]

    def touched(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        places = self.places(np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64))
        if not self.inside[places].all():
            self.fail("touches memory between the elements of a tensor")
        return places

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> int:
        places = self.touched(pointers, mask)
        writer = self.writer[places]
        if ((writer != NOBODY) & (writer != self.program)).any():
            self.fail("reads what another program wrote")
        if ((writer == self.program) & (self.written_at[places] == self.barriers)).any():
            self.fail("reads what it wrote, with no barrier between")
        reader = self.reader[places]
        self.reader[places] = np.where((reader == NOBODY) | (reader == self.program), self.program, SEVERAL)
        return len(places)

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> int:
        places = self.touched(pointers, mask)
        if len(np.unique(places)) < len(places):
            self.fail("writes one place twice in a store")
        writer, reader = self.writer[places], self.reader[places]
        if ((writer != NOBODY) & (writer != self.program)).any():
            self.fail("writes where another program wrote")
        if ((reader != NOBODY) & (reader != self.program)).any():
            self.fail("writes what another program read")
        self.writer[places], self.written_at[places] = self.program, self.barriers
        return len(places)

    def fail(self, what: str) -> None:
        raise AssertionError(f"{self.name}, program {self.program}: {what}")


def left_out(dtype: np.dtype, bfloat16: bool):
    """What no mask let through: NaN, and a large integer."""
    if np.issubdtype(dtype, np.floating):
        return np.nan
    if dtype.kind == "b":
        return True
    return 0xFFFF if bfloat16 else np.iinfo(dtype).max // 100


@contextmanager
def watched(seed: int = 0) -> Iterator[Watch]:
    """See above; the seed shuffles the programs. Not for kernels with atomics, which it refuses."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    watch, shuffled = Watch(), random.Random(seed)
    launch: Launch | None = None
    order: list[tuple[int, int, int]] = []
    begin, place_in_grid, masked_load = executor._init_args_hst, builder.set_grid_idx, builder.create_masked_load

    def begin_launch(self, arguments, named):
        nonlocal launch
        arguments, named = begin(self, arguments, named)
        watch.kernels.add(self.fn.__name__)
        launch = Launch(self.fn.__name__, list(views([*arguments, *named.values()])))
        order.clear()
        return arguments, named

    def place_program(self, x, y, z):
        if not order:
            order.extend(product(*map(range, self.grid_dim)))
            shuffled.shuffle(order)
            launch.program = 0
        launch.program += 1
        place_in_grid(self, *order[launch.program - 1])

    def load(self, pointers, mask, other, *settings):
        watch.read += launch.load(pointers.data, mask.data)
        if other is None and not mask.data.all():
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            fill = np.full(mask.data.shape, left_out(np.dtype(dtype), kind == tl.bfloat16), dtype=dtype)
            other = interpreter.TensorHandle(fill, kind)
        return masked_load(self, pointers, mask, other, *settings)

    def store(self, pointers, value, mask, *settings):
        watch.written += launch.store(pointers.data, mask.data)
        return interpreter._interpreter.store(pointers.data, value.data, mask.data)

    def barrier(self):
        launch.barriers += 1

    def refuse(self, *given):
        raise AssertionError(f"{launch.name}: atomics are not watched")

    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", begin_launch)
        patch.setattr(builder, "set_grid_idx", place_program)
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "create_barrier", barrier)
        patch.setattr(builder, "create_atomic_cas", refuse)
        patch.setattr(builder, "create_atomic_rmw", refuse)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield watch
        finally:
            torch.use_deterministic_algorithms(was[0])
            torch.utils.deterministic.fill_uninitialized_memory = was[1]
