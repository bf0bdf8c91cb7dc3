"""The method study in the report: means, paired differences with intervals, and who is ahead, from its cells.

A study file is what `vlscale bench method --write` keeps: a cell a level and seed, with what was measured of every
method on the test split, and as `study` the comparisons and endpoints that were fixed beforehand; older files lack
these. Trials of the tuning are left out: they chose settings and prove nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlscale.evaluate.paired import ENOUGH, BySeed, paired, seed_interval

ENDPOINTS = {  # name in a cell -> title
    "rsum": "rsum, of 600",
    "i2i": "picture to picture",
    "t2t": "caption to caption",
    "single": "mean of these two",
    "i2it": "picture to both",
    "t2it": "caption to both",
    "reranked": "rsum, re-ranked",
}
USUAL = [name for name in ENDPOINTS if name != "reranked"]  # of a file that names none
ACROSS = ("rsum", "reranked")  # where single-modal teachers are far behind: beside that no other difference is seen
BASE, JOINT, TEACHERS = "contrastive", "joint", "teachers"
MARKS = {"better": "▲", "worse": "▼", "no clear change": "≈", "too few seeds": "?"}
WIDTH, LEFT, ROW, TOP = 300, 96, 22, 8  # of a panel, in units of its view box


@dataclass(frozen=True)
class Measured:
    """What a study file holds."""

    table: dict[str, BySeed]  # level -> seed -> method -> endpoint -> value, of the cells measured on test
    endpoints: list[str]
    comparisons: list[tuple[str, str]]  # first, second; empty where the file names none


@dataclass(frozen=True)
class Difference:
    """Mean over seeds; `low` and `high` where there are seeds enough."""

    mean: float
    low: float | None
    high: float | None
    seeds: list[float]

    @property
    def word(self) -> str:
        if self.low is None:
            return "too few seeds"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear change"

    @property
    def mark(self) -> str:
        return MARKS[self.word]


@dataclass(frozen=True)
class Mean:
    """`mark`: `best` is ahead of every other method, each paired interval leaving out zero; `highest` by its mean."""

    value: float
    mark: str = ""


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    differences: list[Difference]  # one an endpoint


@dataclass(frozen=True)
class Dot:
    """A method's line in a panel; x in units of the view box."""

    method: str
    y: float
    at: float
    low: float | None
    high: float | None
    seeds: list[float]
    word: str


@dataclass(frozen=True)
class Panel:
    title: str
    zero: float
    height: float
    ticks: list[tuple[float, str]]
    heads: list[tuple[float, str]]  # y and second method of the dots below
    dots: list[Dot]
    summary: str  # in words


@dataclass(frozen=True)
class Level:
    name: str
    seeds: int
    enough: bool
    means: list[tuple[str, list[Mean]]]  # methods, teachers first
    comparisons: list[Comparison]
    panels: list[Panel]


@dataclass(frozen=True)
class Tally:
    """Of a comparison: at how many levels it is better, worse and unclear, one an endpoint."""

    first: str
    second: str
    counts: list[dict[str, int]]


@dataclass(frozen=True)
class Study:
    titles: list[str]  # of the endpoints
    methods: list[str]
    levels: list[Level]
    tallies: list[Tally]
    lead: str


def read_study(path: Path) -> Measured:
    try:
        cells = json.loads(path.read_text())
        own = cells.pop("study", {})
        endpoints = own.get("endpoints", USUAL)
        comparisons = [(first, second) for first, second in own.get("comparisons", [])]
        table: dict[str, BySeed] = {}
        for cell in cells.values():
            if cell["split"] == "test":
                measured = {
                    name: {key: float(values[key]) for key in endpoints} for name, values in cell["measured"].items()
                }
                table.setdefault(cell["level_name"], {})[int(cell["seed"])] = measured
    except FileNotFoundError:
        raise ValueError(f"study {path} does not exist; expected a file that `vlscale bench method` wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"study {path}: expected the cells that `vlscale bench method --write` keeps, got {type(error).__name__} "
            f"({error}); name a ...-cells.json"
        ) from None
    for level, by_seed in table.items():
        known = [set(cell) for cell in by_seed.values()]
        if BASE not in known[0] or any(methods != known[0] for methods in known):
            raise ValueError(
                f"study {path}: every seed of level {level} needs the same methods, {BASE} among them, got "
                f"{' and '.join(sorted({', '.join(sorted(methods)) for methods in known}))}"
            )
    if not table:
        raise ValueError(f"study {path} holds no cell that was measured on test; run the study to its end")
    return Measured(table, endpoints, comparisons)


def study_of(measured: Measured) -> Study:
    """What the page shows."""
    table, endpoints = measured.table, measured.endpoints
    order = dict.fromkeys(name for by_seed in table.values() for cell in by_seed.values() for name in cell)
    methods = [name for name in order if name != TEACHERS]
    wanted = measured.comparisons or compared(methods)
    levels = [_level(name, by_seed, methods, endpoints, wanted) for name, by_seed in table.items()]
    pairs = dict.fromkeys((c.first, c.second) for level in levels for c in level.comparisons)
    tallies = [Tally(*pair, _counts(pair, levels)) for pair in pairs]
    return Study([ENDPOINTS[name] for name in endpoints], methods, levels, tallies, _lead(levels, methods, endpoints))


def compared(methods: list[str]) -> list[tuple[str, str]]:
    """Of a file without comparisons: each method against contrastive only, and each meta mode against joint."""
    against_base = [(name, BASE) for name in methods if name != BASE]
    modes = [name for name in methods if name in ("heads", "first_order", "finite_difference")]
    return against_base + [(name, JOINT) for name in modes if JOINT in methods]


def difference(by_seed: BySeed, first: str, second: str, endpoint: str) -> Difference:
    found = paired(by_seed, first, second, endpoint)
    bounds = seed_interval(found) if len(found) >= ENOUGH else (None, None)
    return Difference(float(found.mean()), *bounds, found.tolist())


def _level(
    name: str, by_seed: BySeed, methods: list[str], endpoints: list[str], wanted: list[tuple[str, str]]
) -> Level:
    known = next(iter(by_seed.values()))
    here = [method for method in methods if method in known]
    shown = [TEACHERS, *here] if TEACHERS in known else here
    values = {
        method: [float(np.mean([cell[method][endpoint] for cell in by_seed.values()])) for endpoint in endpoints]
        for method in shown
    }
    marks = {endpoint: _winner(by_seed, here, endpoint) for endpoint in endpoints}
    means = [
        (method, [Mean(value, marks[key].get(method, "")) for key, value in zip(endpoints, row, strict=True)])
        for method, row in values.items()
    ]
    comparisons = [
        Comparison(*pair, [difference(by_seed, *pair, endpoint) for endpoint in endpoints])
        for pair in wanted
        if known.keys() >= set(pair)
    ]
    panels = [
        _panel(ENDPOINTS[key], place, [c for c in comparisons if c.second != TEACHERS or key not in ACROSS])
        for place, key in enumerate(endpoints)
    ]
    return Level(name, len(by_seed), len(by_seed) >= ENOUGH, means, comparisons, panels)


def _winner(by_seed: BySeed, methods: list[str], endpoint: str) -> dict[str, str]:
    best = max(methods, key=lambda method: np.mean([cell[method][endpoint] for cell in by_seed.values()]))
    others = [difference(by_seed, best, method, endpoint) for method in methods if method != best]
    return {best: "best" if others and all(other.word == "better" for other in others) else "highest"}


def _panel(title: str, endpoint: int, comparisons: list[Comparison]) -> Panel:
    """Every comparison given, below the method that it is against: each seed, their mean, its interval."""
    found: dict[str, list[tuple[str, Difference]]] = {}
    for c in comparisons:
        found.setdefault(c.second, []).append((c.first, c.differences[endpoint]))
    every = [d for group in found.values() for _, d in group]
    far = [abs(value) for d in every for value in (d.mean, *d.seeds, d.low or 0, d.high or 0)]
    reach = max(1.0, 1.08 * max(far, default=1.0))

    def across(value: float) -> float:
        return LEFT + (value / reach + 1) / 2 * (WIDTH - LEFT - 8)

    heads, dots, middle = [], [], TOP + ROW / 2
    for second, group in found.items():
        heads.append((middle, second))
        for place, (first, d) in enumerate(group, 1):
            low, high = (None if value is None else across(value) for value in (d.low, d.high))
            seeds = [across(value) for value in d.seeds]
            dots.append(Dot(first, middle + ROW * place, across(d.mean), low, high, seeds, d.word))
        middle += ROW * (len(group) + 1)
    step = max(size for size in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if size <= 0.8 * reach)
    ticks = [(across(value), f"{value:+g}".replace("-", "\u2212")) for value in (-step, step)] + [(across(0), "0")]
    words = "; ".join(
        f"against {second}: {'; '.join(f'{first} {d.mean:+.1f}, {d.word}' for first, d in group)}"
        for second, group in found.items()
    )
    return Panel(title, across(0), middle - ROW / 2 + 24, ticks, heads, dots, f"{title}, {words}")


def _counts(pair: tuple[str, str], levels: list[Level]) -> list[dict[str, int]]:
    here = [c for level in levels for c in level.comparisons if (c.first, c.second) == pair]
    return [
        {word: sum(c.differences[place].word == word for c in here) for word in MARKS}
        for place in range(len(here[0].differences))
    ]


def _lead(levels: list[Level], methods: list[str], endpoints: list[str]) -> str:
    sure = [level for level in levels if level.enough]
    fewest, most = (of(level.seeds for level in levels) for of in (min, max))
    seeds = str(most) if fewest == most else f"{fewest} to {most}"
    said = f"{len(methods)} methods on {_counted(len(levels), 'level')}, {seeds} seeds each."
    if not sure:
        return f"{said} No level has the {ENOUGH} seeds that a conclusion needs."
    ahead = []
    for method in methods:
        here = [c for level in sure for c in level.comparisons if (c.first, c.second) == (method, BASE)]
        words = [d.word for c in here for d in c.differences]
        if words:
            ahead.append(f"{method} better {words.count('better')}, worse {words.count('worse')}")
    if not ahead:
        return said
    total = len(sure) * len(endpoints)
    where = "" if len(sure) == len(levels) else f", where there are {ENOUGH} seeds or more"
    return f"{said} Against {BASE}, of {total} endpoints and levels{where}: {'; '.join(ahead)}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
