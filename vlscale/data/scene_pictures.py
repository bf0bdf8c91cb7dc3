"""Scenes drawn: one RGB array a scene, from the scene and a key. R the picture's side in pixels."""

import math

import cv2
import numpy as np

from vlscale.data.scenes import COLUMNS, PLACES, Draw, Scene, Thing

_COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 92, 219), "yellow": (247, 209, 23),
    "purple": (137, 48, 176), "orange": (245, 130, 20), "cyan": (30, 190, 205), "brown": (121, 78, 40),
}  # fmt: skip
_BACKGROUNDS = {
    "white": (250, 250, 250), "black": (16, 16, 18), "grey": (140, 142, 146), "beige": (222, 205, 170),
    "pink": (246, 190, 205), "navy": (22, 28, 78),
}  # fmt: skip
_RADIUS = {"small": 0.1, "medium": 0.145, "large": 0.2}  # of the side
_JITTER = 0.03
_SUBPIXEL = 4  # bits
_DRAWN_AT = 96  # pixels at least, then shrunk: smooth edges and textures at 32


def draw_picture(scene: Scene, draw: Draw, *, resolution: int, occlusion: float, blur: float) -> np.ndarray:
    """(R, R, 3) uint8. `occlusion`: the share of the picture under grey boxes; `blur`: sigma in 32nds of the side."""
    side = resolution if resolution >= _DRAWN_AT else resolution * -(-_DRAWN_AT // resolution)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    shade = draw.between(-12, 12)
    canvas[:] = np.clip(np.array(_BACKGROUNDS[scene.background]) + shade, 0, 255)
    placed = [
        (thing, _RADIUS[thing.size] * draw.between(0.9, 1.1), *_centre(thing, draw), draw.random())
        for thing in scene.objects
    ]
    for thing, radius, x, y, turn in sorted(placed, key=lambda item: -item[1]):
        _draw_thing(canvas, thing, radius * side, x * side, y * side, turn)
    if blur:
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur * side / 32)
    if occlusion:
        _occlude(canvas, occlusion, draw)
    if side != resolution:
        canvas = cv2.resize(canvas, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return canvas


def _centre(thing: Thing, draw: Draw) -> tuple[float, float]:
    """(x, y) as fractions of the side."""
    row, column = divmod(PLACES.index(thing.place), len(COLUMNS))
    return tuple(0.2 + 0.3 * cell + draw.between(-_JITTER, _JITTER) for cell in (column, row))


def _draw_thing(canvas: np.ndarray, thing: Thing, radius: float, x: float, y: float, turn: float) -> None:
    """Blends the object into the box of the canvas that it covers."""
    reach = math.ceil(radius * 1.15) + 2
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    box = canvas[top : int(y) + reach + 1, left : int(x) + reach + 1]
    mask = _mask(thing.shape, box.shape[:2], x - left, y - top, radius, turn)
    colour = np.array(_COLOURS[thing.colour], dtype=np.int32)
    paint = np.broadcast_to(colour, box.shape)
    if thing.texture != "plain":
        marked = _texture(thing.texture, box.shape[:2], radius, turn)
        lighter = colour.mean() < 128
        other = colour + (255 - colour) * 3 // 4 if lighter else colour * 3 // 10
        paint = np.where(marked[..., None], other, paint)
    box[:] = box + (paint - box) * mask[..., None].astype(np.int32) // 255


def _mask(shape: str, size: tuple[int, int], x: float, y: float, radius: float, turn: float) -> np.ndarray:
    """Coverage, 0 to 255."""
    mask = np.zeros(size, dtype=np.uint8)
    if shape in ("circle", "ring", "crescent"):
        _disc(mask, x, y, radius, 255)
        if shape == "ring":
            _disc(mask, x, y, radius * 0.52, 0)
        elif shape == "crescent":
            _disc(mask, x + radius * 0.5, y - radius * 0.2, radius * 0.85, 0)
        return mask
    angle = (turn - 0.5) * 0.3
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = (_POLYGONS[shape] * radius) @ rotation + (x, y)
    cv2.fillPoly(mask, [np.rint(points * (1 << _SUBPIXEL)).astype(np.int32)], 255, cv2.LINE_AA, _SUBPIXEL)
    return mask


def _disc(mask: np.ndarray, x: float, y: float, radius: float, value: int) -> None:
    centre = round(x * (1 << _SUBPIXEL)), round(y * (1 << _SUBPIXEL))
    cv2.circle(mask, centre, round(radius * (1 << _SUBPIXEL)), value, -1, cv2.LINE_AA, _SUBPIXEL)


def _texture(texture: str, size: tuple[int, int], radius: float, turn: float) -> np.ndarray:
    """Where the second tone shows, as booleans."""
    period = max(2.0, radius * 0.62)
    rows = (np.arange(size[0]) / period + turn)[:, None]
    columns = (np.arange(size[1]) / period + turn)[None, :]
    if texture == "striped":
        return np.broadcast_to(rows % 1 < 0.5, size)
    if texture == "checked":
        return ((rows * 2).astype(int) + (columns * 2).astype(int)) % 2 == 0
    return (rows % 1 - 0.5) ** 2 + (columns % 1 - 0.5) ** 2 < 0.09


def _occlude(canvas: np.ndarray, share: float, draw: Draw) -> None:
    side = canvas.shape[0]
    for _ in range(2):
        stretch = draw.between(0.6, 1.6)
        width, height = (min(side, round(side * math.sqrt(share / 2 * s))) for s in (stretch, 1 / stretch))
        left, top = int(draw.random() * (side - width + 1)), int(draw.random() * (side - height + 1))
        canvas[top : top + height, left : left + width] = int(draw.between(90, 170))


def _regular(corners: int, start: float, inner: float = 1.0) -> np.ndarray:
    """Corners on the unit circle; with `inner`, every second one at that radius."""
    angles = start + np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_ARM = 0.36
_CROSS = [
    (-_ARM, -1),
    (_ARM, -1),
    (_ARM, -_ARM),
    (1, -_ARM),
    (1, _ARM),
    (_ARM, _ARM),
    (_ARM, 1),
    (-_ARM, 1),
    (-_ARM, _ARM),
]
_POLYGONS = {
    "square": _regular(4, math.pi / 4) * 1.15,
    "triangle": _regular(3, -math.pi / 2) * 1.1,
    "diamond": _regular(4, 0) * np.array([0.72, 1.12]),
    "star": _regular(10, -math.pi / 2, 0.42) * 1.12,
    "cross": np.array([*_CROSS, (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]),
}
