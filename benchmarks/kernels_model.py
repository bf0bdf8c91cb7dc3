"""What `vlscale bench kernels` should measure on an H200, kernel by kernel: a model on paper, written down before.

    python benchmarks/kernels_model.py [--families ...] [--pairs ...] [--widths ...] [--set RATE=VALUE ...]
    python benchmarks/kernels_model.py --write
    python benchmarks/kernels_model.py --against runs/gpu/kernels.csv

--write puts DATE-kernels-model.md and .csv into benchmarks/results. --against sets the prediction beside the rows of
`vlscale triton` in a CSV that the benchmark wrote on a GPU: predicted.csv and predicted.md in the folder of that CSV.

Counted: kernels, grids, tiles, torch operations and bytes, from the launchers themselves (kernels_model_trace.py);
instructions, from the compiled kernels (kernels_model_sass.py). Assumed: kernels_model_rates.py. How they become
seconds: kernels_model_price.py.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kernels_model_page as page  # noqa: E402
from kernels_bench import DTYPES, ON_GPU  # noqa: E402
from kernels_bench_entries import FAMILIES  # noqa: E402
from kernels_bench_report import COLUMNS, FLAGSHIP, KEY  # noqa: E402
from kernels_model_price import Pass, price  # noqa: E402
from kernels_model_rates import TARGETS, Rates  # noqa: E402
from kernels_model_trace import trace  # noqa: E402

from benchmarks.common import RESULTS, provenance, today  # noqa: E402

PAIRS = sorted({page.SMALL, *page.SHOWN})  # counting is all Python: others by --pairs
WIDTHS = sorted({128, *ON_GPU["widths"]})
OURS = FLAGSHIP[0]
NEEDED = (*KEY, "status", "median_ms")


@dataclass(frozen=True)
class Prediction:
    family: str
    which: str
    pairs: int
    width: int
    found: Pass
    rates: Rates

    @property
    def ms(self) -> float:
        return 1e3 * self.found.seconds

    @property
    def tflops(self) -> float:
        """On the fewest operations that the pass needs; 0 where it has no count of its own."""
        return least(self.family, self.which, self.pairs, self.width) / self.found.seconds / 1e12

    @property
    def fraction(self) -> float:
        return self.tflops / self.rates.product_tflops

    @property
    def target(self) -> tuple[float, float] | None:
        return TARGETS.get((self.family, self.which, self.width)) if self.pairs in page.SHOWN else None

    def row(self) -> dict:
        seconds = self.found.cost.seconds
        shares = {name: f"{part / seconds:.3f}" for name, part in sorted(self.found.cost.parts.items()) if part}
        return {
            "family": self.family,
            "pass": self.which,
            "pairs": self.pairs,
            "width": self.width,
            "predicted_ms": f"{self.ms:.4g}",
            "limit": self.found.limit,
            "tflops": f"{self.tflops:.4g}" if self.tflops else "",
            "fraction": f"{self.fraction:.3f}" if self.tflops else "",
            "target": self.target[0] if self.target else "",
            "reached": self.fraction >= self.target[0] if self.target else "",
            "device_ms": f"{1e3 * self.found.device_s:.4g}",
            "host_ms": f"{1e3 * self.found.host_s:.4g}",
            "device_parts": " ".join(f"{name.replace(' ', '_')}={share}" for name, share in shares.items()),
        }


def least(family: str, which: str, pairs: int, width: int) -> float:
    """As the benchmark counts: the fewest operations of a pass."""
    of = FAMILIES[family]
    forward = of.forward(pairs, width)
    if which == "forward":
        return forward
    both = of.both(pairs, width)
    return both if which == "both" else 0.0 if of.together else both - forward


def passes(family: str) -> tuple[str, ...]:
    return ("forward", "backward", "both") if FAMILIES[family].both else ("forward",)


@cache
def events(family: str, pairs: int, width: int, which: str, dtype: torch.dtype = torch.bfloat16):
    return trace(family, pairs, width, which, dtype=dtype)


def predict(
    family: str, which: str, pairs: int, width: int, rates: Rates, dtype: torch.dtype = torch.bfloat16
) -> Prediction:
    return Prediction(family, which, pairs, width, price(events(family, pairs, width, which, dtype), rates), rates)


def sweep(families: list[str], pairs: list[int], widths: list[int], rates: Rates) -> list[Prediction]:
    return [
        predict(family, which, n, d, rates)
        for family in families
        for d in widths
        for n in pairs
        for which in passes(family)
    ]


def measured(path: Path) -> list[dict]:
    """The rows of a benchmark's CSV that our Triton kernels finished."""
    if not path.is_file():
        raise ValueError(f"--against {path}: expected the kernels.csv of `vlscale bench kernels`, found no such file")
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (table.fieldnames or [])]
        if missing:
            wanted, absent = ", ".join(COLUMNS), ", ".join(missing)
            raise ValueError(f"--against {path}: expected the columns {wanted}; missing: {absent}")
        rows = [row for row in table if row["entry"] == OURS and row["status"] == "ok"]
    if unknown := {row["family"] for row in rows} - set(FAMILIES):
        raise ValueError(f"--against {path}: no prediction for the family {', '.join(sorted(unknown))}")
    if not rows:
        raise ValueError(f"--against {path}: expected rows of {OURS!r} that ran, found none")
    return rows


def beside(rows: list[dict], rates: Rates) -> list[dict]:
    """Each measured row with its prediction and measured / predicted."""
    found = []
    for row in rows:
        place = row["family"], row["pass"], int(row["pairs"]), int(row["width"])
        expected = predict(*place, rates, DTYPES[row["dtype"]])
        ms = float(row["median_ms"])
        found.append(
            {name: row[name] for name in KEY}
            | {"predicted_ms": f"{expected.ms:.4g}", "measured_ms": f"{ms:.6g}", "ratio": f"{ms / expected.ms:.3f}"}
            | {"predicted_limit": expected.found.limit}
        )
    return found


def against(path: Path, rates: Rates, command: str) -> str:
    rows = measured(path)
    compared = beside(rows, rates)
    with (path.parent / "predicted.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(compared[0]))
        table.writeheader()
        table.writerows(compared)
    squares = [float(row["square_tflops"]) for row in rows if row.get("square_tflops")]
    devices = ", ".join(sorted({row.get("device") or "an unnamed device" for row in rows}))
    text = page.comparison(compared, devices, statistics.median(squares) if squares else None, rates, command)
    (path.parent / "predicted.md").write_text(text)
    return text


def write(predictions: list[Prediction], rates: Rates, folder: Path, command: str) -> Path:
    stem = folder / f"{today()}-kernels-model"
    rows = [prediction.row() for prediction in predictions]
    with stem.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    stem.with_suffix(".md").write_text(page.prediction(predictions, rates, provenance(command), predict))
    return stem.with_suffix(".md")


def setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--set: expected RATE=NUMBER, got {text!r}") from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS, help="N")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="D")
    parser.add_argument("--set", nargs="+", default=[], metavar="RATE=VALUE", help="instead of a rate of the table")
    parser.add_argument("--against", type=Path, metavar="CSV", help="predicted, measured and their ratio a row")
    parser.add_argument("--write", action="store_true", help="the dated page and its CSV")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of --write")
    given = parser.parse_args(argv)
    command = " ".join(["python benchmarks/kernels_model.py", *argv])
    try:
        rates = Rates(dict(map(setting, given.set)))
        if given.against:
            print(against(given.against, rates, command))
            return 0
        found = sweep(given.families, given.pairs, given.widths, rates)
        print(write(found, rates, given.out, command) if given.write else page.summary(found))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
