"""PTX instructions that make registers of registers (PTX ISA, version 8.7)."""

from collections.abc import Callable

import numpy as np

from tests.kernels.ptx_operands import RAW, TYPES, getter, listed

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
