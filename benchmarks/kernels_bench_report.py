"""The files of a kernel benchmark: a CSV that a later run continues, a Markdown page and plots."""

import csv
import os
import platform
import subprocess
from collections import defaultdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

KEY = ("family", "entry", "pairs", "width", "scale", "dtype", "pass")
MEASURED = ("median_ms", "p20_ms", "p80_ms", "rounds", "peak_mb", "tflops", "fraction", "square_tflops")
COLUMNS = [*KEY, "status", "detail", *MEASURED, "device", "torch", "date"]
FINISHED = ("ok", "out of memory", "failed")  # what a later run does not try again
PEERS = ("triton", "inf_cl", "cut-cross-entropy", "liger-kernel", "open_clip_torch")
FLAGSHIP = ("vlscale triton", "vlscale chunked")


def key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


class Rows:
    """Rows by key, kept in `folder`/kernels.csv: whole after every `save`."""

    def __init__(self, folder: Path, device: str):
        self.path = folder / "kernels.csv"
        self.stamp = {"device": device, "torch": torch.__version__, "date": date.today().isoformat()}
        self.rows: dict[tuple[str, ...], dict] = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = {key(row): row for row in csv.DictReader(file)}
        for row in self.rows.values():
            for name in ("device", "torch"):
                if row[name] != self.stamp[name]:
                    here = f"{name} {self.stamp[name]}"
                    raise ValueError(f"{self.path}: expected rows of {here}, got {row[name]}; choose another --out")

    def finished(self, wanted: tuple[str, ...]) -> bool:
        return wanted in self.rows and self.rows[wanted]["status"] in FINISHED

    def add(self, values: dict) -> None:
        row = dict.fromkeys(COLUMNS, "") | values | self.stamp
        self.rows[key(row)] = row

    def save(self) -> None:
        unfinished = self.path.with_suffix(".part")
        with unfinished.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(self.rows.values())
        unfinished.replace(self.path)

    def values(self) -> list[dict]:
        return list(self.rows.values())


def said_by(*command: str) -> str:
    """What a program prints; nothing where it is not there."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().replace("\n", "; ")


def driver() -> str:
    """Of the GPU: its driver, its clocks now and at most, its power limit."""
    asked = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return said_by("nvidia-smi", asked, "--format=csv,noheader")


def about(command: str, device: str) -> list[str]:
    """What a result says of itself."""
    commit = said_by("git", "describe", "--always", "--dirty") or os.environ.get("COMMIT", "unknown")
    versions = [f"torch {torch.__version__}"]
    for name in PEERS:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    lines = [f"- {date.today().isoformat()}, commit {commit}: `{command}`"]
    lines += [f"- {device}; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads; {driver()}".rstrip("; ")]
    return [*lines, f"- Python {platform.python_version()}, {', '.join(versions)}"]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def number(text: str, digits: str) -> str:
    return format(float(text), digits) if text != "" else ""


def base_of(rows: list[dict]) -> dict[tuple, float]:
    """Our median by point and pass: of Triton where it ran, else of the blockwise code."""
    found = {}
    for name in reversed(FLAGSHIP):
        mine = [row for row in rows if row["entry"] == name and row["status"] == "ok"]
        found |= {tuple(str(row[c]) for c in KEY if c != "entry"): float(row["median_ms"]) for row in mine}
    return found


def page(rows: list[dict], said: list[str]) -> str:
    text = "# Kernels: time, memory and rate\n\n" + "\n".join(said) + "\n\n"
    text += (
        "Median of interleaved rounds, with the 20th and 80th percentile; peak memory above the inputs, in MB (of a"
        " backward pass: with its forward); TFLOP/s on the fewest operations that the loss needs; share: of the rate of"
        " a square product in the same rounds; times ours: this median over vlscale's at the same point. scale is"
        " logit_scale, and 1 / temperature for relations. Inputs stay the same from round to round.\n"
    )
    base = base_of(rows)
    header = ["N", "D", "scale", "entry", "ms", "p20-p80", "peak MB", "TFLOP/s", "share", "times ours"]
    for family in dict.fromkeys(row["family"] for row in rows):
        for which in ("forward", "backward", "both"):
            mine = [row for row in rows if (row["family"], row["pass"]) == (family, which)]
            if not any(row["status"] == "ok" for row in mine):
                continue
            lines = []
            for row in sorted(mine, key=lambda r: (int(r["width"]), int(r["pairs"]), float(r["scale"]))):
                if row["status"] in ("missing", "skipped"):
                    continue
                place = [str(row["pairs"]), str(row["width"]), str(row["scale"]), row["entry"]]
                if row["status"] != "ok":
                    lines.append([*place, row["status"], row["detail"], "", "", "", ""])
                    continue
                ours = base.get(tuple(str(row[c]) for c in KEY if c != "entry"))
                ratio = f"{float(row['median_ms']) / ours:.2f}" if ours else ""
                spread = f"{number(row['p20_ms'], '.3f')}-{number(row['p80_ms'], '.3f')}"
                measured = (("median_ms", ".3f"), ("peak_mb", ".0f"), ("tflops", ".3g"), ("fraction", ".2f"))
                median, *others = (number(row[name], digits) for name, digits in measured)
                lines.append([*place, median, spread, *others, ratio])
            text += f"\n## {family}, {which}, {mine[0]['dtype']}\n\n" + markdown_table(header, lines)
    absent = {(row["entry"], row["detail"]) for row in rows if row["status"] == "missing"}
    if absent:
        text += "\n## Missing\n\n" + "".join(f"- {entry}: {why}\n" for entry, why in sorted(absent))
    if skipped := sum(row["status"] == "skipped" for row in rows):
        text += f"\n{skipped} rows did not fit the time and say so in the CSV; the same command goes on with them.\n"
    return text


def plots(rows: list[dict], folder: Path) -> list[Path]:
    """Time and peak memory against N, a picture a family and width, at the largest scale measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row["pass"] in ("both", "forward"):
            groups[row["family"], int(row["width"])].append(row)
    made = []
    for (family, width), mine in sorted(groups.items()):
        which = "both" if any(row["pass"] == "both" for row in mine) else "forward"
        scale = max(float(row["scale"]) for row in mine)
        mine = [row for row in mine if row["pass"] == which and float(row["scale"]) == scale]
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for entry in dict.fromkeys(row["entry"] for row in mine):
            line = sorted((r for r in mine if r["entry"] == entry), key=lambda r: int(r["pairs"]))
            pairs = [int(row["pairs"]) for row in line]
            for axis, column in zip(axes, ("median_ms", "peak_mb"), strict=True):
                style = {"marker": "o", "linewidth": 2.5 if entry in FLAGSHIP else 1}
                axis.plot(pairs, [max(float(row[column]), 1e-3) for row in line], label=entry, **style)
        passes = "forward + backward" if which == "both" else which
        for axis, label in zip(axes, (f"ms, {passes}", "peak MB above the inputs"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        figure.suptitle(f"{family}, D = {width}, scale {scale:g}, {mine[0]['dtype']}, {mine[0]['device']}")
        made.append(folder / f"{family}-{width}.png")
        figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


def write(rows: Rows, folder: Path, device: str, command: str) -> str:
    """kernels.md and the plots; returns the page."""
    text = page(rows.values(), about(command, device))
    (folder / "kernels.md").write_text(text)
    plots(rows.values(), folder)
    return text
