"""Launches of Triton kernels that run what they are compiled to for a GPU (ptx.py), on tensors of the CPU.

Needs Triton without its interpreter: a process whose environment has no TRITON_INTERPRET.
"""

import inspect
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels.ptx import Arena, Machine, parse

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
Found = tuple[str, object, bool]  # a type, a constant where it is one, and whether 16 divides it


def specialised(value: object, constant: bool) -> Found:
    """As Triton's launcher does: None and 1 become constants, what 16 divides is known to be so divided."""
    if constant or value is None or (type(value) is int and value == 1):
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    return "i64" if abs(value) >= 2**31 else "i32", None, value % 16 == 0


class Launcher:
    """Compiles each specialisation once."""

    def __init__(self, arch: int, late: bool, seed: int) -> None:
        self.arch, self.late, self.seed = arch, late, seed
        self.programs: dict = {}
        self.kernels: dict[str, int] = {}  # launches

    def run(self, kernel: JITFunction, *arguments, grid, warmup=False, **named) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        defaults = {p.name: p.default for p in kernel.params if p.default is not inspect.Parameter.empty}
        given = defaults | dict(zip(kernel.arg_names, arguments, strict=False)) | named
        found = {p.name: specialised(given[p.name], p.is_constexpr) for p in kernel.params}
        key = kernel.fn.__name__, tuple(found.items()), tuple(options.items())
        if key not in self.programs:
            self.programs[key] = self.compile(kernel, found, options)
        machine = self.programs[key]
        passed = [given[name] for name, (kind, *_) in found.items() if kind != "constexpr"]
        arena = Arena([value for value in passed if isinstance(value, torch.Tensor)])
        bits = [arena.address(v) if isinstance(v, torch.Tensor) else as_bits(v) for v in passed]
        bits += [0] * (len(machine.program.parameters) - len(bits))  # Triton's own, for scratch memory
        size = (*grid, 1, 1)[:3] if isinstance(grid, tuple) else grid
        machine.run(size, arena, bits)
        arena.copy_back()
        self.kernels[kernel.fn.__name__] = self.kernels.get(kernel.fn.__name__, 0) + 1

    def compile(self, kernel: JITFunction, found: dict[str, Found], options: dict) -> Machine:
        signature = {name: kind for name, (kind, _, _) in found.items()}
        constants = {name: value for name, (kind, value, _) in found.items() if kind == "constexpr"}
        divided = {(p,): [["tt.divisibility", 16]] for p, (_, _, whole) in enumerate(found.values()) if whole}
        source = ASTSource(kernel, signature, constants, divided)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        return Machine(parse(compiled.asm["ptx"]), compiled.metadata.shared, self.late, self.seed)


def as_bits(value: float | int) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else value


@contextmanager
def compiled_for(arch: int, *, late: bool = True, seed: int = 0, small_waves: bool = False) -> Iterator[Launcher]:
    """Within, CPU tensors are served by the kernels and tiles of compute capability `arch` (80, 90); waves of one tile
    are a large problem's many."""
    from vlscale.kernels import checks, triton_tiles

    launcher = Launcher(arch, late, seed)

    def choose(x, work):
        config = triton_tiles.config_for(x.dtype, arch // 10, triton_tiles.WORK_OF.get(work, work))
        one = {"wave_rows": config.block_m, "wave_columns": config.block_n, "splits": 1}
        return replace(config, **one) if small_waves else config

    def fused(x):
        if x.dtype not in triton_tiles.HALF:
            return None
        features = max(64, triton.next_power_of_2(x.shape[1]))
        return triton_tiles.FUSED[arch // 10].get(features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *given, **named: launcher.run(kernel, *given, **named))
        patch.setattr(checks, "_compiles_for", lambda device: True)
        for name, module in list(sys.modules.items()):
            if ".kernels.triton_" in name:
                for attribute, made in (("choose_config", choose), ("fused_config", fused)):
                    if hasattr(module, attribute):
                        patch.setattr(module, attribute, made)
        yield launcher
