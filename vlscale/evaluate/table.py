"""Several results side by side: tables for the terminal (100 columns) and for Markdown, from the same rows.

The best value of a column carries a star. NDCG@10 stands three ways: `fixed` over chance (the one to compare by),
`fixed` as measured with the chance level beside it, and `paper`. A result that was re-ranked has a second row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlscale.evaluate.result import EvalResult

WITHIN = ("i2i", "t2t", "i2it", "t2it")
CHANCE = "a random order"
NAME = 36
CROSS = [("rsum", "rsum")] + [(f"{task} R@{k}", f"{task}/r@{k}") for task in ("i2t", "t2i") for k in (1, 5, 10)]


JUDGED = {  # benchmark -> its measures beyond the pairs' own
    "ECCV Caption": [
        (f"{task} {short}", f"eccv:{task}/{name}")
        for task in ("i2t", "t2i")
        for short, name in (("R@1", "r@1"), ("mAP@R", "map@r"), ("R-P", "r_precision"))
    ],
    "Crisscrossed Captions": [(f"{task} R@1", f"cxc:{task}/r@1") for task in ("i2t", "t2i", "i2i", "t2t")]
    + [(f"{kind.upper()} Spearman", f"cxc:{kind}/spearman") for kind in ("sis", "sts", "sits")],
}


@dataclass(frozen=True)
class Sheet:
    """A table without a look: `cells` are (row, column) strings, the best of each column starred."""

    title: str
    columns: list[str]
    rows: list[str]
    cells: list[list[str]]


def sheets(results: dict[str, EvalResult]) -> Iterator[Sheet]:
    """The main sheet; NDCG as measured and by the papers' code where relevance is graded; labels; benchmarks."""
    results = both_rows(results)
    prefixes = _prefixes(results)
    over_chance = [(f"{task} NDCG", f"{prefixes[0]}{task}/ndcg@10_norm") for task in WITHIN]
    graded = any(name in result.metrics for result in results.values() for _, name in over_chance)
    by = f" by same {prefixes[0][:-1]}" if prefixes[0] else ""
    title = f"Retrieval, percent; NDCG@10{by} over chance" if graded else "Retrieval, percent"
    yield _sheet(title, CROSS + (over_chance if graded else []), results)
    if graded and not prefixes[0]:
        yield _sheet("NDCG@10 as measured (fixed) and by the papers' own code (paper)", _raw_columns(), results)
    by_paper = {name: result for name, result in results.items() if "rsum_paper" in result.metrics}
    if by_paper:
        columns = [(title, f"{name}_paper") for title, name in CROSS]
        yield _sheet("Re-ranked as by the papers' own code (paper): raw matching logits", columns, by_paper)
    for prefix in filter(None, prefixes):
        recall = [(f"{task} R@{k}", f"{prefix}{task}/r@{k}") for task in ("i2i", "t2t") for k in (1, 5, 10)]
        over_chance = [(f"{task} NDCG", f"{prefix}{task}/ndcg@10_norm") for task in WITHIN]
        yield _sheet(f"Same {prefix[:-1]} found, percent; NDCG@10 over chance", recall + over_chance, results)
    for title, columns in JUDGED.items():
        measured = [column for column in columns if any(column[1] in result.metrics for result in results.values())]
        if measured:
            yield _sheet(f"{title}, percent", measured, results)


def both_rows(results: dict[str, EvalResult]) -> dict[str, EvalResult]:
    """The dual encoder's measures and, where they were re-ranked, those after it, named apart."""
    rows: dict[str, EvalResult] = {}
    for name, result in results.items():
        alone, again = result.split()
        rows |= {name: alone} | ({} if again is None else {f"{name}, re-ranked {again.rerank}": again})
    return rows


def render(results: dict[str, EvalResult]) -> RenderableType:
    """For a rich console; 100 columns hold it unbroken with names of up to NAME letters."""
    parts: list[RenderableType] = []
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.padding = 0  # the box itself puts a space between columns
        table.add_column("", no_wrap=True, max_width=NAME)
        for column in sheet.columns:
            table.add_column(column.replace(" ", " \n") + " ", justify="right", no_wrap=True)
        for name, cells in zip(sheet.rows, sheet.cells, strict=True):
            shown = [cell if cell.endswith("*") else f"{cell} " for cell in cells]
            style = "dim" if name == CHANCE else ""
            table.add_row(name, *[Text(cell, style="bold" if cell.endswith("*") else style) for cell in shown])
        parts.append(table)
    parts.extend(Text(note, style="dim") for note in notes(results))
    return Group(*parts)


def markdown(results: dict[str, EvalResult]) -> str:
    parts = []
    for sheet in sheets(results):
        rows = [[name, *cells] for name, cells in zip(sheet.rows, sheet.cells, strict=True)]
        rows = [[f"**{cell[:-1]}**" if cell.endswith("*") else cell for cell in row] for row in rows]
        lines = [["", *sheet.columns], ["---", *["---:"] * len(sheet.columns)], *rows]
        parts.append(f"{sheet.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.extend(f"- {note}" for note in notes(results))
    return "\n\n".join(parts) + "\n"


def notes(results: dict[str, EvalResult]) -> list[str]:
    """What the reader has to know, each line once."""
    sizes = {f"{r.images:,} images, {r.captions:,} captions, protocol {r.protocol}" for r in results.values()}
    return sorted(sizes) + list(dict.fromkeys(note for result in results.values() for note in result.notes))


def best_rows(values: list[float | None]) -> set[int]:
    """Rows that hold the largest value, as it is shown; none where there is nothing to compare."""
    shown = [None if value is None else round(value, 1) for value in values]
    known = [value for value in shown if value is not None]
    if len(known) < 2 or len(set(known)) == 1:
        return set()
    return {row for row, value in enumerate(shown) if value == max(known)}


def _raw_columns() -> list[tuple[str, str]]:
    both = [("fixed", "ndcg@10"), ("paper", "ndcg@10_paper")]
    return [(f"{task} {kind}", f"{task}/{name}") for task in WITHIN for kind, name in both]


def _sheet(title: str, columns: list[tuple[str, str]], results: dict[str, EvalResult]) -> Sheet:
    """A row a result, and last what a random order scores, where that is known."""
    by_column = []
    for _, name in columns:
        values = [result.value(name) for result in results.values()]
        best = best_rows(values)
        chance = next((r[name].chance for r in results.values() if name in r.metrics), None)
        starred = [shown(value) + ("*" if row in best else "") for row, value in enumerate(values)]
        by_column.append([*starred, "" if chance is None else shown(chance)])
    rows = [list(cells) for cells in zip(*by_column, strict=True)]
    return Sheet(title, [title for title, _ in columns], [*results, CHANCE], rows)


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return "100" if 99.95 <= value < 100.05 else f"{value:.1f}"


def _prefixes(results: dict[str, EvalResult]) -> list[str]:
    """ "" for exact relevance, else `FIELD:` for each label."""
    fields = dict.fromkeys(field for result in results.values() for field in result.labels)
    return [
        f"{field}:"
        for field in fields
        if any(f"{field}:i2i/ndcg@10_norm" in result.metrics for result in results.values())
    ] or [""]
