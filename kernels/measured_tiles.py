"""Tile sizes that were measured on a device and stand in for those chosen by its generation.

`vlscale bench tune` writes them; VLSCALE_TILES names the file, {device: {dtype: {launch: sizes}}}. A launch that the
file does not hold keeps the sizes it has.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

VARIABLE = "VLSCALE_TILES"
FUSED_WIDTHS = (64, 128, 256)
FUSED = {f"contrastive_fused_{width}": width for width in FUSED_WIDTHS}
LAUNCHES = (
    "contrastive_forward",
    "contrastive_backward",
    *FUSED,  # their sizes may be null: the two ordinary products of contrastive_backward serve such widths better
    "sigmoid",
    "relation_kl_forward",
    "relation_kl_backward",
    "relation_mae",
    "ranks",
    "neighbours",
)
BLOCKS = tuple(2**power for power in range(4, 9))
LARGEST_WAVE = 2**29  # elements of a block of weights, which kernels reach by 32-bit offsets

Sizes = dict[str, int]  # of a Config; empty for null
Table = dict[str, dict[str, dict[str, Sizes]]]
_given: list[Table] = []  # by `given_tiles`, the last one counts


def measured_sizes(launch: str, dtype: torch.dtype, device: torch.device) -> Sizes | None:
    """The measured sizes of a launch, None where there are none."""
    if _given:
        table = _given[-1]
    elif path := os.environ.get(VARIABLE):
        table = read_tiles(path)
    else:
        return None
    return table.get(device_name(device), {}).get(str(dtype).removeprefix("torch."), {}).get(launch)


@contextmanager
def given_tiles(table: Table) -> Iterator[None]:
    """Within, this table stands in for the file's."""
    _given.append(table)
    try:
        yield
    finally:
        _given.remove(table)


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def read_tiles(path: str) -> Table:
    """The file's table, checked; read once a process."""
    try:
        table = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "no JSON"
        raise ValueError(f"{VARIABLE}={path}: expected a file that `vlscale bench tune` wrote, got: {said}") from None
    found: Table = {}
    for device, dtypes in _items(table, path):
        for dtype, launches in _items(dtypes, f"{path}: {device}"):
            for launch, sizes in _items(launches, f"{path}: {device}: {dtype}"):
                place = f"{VARIABLE}={path}: {device}: {dtype}: {launch}"
                if launch not in LAUNCHES:
                    raise ValueError(f"{place}: expected one of {', '.join(LAUNCHES)}")
                found.setdefault(device, {}).setdefault(dtype, {})[launch] = _checked(sizes, launch, place)
    return found


def _items(value: object, place: str):
    if not isinstance(value, dict):
        raise ValueError(f"{VARIABLE}={place}: expected an object, got {type(value).__name__}")
    return value.items()


def _checked(sizes: object, launch: str, place: str) -> Sizes:
    if sizes is None and launch in FUSED:
        return {}
    allowed = {
        "block_m": BLOCKS,
        "block_n": BLOCKS,
        "block_k": (FUSED[launch],) if launch in FUSED else BLOCKS,
        "warps": (1, 2, 4, 8, 16),
        "stages": range(1, 9),
        "wave_rows": range(1, LARGEST_WAVE + 1),
        "wave_columns": range(1, LARGEST_WAVE + 1),
        "splits": range(1, 4097),
    }
    if not isinstance(sizes, dict) or sizes.keys() != allowed.keys():
        got = ", ".join(sizes) if isinstance(sizes, dict) else sizes
        raise ValueError(f"{place}: expected {', '.join(allowed)}, got {got}")
    for name, value in sizes.items():
        values = allowed[name]
        if type(value) is not int or value not in values:
            said = (
                f"{values[0]} to {values[-1]}" if isinstance(values, range) else f"one of {', '.join(map(str, values))}"
            )
            raise ValueError(f"{place}: {name}: expected {said}, got {value!r}")
    for wave, block in (("wave_rows", "block_m"), ("wave_columns", "block_n")):
        if sizes[wave] % sizes[block]:
            raise ValueError(f"{place}: {wave}: expected a multiple of {block} = {sizes[block]}, got {sizes[wave]}")
    if sizes["wave_rows"] * sizes["wave_columns"] > LARGEST_WAVE:
        got = sizes["wave_rows"] * sizes["wave_columns"]
        raise ValueError(f"{place}: expected wave_rows x wave_columns of at most {LARGEST_WAVE}, got {got}")
    return sizes
