"""Tables, CSV and plot of the method study, from its cells.

A difference is paired: the same corpus, teachers and batches, two methods; see `vlscale.evaluate.paired`.
"""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from common import RESULTS, commit, provenance, today

from vlscale.evaluate.paired import ENOUGH, bootstrap_interval, paired, seed_interval

NAMES = {
    "rsum": "rsum", "i2i": "i2i", "t2t": "t2t", "single": "mean of i2i, t2t", "i2it": "i2it", "t2it": "t2it",
    "reranked": "rsum, re-ranked",
}  # fmt: skip


def write_study(study: dict, cells: Path, chosen: dict, out: Path, *, keep: bool) -> None:
    """`study.md`, `study.csv`, `study.png` and `differences.csv` in `out`, and with `keep` dated copies in
    benchmarks/results/."""
    table = read_cells(study, cells)
    if not any(table.values()):
        return
    page = markdown(study, table, chosen, trained_at(study, cells))
    (out / "study.md").write_text(page)
    (out / "study.csv").write_text(as_csv(study, table))
    (out / "differences.csv").write_text(differences_csv(study, table))
    plot(study, table, out / "study.png")
    print(page)
    if keep:
        name = study.get("name", "study")
        for kind in ("md", "csv", "png"):
            shutil.copy(out / f"study.{kind}", RESULTS / f"{today()}-method-{name}.{kind}")
        shutil.copy(out / "differences.csv", RESULTS / f"{today()}-method-{name}-differences.csv")
        everything = {path.stem: json.loads(path.read_text()) for path in sorted(cells.glob("[!.]*.json"))}
        if known := study.get("known_levels"):  # another study may have used the same folder
            everything = {name: cell for name, cell in everything.items() if cell["level_name"] in known}
        everything["study"] = {"name": name, "comparisons": study["comparisons"], "endpoints": list(names_of(study))}
        kept = "cells" if name == "study" else f"{name}-cells"
        (RESULTS / f"{today()}-method-{kept}.json").write_text(json.dumps(everything) + "\n")


def read_cells(study: dict, cells: Path) -> dict[str, dict[int, dict]]:
    """level -> seed -> method -> endpoint."""
    return {
        level: {seed: cell["measured"] for seed, cell in by_seed.items()}
        for level, by_seed in _cells(study, cells).items()
    }


def trained_at(study: dict, cells: Path) -> Counter[str]:
    """commit -> cells; older cells do not tell."""
    every = [cell for by_seed in _cells(study, cells).values() for cell in by_seed.values()]
    return Counter(cell.get("commit", "unknown") for cell in every)


def _cells(study: dict, cells: Path) -> dict[str, dict[int, dict]]:
    return {
        level: {
            seed: json.loads(path.read_text())
            for seed in study["seeds"]
            if (path := cells / f"{level}-seed-{seed}.json").exists()
        }
        for level in study["levels"]
    }


def names_of(study: dict) -> dict[str, str]:
    """The study's endpoints, and what the tables call them; where it names none, all but the re-ranked one."""
    wanted = study.get("endpoints") or [endpoint for endpoint in NAMES if endpoint != "reranked"]
    return {endpoint: NAMES[endpoint] for endpoint in wanted}


def markdown(study: dict, table: dict, chosen: dict, commits: Counter[str] | None = None) -> str:
    """`commits`: what the cells were trained at, which is said where it is not the page's own commit."""
    seeds, names = sorted({seed for by_seed in table.values() for seed in by_seed}), names_of(study)
    lines = [
        f"# Method {study.get('name', 'study')}, {today()}",
        "",
        provenance(study.get("command", "vlscale bench method --out DIR --emoji FOLDER --processes 2 --write"))
        + _told(commits or Counter()),
        "",
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), each with its own corpus, teachers, weights and batches; "
        "test split; NDCG@10 above chance, in percent; rsum of 600. In brackets: 95 % interval (Student's t) over the "
        "seeds of the paired difference; bold where it excludes zero. `differences.csv` has the bootstrap's beside it.",
    ]
    for level, by_seed in table.items():
        if not by_seed:
            continue
        few = "" if len(by_seed) >= ENOUGH else f"; with fewer than {ENOUGH} nothing is concluded"
        lines += [
            "",
            f"## {level} ({len(by_seed)} of {len(study['seeds'])} seeds{few})",
            "",
            "| | " + " | ".join(names.values()) + " |",
        ]
        lines.append("| --- |" + " ---: |" * len(names))
        for method in next(iter(by_seed.values())):
            means = [np.mean([cell[method][endpoint] for cell in by_seed.values()]) for endpoint in names]
            lines.append(f"| {method} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
        for method, shares in _mixtures(by_seed).items():
            lines += ["", f"Weight of the text in the mixture of `{method}` at its last step, by seed: {shares}."]
        lines += ["", "| difference | " + " | ".join(names.values()) + " |", "| --- |" + " ---: |" * len(names)]
        for first, second in study["comparisons"]:
            shown = [_difference(paired(by_seed, first, second, endpoint)) for endpoint in names]
            lines.append(f"| {first} - {second} | " + " | ".join(shown) + " |")
    tuned = any("grid" in own for own in study["methods"].values())
    how = "Chosen by tuning, on the validation split of a seed that is not reported" if tuned else "Settings, not tuned"
    lines += ["", f"## {how}", "", "| tuned on | method | settings |" if tuned else "| level | method | settings |"]
    lines.append("| --- | --- | --- |")
    for level, methods in chosen.items():
        lines += [f"| {level} | {method} | `{json.dumps(own)}` |" for method, own in methods.items()]
    return "\n".join(lines) + "\n"


def _told(commits: Counter[str]) -> str:
    if commits.keys() <= {commit()}:
        return ""
    known = [f"{count} at commit {name}" for name, count in commits.items() if name != "unknown"]
    unknown = [f"{commits['unknown']} at a commit that was not kept"] if commits["unknown"] else []
    return f" Cells were trained earlier: {', '.join(known + unknown)}."


def _mixtures(by_seed: dict[int, dict]) -> dict[str, str]:
    """RVLR's learned w, of the methods that have one."""
    learned = [name for name, own in next(iter(by_seed.values())).items() if "mixture_text" in own]
    return {name: ", ".join(f"{cell[name]['mixture_text']:.3f}" for cell in by_seed.values()) for name in learned}


def _difference(differences: np.ndarray) -> str:
    """Without an interval where there are too few seeds for one."""
    if len(differences) < ENOUGH:
        return f"{differences.mean():+.1f}"
    low, high = seed_interval(differences)
    shown = f"{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{shown}**" if low > 0 or high < 0 else shown


def as_csv(study: dict, table: dict) -> str:
    out, names = io.StringIO(), names_of(study)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["level", "seed", "method", *names])
    for level, by_seed in table.items():
        for seed, cell in by_seed.items():
            for method, values in cell.items():
                writer.writerow([level, seed, method, *(f"{values[endpoint]:.4f}" for endpoint in names)])
    return out.getvalue()


def differences_csv(study: dict, table: dict) -> str:
    """Each comparison's mean difference with both intervals: Student's t, which the page has, and the bootstrap."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["level", "first", "second", "endpoint", "seeds", "mean", "t_low", "t_high", "boot_low", "boot_high"]
    )
    for level, by_seed in table.items():
        for first, second in study["comparisons"] if by_seed else ():
            for endpoint in names_of(study):
                found = paired(by_seed, first, second, endpoint)
                numbers = found.mean(), *seed_interval(found), *bootstrap_interval(found)
                writer.writerow([level, first, second, endpoint, len(found), *(f"{number:.4f}" for number in numbers)])
    return out.getvalue()


def plot(study: dict, table: dict, path: Path) -> None:
    """Each method against contrastive only: a row of levels, a panel an endpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    levels = [level for level, by_seed in table.items() if by_seed]
    methods, names = [method for method in study["methods"] if method != "contrastive"], names_of(study)
    height = max(2.0, 0.2 * len(methods)) * len(levels)
    figure, axes = plt.subplots(len(levels), len(names), figsize=(2.4 * len(names), height), squeeze=False)
    for level, row in zip(levels, axes, strict=True):
        for axis, endpoint in zip(row, names, strict=True):
            for place, method in enumerate(methods):
                differences = paired(table[level], method, "contrastive", endpoint)
                low, high = seed_interval(differences)
                axis.plot([low, high], [place, place], color="tab:blue")
                axis.plot(differences, [place] * len(differences), ".", color="tab:gray", markersize=3)
                axis.plot(differences.mean(), place, "o", color="tab:blue", markersize=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_yticks(range(len(methods)), methods if axis is row[0] else [""] * len(methods), fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
            axis.invert_yaxis()
            if level == levels[0]:
                axis.set_title(names[endpoint], fontsize=9)
        row[0].set_ylabel(level, fontsize=9)
    figure.suptitle("difference from contrastive only: mean over seeds, 95 % interval, each seed", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
