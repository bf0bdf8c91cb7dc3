"""PTX instructions of control, memory and matrices (PTX ISA, version 8.7); ptx_arithmetic has the others."""

import re
from collections.abc import Callable

import numpy as np

from tests.kernels import ptx_products as products
from tests.kernels.ptx_arithmetic import arithmetic
from tests.kernels.ptx_operands import TYPES, address, getter, listed, put


def compile_instruction(machine, predicate: str, negated: bool, operation: str, operands: list[str]) -> Callable:
    """A function of a unit that does the instruction; "barrier" and "exit" are what it may return."""

    def mask_of(unit) -> np.ndarray | None:
        if not predicate:
            return unit.active
        mask = ~unit.registers[predicate] if negated else unit.registers[predicate]
        return mask if unit.active is None else mask & unit.active

    name, *rest = operation.split(".")
    for kinds, made in ((CONTROL, control), (MEMORY, memory), (MATRIX, matrix)):
        if name in kinds:
            return made(machine, name, rest, operands, mask_of)
    outs, compute = arithmetic(machine, name, rest, operands)

    def act(unit) -> None:
        mask = mask_of(unit)
        for out, value in zip(outs, compute(unit), strict=True):
            put(unit, out, value, mask)

    return act


CONTROL = ("bra", "bar", "barrier", "ret", "exit", "fence", "membar", "griddepcontrol", "createpolicy")


def control(machine, name: str, rest: list[str], operands: list[str], mask_of) -> Callable:
    if name == "bra":
        target = operands[-1]

        def jump(unit) -> None:
            mask = mask_of(unit)
            here = unit.active if unit.active is not None else True
            if mask is None or (mask == here).all():
                unit.place = machine.program.labels[target]
            elif mask.any():
                unit.branch(mask, machine.program.labels[target])

        return jump

    def all_together(what: str) -> Callable:
        def stop(unit) -> str:
            unit.together()
            return what

        return stop

    if name in ("bar", "barrier"):
        return all_together("barrier")
    if name in ("ret", "exit"):
        return all_together("exit")
    return lambda unit: None


MEMORY = ("ld", "st", "cp")


def memory(machine, name: str, rest: list[str], operands: list[str], mask_of) -> Callable:
    if name == "cp":
        return copy(machine, rest, operands, mask_of)
    width = TYPES[rest[-1]].itemsize
    raw = np.dtype(f"{'i' if rest[-1][0] == 's' and name == 'ld' else 'u'}{width}")
    many = next((int(part[1:]) for part in rest if re.fullmatch(r"v\d", part)), 1)
    if rest[0] == "param":
        at = getter(machine, operands[1].strip("[] "), np.dtype("u8"))

        def load_parameter(unit) -> None:
            bits = [value & (2 ** (8 * width) - 1) for value in machine.arguments]
            put(unit, operands[0], np.array(bits, dtype=f"u{width}").view(raw)[at(unit)], mask_of(unit))

        return load_parameter
    space = (lambda: machine.shared) if rest[0].startswith("shared") else (lambda: machine.arena)
    where = address(machine, operands[0] if name == "st" else operands[1])
    if name == "st":
        values = [getter(machine, text, raw) for text in listed(operands[1])]

        def store(unit) -> None:
            mask = mask_of(unit)
            chosen = slice(None) if mask is None else mask
            rows = np.stack([value(unit) for value in values], 1)[chosen]
            space().store(where(unit)[chosen], np.ascontiguousarray(rows).view(np.uint8))

        return store
    outs = listed(operands[0])

    def load(unit) -> None:
        mask = mask_of(unit)
        chosen = slice(None) if mask is None else mask
        found = space().load(where(unit)[chosen], width * many).view(raw)
        for place, out in enumerate(outs):
            value = np.full(len(unit.threads), np.iinfo(raw).max, dtype=raw)
            value[chosen] = found[:, place]
            put(unit, out, value, mask)

    return load


def copy(machine, rest: list[str], operands: list[str], mask_of) -> Callable:
    """cp.async of `size` bytes, of which as many as the last operand says are read and the others are 0."""
    if rest[1] == "commit_group":

        def commit(unit) -> None:
            unit.copies.append(unit.copying)
            unit.copying = []

        return commit
    if rest[1] in ("wait_group", "wait_all"):
        left = int(operands[0]) if operands else 0
        return lambda unit: unit.finish(unit.copies, left)
    to, source, size = address(machine, operands[0]), address(machine, operands[1]), int(operands[2], 0)
    read = getter(machine, operands[3], np.dtype("u4")) if len(operands) > 3 else None

    def start(unit) -> None:
        mask = mask_of(unit)
        chosen = np.ones(len(unit.threads), dtype=bool) if mask is None else mask
        there, here = to(unit)[chosen], source(unit)[chosen]
        counts = np.full(len(here), size) if read is None else read(unit)[chosen]
        if not np.isin(counts, (0, size)).all():
            raise AssertionError(f"cp.async of a part of {size} bytes")

        def act() -> None:
            values = np.zeros((len(here), size), dtype=np.uint8)
            values[counts > 0] = machine.arena.load(here[counts > 0], size)
            machine.shared.store(there, values)

        if machine.late:
            unit.copying.append(act)
        else:
            act()

    return start


MATRIX = ("ldmatrix", "stmatrix", "mma", "wgmma")


def matrix(machine, name: str, rest: list[str], operands: list[str], mask_of) -> Callable:
    if name == "wgmma":
        act = products.group_product(machine, rest, operands, getter, put)
    elif name == "mma":
        act = products.warp_product(machine, rest, operands, getter, put)
    else:
        act = products.matrices(machine, name, rest, operands, address, put)

    def act_together(unit) -> None:
        unit.together()
        act(unit)

    return act_together
