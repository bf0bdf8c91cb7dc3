"""What a pass of `vlscale bench kernels` launches on a GPU, counted by running its own launchers on the meta device.

Nothing is computed or allocated: kernels are recorded where they would start, with the tiles, waves and grids that the
launchers choose on a Hopper GPU, and so is every torch operation with the shapes that it meets. One flag that only a
GPU can set is taken as it is for normalised embeddings: the fixed reference is sound, so kernels for vector references
and maxima return at once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from unittest.mock import patch

import torch
from kernels_bench_entries import DENSE, FAMILIES, Loss, Problem, ours
from kernels_bench_measure import Calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOPPER = (9, 0)
MODULES = ("contrastive", "contrastive_fused", "contrastive_waves", "contrastive_double", "sigmoid", "relation_kl")
MODULES += ("relation_match", "relation_passes", "passes", "contrastive_passes")
OPS = ("contrastive", "sigmoid", "relation_kl", "relation_match", "once")
BLOCKS = {"g_ptr", "h_ptr", "toward_ptr", "teacher_ptr"}  # a value a pair, in a buffer that may be larger
ON_TOP = {"FIRST": "out_ptr"} | {f"FIRST_{job.upper()}": f"out_{job}_ptr" for job in "abc"}  # unless set, read first
SUMS = {"row_out_ptr", "column_out_ptr", "out_ptr", "along_ptr", "total_ptr", "row_total_ptr", "column_total_ptr"}
SUMS |= {"row_sums_ptr", "column_sums_ptr", "teacher_rows_ptr", "teacher_columns_ptr", "scalars_ptr"}
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh", "alias")
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1}  # the place of the left factor among the arguments


@dataclass(frozen=True)
class Launch:
    """One kernel's start. `columns` are those of all programs of a row tile, where a program walks over several."""

    kernel: str
    variant: frozenset[str]  # as in the names of the compile tables
    dtype: torch.dtype  # of the embeddings
    block: tuple[int, int, int]
    grid: tuple[int, int]
    columns: int | None
    multiplied: int  # features of a tile's products, all products together
    fed: int  # bytes that a tile's products take from the second-level cache
    loops: int  # over features in a tile, each of which starts its loads anew
    stored: int  # bytes to device memory
    read: int  # bytes from device memory, each embedding once
    idle: bool  # returns at once


@dataclass(frozen=True)
class Op:
    """One torch operation; `product` (m, k, n) of a matrix product; bytes in and out."""

    name: str
    dtype: torch.dtype
    moved: int
    elements: int  # of the largest input or output
    product: tuple[int, int, int] | None = None
    free: bool = False  # of the device: views, and memory that is only set aside
    triton: bool = False  # a kernel of ours without products, which takes what its bytes take


class Recorder:
    """In a Triton kernel's place."""

    def __init__(self, kernel, events: Counter, always: list[Tensor]):
        self.names = list(signature(kernel.fn).parameters)
        self.name, self.events, self.always = kernel.fn.__name__, events, always
        self.around = kernel.fn.__module__.endswith("passes")  # those around the kernels have no products

    def __getitem__(self, grid):
        grid = (grid,) if isinstance(grid, int) else tuple(grid)

        def start(*arguments, **settings) -> None:
            given = dict(zip(self.names, arguments, strict=False)) | settings
            event = self.pass_(given) if self.around else self.launch(given, (*grid, 1)[:2])
            self.events[event] += 1

        return start

    def launch(self, given: dict, grid: tuple[int, int]) -> Launch:
        emb = given.get("x_ptr", given.get("query_ptr"))
        block = given["BLOCK_M"], given["BLOCK_N"], given["BLOCK_K"]
        rows = given["row_end"] - given["row_start"] if "row_end" in given else None
        columns = given.get("column_end", given.get("n", given.get("g")))
        columns = None if columns is None else columns - given.get("column_start", 0)
        multiplied, loaded, loops = widths(given)
        fed = 2 * block[1] * given["D"] if loops == 0 else (block[0] + block[1]) * loaded
        extent = (rows or grid[0] * block[0]) + (columns or 0)
        return Launch(
            self.name,
            frozenset(words(given)),
            emb.dtype,
            block,
            grid,
            columns,
            multiplied,
            fed * emb.itemsize,
            loops,
            stored(given, rows, columns) + (2 * grid[0] * block[0] * columns if given.get("KEPT") else 0),
            extent * loaded * emb.itemsize,
            self.idle(given),
        )

    def pass_(self, given: dict) -> Op:
        """Its tensors once each, of a whole side the rows that it writes; nothing where it returns at once."""
        if given.get("GUARDED") or not given.get("SHARED", True):
            return Op(self.name, torch.float32, 0, 0, triton=True)
        sizes = {name: t.numel() * t.itemsize for name, t in given.items() if isinstance(t, Tensor)}
        if self.name == "gradient_kernel":
            rows = given["rows"] * given["D"]
            sizes["out_ptr"] = rows * given["out_ptr"].itemsize
            if given["HAS_OWN"]:
                sizes["partner_ptr"] = min(rows, given["partner_ptr"].numel()) * given["partner_ptr"].itemsize
        if "kept_ptr" in given:  # of the whole, which the forward has stored, a block
            pairs = (given["row_end"] - given["row_start"]) * (given["column_end"] - given["column_start"])
            sizes |= {name: pairs * given[name].itemsize for name in ("kept_ptr", "g_ptr")}
        if self.name == "side_sums_kernel":
            sizes["row_sums_ptr"] = sizes["row_sums_ptr"] * given["rows"] // given["b"]
        for first, out in ON_TOP.items():
            if given.get(first) is False and out in sizes:
                sizes[out] *= 2
        return Op(self.name, torch.float32, sum(sizes.values()), max(sizes.values()) // 4, triton=True)

    def idle(self, given: dict) -> bool:
        if any(given.get("run_ptr") is flag for flag in self.always):
            return False
        if self.name in ("maxima_kernel", "relation_maxima_kernel", "relation_statistics_kernel"):
            return True
        return not given.get("SHARED", True)


def widths(given: dict) -> tuple[int, int, int]:
    """Features that a tile multiplies and loads a row or column, and in how many loops; 0: all are held at once."""
    own = given["D"]
    if "right_ptr" in given:  # S, and G times the columns
        return 2 * given["BLOCK_K"], 2 * own, 0
    if "u_ptr" in given:  # S, and both halves of A
        return 3 * own, 2 * own, 1
    again = given.get("TEACHER") == 2 or (given.get("TEACHER") and given.get("EUCLIDEAN"))
    teachers = given.get("F", 0) * (2 if again else 1)
    loops = 1 + given.get("K", 0) * (teachers // given["F"] if teachers else 0)
    return own + teachers, own + teachers, loops


def stored(given: dict, rows: int | None, columns: int | None) -> int:
    """Bytes that a launch writes: sums, whose tensors are theirs alone, and values a pair."""
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor) and t.dim() > 0}
    count = sum(t.numel() * t.itemsize for name, t in tensors.items() if name in SUMS)
    if rows and given.get("GRADIENT", True):
        blocks = (t for name, t in tensors.items() if name in BLOCKS)
        count += sum(rows * columns * t.shape[:-2].numel() * t.itemsize for t in blocks)
    return count


def words(given: dict) -> Iterator[str]:
    """A launch's constants in the words of the compile tables' variants."""
    if "SHARED" in given:
        yield "shared" if given["SHARED"] else "vectors"
    if given.get("HAS_IDS"):
        yield "ids"
    if given.get("KEPT"):
        yield "kept"
    if "K" in given:
        yield f"{given['K']} teacher" + "s" * (given["K"] > 1)
    if given.get("EUCLIDEAN"):
        yield "euclidean"
    if given.get("TEACHER"):
        yield "teacher gradient" if given["TEACHER"] == 1 else "teacher weights"
    if given.get("GRADIENT") is False:
        yield "no gradient"
    if "KEEP" in given:
        yield "16" if given["KEEP"] <= 16 else "64"
        if given["BOUNDED"]:
            yield "later pass"
    if "right_ptr" in given:
        yield f"{given['BLOCK_K']} features"


class Tracer(TorchDispatchMode):
    """Records torch operations, those inside the library's own ones too; only while `on`."""

    def __init__(self, events: Counter):
        super().__init__()
        self.events, self.bodies = events, bodies()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = function.name().split("::")
        if space == "vlscale":
            self.events[Op(function.name(), torch.float32, 0, 0, free=True)] += 1
            with self:
                return self.bodies[function.name()](*args, **kwargs)
        with self:
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        self.events[operation(function, name.split(".")[0], args, kwargs, result)] += 1
        return result


@cache
def bodies() -> dict:
    """Each custom op's own code by name."""
    found = {}
    for module in (import_module(f"vlscale.kernels.{name}") for name in OPS):
        for op in vars(module).values():
            if isinstance(op, torch.library.CustomOpDef):
                found[op._qualname] = op._init_fn
    return found


def operation(function, name: str, args, kwargs, result) -> Op:
    ins, outs = list(tensors((*args, *kwargs.values()))), list(tensors((result,)))
    every = ins + outs
    dtype = max(every, key=lambda t: t.numel()).dtype if every else torch.float32
    given = {t.untyped_storage()._cdata for t in ins}
    view = not function._schema.is_mutable and bool(outs) and all(t.untyped_storage()._cdata in given for t in outs)
    shape = None
    if name in PRODUCTS:
        left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
        dtype, shape = left.dtype, (*left.shape, right.shape[1])
    if name == "copy_" and same_place(*args[:2]):
        view = True
    moved = sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in every)
    return Op(name, dtype, moved, max((t.numel() for t in every), default=0), shape, view or name in FREE)


def tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def same_place(target: Tensor, source: Tensor) -> bool:
    """As in `rows[i] += x`, whose sum is already there: CUDA copies nothing."""
    mine, other = target.untyped_storage()._cdata, source.untyped_storage()._cdata
    contiguous = target.is_contiguous() and source.is_contiguous()
    return mine == other and target.storage_offset() == source.storage_offset() and contiguous


@contextmanager
def recording(events: Counter, *, waves: bool = False) -> Iterator[Tracer]:
    """The library as on a Hopper GPU, its kernels recorded into `events`; operations too, inside the tracer."""
    always: list[Tensor] = []
    modules = {name: import_module(f"vlscale.kernels.triton_{name}") for name in (*MODULES, "retrieval")}

    def kept(like: Tensor) -> Tensor:
        always.append(torch.ones((), dtype=torch.int32, device=like.device))
        return always[-1]

    with ExitStack() as patches:
        # autocast does not know the meta device
        patches.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        patches.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))
        patches.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: HOPPER))
        checks = import_module("vlscale.kernels.checks")
        patches.enter_context(patch.object(checks, "available_impls", lambda device: list(checks.IMPLS)))
        patches.enter_context(patch.object(modules["relation_kl"], "_always", kept))
        if waves:
            patches.enter_context(patch.object(modules["contrastive"], "fused_config", lambda x: None))
        for module in modules.values():
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patches.enter_context(patch.object(module, name, Recorder(kernel, events, always)))
        yield Tracer(events)


def problem(family: str, n: int, d: int, dtype: torch.dtype) -> Problem:
    """Inputs without values; kernels and operations are the same at any scale."""
    x, y = torch.empty(2, n, d, dtype=dtype, device="meta").unbind()
    tensors = x, y, torch.empty((), device="meta"), torch.empty((), device="meta")
    trained = FAMILIES[family].trained
    return Problem(*(t.detach().requires_grad_(on) for t, on in zip(tensors, trained, strict=True)), temperature=0.01)


def trace(
    family: str, n: int, d: int, which: str, *, dtype=torch.bfloat16, waves: bool = False, dense: bool = False
) -> Counter:
    """How often each event happens in a timed call of the pass (forward, backward, both); `waves`: nothing is fused;
    `dense`: of dense torch in place of ours."""
    if family == "relation_wasserstein" and not dense:
        return _by_chunks(family, n, d, which, dtype)
    loss = DENSE[family][0] if dense else ours(family, "triton")
    return _trace(loss, problem(family, n, d, dtype), which, waves=waves)


def _trace(loss: Loss, given: Problem, which: str, *, waves: bool = False) -> Counter:
    events = Counter()
    with recording(events, waves=waves) as tracer:
        calls = Calls(loss, given)
        if which == "backward":
            with Tracer(Counter()):
                value = calls.loss(given)
            events.clear()
            with tracer:
                torch.autograd.grad(value, calls.leaves)
        else:
            with tracer:
                getattr(calls, which)()
    return events


def _by_chunks(family: str, n: int, d: int, which: str, dtype: torch.dtype) -> Counter:
    """Sorting goes by thousands of equal chunks of rows: one is counted, and taken as often."""
    tiles = import_module("vlscale.kernels.chunked_relation_match")
    whole, chunks = tiles.spans, 1

    def counted(most: int) -> Counter:
        def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
            nonlocal chunks
            every = list(whole(start, stop, size))
            chunks = len(every)
            return every[:most]

        with patch.object(tiles, "spans", spans):
            return _trace(ours(family, "triton"), problem(family, n, d, dtype), which)

    one, two = counted(1), counted(2)
    return Counter({event: one[event] + (chunks - 1) * (two[event] - one[event]) for event in one | two})
