"""What the public functions accept: argument checks with one clear line each, and the choice of implementation.

N pairs, D width. Values are checked for Python floats only: looking into a tensor would wait for the device.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "chunked", "reference")
_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def available_impls(device: torch.device) -> list[str]:
    """Implementations that run on `device` now; on CPU the Triton kernels run only in Triton's interpreter."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return [*(["triton"] if _TRITON_FOUND and (interpreted or _compiles_for(device)) else []), "chunked", "reference"]


def _compiles_for(device: torch.device) -> bool:
    """Whether the Triton kernels have tiles for this GPU: NVIDIA's of compute capability 8.0 or more."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(device).major >= 8  # torch.compile folds this call, not its siblings


def choose_impl(impl: str, device: torch.device) -> str:
    if impl == "auto":
        return "triton" if _TRITON_FOUND and _compiles_for(device) else "chunked"
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "triton" and impl not in (available := available_impls(device)):
        raise ValueError(
            f"impl: 'triton' is not available for {device.type} tensors here, available: auto, {', '.join(available)}"
            " (tensors on an NVIDIA GPU of compute capability 8.0 or more, or TRITON_INTERPRET=1 for CPU tensors, make"
            " it so)"
        )
    return impl


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_embeddings(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor (N, D), got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape (N, D), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {value.dtype}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {value.layout}; .to_dense() makes one")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(value.shape)}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, shape: bool = True) -> None:
    """`value` must match `other` in device and dtype, and in shape unless only the width has to agree."""
    if shape and value.shape != other.shape:
        raise ValueError(f"{name}: expected shape {tuple(other.shape)} as {other_name}, got {tuple(value.shape)}")
    if not shape and value.shape[1] != other.shape[1]:
        raise ValueError(f"{name}: expected width {other.shape[1]} as {other_name}, got {value.shape[1]}")
    if value.dtype != other.dtype:
        raise ValueError(f"{name}: expected dtype {other.dtype} as {other_name}, got {value.dtype}")
    check_device(name, value, other.device)


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_indices(name: str, value: Tensor | None, rows: int, size: int, device: torch.device) -> None:
    """A padded table of indices into a gallery of `size` rows, (Q, P) int64; values are looked at on a CPU only."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != rows:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor ({rows}, P) of gallery indices padded by -1, got {got}")
    if value.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {value.dtype}")
    check_device(name, value, device)
    if device.type == "cpu" and value.numel():
        least, most = (int(v) for v in value.aminmax())
        if least < -1 or most >= size:
            got = least if least < -1 else most
            raise ValueError(f"{name}: expected gallery indices 0 to {size - 1}, or -1 as padding, got {got}")


def check_pair_id(pair_id: Tensor | None, n: int, device: torch.device) -> None:
    if pair_id is None:
        return
    if not isinstance(pair_id, Tensor) or tuple(pair_id.shape) != (n,):
        got = tuple(pair_id.shape) if isinstance(pair_id, Tensor) else type(pair_id).__name__
        raise ValueError(f"pair_id: expected shape ({n},), one id a pair, got {got}")
    if pair_id.dtype != torch.int64:
        raise ValueError(f"pair_id: expected int64, got {pair_id.dtype}")
    check_device("pair_id", pair_id, device)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_autocast(impl: str, *embeddings: Tensor) -> tuple[Tensor, ...]:
    """What `impl` multiplies: inside autocast `triton` takes float32 embeddings in autocast's dtype, as a dense loss's
    products would; the other impls have nothing to win by it."""
    device = embeddings[0].device.type
    if impl != "triton" or not torch.is_autocast_enabled(device):
        return embeddings
    dtype = torch.get_autocast_dtype(device)
    return tuple(rows.to(dtype) if rows.dtype == torch.float32 else rows for rows in embeddings)


def as_scalar(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype, *, positive: bool) -> Tensor:
    """A 0-d tensor of `dtype` on `like`'s device; tensors keep their graph and are never read."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one floating value, got {tuple(value.shape)} of {value.dtype}")
        check_device(name, value, like.device)
        return value.reshape(()).to(dtype)
    value = _plain(value)
    if not _is_number(value):
        raise ValueError(f"{name}: expected a float or a 0-d tensor, got {type(value).__name__}")
    if not _is_finite(value) or (positive and value <= 0):
        raise ValueError(f"{name}: expected a finite {'positive ' if positive else ''}number, got {value}")
    return torch.full((), float(value), dtype=dtype, device=like.device)


def _plain(value: object) -> object:
    """A number of numpy's as Python's."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """Of integers too that no float holds."""
    return abs(value) <= sys.float_info.max


def _told(value: object) -> str:
    """A list as it is where it is short, else its type."""
    shown = repr(value)
    return shown if isinstance(value, list | tuple) and len(shown) <= 80 and "\n" not in shown else type(value).__name__


def as_teachers(student: Tensor, teacher_embs: Tensor | list[Tensor]) -> list[Tensor]:
    """The teachers as a list, each (N, D_k) on the student's device; their dtype and width are their own."""
    teachers = [teacher_embs] if isinstance(teacher_embs, Tensor) else teacher_embs
    if not isinstance(teachers, list | tuple) or not teachers:
        raise ValueError(f"teacher_embs: expected a tensor or a non-empty list of tensors, got {_told(teacher_embs)}")
    for k, teacher in enumerate(teachers):
        name = f"teacher_embs[{k}]"
        check_embeddings(name, teacher)
        if teacher.shape[0] != student.shape[0]:
            raise ValueError(f"{name}: expected {student.shape[0]} rows as student_emb, got {teacher.shape[0]}")
        check_device(name, teacher, student.device)
    return list(teachers)


def join_teachers(teachers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, sum of widths), in the teachers' own dtype where they share one, else in `dtype`."""
    if len(teachers) == 1:
        return teachers[0]
    kinds = {teacher.dtype for teacher in teachers}
    kind = dtype if len(kinds) > 1 else teachers[0].dtype
    return torch.cat([teacher.to(kind) for teacher in teachers], 1)


def as_weights(weights: Tensor | list[float] | None, teachers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Teacher weights as a (K,) tensor; None means one teacher of weight 1."""
    device = teachers[0].device
    if weights is None:
        if len(teachers) > 1:
            raise ValueError(f"teacher_weights: expected {len(teachers)} weights for as many teachers, got None")
        return torch.ones(1, dtype=dtype, device=device)
    if isinstance(weights, list | tuple):
        weights = [_plain(w) for w in weights]
    if isinstance(weights, Tensor):
        if not weights.is_floating_point():
            raise ValueError(f"teacher_weights: expected a floating dtype, got {weights.dtype}")
        check_device("teacher_weights", weights, device)
    elif isinstance(weights, list | tuple) and weights and all(_is_number(w) and _is_finite(w) for w in weights):
        weights = torch.stack([torch.full((), float(w), dtype=dtype, device=device) for w in weights])
    else:
        raise ValueError(f"teacher_weights: expected a tensor (K,) or a list of finite floats, got {_told(weights)}")
    if tuple(weights.shape) != (len(teachers),):
        raise ValueError(f"teacher_weights: expected shape ({len(teachers)},), got {tuple(weights.shape)}")
    return weights.to(dtype)


def as_logit_weights(weights: Tensor | list[float] | None, teachers: list[Tensor], temperature: Tensor) -> Tensor:
    """Teacher weights over the temperature (0-d), (K,) of its dtype."""
    if weights is None and len(teachers) == 1:
        return temperature.reciprocal().reshape(1)
    return as_weights(weights, teachers, temperature.dtype) / temperature
