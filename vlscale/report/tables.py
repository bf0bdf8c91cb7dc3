"""The report's tables: a row a measure, a column a run, each value with its interval, the winner marked."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from vlscale.evaluate.result import EvalResult, Measure, compare

WITHIN = {
    "i2i": "picture to picture",
    "t2t": "caption to caption",
    "i2it": "picture to both",
    "t2it": "caption to both",
}
Named = tuple[str, str, str]  # group, label, name of the measure
ACROSS = {"i2t": "captions of a picture", "t2i": "pictures of a caption"}


@dataclass(frozen=True)
class Cell:
    """`mark`: `best` is ahead of every other run, with a paired interval that leaves out zero; `highest` is ahead by
    its value alone."""

    measure: Measure | None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    label: str
    cells: list[Cell]
    chance: float | None


@dataclass(frozen=True)
class Section:
    title: str
    explained: str
    groups: list[tuple[str, list[Row]]]  # name (empty for none) and rows


def sections(results: dict[str, EvalResult]) -> list[Section]:
    """What each protocol has, the measures to compare by first; sections without a row are left out."""
    found = [_across()]
    if any("i2i/ndcg@10" in result.metrics for result in results.values()):
        found += _exact()
    for field in dict.fromkeys(chain.from_iterable(result.labels for result in results.values())):
        found.append(_by_label(field))
    found += _judged()
    found.append(_again())
    made = [Section(title, explained, _groups(named, results)) for title, explained, named in found]
    return [section for section in made if section.groups]


def _across() -> tuple[str, str, list[Named]]:
    named = [("", "rsum, of 600", "rsum")]
    for task, words in ACROSS.items():
        named += [(words, f"R@{k}", f"{task}/r@{k}") for k in (1, 5, 10)]
        named += [(words, f"{kind} rank", f"{task}/{kind}_rank") for kind in ("mean", "median")]
    explained = "R@K: how often a right answer is among the first K. Ranks count from 1; lower is better."
    return "Across the modalities", explained, named


def _exact() -> Iterator[tuple[str, str, list[Named]]]:
    yield (
        "Inside a modality, and mixed: NDCG@10 over chance",
        "0 is a random order, 100 the ideal one. This is the column to compare by.",
        [("", words, f"{task}/ndcg@10_norm") for task, words in WITHIN.items()]
        + [("", "caption to captions of other pictures", "t2t_others/ndcg@10_norm")],
    )
    yield (
        "The same, as measured",
        "Fixed: the query itself is out of the gallery, all captions ask, ties count by expected value. Beside it, "
        "what a random order scores.",
        [(words, f"NDCG@{k}", f"{task}/ndcg@{k}") for task, words in WITHIN.items() for k in (10, 20, 50)],
    )
    yield (
        "The same, by the papers' own code",
        "Faults kept, to compare with published tables: the query's own similarity is set to 0 instead of being left "
        "out; a caption's relevance is taken to the query's picture, siblings stay; in mixed galleries the query finds "
        "itself, and caption queries are scored by the transposed block.",
        [(words, f"NDCG@{k}", f"{task}/ndcg@{k}_paper") for task, words in WITHIN.items() for k in (10, 20, 50)],
    )
    yield (
        "How far the modalities lie apart",
        "Share of the first ten results, in the mixed gallery, that are of the query's own modality.",
        [("", WITHIN[task], f"{task}/own_modality@10") for task in ("i2it", "t2it")],
    )


def _again() -> tuple[str, str, list[Named]]:
    """What re-ranking changed, across the modalities and in mixed galleries; fixed, and as the papers' code."""
    named = [("", "rsum, of 600", "reranked:rsum"), ("", "rsum by the papers' code", "reranked:rsum_paper")]
    for task, words in ACROSS.items():
        named += [(words, f"R@{k}", f"reranked:{task}/r@{k}") for k in (1, 5, 10)]
    mixed = {task: WITHIN[task] for task in ("i2it", "t2it")}
    named += [("NDCG@10 over chance", words, f"reranked:{task}/ndcg@10_norm") for task, words in mixed.items()]
    named += [("NDCG@10 by the papers' code", words, f"reranked:{task}/ndcg@10_paper") for task, words in mixed.items()]
    explained = "The nearest of each query put in order by the fusion encoder; what it did not score stands below."
    return "After re-ranking", explained, named


def _by_label(field: str) -> tuple[str, str, list[Named]]:
    searches = {"i2i": WITHIN["i2i"], "t2t": WITHIN["t2t"]} | ACROSS
    named = [(words, f"R@{k}", f"{field}:{task}/r@{k}") for task, words in searches.items() for k in (1, 5, 10)]
    named += [("NDCG@10 over chance", words, f"{field}:{task}/ndcg@10_norm") for task, words in WITHIN.items()]
    explained = (
        "Equal values are relevant. The query's own sample is left out; samples that share with none do not ask."
    )
    return f"Same {field}", explained, named


def _judged() -> Iterator[tuple[str, str, list[Named]]]:
    measures = [("R@1", "r@1"), ("R@5", "r@5"), ("R@10", "r@10"), ("mAP@R", "map@r"), ("R-Precision", "r_precision")]
    searches = ACROSS | {"i2i": WITHIN["i2i"], "t2t": WITHIN["t2t"]}
    for prefix, title in (("eccv", "ECCV Caption"), ("cxc", "Crisscrossed Captions")):
        named = [(words, label, f"{prefix}:{t}/{name}") for t, words in searches.items() for label, name in measures]
        pairs = {"sis": "pairs of pictures", "sts": "pairs of captions", "sits": "captions with pictures"}
        named += [
            ("Spearman with people's scores", words, f"{prefix}:{kind}/spearman") for kind, words in pairs.items()
        ]
        yield title, "With what people judged relevant, beyond the pairs of the corpus.", named


def _groups(named: list[Named], results: dict[str, EvalResult]) -> list[tuple[str, list[Row]]]:
    """Rows under their group's name, in order."""
    groups: dict[str, list[Row]] = {}
    for group, label, name in named:
        measures = [result.metrics.get(name) for result in results.values()]
        if not any(measures):
            continue
        marks = _marks(name, list(results.values()), measures)
        chance = next((m.chance for m in measures if m is not None), None)
        cells = [Cell(m, mark) for m, mark in zip(measures, marks, strict=True)]
        groups.setdefault(group, []).append(Row(label, cells, chance))
    return list(groups.items())


def _marks(name: str, results: list[EvalResult], measures: list[Measure | None]) -> list[str]:
    marks = [""] * len(results)
    known = [place for place, m in enumerate(measures) if m is not None]
    if "own_modality" in name or len(known) < 2:
        return marks
    sign = -1 if name.endswith("_rank") else 1
    best = max(known, key=lambda place: sign * measures[place].value)
    others = [place for place in known if place != best]
    if any(measures[place].value == measures[best].value for place in others):
        return marks
    ahead = [compare(results[place], results[best], name) for place in others]
    marks[best] = "best" if all(difference.sure for difference in ahead) else "highest"
    return marks
