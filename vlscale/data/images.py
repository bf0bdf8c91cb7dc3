"""Pictures: bytes to uint8 at the model's size, for evaluation (exactly the processor's resize) and for training.

Training decodes by `fast` (libjpeg-turbo with DCT scaling, area resize) or `pil` (the processor's resize), or leaves
all after decoding to the device, and changes the picture by numbers that the caller has drawn from (seed, epoch, sample
key). H, W of the source; S the model's side.
"""

import io
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from vlscale.data import colours
from vlscale.data.faults import BadSample
from vlscale.data.keyed import random64
from vlscale.sections import AugmentConfig

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
_GEOMETRY_DRAWS = 8
NUM_DRAWS = _GEOMETRY_DRAWS + colours.NUM_DRAWS  # uniform numbers that one augmented view takes
_NOISE_TABLE = 1 << 20
_EXIF_SEARCH = 4096  # bytes; the Exif marker stands first in files that have it
_ORIENTATION = 0x0112  # Exif tag; 1 is upright

cv2.setNumThreads(1)


@dataclass(frozen=True)
class ImageSpec:
    """What the vision tower takes: a square of `size`, normalised."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 2  # Pillow's code: 2 bilinear, 3 bicubic
    crop: bool = False  # shorter side to `resize_to` and the centre taken, instead of squeezing to a square
    resize_to: int | None = None

    @classmethod
    def from_processor(cls, processor) -> "ImageSpec":
        """Of a Hugging Face image processor that resizes, rescales by 1/255 and normalises."""
        given = processor.to_dict()
        size, crop_size = given.get("size") or {}, given.get("crop_size") or {}
        target = crop_size if given.get("do_center_crop") else size
        square = target.get("height") is not None and target.get("height") == target.get("width")
        shortest = size.get("shortest_edge") if given.get("do_center_crop") else None
        squeezed = size.get("height") == size.get("width") if shortest is None else True
        plain = given.get("do_resize", True) and given.get("do_normalize", True) and given.get("do_rescale", True)
        if not (square and squeezed and plain and abs(given.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-9):
            raise ValueError(
                f"image processor {type(processor).__name__}: expected a square size, rescaling by 1/255 and "
                f"normalisation, got size={size}, crop_size={crop_size}; give it a square size"
            )
        crop = bool(given.get("do_center_crop"))
        resize_to = (shortest or size["height"]) if crop else None
        if crop and (shortest is None or resize_to < target["height"]):
            raise ValueError(
                f"image processor {type(processor).__name__}: a centre crop needs size.shortest_edge >= crop"
            )
        return cls(
            target["height"],
            tuple(given["image_mean"]),
            tuple(given["image_std"]),
            int(given["resample"]),
            crop,
            resize_to,
        )


class Piece(NamedTuple):
    """What a training picture is made of on the device."""

    pixels: np.ndarray  # (h, w, 3) uint8, what the crop touches
    box: tuple[float, float, float, float]  # the crop in it: left, top, width, height
    flip: bool
    colours: np.ndarray | None  # (3, 4) float32, see `colour_map`


def normalise(images: "Tensor", spec: ImageSpec) -> "Tensor":
    """(B, 3, S, S) uint8 to float32, equal to the processor's rescale and normalise for each of the 256 values."""
    import torch  # here, since worker processes import this module and have no use for it

    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (spec.mean, spec.std)
    )
    return (images.to(torch.float32) / 255 - mean) / std


def decode_eval(data: bytes, spec: ImageSpec, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(S, S, 3) uint8, bit for bit what the processor's resize (and centre crop) gives. Raises BadSample."""
    picture = open_picture(data, max_pixels)
    if not spec.crop:
        return np.array(picture.resize((spec.size, spec.size), spec.resample))
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    scaled_long = int(spec.resize_to * long / short)
    width, height = (spec.resize_to, scaled_long) if width <= height else (scaled_long, spec.resize_to)
    left, top = (width - spec.size) // 2, (height - spec.size) // 2
    resized = np.array(picture.resize((width, height), spec.resample))
    return np.ascontiguousarray(resized[top : top + spec.size, left : left + spec.size])


def decode_train(
    data: bytes, spec: ImageSpec, augment: AugmentConfig, mode: str, max_pixels: int, draws: np.ndarray
) -> np.ndarray:
    """One augmented view, (S, S, 3) uint8. `draws` (NUM_DRAWS,) in [0, 1) decides everything. Raises BadSample."""
    if mode == "pil":
        picture = _crop_and_resize_pil(open_picture(data, max_pixels), spec, augment, draws)
    else:
        picture = _crop_and_resize_fast(data, spec, augment, max_pixels, draws)
    return perturb(picture, augment, draws)


def decode_piece(data: bytes, spec: ImageSpec, augment: AugmentConfig, max_pixels: int, draws: np.ndarray) -> Piece:
    """The same view as of `decode_train`, neither resized, flipped nor coloured yet. Raises BadSample."""
    source, box = _decode_crop(data, spec, augment, max_pixels, draws)
    left, top, width, height = box
    x, y = math.floor(left), math.floor(top)
    pixels = source[y : math.ceil(top + height), x : math.ceil(left + width)]
    inside = (float(left - x), float(top - y), float(width), float(height))
    mapped = colours.colour_map(augment, draws[_GEOMETRY_DRAWS:])
    return Piece(np.ascontiguousarray(pixels), inside, bool(_is_flipped(augment, draws)), mapped)


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB, upright, first frame. Raises BadSample for all that Pillow cannot read, or that is too large to unpack."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(picture.size, max_pixels)
        picture.load()
        if picture.mode.startswith("I"):  # Pillow's own conversion would cut 16 bits at 255
            values = np.asarray(picture).astype(np.uint32)
            picture = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8))
        elif picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("broken picture", f"no {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise nearly every type on damaged input
        raise BadSample("broken picture", f"{type(error).__name__}: {error}") from None


def perturb(picture: np.ndarray, augment: AugmentConfig, draws: np.ndarray) -> np.ndarray:
    """Shift, flip, colours and noise on (S, S, 3)."""
    side = picture.shape[0]
    flip = _is_flipped(augment, draws)
    if augment.shift or flip:
        largest = int(augment.shift * side)
        down, right = (math.floor(draw * (2 * largest + 1)) - largest for draw in draws[4:6])
        steps = np.arange(side)
        columns = np.clip(steps + right, 0, side - 1)
        picture = picture[np.clip(steps + down, 0, side - 1)][:, columns[::-1] if flip else columns]
    if (mapped := colours.colour_map(augment, draws[_GEOMETRY_DRAWS:])) is not None:
        picture = cv2.transform(picture, mapped)  # rounds, and cuts off at black and white
    if augment.noise:
        start = int(draws[7] * _NOISE_TABLE)
        noise = np.take(_noise_table(), np.arange(start, start + picture.size), mode="wrap")
        changed = picture + noise.reshape(picture.shape) * np.float32(255 * augment.noise)
        picture = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(picture)


def _crop_and_resize_fast(
    data: bytes, spec: ImageSpec, augment: AugmentConfig, max_pixels: int, draws: np.ndarray
) -> np.ndarray:
    source, (left, top, width, height) = _decode_crop(data, spec, augment, max_pixels, draws)
    x0, y0 = int(left), int(top)
    x1, y1 = (max(at + 1, round(end)) for at, end in ((x0, left + width), (y0, top + height)))
    piece = source[y0:y1, x0:x1]
    if piece.shape[:2] == (spec.size, spec.size):
        return piece
    shrinks = piece.shape[0] >= spec.size and piece.shape[1] >= spec.size
    return cv2.resize(piece, (spec.size, spec.size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _crop_and_resize_pil(
    picture: Image.Image, spec: ImageSpec, augment: AugmentConfig, draws: np.ndarray
) -> np.ndarray:
    left, top, width, height = _crop_box(*picture.size, spec, augment, draws)
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((spec.size, spec.size), spec.resample, box=box))


def _decode_crop(
    data: bytes, spec: ImageSpec, augment: AugmentConfig, max_pixels: int, draws: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The picture, perhaps smaller than it is, and the crop in it."""
    source, width, height = _decode_scaled(data, spec, augment, max_pixels, draws)
    left, top, crop_width, crop_height = _crop_box(width, height, spec, augment, draws)
    scale_x, scale_y = source.shape[1] / width, source.shape[0] / height
    return source, (left * scale_x, top * scale_y, crop_width * scale_x, crop_height * scale_y)


def _decode_scaled(
    data: bytes, spec: ImageSpec, augment: AugmentConfig, max_pixels: int, draws: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """The picture, perhaps smaller than it is, but with no fewer than S pixels along each side of the crop; its full
    width and height."""
    if data[:2] != b"\xff\xd8" or (b"Exif" in data[:_EXIF_SEARCH] and _is_turned(data)):
        picture = open_picture(data, max_pixels)
        return np.asarray(picture), *picture.size
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels((width, height), max_pixels)
        if space not in ("YCbCr", "RGB", "Gray"):
            return np.asarray(open_picture(data, max_pixels)), width, height
        _, _, crop_width, crop_height = _crop_box(width, height, spec, augment, draws)
        least_height = min(height, math.ceil(spec.size * height / crop_height))
        least_width = min(width, math.ceil(spec.size * width / crop_width))
        picture = simplejpeg.decode_jpeg(data, "RGB", min_height=least_height, min_width=least_width, min_factor=1)
    except BadSample:
        raise
    except ValueError as error:
        raise BadSample("broken picture", str(error)) from None
    return picture, width, height


def _is_flipped(augment: AugmentConfig, draws: np.ndarray) -> bool:
    return augment.flip and draws[6] < 0.5


def _is_turned(data: bytes) -> bool:
    """Whether a JPEG's Exif says that it lies on a side; True also when that cannot be read, for Pillow to judge."""
    try:
        return Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_ORIENTATION, 1) != 1
    except Exception:
        return True


def _crop_box(
    width: int, height: int, spec: ImageSpec, augment: AugmentConfig, draws: np.ndarray
) -> tuple[float, float, float, float]:
    """(left, top, width, height) in source pixels: the whole picture or its central square, or a random part of it."""
    box_width, box_height = (min(width, height),) * 2 if spec.crop else (width, height)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    if augment.crop_scale == 1:
        return left, top, box_width, box_height
    area = augment.crop_scale + (1 - augment.crop_scale) * draws[0]
    stretch = math.exp((draws[1] - 0.5) * math.log(4 / 3))
    wide, high = min(1.0, math.sqrt(area) * stretch), min(1.0, math.sqrt(area) / stretch)
    crop_width, crop_height = max(1.0, box_width * wide), max(1.0, box_height * high)
    return (
        left + draws[2] * (box_width - crop_width),
        top + draws[3] * (box_height - crop_height),
        crop_width,
        crop_height,
    )


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise BadSample("too many pixels", f"{size[0]} x {size[1]}, data.max_pixels={max_pixels}")


@cache
def _noise_table() -> np.ndarray:
    """Normal deviates (Box-Muller). A view's noise is a run of them from a drawn place: a table costs a tenth of a
    generator a picture."""
    pairs = (random64(0, _NOISE_TABLE) >> np.uint64(11)).reshape(2, -1) * 0.5**53
    radius, angle = np.sqrt(-2 * np.log1p(-pairs[0])), 2 * np.pi * pairs[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
