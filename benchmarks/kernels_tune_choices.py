"""What `vlscale bench tune` tries: for each launch the tiles that fit a device, and the waves that they may go in."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch
from kernels_bench_entries import make_problem, ours
from kernels_bench_measure import Calls
from vlscale.kernels.measured_tiles import FUSED, LARGEST_WAVE, LAUNCHES, Sizes, device_name, given_tiles
from vlscale.kernels.triton_tiles import Config, choose_config, fused_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALE = 100.0
REGISTERS = 128  # of a thread, for products


@dataclass(frozen=True)
class Launch:
    """What times a launch: the pass of a family's loss that it carries; how many products a tile holds."""

    family: str
    timed: str
    products: int = 1
    waved: bool = True
    widths: tuple[int, ...] = ()  # where they are not the user's


BY_NAME = {
    "contrastive_forward": Launch("contrastive", "forward"),
    "contrastive_backward": Launch("contrastive", "backward"),
    **{name: Launch("contrastive", "backward", waved=False, widths=(width,)) for name, width in FUSED.items()},
    "sigmoid": Launch("sigmoid", "both"),
    "relation_kl_forward": Launch("relation_kl", "forward", 2),
    "relation_kl_backward": Launch("relation_kl", "backward", 2),
    "relation_mae": Launch("relation_mae", "both", 2),
    "ranks": Launch("ranks", "forward", waved=False),
    "neighbours": Launch("neighbours", "forward", waved=False),
}
assert set(BY_NAME) == set(LAUNCHES)


NOT_FUSED = None
Choice = Config | None


def sizes_of(choice: Choice) -> Sizes:
    """As measured_tiles has them."""
    return {} if choice is NOT_FUSED else asdict(choice)


def described(choice: Choice) -> dict:
    """Cells of a table."""
    if choice is NOT_FUSED:
        return {"tile": "not fused"}
    tile, waves = f"{choice.block_m}x{choice.block_n}x{choice.block_k}", f"{choice.wave_rows}x{choice.wave_columns}"
    return {"tile": tile, "warps": choice.warps, "stages": choice.stages, "waves": waves, "splits": choice.splits}


@dataclass(frozen=True)
class Place:
    """Where choices are tried; goes to the processes that compile."""

    device: str
    dtype: str
    pairs: int

    def problem(self, launch: str, width: int):
        family = BY_NAME[launch].family
        return make_problem(family, self.pairs, width, SCALE, DTYPES[self.dtype], torch.device(self.device))

    def calls(self, launch: str, width: int) -> Calls:
        return Calls(ours(BY_NAME[launch].family, "triton"), self.problem(launch, width))

    @contextmanager
    def taking(self, launch: str, choice: Choice, others: dict[str, Sizes]) -> Iterator[None]:
        """The launch takes the choice, the others what they have been given."""
        launches = others | {launch: sizes_of(choice)}
        with given_tiles({device_name(torch.device(self.device)): {self.dtype: launches}}):
            yield


def in_use(place: Place, launch: str, width: int) -> Choice:
    """The sizes that the kernels take by themselves."""
    x = torch.empty(1, width, dtype=DTYPES[place.dtype], device=place.device)
    with given_tiles({}):
        return fused_config(x) if launch in FUSED else choose_config(x, launch)


def tiles_for(launch: str, now: Choice, place: Place) -> list[Choice]:
    """Every tile whose products fit registers and operands shared memory, the nearest to `now` first."""
    about_it = BY_NAME[launch]
    if place.device == "cuda":
        room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
        blocks, depths, warps, stages = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    else:
        room, blocks, depths, warps, stages = 2**18, (32, 64), (16, 32), (4,), (2,)
    base = now or Config(block_n=64)
    columns = (32, *blocks) if launch in FUSED else blocks
    depths = (FUSED[launch],) if launch in FUSED else depths
    size = DTYPES[place.dtype].itemsize
    found: list[Choice] = [NOT_FUSED] if launch in FUSED and now is not NOT_FUSED else []
    for m, n, k, w, s in product(blocks, columns, depths, warps, stages):
        held = about_it.products * m * n + (m * k if launch in FUSED else 0)
        if held <= REGISTERS * 32 * w and s * (m + n) * k * size <= room:
            waves = {"wave_rows": whole(base.wave_rows, m), "wave_columns": whole(base.wave_columns, n)}
            found.append(replace(base, block_m=m, block_n=n, block_k=k, warps=w, stages=s, **waves))

    def away(choice: Choice) -> float:
        if choice is NOT_FUSED:
            return 0.0
        pairs = ((getattr(choice, name), getattr(base, name)) for name in ("block_m", "block_n", "block_k", "warps"))
        return sum(abs(math.log2(a / b)) for a, b in pairs) + abs(choice.stages - base.stages)

    return sorted((choice for choice in found if choice != now), key=away)


def whole(wave: int, block: int) -> int:
    """The next multiple of the block."""
    return -(-wave // block) * block


def waves_for(choice: Config, launch: str, place: Place) -> list[Choice]:
    """The same tile in other waves, and over other splits where those count."""
    if launch in ("contrastive_forward", "ranks", "neighbours"):
        return [replace(choice, splits=n) for n in (4, 8, 16, 32, 64) if n != choice.splits]
    rows, columns = ((2048, 4096, 8192, 16384), (16384, 32768, 65536)) if place.device == "cuda" else ((64,), (128,))
    shapes = {(whole(r, choice.block_m), whole(c, choice.block_n)) for r, c in product(rows, columns)}
    shapes -= {(choice.wave_rows, choice.wave_columns)}
    return [replace(choice, wave_rows=r, wave_columns=c) for r, c in sorted(shapes) if r * c <= LARGEST_WAVE]
