"""Results of the data benchmarks as rows: one CSV, and one Markdown table for each thing that was measured."""

import csv
import shutil
import statistics
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from common import RESULTS, today

COLUMNS = (
    "measured",
    "pipeline",
    "pictures",
    "workers",
    "state",
    "median",
    "least",
    "most",
    "rounds",
    "times",
    "status",
)


@dataclass(frozen=True)
class Row:
    measured: str  # with its unit
    pipeline: str
    values: list[float] = field(default_factory=list)  # one a round; none where it is missing
    pictures: str = ""
    workers: int | str = ""
    state: str = ""
    times: str = ""  # how many times better vlscale is
    status: str = "ok"

    def cells(self) -> dict[str, str]:
        found = self.values
        numbers = (statistics.median(found), min(found), max(found)) if found else ()
        told = dict(zip(("median", "least", "most"), (f"{number:.4g}" for number in numbers), strict=False))
        cells = {"rounds": str(len(found) or ""), **told}
        return {name: cells.get(name, str(getattr(self, name, ""))) for name in COLUMNS}


def write(folder: Path, name: str, title: str, about: str, rows: list[Row], *, keep: bool) -> str:
    """NAME.csv and NAME.md in `folder`, and with `keep` dated copies in benchmarks/results/; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(row.cells() for row in rows)
    page = f"# {title}\n\n{about}\n"
    for measured, group in groupby(sorted(rows, key=lambda row: row.measured), key=lambda row: row.measured):
        page += f"\n## {measured}\n\n{_table([row.cells() for row in group])}"
    (folder / f"{name}.md").write_text(page)
    if keep:
        for kind in ("csv", "md"):
            shutil.copy(folder / f"{name}.{kind}", RESULTS / f"{today()}-{name}.{kind}")
    return page


def _table(cells: list[dict[str, str]]) -> str:
    """Only the columns that say something."""
    columns = [name for name in COLUMNS[1:] if any(row[name] for row in cells)]
    if all(row["status"] == "ok" for row in cells):
        columns.remove("status")
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
