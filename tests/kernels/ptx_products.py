"""Products of matrices in PTX: mma.sync of a warp, wgmma of four, and the loads that bring their operands.

Where elements lie in registers and in shared memory: PTX ISA 8.7, sections 9.7.14 (mma, ldmatrix) and 9.7.15 (wgmma,
matrix descriptors, swizzling).
"""

import re
from collections.abc import Callable

import numpy as np


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits of float16 or bfloat16 as float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pair(register: np.ndarray, kind: str) -> np.ndarray:
    """(threads, 2): the lower and the upper half of a register."""
    return floats(np.ascontiguousarray(register[:, None]).view(np.uint16), kind)


def rows_of_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, 16, 16) out of four registers a thread."""
    warps = len(registers[0]) // 32
    out = np.empty((warps, 16, 16), dtype=np.float32)
    lane = np.arange(32)
    for place, register in enumerate(registers):
        values = pair(register, kind).reshape(warps, 32, 2)
        row, column = lane // 4 + 8 * (place % 2), 2 * (lane % 4) + 8 * (place // 2)
        out[:, row, column], out[:, row, column + 1] = values[..., 0], values[..., 1]
    return out


def warp_product(machine, rest: list[str], operands: list[str], getter, put) -> Callable:
    """mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32"""
    if "m16n8k16" not in rest or rest[-4] != "f32" or rest[-1] != "f32":
        raise AssertionError(f"mma of other shapes or kinds: {rest}")
    kind = rest[-2]
    word = np.dtype("u4")
    lists = [[part.strip() for part in text.strip("{} ").split(",")] for text in operands]
    a, b, c = ([getter(machine, text, word) for text in names] for names in lists[1:])

    def multiply(unit) -> None:
        warps, lane = len(unit.threads) // 32, np.arange(32)
        left = rows_of_a([value(unit) for value in a], kind)
        right = np.empty((warps, 16, 8), dtype=np.float32)
        for place, value in enumerate(b):
            values = pair(value(unit), kind).reshape(warps, 32, 2)
            row = 2 * (lane % 4) + 8 * place
            right[:, row, lane // 4], right[:, row + 1, lane // 4] = values[..., 0], values[..., 1]
        total = left @ right
        for place, (out, add) in enumerate(zip(lists[0], c, strict=True)):
            mine = total[:, lane // 4 + 8 * (place // 2), 2 * (lane % 4) + place % 2].reshape(-1)
            put(unit, out, mine + add(unit).view(np.float32), None)

    return multiply


def matrices(machine, name: str, rest: list[str], operands: list[str], address, put) -> Callable:
    """ldmatrix and stmatrix of 8 x 8 elements of 16 bits: a lane names a row's address, and holds two elements."""
    count = int(next(part for part in rest if re.fullmatch(r"x\d", part))[1:])
    turned, lane = "trans" in rest, np.arange(32)
    registers, where = operands if name == "ldmatrix" else operands[::-1]
    names, at = [part.strip() for part in registers.strip("{} ").split(",")], address(machine, where)

    def places(unit, matrix: int) -> np.ndarray:
        """(threads, 2) addresses of the elements that each lane holds of a matrix."""
        rows = at(unit).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
        if (rows % 16).any():
            raise AssertionError("a row of a matrix is not aligned to 16 bytes")
        near, far = lane // 4, 2 * (lane % 4)
        both = [rows[:, far + k] + 2 * near if turned else rows[:, near] + 2 * (far + k) for k in (0, 1)]
        return np.stack(both, -1).reshape(-1, 2)

    def load(unit) -> None:
        for matrix, out in zip(range(count), names, strict=True):
            found = machine.shared.load(places(unit, matrix).reshape(-1), 2).view(np.uint16)
            put(unit, out, found.reshape(-1, 2).copy().view(np.uint32)[:, 0], None)

    def store(unit) -> None:
        for matrix, source in zip(range(count), names, strict=True):
            halves = np.ascontiguousarray(unit.registers[source][:, None]).view(np.uint16).reshape(-1, 1)
            machine.shared.store(places(unit, matrix).reshape(-1), halves.view(np.uint8))

    return load if name == "ldmatrix" else store


def described(machine, descriptor: int, rows: int, kind: str, along_rows: bool) -> np.ndarray:
    """(rows, 16) of a matrix in shared memory, of which 16 columns are multiplied.

    along_rows: rows lie side by side in memory ("MN-major"), else columns ("K-major"). Only swizzled descriptors.
    """
    start, leading, stride = ((descriptor >> place & 0x3FFF) << 4 for place in (0, 16, 32))
    swizzle = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62 & 3)
    if swizzle is None or descriptor >> 49 & 7:
        raise AssertionError("a descriptor without swizzle, or with an offset of its own")
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if along_rows:
        across = swizzle // 2
        at = start + row // across * leading + column // 8 * stride + column % 8 * swizzle + row % across * 2
    else:
        at = start + row // 8 * stride + row % 8 * swizzle + column * 2
    at = at ^ (at >> 3 & swizzle - 16)
    return floats(machine.shared.load(at.reshape(-1), 2).view(np.uint16).reshape(rows, 16), kind)


def group_product(machine, rest: list[str], operands: list[str], getter, put) -> Callable:
    """wgmma.mma_async and the groups it is committed to and waited for in."""
    if rest[0] == "commit_group":

        def commit(unit) -> None:
            unit.products.append(unit.multiplying)
            unit.multiplying = []

        return commit
    if rest[0] == "wait_group":
        return lambda unit: unit.finish(unit.products, int(operands[-1]))
    if rest[0] == "fence":
        return lambda unit: None
    shape = next(part for part in rest if part.startswith("m64n"))
    width, kind = int(re.fullmatch(r"m64n(\d+)k16", shape).group(1)), rest[-1]
    outs = [part.strip() for part in operands[0].strip("{} ").split(",")]
    held = operands[1].startswith("{")
    word, wide = np.dtype("u4"), np.dtype("u8")
    if held:
        left = [getter(machine, part.strip(), word) for part in operands[1].strip("{} ").split(",")]
    else:
        left = [getter(machine, operands[1], wide)]
    right, keep = getter(machine, operands[2], wide), getter(machine, operands[3], np.dtype(bool))
    flags = [int(text) for text in operands[4:]]
    if flags[:2] != [1, 1]:
        raise AssertionError("wgmma of negated operands")
    turned_a, turned_b = (False, *flags[2:]) if held else flags[2:]

    def one(value: np.ndarray):
        if (value != value[0]).any():
            raise AssertionError("threads of a group differ in what they multiply")
        return value[0]

    def multiply(unit) -> None:
        if len(unit.threads) != 128:
            raise AssertionError("wgmma outside of a group of four warps")
        if held:
            a = rows_of_a([value(unit) for value in left], kind).reshape(64, 16)
        else:
            a = described(machine, int(one(left[0](unit))), 64, kind, bool(turned_a))
        b = described(machine, int(one(right(unit))), width, kind, bool(turned_b))
        total = (a @ b.T).reshape(4, 16, width)
        lane, kept = np.arange(32), bool(one(keep(unit)))
        for place, out in enumerate(outs):
            row, column = lane // 4 + 8 * (place // 2 % 2), 2 * (lane % 4) + place % 2 + 8 * (place // 4)
            mine = total[:, row, column].reshape(-1)
            put(unit, out, mine + unit.registers[out].view(np.float32) if kept else mine, None)

    def start(unit) -> None:
        if machine.late:
            unit.multiplying.append(lambda: multiply(unit))
        else:
            multiply(unit)

    return start
