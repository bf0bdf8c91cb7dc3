"""Scenes of the synthetic corpus: what can be in one, how one is drawn from a key, and how alike two are.

A scene is a background and one to four objects, each with shape, colour, size, texture and place. A, B scenes.
"""

import itertools
import random
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from vlscale.data.keyed import hash64

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "crescent")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "brown")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "striped", "dotted", "checked")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
BACKGROUNDS = ("white", "black", "grey", "beige", "pink", "navy")
CHOICES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES, "place": PLACES}
ATTRIBUTES = (*CHOICES, "background")
MAX_OBJECTS = 4
_COUNT_SHARES = (0.3, 0.35, 0.2, 0.15)  # of scenes with 1, 2, 3, 4 objects
_HELD_OUT = 5  # one of so many possible scenes is never in the training part

# How much of an object's likeness each attribute carries, and how much of a scene's the background.
_WEIGHTS = {"shape": 0.3, "colour": 0.3, "texture": 0.15, "place": 0.15, "size": 0.1}
_BACKGROUND_WEIGHT = 0.15
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    texture: str
    place: str


@dataclass(frozen=True)
class Scene:
    background: str
    objects: tuple[Thing, ...]

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "objects": [asdict(thing) for thing in self.objects]}

    @property
    def held_out(self) -> bool:
        """A property of the scene itself, so no scene of one part can be in the other."""
        things = sorted(repr(thing) for thing in self.objects)
        return hash64(self.background, *things) % _HELD_OUT == 0


class Draw:
    """Choices from a key. Only `random.random` is used: its numbers are the same in every Python."""

    def __init__(self, *key: int | str):
        self.random = random.Random(hash64(*key)).random

    def choice(self, values):
        return values[int(self.random() * len(values))]

    def below(self, chance: float) -> bool:
        return self.random() < chance

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def shuffled(self, values) -> list:
        values = list(values)
        for i in range(len(values) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            values[i], values[j] = values[j], values[i]
        return values


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Scene `index` of the train or the val part."""
    draw = Draw("scene", seed, split, index)
    while True:
        scene = _any_scene(draw)
        if scene.held_out == (split == "val"):
            return scene


def _any_scene(draw: Draw) -> Scene:
    share = draw.random()
    count = 1 + sum(share >= until for until in itertools.accumulate(_COUNT_SHARES[:-1]))
    places = draw.shuffled(PLACES)[:count]
    things = (
        Thing(draw.choice(SHAPES), draw.choice(COLOURS), draw.choice(SIZES), draw.choice(TEXTURES), place)
        for place in places
    )
    return Scene(draw.choice(BACKGROUNDS), tuple(things))


def scene_relevance(scenes_a: list[dict[str, Any]], scenes_b: list[dict[str, Any]]) -> np.ndarray:
    """(A, B) float32 in [0, 1]: how alike the scenes (as in a sample's json) are; 1 where they are the same.

    The objects are matched in the best of all ways; unmatched ones count as nothing alike, and the sum is divided by
    the larger number of objects. Size and place are graded by distance, the rest is the same or not.
    """
    codes_a, codes_b = _codes(scenes_a), _codes(scenes_b)
    out = np.empty((len(scenes_a), len(scenes_b)), dtype=np.float32)
    step = max(1, _PAIRS_AT_ONCE // max(1, len(scenes_b)))
    for start in range(0, len(scenes_a), step):
        out[start : start + step] = _relevance(tuple(part[start : start + step] for part in codes_a), codes_b)
    return out


def _relevance(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    (things_a, count_a, ground_a), (things_b, count_b, ground_b) = a, b
    looks, rest = _likeness_tables()
    columns = [
        [
            looks[things_a[:, i, :1], things_b[None, :, j, 0]] + rest[things_a[:, i, 1:], things_b[None, :, j, 1]]
            for j in range(MAX_OBJECTS)
        ]
        for i in range(MAX_OBJECTS)
    ]
    best = None
    for order in itertools.permutations(range(MAX_OBJECTS)):
        total = columns[0][order[0]] + columns[1][order[1]]
        total += columns[2][order[2]]
        total += columns[3][order[3]]
        best = total if best is None else np.maximum(best, total, out=best)
    objects = best / np.maximum(count_a[:, None], count_b[None])
    same_ground = (ground_a[:, None] == ground_b[None]).astype(np.float32)
    return (1 - _BACKGROUND_WEIGHT) * objects + _BACKGROUND_WEIGHT * same_ground


def _codes(scenes: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects as two numbers each, (n, 4, 2), filled up with "no object"; how many, (n,); backgrounds, (n,)."""
    things = np.empty((len(scenes), MAX_OBJECTS, 2), dtype=np.int64)
    things[:] = len(SHAPES) * len(COLOURS), len(SIZES) * len(TEXTURES) * len(PLACES)
    counts, grounds = np.empty(len(scenes), dtype=np.float32), np.empty(len(scenes), dtype=np.int64)
    for i, scene in enumerate(scenes):
        try:
            counts[i], grounds[i] = len(scene["objects"]), BACKGROUNDS.index(scene["background"])
            if counts[i] == 0:
                raise ValueError
            for j, thing in enumerate(scene["objects"]):
                shape, colour, size, texture, place = (CHOICES[name].index(thing[name]) for name in CHOICES)
                things[i, j, 0] = shape * len(COLOURS) + colour
                things[i, j, 1] = (size * len(TEXTURES) + texture) * len(PLACES) + place
        except (LookupError, TypeError, ValueError):
            raise ValueError(
                f"sample {i}'s scene cannot be read: expected a background and one to {MAX_OBJECTS} objects with "
                f"{', '.join(CHOICES)}, as `vlscale data synth` writes them"
            ) from None
    return things, counts, grounds


@cache
def _likeness_tables() -> tuple[np.ndarray, np.ndarray]:
    """Weighted likeness of every (shape, colour) and of every (size, texture, place) with every other; 0 with none."""
    size = 1 - np.abs(np.subtract.outer(*[np.arange(len(SIZES))] * 2)) / (len(SIZES) - 1)
    steps = 1 - np.abs(np.subtract.outer(*[np.arange(3)] * 2)) / 2
    place = (steps[:, None, :, None] + steps[None, :, None, :]).reshape(len(PLACES), len(PLACES)) / 2
    shape, colour, texture = (np.eye(len(CHOICES[name])) for name in ("shape", "colour", "texture"))
    looks = _combine(_WEIGHTS["shape"] * shape, _WEIGHTS["colour"] * colour)
    rest = _combine(_combine(_WEIGHTS["size"] * size, _WEIGHTS["texture"] * texture), _WEIGHTS["place"] * place)
    return tuple(np.pad(table, (0, 1)).astype(np.float32) for table in (looks, rest))


def _combine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The table of pairs from the tables of the parts: sums of both."""
    size = len(first) * len(second)
    return (first[:, None, :, None] + second[None, :, None, :]).reshape(size, size)
