"""Pictures to a batch: `preprocess_images` against torch's own antialiased resize, on the same device.

Pictures of 384 x 512 in a packed buffer, whole, bicubic, to 224 x 224. GB/s counts the fewest bytes, each source and
each output value once; share: of the rate of a copy on this device in the same rounds, counted in bytes read and
written. The error is the largest difference from F.interpolate in float64, in units of the normalised output.
"""

import csv
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels_bench_entries import Missing
from kernels_bench_measure import Device, Timing
from kernels_bench_report import about, markdown_table
from torch import Tensor
from vlscale.kernels.preprocess import pack_pictures, preprocess_images

HEIGHT, WIDTH, SIDE = 384, 512, 224
PICTURES = {"cuda": 512, "cpu": 16}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
COLUMNS = ["entry", "pictures", "dtype", "median_ms", "p20_ms", "p80_ms", "pictures_s", "gb_s", "share", "error"]


def one_by_one(pictures: list[Tensor], dtype: torch.dtype, precision: torch.dtype = torch.float32) -> Tensor:
    """What a loader without a kernel does: each picture by itself, normalised together."""
    mean, std = (torch.tensor(v, dtype=precision, device=pictures[0].device).view(3, 1, 1) for v in (MEAN, STD))
    planes = [picture.permute(2, 0, 1)[None].to(precision) for picture in pictures]
    sized = [F.interpolate(plane, (SIDE, SIDE), mode="bicubic", antialias=True) for plane in planes]
    return ((torch.cat(sized).clamp_(0, 255) / 255 - mean) / std).to(dtype)


def entries(
    count: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Calls by name, and the pictures."""
    pictures = list(torch.randint(0, 256, (count, HEIGHT, WIDTH, 3), dtype=torch.uint8, device=device))
    packed, offsets, sizes = pack_pictures(pictures)
    target = {"size": SIDE, "mean": MEAN, "std": STD, "dtype": dtype}

    def ours(impl: str) -> Callable[[], Tensor]:
        return lambda: preprocess_images(packed, offsets, sizes, impl=impl, **target)

    def cuda() -> Tensor:
        if device.type != "cuda":
            raise Missing("needs a CUDA device")
        return ours("cuda")()

    calls = {"vlscale cuda": cuda, "vlscale reference": ours("reference")}
    return calls | {"F.interpolate, picture by picture": lambda: one_by_one(pictures, dtype)}, pictures


def measure(count: int, dtype: torch.dtype, device: Device, rounds: int) -> tuple[list[dict], list[str]]:
    """(rows, what is missing and why)."""
    calls, pictures = entries(count, dtype, device.device)
    exact = one_by_one(pictures[:4], torch.float64, precision=torch.float64)
    errors, missing = {}, []
    for name, call in list(calls.items()):
        try:
            errors[name] = (call()[:4].double() - exact).abs().max().item()
        except (Missing, ValueError) as reason:
            missing.append(f"{name}: {reason}")
            del calls[name]
    source = torch.zeros(COPY_BYTES[device.device.type], dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    seconds = {name: [] for name in calls}
    for round_number in range(rounds + 1):  # the first is not counted
        for name, call in calls.items():
            taken = device.seconds(call)
            if round_number:
                seconds[name].append(taken)
    copied = 2 * source.numel() / statistics.median(seconds.pop("copy"))
    moved = count * 3 * (HEIGHT * WIDTH + SIDE * SIDE * dtype.itemsize)
    rows = []
    for name, taken in seconds.items():
        low, median, high = Timing(taken, 0).quantiles()
        times = zip(("p20_ms", "median_ms", "p80_ms"), (f"{t * 1e3:.6g}" for t in (low, median, high)), strict=True)
        rates = {"pictures_s": f"{count / median:.6g}", "gb_s": f"{moved / median / 1e9:.4g}"}
        place = {"entry": name, "pictures": count, "dtype": str(dtype).removeprefix("torch.")}
        rows.append(
            place | dict(times) | rates | {"share": f"{moved / median / copied:.4g}", "error": f"{errors[name]:.1e}"}
        )
    return rows, missing


def run(given: Namespace, device: torch.device, name: str, dtype: torch.dtype, command: str) -> int:
    """Writes pictures.csv and pictures.md."""
    rows, missing = measure(given.batch or PICTURES[device.type], dtype, Device(device), given.rounds)
    out: Path = given.out
    with (out / "pictures.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    text = "# Pictures to a batch\n\n" + "\n".join(about(command, name)) + f"\n\n{__doc__.split(chr(10), 2)[2]}\n"
    text += markdown_table(COLUMNS, [[str(row[column]) for column in COLUMNS] for row in rows])
    text += "".join(f"\n- {line}" for line in missing) + "\n"
    (out / "pictures.md").write_text(text)
    print(text)
    return 0
