"""Errors of every entry side by side, against the loss's definition in float64 on the same rounded inputs.

Error: Frobenius norm of the difference over the truth's, free of scale: a zero gradient has error 1. `times dense` is
the error over that of dense torch in the same dtype, the budget that our kernels are held to being 2. A peer with a
loss of its own is held to that: Liger keeps each row's relation to itself. Where the definition itself is rounding in
float64, as p - 1 of converged pairs at a large scale is, nothing is compared, and a line says so.
"""

import csv
from argparse import Namespace
from itertools import product

import torch
from kernels_bench_entries import FAMILIES, Entry, Loss, Missing, Problem, entries, make_problem, ours
from kernels_bench_report import about, markdown_table
from torch import Tensor

PAIRS = 1000  # ragged: no tile divides it
SURE = 1e-3  # how far the definition and the blockwise form, which takes no differences near 1, may be apart in float64
REGIMES = ("random", "cone", "converged")
COLUMNS = [
    "family",
    "regime",
    "pairs",
    "width",
    "scale",
    "dtype",
    "quantity",
    "entry",
    "error",
    "times_dense",
    "detail",
]


def outputs(loss: Loss, problem: Problem) -> dict[str, Tensor]:
    """The loss and every gradient in float64."""
    leaves = problem.leaves()
    value = loss(problem)
    grads = torch.autograd.grad(value, list(leaves.values()))
    found = {"loss": value.detach()} | dict(zip(leaves, grads, strict=True))
    return {name: tensor.double() for name, tensor in found.items()}


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got - truth).norm() / truth.norm()).item()


def errors(entry: Entry, problem: Problem, truth: Loss, device: torch.device) -> dict[str, float]:
    got = outputs(entry.load(device), problem)
    exact = outputs(entry.truth or truth, problem.double())
    return {name: relative(got[name], exact[name]) for name in exact}


def unsure(family: str, problem: Problem) -> set[str]:
    """Quantities of which the family's definition is no truth, in float64 neither."""
    exact, other = (outputs(loss, problem.double()) for loss in (FAMILIES[family].truth, ours(family, "chunked")))
    return {name for name in exact if not relative(exact[name], other[name]) <= SURE}


def point(
    family: str,
    given: tuple[int, int, float],
    dtype: torch.dtype,
    regime: str,
    device: torch.device,
    without: list[str],
) -> list[dict]:
    n, d, scale = given
    problem = make_problem(family, n, d, scale, dtype, device, regime)
    place = {"family": family, "regime": regime, "pairs": n, "width": d, "scale": scale, "dtype": str(dtype)[6:]}
    found: dict[str, dict[str, float]] = {}
    rows = []
    for entry in entries([family], without):
        try:
            found[entry.name] = errors(entry, problem, FAMILIES[family].truth, device)
        except Missing as reason:
            rows.append(place | {"entry": entry.name, "detail": f"missing: {reason}"})
        except Exception as error:  # a peer may fail in its own ways; the others go on
            said = (str(error).strip().splitlines() or [""])[0]
            rows.append(place | {"entry": entry.name, "detail": f"failed: {type(error).__name__}: {said}"[:200]})
    dense, left_out = found.get("dense eager", {}), unsure(family, problem)
    if left_out:
        detail = f"{regime}, scale {scale:g}: the definition is rounding in float64, not compared"
        each = ({"entry": f"{family}: {name}", "quantity": name, "detail": detail} for name in sorted(left_out))
        rows += [place | row for row in each]
    for name, quantities in found.items():
        for quantity, error in quantities.items():
            if quantity in left_out:
                continue
            times = f"{error / dense[quantity]:.2f}" if dense.get(quantity) else ""
            rows.append(place | {"entry": name, "quantity": quantity, "error": f"{error:.2e}", "times_dense": times})
    return rows


def page(rows: list[dict], lines: list[str]) -> str:
    text = "# Kernels: errors against float64\n\n" + "\n".join(lines) + f"\n\n{__doc__.split(chr(10), 2)[2].strip()}\n"
    header = ["regime", "scale", "N", "D", "quantity", "entry", "error", "times dense"]
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family and row.get("error")]
        mine.sort(key=lambda r: (REGIMES.index(r["regime"]), r["scale"], r["pairs"], r["width"], r["quantity"]))
        columns = ("regime", "scale", "pairs", "width", "quantity", "entry", "error", "times_dense")
        text += f"\n## {family}\n\n" + markdown_table(header, [[str(row[c]) for c in columns] for row in mine])
    absent = {(row["entry"], row["detail"]) for row in rows if row.get("detail")}
    if absent:
        text += "\n## Missing, failed or left out\n\n" + "".join(f"- {entry}: {why}\n" for entry, why in sorted(absent))
    return text


def run(given: Namespace, device: torch.device, name: str, dtype: torch.dtype, command: str) -> int:
    """Writes accuracy.csv and accuracy.md, also when stopped; 1 when an entry of ours failed."""
    rows = []
    families = [family for family in given.families if FAMILIES[family].truth]
    try:
        for family, *place, regime in product(families, given.pairs, given.widths, given.scales, REGIMES):
            rows += point(family, tuple(place), dtype, regime, device, given.without)
    finally:
        write(rows, given, about(command, name))
    return int(any(r["entry"].startswith("vlscale") and r.get("detail", "").startswith("failed") for r in rows))


def write(rows: list[dict], given: Namespace, lines: list[str]) -> None:
    with (given.out / "accuracy.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    text = page(rows, lines)
    (given.out / "accuracy.md").write_text(text)
    print(text)
