"""Bytes of tensors alive while code runs, operation by operation; on the meta device nothing is allocated or computed.

What a single operation takes inside itself, a sort's workspace say, is not seen.
"""

import pkgutil
import weakref
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlscale import kernels


class LiveBytes(TorchDispatchMode):
    """`live` and `peak` bytes of what was made inside; `given` tensors and views of them count nothing."""

    def __init__(self, *given: Tensor | None):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given if tensor is not None}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf.untyped_storage())
        return result

    def hold(self, storage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, storage._cdata)

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def body(op):
    """A custom op's own code, without what would keep it from the meta device: its fake, and autocast's switch."""
    return op._init_fn.__wrapped__


class NoKernel:
    """In a Triton kernel's place: its launcher runs, and nothing is written. Keeps the grids."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        self.launched.append(grid)
        return lambda *arguments, **settings: None


def without_kernels(monkeypatch) -> NoKernel:
    """Every Triton kernel replaced by this one, on a Hopper GPU's configurations."""
    none = NoKernel()
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if found.name.startswith("triton_")]
    for module in (import_module(f"vlscale.kernels.{name}") for name in names):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, none)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return none
