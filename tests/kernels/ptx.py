"""Runs a kernel's PTX, what Triton's compiler made of it, with numpy: layouts, masks, pipelines, barriers as compiled.

A block's threads run in units, of four warps where `wgmma` wants them, else of fewer; a unit in lock step, units one
after another between barriers, in a shuffled order. What is asynchronous (`cp.async`, `wgmma`) happens only when it
is waited for, or, with `late=False`, at once: code that is right gives the same bits both ways. Shared memory starts as
NaN, a register that nothing wrote is an error, and so is an address outside the tensors. No time is told, and the order
of memory is no weaker than that.

`Machine` keeps the state, `ptx_instructions` says what an instruction does.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

BASE = 0x7F_1234_0000_0000  # of global memory: no address fits 32 bits
GAP = 4096  # bytes between tensors, which nothing may touch


class Memory:
    """Bytes, those among them that may be touched, and addresses to reach them."""

    def __init__(self, size: int, base: int = 0) -> None:
        self.bytes = np.full(size, 0xFF, dtype=np.uint8)
        self.allowed = np.zeros(size, dtype=bool)
        self.base = base

    def _places(self, addresses: np.ndarray, width: int, what: str) -> np.ndarray:
        at = addresses.astype(np.int64) - self.base
        if (at % width).any():
            raise AssertionError(f"{what}: an address is no multiple of {width}")
        if ((at < 0) | (at + width > len(self.bytes))).any() or not self.allowed[at[:, None] + np.arange(width)].all():
            raise AssertionError(f"{what}: an address lies outside of what the kernel was given")
        return at[:, None] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """(addresses, width) bytes."""
        return self.bytes[self._places(addresses, width, "load")]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self.bytes[self._places(addresses, values.shape[1], "store")] = values


class Arena(Memory):
    """Global memory: copies of the launch's tensors, each storage once, apart from one another."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.storages: dict[int, tuple[int, torch.Tensor]] = {}
        size = GAP
        for tensor in tensors:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.storages:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.storages[key] = size, whole
                size += -(-len(whole) // 256) * 256 + GAP
        super().__init__(size, BASE)
        for start, whole in self.storages.values():
            self.bytes[start : start + len(whole)] = whole.numpy()
        for tensor in tensors:
            if tensor.numel():
                strides = [step * tensor.element_size() for step in tensor.stride()]
                here = self.allowed[self.address(tensor) - BASE :]
                for byte in range(tensor.element_size()):
                    np.lib.stride_tricks.as_strided(here[byte:], tensor.shape, strides)[...] = True

    def address(self, tensor: torch.Tensor) -> int:
        start = self.storages[tensor.untyped_storage().data_ptr()][0]
        return BASE + start + tensor.storage_offset() * tensor.element_size()

    def copy_back(self) -> None:
        for start, whole in self.storages.values():
            whole.numpy()[:] = self.bytes[start : start + len(whole)]


@dataclass
class Unit:
    """Some threads of a block that run in lock step."""

    threads: np.ndarray
    registers: dict[str, np.ndarray] = field(default_factory=dict)
    place: int = 0
    done: bool = False
    active: np.ndarray | None = None  # where threads have parted ways, those that are at `place`,
    parked: list[tuple[int, np.ndarray]] = field(default_factory=list)  # and where the others are
    copies: list[list[Callable]] = field(default_factory=list)  # committed groups of cp.async
    copying: list[Callable] = field(default_factory=list)
    products: list[list[Callable]] = field(default_factory=list)  # of wgmma
    multiplying: list[Callable] = field(default_factory=list)

    def branch(self, taken: np.ndarray, target: int) -> None:
        here = np.ones(len(self.threads), dtype=bool) if self.active is None else self.active
        self.parked.append((target, here & taken))
        self.active = here & ~taken

    def regroup(self) -> None:
        """The threads that are furthest behind go on, with whom they meet."""
        groups = [*self.parked, (self.place, self.active)]
        self.place = min(place for place, mask in groups if mask.any())
        self.active = np.any([mask for place, mask in groups if place == self.place], axis=0)
        self.parked = [(place, mask) for place, mask in groups if place != self.place and mask.any()]
        if not self.parked:
            self.active = None

    def together(self) -> None:
        if self.active is not None:
            raise AssertionError("an instruction of all threads, where they have parted ways")

    def finish(self, groups: list[list[Callable]], but: int) -> None:
        """All but the last groups happen now."""
        while len(groups) > but:
            for act in groups.pop(0):
                act()


@dataclass
class Program:
    """A kernel's instructions: (predicate, negated, operation, operands), and where labels stand."""

    name: str
    parameters: list[str]  # their types
    threads: int
    instructions: list[tuple[str, bool, str, list[str]]]
    labels: dict[str, int]


STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


def operands_of(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text[text.index(".visible .entry") :].split(")", 1)
    parameters = re.findall(r"\.param \.(\w+)", head)
    name = re.search(r"\.entry (\w+)", head).group(1)
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", body).group(1))
    body = body[body.index("{") + 1 :]
    instructions: list[tuple[str, bool, str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.strip()
        if label := re.fullmatch(r"(\$?\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif line.startswith(".section"):
            break
        else:
            parts = (part.strip().lstrip("{} ") for part in line.split(";"))
            for statement in (part for part in parts if part and not part.startswith(".")):
                found = STATEMENT.fullmatch(statement)
                if found is None:
                    raise AssertionError(f"{name}: not understood: {statement}")
                negated, predicate, operation, rest = found.groups()
                instructions.append((predicate or "", bool(negated), operation, operands_of(rest)))
    return Program(name, parameters, threads, instructions, labels)


class Machine:
    """A program that may be launched again and again."""

    def __init__(self, program: Program, shared_bytes: int, late: bool, seed: int):
        from tests.kernels.ptx_instructions import compile_instruction

        self.program, self.late = program, late
        self.arena, self.arguments = Arena([]), []
        self.shared_bytes, self.shuffled = shared_bytes, random.Random(seed)
        self.shared = Memory(0)
        self.block = self.grid = (0, 0, 0)
        grouped = any(operation.startswith("wgmma") for _, _, operation, _ in program.instructions)
        self.unit = 128 if grouped else max(32, min(128, program.threads // 4))  # threads
        self.steps = [compile_instruction(self, *given) for given in program.instructions]

    def run(self, grid: tuple[int, int, int], arena: Arena, arguments: list[int]) -> None:
        self.arena, self.arguments = arena, arguments
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        self.shuffled.shuffle(blocks)
        self.grid = grid
        for self.block in blocks:
            self.shared = Memory(self.shared_bytes)
            self.shared.allowed[:] = True
            with np.errstate(all="ignore"):
                self.run_block()

    def run_block(self) -> None:
        size, threads = self.unit, self.program.threads
        units = [Unit(np.arange(first, first + size)) for first in range(0, threads, size)]
        while running := [unit for unit in units if not unit.done]:
            self.shuffled.shuffle(running)
            for unit in running:
                self.run_to_barrier(unit)
            if len({unit.done for unit in running}) > 1:
                raise AssertionError(f"{self.program.name}: some threads wait at a barrier that others never reach")

    def run_to_barrier(self, unit: Unit) -> None:
        steps, end = self.steps, len(self.steps)
        while unit.place < end:
            if unit.parked:
                unit.regroup()
            step = steps[unit.place]
            unit.place += 1
            try:
                what = step(unit)
            except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
                given = self.program.instructions[unit.place - 1]
                raise AssertionError(f"{self.program.name}: {given}: {error!r}") from error
            if what == "barrier":
                return
            if what == "exit":
                break
        unit.done = True
        if unit.copies or unit.copying or unit.products or unit.multiplying:
            unfinished = [unit.copies, unit.products]
            raise AssertionError(f"{self.program.name}: ends with {unfinished} in flight")
