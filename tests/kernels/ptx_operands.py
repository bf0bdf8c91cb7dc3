"""Operands of PTX instructions: what they hold in a unit, an array of one element a thread, and how it is written."""

import re
import struct
from collections.abc import Callable
from functools import cache

import numpy as np

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"{code}{bits // 8}") for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
       for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "bf16": np.dtype("u2"),
}  # fmt: skip
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDTHS = {"%rs": 2, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8}  # of registers, by their names


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
    constants = {size: np.full(size, number(text, dtype)) for size in (32, 64, 128)}  # the sizes of units
    return lambda unit: constants[len(unit.threads)]


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


@cache
def width_of(register: str) -> int:
    return WIDTHS.get(re.match(r"%?[a-z]*", register).group(), 0)


def put(unit, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
    """Writes a register, of the threads in `mask`."""
    if name == "_":
        return
    value = np.ascontiguousarray(value)
    if value.dtype.kind != "b":
        width = width_of(name)
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
