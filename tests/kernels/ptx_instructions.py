"""What PTX instructions do to a unit of threads (PTX ISA, version 8.7); registers are arrays, one element a thread."""

import re
import struct
from collections.abc import Callable

import numpy as np

from tests.kernels import ptx_products as products

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
       for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "bf16": np.dtype("u2"),
}  # fmt: skip
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDTHS = {"%rs": 2, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8}  # of registers, by their names
COMPARE = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "neu": np.not_equal, "equ": lambda a, b: ~(a != b) | _nan(a, b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}  # fmt: skip


JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _nan(a, b):
    return np.isnan(a) | np.isnan(b)


def number(text: str, dtype: np.dtype):
    if text.startswith("0f"):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), dtype="f4").view(dtype)[0]
    if text.startswith("0d"):
        return np.frombuffer(struct.pack("<Q", int(text[2:], 16)), dtype="f8").view(dtype)[0]
    value = int(text, 0)
    if dtype.kind == "b":
        return np.bool_(value)
    if dtype.kind in "ui":
        return np.array(value & (2 ** (8 * dtype.itemsize) - 1), dtype=f"u{dtype.itemsize}").view(dtype)[()]
    return dtype.type(value)


Getter = Callable[[object], np.ndarray]


def getter(machine, text: str, dtype: np.dtype) -> Getter:
    """The operand's value in a unit, as dtype."""
    if text.startswith("%") and text[1:].split(".")[0] in ("tid", "ctaid", "nctaid", "ntid", "laneid"):
        return special(machine, *text[1:].split("."))
    if text.startswith("%") or re.fullmatch(r"[a-z]+", text):
        return lambda unit: _viewed(unit.registers[text], dtype)
    if parameter := re.fullmatch(r"\w+_param_(\d+)", text):  # its address: its number
        return lambda unit: np.full(len(unit.threads), int(parameter.group(1)), dtype=dtype)
    if text == "global_smem":
        return lambda unit: np.zeros(len(unit.threads), dtype=dtype)
    value = number(text, dtype)
    return lambda unit: np.full(len(unit.threads), value)


def _viewed(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if value.dtype == dtype:
        return value
    if value.dtype.itemsize < dtype.itemsize or value.dtype.kind == "b":
        raise ValueError(f"a register of {value.dtype.itemsize} bytes is read as {dtype}")
    if value.dtype.itemsize > dtype.itemsize:  # its lower part, as st and cvt take it
        value = value.astype(RAW[dtype.itemsize])
    return value.view(dtype)


def special(machine, name: str, axis: str = "x") -> Getter:
    place = "xyz".index(axis)
    if name == "laneid":
        return lambda unit: (unit.threads % 32).astype(np.uint32)
    if name in ("tid", "ntid"):
        if place:
            return lambda unit: np.full(len(unit.threads), name == "ntid", dtype=np.uint32)
        if name == "ntid":
            return lambda unit: np.full(len(unit.threads), machine.program.threads, dtype=np.uint32)
        return lambda unit: unit.threads.astype(np.uint32)
    return lambda unit: np.full(
        len(unit.threads), (machine.block if name == "ctaid" else machine.grid)[place], dtype=np.uint32
    )


def put(unit, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
    """Writes a register, of the threads in `mask`."""
    if name == "_":
        return
    value = np.ascontiguousarray(value)
    if value.dtype.kind != "b":
        width = WIDTHS.get(re.match(r"%?[a-z]*", name).group(), value.dtype.itemsize)
        if width > value.dtype.itemsize:  # of a narrower type: by its sign, or zeros
            value = value.astype(f"{value.dtype.kind}{width}")
        value = value.view(RAW[value.dtype.itemsize])
    if mask is not None and not mask.all():
        old = unit.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros_like(value) if value.dtype == bool else np.full_like(value, np.iinfo(value.dtype).max)
        value = np.where(mask, value, old)
    unit.registers[name] = value


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")] if text.startswith("{") else [text]


def address(machine, text: str) -> Getter:
    base, sign, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:([+-])\s*(\d+))?\s*\]", text).groups()
    shift = int(offset or 0) * (-1 if sign == "-" else 1)
    if not base.startswith("%"):
        return lambda unit: np.full(len(unit.threads), shift, dtype=np.int64)  # shared memory's own start
    return lambda unit: unit.registers[base].astype(np.int64) + shift


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
        with np.errstate(all="ignore"):
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
        values = np.array([value & (2 ** (8 * width) - 1) for value in machine.arguments], dtype=f"u{width}").view(raw)
        return lambda unit: put(unit, operands[0], values[at(unit)], mask_of(unit))
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


def rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """To float16 or bfloat16, the nearest even; bits."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.astype(np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), nearest)


def flushed(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def shifted(left: bool):
    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        bits = 8 * a.dtype.itemsize
        clamped = np.minimum(n.astype(np.int64), bits - 1).astype(a.dtype)
        moved = np.left_shift(a, clamped) if left else np.right_shift(a, clamped)
        if not left and a.dtype.kind == "i":
            return moved  # the sign, over and over
        return np.where(n >= bits, a.dtype.type(0), moved)

    return shift


def extract(a: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
    length = length.astype(np.int64)
    value = (a.astype(np.int64) >> place.astype(np.int64)) & ((1 << length) - 1)
    if a.dtype.kind == "i":
        value = np.where(value >> np.maximum(length - 1, 0) & 1, value - (1 << length), value)
    return value.astype(a.dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(both)
    for byte in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * byte)) & np.uint64(15)
        if (nibble > 7).any():
            raise AssertionError("prmt with a sign")
        out |= ((both >> (nibble * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * byte)
    return out.astype(np.uint32)


def looked_up(a, b, c, table):
    out, code = np.zeros_like(a), int(table[0])
    for place in range(8):
        if code >> place & 1:
            out |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return out


ONE = {
    "neg": np.negative, "abs": np.abs, "not": np.invert,
    "ex2": lambda a: flushed(np.exp2(flushed(a))), "lg2": lambda a: np.log2(flushed(a)),
    "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "clz": lambda a: np.array([32 - int(v).bit_length() for v in a], dtype=np.uint32),
    "popc": lambda a: np.array([int(v).bit_count() for v in a], dtype=np.uint32),
}  # fmt: skip
TWO = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.fmin, "max": np.fmax, "mul": np.multiply,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _divided(a, b),
    "rem": lambda a, b: a - b * _divided(a, b),
}  # fmt: skip


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "u":
        return a // b
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def arithmetic(machine, name: str, rest: list[str], operands: list[str]) -> tuple[list[str], Callable]:
    """(registers written, their values in a unit)."""
    out, given = listed(operands[0]), operands[1:]
    if name == "mov":
        return out, moved(machine, TYPES[rest[-1]], out, given[0])
    if name == "cvt":
        return out, converted(machine, rest, given)
    if name == "cvta":
        value = getter(machine, given[0], np.dtype("u8"))
        return out, lambda unit: [value(unit)]
    if name == "setp":
        kind = TYPES[rest[-1]]
        first, second = (getter(machine, text, kind) for text in given[:2])
        also = getter(machine, given[2], np.dtype(bool)) if len(given) > 2 else None
        compare, join = COMPARE[rest[0]], JOIN.get(rest[1])

        def compared(unit):
            found = compare(first(unit), second(unit))
            return [found if also is None else join(found, also(unit))]

        return out, compared
    if name == "selp":
        kind = np.dtype(RAW[TYPES[rest[-1]].itemsize])
        first, second = (getter(machine, text, kind) for text in given[:2])
        chosen = getter(machine, given[2], np.dtype(bool))
        return out, lambda unit: [np.where(chosen(unit), first(unit), second(unit))]
    if name == "shfl":
        return out[:1], exchanged(machine, rest[1], given)
    compute = reduced(machine, rest, given) if name == "redux" else computed(machine, name, rest, given)
    return out, lambda unit: [compute(unit)]


def moved(machine, kind: np.dtype, out: list[str], source: str):
    """Of one register, packed out of several, or unpacked to several."""
    if source.startswith("{"):
        parts = listed(source)
        each = np.dtype(RAW[kind.itemsize // len(parts)])
        values = [getter(machine, text, each) for text in parts]
        return lambda unit: [np.stack([v(unit) for v in values], 1).view(RAW[kind.itemsize])[:, 0]]
    value = getter(machine, source, kind)
    if len(out) == 1:
        return lambda unit: [value(unit)]
    each = RAW[kind.itemsize // len(out)]
    return lambda unit: list(np.ascontiguousarray(value(unit)[:, None]).view(each).T)


def converted(machine, rest: list[str], given: list[str]):
    to, source = rest[-2], rest[-1]
    if to in ("f16x2", "bf16x2"):  # the first operand is the upper half
        high, low = (getter(machine, text, TYPES[source]) for text in given)
        kind = to[:-2]
        return lambda unit: [
            rounded(high(unit), kind).astype(np.uint32) << np.uint32(16) | rounded(low(unit), kind).astype(np.uint32)
        ]
    value = getter(machine, given[0], TYPES[source])
    if to in ("f16", "bf16") and source in ("f32", "f64"):
        return lambda unit: [rounded(value(unit), to)]
    if source == "bf16":
        return lambda unit: [(value(unit).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(TYPES[to])]
    way = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}.get(rest[0])
    if way is None:
        return lambda unit: [value(unit).astype(TYPES[to])]
    if TYPES[to].kind == "f":
        return lambda unit: [way(value(unit)).astype(TYPES[to])]
    ends = np.iinfo(TYPES[to])

    def whole(unit):
        inside = np.clip(way(value(unit)).astype(np.float64), ends.min, ends.max)
        return [np.nan_to_num(inside).astype(TYPES[to])]

    return whole


def exchanged(machine, mode: str, given: list[str]):
    value, lanes = getter(machine, given[0], np.dtype("u4")), getter(machine, given[1], np.dtype("u4"))
    if given[2] not in ("31", "0x1f"):
        raise AssertionError("shfl within less than a warp")

    def exchange(unit):
        unit.together()
        lane = unit.threads % 32
        of = {
            "bfly": lane ^ lanes(unit),
            "idx": lanes(unit) % 32,
            "up": lane - lanes(unit).astype(int),
            "down": lane + lanes(unit),
        }[mode]
        of = np.where((of < 0) | (of > 31), lane, of)
        return [value(unit)[(unit.threads - lane - unit.threads[0]) + of]]

    return exchange


def reduced(machine, rest: list[str], given: list[str]):
    """redux.sync: one value of a warp, in all its threads."""
    value, reduce = getter(machine, given[0], TYPES[rest[-1]]), TWO[rest[1]].reduce
    return lambda unit: np.repeat(reduce(value(unit).reshape(-1, 32), axis=1), 32)


def computed(machine, name: str, rest: list[str], given: list[str]):
    kind = TYPES[rest[-1]]
    if name in ("shl", "shr"):
        value, count = getter(machine, given[0], kind), getter(machine, given[1], np.dtype("u4"))
        shift = shifted(name == "shl")
        return lambda unit: shift(value(unit), count(unit))
    if name == "bfe":
        value, *ends = getter(machine, given[0], kind), *(getter(machine, t, np.dtype("u4")) for t in given[1:])
        return lambda unit: extract(value(unit), *(end(unit) for end in ends))
    if name in ("prmt", "lop3"):
        values = [getter(machine, text, np.dtype("u4")) for text in given]
        apply = permuted if name == "prmt" else looked_up
        return lambda unit: apply(*(value(unit) for value in values))
    if name in ("mul", "mad") and "wide" in rest:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        a, b = (getter(machine, text, kind) for text in given[:2])
        more = getter(machine, given[2], wide) if name == "mad" else None
        return lambda unit: a(unit).astype(wide) * b(unit).astype(wide) + (0 if more is None else more(unit))
    if name == "mul" and "hi" in rest:
        a, b = (getter(machine, text, kind) for text in given)
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        return lambda unit: (a(unit).astype(wide) * b(unit).astype(wide) >> wide.type(8 * kind.itemsize)).astype(kind)
    values = [getter(machine, text, kind) for text in given]
    if name in ("fma", "mad"):
        a, b, c = values
        if kind == np.float32:  # one rounding, but for what float64 rounds
            return lambda unit: (a(unit).astype(float) * b(unit).astype(float) + c(unit)).astype(np.float32)
        return lambda unit: a(unit) * b(unit) + c(unit)
    if len(values) == 1:
        return lambda unit, of=ONE[name]: of(values[0](unit)).astype(kind if name not in ("clz", "popc") else np.uint32)
    a, b = values
    flush = "ftz" in rest
    return lambda unit, of=TWO[name]: flushed(of(a(unit), b(unit))) if flush else of(a(unit), b(unit))
