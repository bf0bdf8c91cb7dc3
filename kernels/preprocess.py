"""`preprocess_images`: pictures of any sizes to one normalised batch: crop, antialiased resize, flip, colours,
normalisation, cast.

    R_b[c] = clamp(Wy P_b[:, :, c] Wx^T, 0, 255),   out[b, c] = (clamp(M_b R_b + t_b, 0, 255)[c] / 255 - mean_c) / std_c

Wy (S, h) and Wx (S, w) hold the weights of torch's F.interpolate(antialias=True): a triangle or Keys' cubic (a = -1/2)
as wide as the larger of a source and an output pixel, each row normalised. Values past black and white, which a cubic
makes at edges, are cut off, as they are in an 8-bit picture. (M_b | t_b) (3, 4) maps the three colours of a pixel. On a
GPU one CUDA kernel (csrc/) does all of it; elsewhere the same products run in torch. Not differentiable. B pictures, S
the output side, H x W a picture's own size.
"""

import contextlib
import ctypes
import math
import warnings
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from . import build

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BILINEAR, BICUBIC = 2, 3  # Pillow's codes, as image processors keep them
REACH = {BILINEAR: 1.0, BICUBIC: 2.0}  # of the filter, in the wider of source and output pixels
IMPLS = ("auto", "cuda", "reference")
SLACK = 1e-3  # pixels by which a rounded box may pass the picture's edge
LONGEST = 1 << 30  # a picture's side
LARGEST = 1 << 14  # the output's side
BAND = 16  # outputs in one product of the reference


@dataclass(frozen=True)
class Packed:
    """Pictures and their descriptions, as `preprocess_images` takes them."""

    pictures: Tensor  # (bytes,) uint8
    offsets: Tensor  # (B,) int64
    sizes: Tensor  # (B, 2) int64, height and width
    boxes: Tensor  # (B, 4) float64, left, top, width, height
    flips: Tensor  # (B,) bool
    colours: Tensor | None  # (B, 3, 4) float32; None: as they are

    def described_on(self, device: torch.device) -> "Packed":
        rest = (self.offsets, self.sizes, self.boxes, self.flips, self.colours)
        moved = (None if part is None else part.to(device, non_blocking=True).contiguous() for part in rest)
        return Packed(self.pictures, *moved)


@dataclass(frozen=True)
class Target:
    """What the model takes: (B, 3, size, size) of dtype, normalised."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int
    dtype: torch.dtype


def pack_pictures(pictures: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W, 3) uint8 pictures -> (bytes,) buffer, (B,) offsets, (B, 2) heights and widths."""
    if not isinstance(pictures, Sized) or len(pictures) == 0:
        got = "none" if isinstance(pictures, Sized) else type(pictures).__name__
        raise ValueError(f"pictures: expected at least one, as a list, got {got}")
    for place, picture in enumerate(pictures):
        as_kind = isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.dim() == 3
        if not as_kind or picture.shape[2] != 3:
            raise ValueError(f"pictures[{place}]: expected (H, W, 3) of torch.uint8, got {_described(picture)}")
    ends = torch.tensor([picture.numel() for picture in pictures], device="cpu").cumsum(0)
    sizes = torch.tensor([tuple(picture.shape[:2]) for picture in pictures], device="cpu")
    return torch.cat([picture.flatten() for picture in pictures]), torch.cat([ends.new_zeros(1), ends[:-1]]), sizes


@torch.no_grad()
def preprocess_images(
    pictures: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor | None = None,
    flips: Tensor | None = None,
    colours: Tensor | None = None,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resample: int = BICUBIC,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """(B, 3, S, S) of `dtype` on `pictures`' device.

    pictures (bytes,) uint8: RGB pictures one after another, rows first; offsets (B,) int64, sizes (B, 2) int64 (height,
    width); boxes (B, 4) float (left, top, width, height) in source pixels, fractions allowed, None for whole pictures;
    flips (B,) bool, mirrored left to right after the crop; colours (B, 3, 4) float, (M | t) of each picture with t in
    levels of 0 to 255, None for colours as they are. resample: Pillow's code, 2 bilinear or 3 bicubic.

    Descriptions (all but `pictures`) on the CPU are checked and sent along; on the GPU they are not read back: `cuda`
    fills a picture whose description is wrong with NaN. impl: `cuda` (CUDA tensors, built by nvcc at first use),
    `reference` (torch, any device, waits for it), `auto` the first that is available.
    """
    _check_tensors(pictures, offsets, sizes, boxes, flips, colours)
    target = Target(size, _three("mean", mean), _three("std", std), resample, dtype)
    _check_target(target)
    boxes = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1) if boxes is None else boxes
    flips = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device) if flips is None else flips
    colours = None if colours is None else colours.float()
    packed = Packed(pictures.contiguous(), offsets, sizes, boxes.double(), flips, colours)
    library = _choose(impl, pictures.device)
    if library is None:
        packed = packed.described_on(torch.device("cpu"))
    if packed.sizes.device.type == "cpu":
        _check_values(packed)
    return reference(packed, target) if library is None else launch(library, packed, target)


def resize_weights(start: float, length: float, pixels: int, size: int, resample: int) -> tuple[int, Tensor]:
    """(first pixel that the box touches, (size, pixels that it touches) float64 weights), each row with sum 1."""
    low, high = math.floor(start), min(pixels, math.ceil(start + length))
    scale = length / size
    stretch = max(scale, 1.0)
    reach = REACH[resample] * stretch
    exact = {"dtype": torch.float64, "device": "cpu"}
    centres = start + (torch.arange(size, **exact)[:, None] + 0.5) * scale
    first = (centres - reach + 0.5).floor().clamp_min(low)
    end = (centres + reach + 0.5).floor().clamp_max(high)
    taps = first + torch.arange(math.ceil(2 * reach) + 1, **exact)
    x = ((taps + 0.5 - centres) / stretch).abs()
    if resample == BILINEAR:
        weights = (1 - x).clamp_min(0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, far * (x < 2))
    weights = weights * (taps < end)
    weights = weights / weights.sum(1, keepdim=True)
    places = (taps - low).long().clamp_max(high - low - 1)  # taps past the end have weight 0
    return low, torch.zeros(size, high - low, **exact).scatter_add_(1, places, weights)


def weighted(weights: Tensor, lines: Tensor) -> Tensor:
    """weights @ lines, some outputs at a time with only the lines that they touch: weights are nearly all zero."""
    parts = []
    for block in weights.split(BAND):
        touched = block.any(0).nonzero()
        first, end = int(touched[0]), int(touched[-1]) + 1
        parts.append(block[:, first:end].to(lines) @ lines[first:end])
    return torch.cat(parts)


def reference(packed: Packed, target: Target) -> Tensor:
    """The definition, a picture at a time, in float32 products; descriptions on the CPU."""
    device, side = packed.pictures.device, target.size
    out = torch.empty(len(packed.sizes), 3, side, side, dtype=torch.float32, device=device)
    described = zip(*(t.tolist() for t in (packed.offsets, packed.sizes, packed.boxes, packed.flips)), strict=True)
    for place, (offset, (height, width), (left, top, box_width, box_height), flip) in enumerate(described):
        picture = packed.pictures[offset : offset + 3 * height * width].view(height, width, 3)
        y, rows = resize_weights(top, box_height, height, side, target.resample)
        x, columns = resize_weights(left, box_width, width, side, target.resample)
        columns = columns.flip(0) if flip else columns
        piece = picture[y : y + rows.shape[1], x : x + columns.shape[1]].float()
        lines = weighted(rows, piece.flatten(1)).view(side, -1, 3).transpose(0, 1)
        out[place] = weighted(columns, lines.flatten(1)).view(side, side, 3).permute(2, 1, 0)
    out.clamp_(0, 255)
    if packed.colours is not None:
        matrix, level = packed.colours.to(device).split([3, 1], dim=2)
        out = torch.baddbmm(level, matrix, out.flatten(2)).view_as(out)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(3, 1, 1) for v in (target.mean, target.std))
    return ((out.clamp_(0, 255) / 255 - mean) / std).to(target.dtype)


@cache
def device_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """Looked for, or built, once a process."""
    return load_library(build.library_for(capability))


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """The C interface of csrc/preprocess.cu."""
    library = ctypes.CDLL(str(path))
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    pictures, described = [i32, pointer, i64], [pointer] * 5
    library.vlscale_preprocess.argtypes = [
        *pictures,
        *described,
        i64,
        i32,
        pointer,
        pointer,
        i32,
        i32,
        pointer,
        pointer,
    ]
    library.vlscale_preprocess.restype = i32
    library.vlscale_error.argtypes, library.vlscale_error.restype = [i32], ctypes.c_char_p
    return library


def launch(library: ctypes.CDLL, packed: Packed, target: Target) -> Tensor:
    """One call of `library` on the current stream of the pictures' device; a CPU's pointers for a build for a CPU."""
    device, count = packed.pictures.device, len(packed.sizes)
    packed = packed.described_on(device)
    out = torch.empty(count, 3, target.size, target.size, dtype=target.dtype, device=device)
    gain = (ctypes.c_float * 3)(*(1 / (255 * std) for std in target.std))
    bias = (ctypes.c_float * 3)(*(-mean / std for mean, std in zip(target.mean, target.std, strict=True)))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        code = library.vlscale_preprocess(
            torch.cuda.current_device() if device.type == "cuda" else 0,
            packed.pictures.data_ptr(),
            packed.pictures.numel(),
            *(part.data_ptr() for part in (packed.offsets, packed.sizes, packed.boxes, packed.flips)),
            0 if packed.colours is None else packed.colours.data_ptr(),
            count,
            target.size,
            gain,
            bias,
            int(target.resample == BICUBIC),
            DTYPES[target.dtype],
            out.data_ptr(),
            stream,
        )
    if code:
        raise RuntimeError(f"preprocess_images: {library.vlscale_error(code).decode()} (error {code})")
    return out


def _choose(impl: str, device: torch.device) -> ctypes.CDLL | None:
    """The library for `cuda`, None for `reference`."""
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "cuda" and device.type != "cuda":
        raise ValueError(f"impl: 'cuda' is not available for {device.type} tensors, available: auto, reference")
    if impl == "reference" or device.type != "cuda":
        return None
    try:
        return device_library(torch.cuda.get_device_capability(device))
    except ValueError as error:
        if impl == "cuda":
            raise ValueError(f"impl: 'cuda' is not available, available: auto, reference ({error})") from None
        warnings.warn(f"preprocess_images runs in torch, which is slower: {error}", stacklevel=3)
        return None


def _check_tensors(
    pictures: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    boxes: Tensor | None,
    flips: Tensor | None,
    colours: Tensor | None,
) -> None:
    """Shapes, types and devices; nothing that waits for a device."""
    if not isinstance(pictures, Tensor) or pictures.dtype != torch.uint8 or pictures.dim() != 1:
        raise ValueError(
            f"pictures: expected (bytes,) of torch.uint8, as pack_pictures makes, got {_described(pictures)}"
        )
    count = len(sizes) if isinstance(sizes, Tensor) and sizes.dim() == 2 else "B"
    for name, value, shape, kind in (
        ("sizes", sizes, (count, 2), "int64"),
        ("offsets", offsets, (count,), "int64"),
        ("boxes", boxes, (count, 4), "a floating dtype"),
        ("flips", flips, (count,), "bool"),
        ("colours", colours, (count, 3, 4), "a floating dtype"),
    ):
        if value is None and name in ("boxes", "flips", "colours"):
            continue
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not _is_kind(value, kind):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name}: expected a tensor ({wanted}) of {kind}, got {_described(value)}")
        if value.device != sizes.device or value.device not in (torch.device("cpu"), pictures.device):
            raise ValueError(f"{name}: expected device cpu or {pictures.device}, as sizes, got {value.device}")
    if count == 0:
        raise ValueError("sizes: expected at least one picture, got none")


def _described(value: object) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _is_kind(value: Tensor, kind: str) -> bool:
    return value.is_floating_point() if kind.startswith("a ") else value.dtype == getattr(torch, kind)


def _three(name: str, values: Iterable[float]) -> tuple[float, float, float]:
    found = tuple(values) if isinstance(values, Iterable) else ()
    if len(found) != 3 or not all(isinstance(v, Real) and math.isfinite(v) for v in found):
        raise ValueError(f"{name}: expected three finite numbers, one a colour, got {values!r}")
    return found


def _check_target(target: Target) -> None:
    if isinstance(target.size, bool) or not isinstance(target.size, int) or not 1 <= target.size <= LARGEST:
        raise ValueError(f"size: expected an output side of 1 to {LARGEST} pixels, got {target.size!r}")
    if min(target.std) <= 0:
        raise ValueError(f"std: expected three positive numbers, got {target.std!r}")
    if target.resample not in REACH:
        raise ValueError(f"resample: expected 2 (bilinear) or 3 (bicubic), got {target.resample!r}")
    if target.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {target.dtype}")


def _check_values(packed: Packed) -> None:
    """Every picture inside the buffer, every box inside its picture; descriptions on the CPU."""
    sizes, boxes, space = packed.sizes, packed.boxes, packed.pictures.numel()
    outside = (packed.offsets < 0) | (packed.offsets > space - 3 * sizes.clamp(0, LONGEST).prod(1))
    wrong = (sizes < 1).any(1) | (sizes >= LONGEST).any(1) | outside
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"sizes[{k}]: expected a picture inside the {space} bytes of pictures, got height and width "
            f"{sizes[k].tolist()} at offset {int(packed.offsets[k])}"
        )
    if packed.colours is not None and not (finite := packed.colours.isfinite().all(2).all(1)).all():
        k = int((~finite).nonzero()[0])
        raise ValueError(f"colours[{k}]: expected finite numbers, got {packed.colours[k].tolist()}")
    start, length, limit = boxes[:, :2], boxes[:, 2:], sizes.flip(1)
    good = ((start >= 0) & (length > 0) & (start < limit) & (start + length <= limit + SLACK)).all(1)
    if not good.all():
        k = int((~good).nonzero()[0])
        raise ValueError(
            f"boxes[{k}]: expected (left, top, width, height) inside a picture of height and width {sizes[k].tolist()},"
            f" got {boxes[k].tolist()}"
        )
