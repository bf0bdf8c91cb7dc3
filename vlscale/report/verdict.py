"""What happened, in words that follow from the numbers: each endpoint before and after, and one sentence over all."""

from collections.abc import Iterable
from dataclasses import dataclass

from vlscale.evaluate.result import EvalResult, Measure, compare
from vlscale.report.runs import RunReport, number


@dataclass(frozen=True)
class Endpoint:
    """`name` of the measure after the label's prefix, and how a reader would call it."""

    name: str
    title: str
    spoken: str
    explained: str


ENDPOINTS = [
    Endpoint(
        "rsum", "Across", "cross-modal search", "pictures by caption and captions by picture; six recalls, of 600"
    ),
    Endpoint("i2i/ndcg@10_norm", "Picture to picture", "picture-to-picture search", "similar pictures first"),
    Endpoint("t2t/ndcg@10_norm", "Caption to caption", "caption-to-caption search", "similar captions first"),
    Endpoint(
        "i2it/ndcg@10_norm", "Picture to both", "picture search in a mixed gallery", "pictures and captions together"
    ),
    Endpoint(
        "t2it/ndcg@10_norm", "Caption to both", "caption search in a mixed gallery", "pictures and captions together"
    ),
]


@dataclass(frozen=True)
class Change:
    """An endpoint in the first and the last run; `low` and `high` bound the difference, paired by images."""

    endpoint: Endpoint
    before: Measure
    after: Measure
    difference: float
    low: float | None
    high: float | None

    @property
    def points(self) -> float:
        """What one point of 100 is in this measure: rsum counts six recalls together."""
        return 6.0 if self.endpoint.name == "rsum" else 1.0

    def places(self, reach: float) -> dict[str, float]:
        """Where zero at 50 % and `reach` points at 100 % put the difference and its bounds, in percent."""
        known = {"low": self.low, "at": self.difference, "high": self.high}
        return {
            name: 50 + 50 * max(-1.0, min(1.0, value / self.points / reach))
            for name, value in known.items()
            if value is not None
        }

    @property
    def word(self) -> str:
        """better, worse, or `no clear change` where the interval holds zero; `higher`, `lower` without one."""
        if self.low is None:
            return "higher" if self.difference > 0 else "lower" if self.difference < 0 else "equal"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear change"


def endpoints(result: EvalResult) -> list[tuple[Endpoint, str]]:
    """The endpoints this protocol has, with the full names of their measures."""
    prefix = f"{result.labels[0]}:" if result.labels else ""
    named = [(each, each.name if each.name == "rsum" else prefix + each.name) for each in ENDPOINTS]
    return [(each, name) for each, name in named if name in result.metrics]


def changes(before: EvalResult, after: EvalResult) -> list[Change]:
    found = []
    for endpoint, name in endpoints(after):
        if name in before.metrics:
            difference = compare(before, after, name)
            found.append(Change(endpoint, before[name], after[name], difference.value, difference.low, difference.high))
    return found


def reach(found: list[Change]) -> float:
    """Half the width of the strip that all differences are drawn on, in points of 100."""
    furthest = [abs(value) / c.points for c in found for value in (c.low, c.difference, c.high) if value is not None]
    return max(1.0, 1.1 * max(furthest, default=1.0))


def headline(runs: list[RunReport]) -> str:
    """One sentence for the first screen, about one run or two, before and after."""
    last = runs[-1]
    if len(runs) == 1:
        parts = [f"{e.spoken} {last.result[name].value:.1f}" for e, name in endpoints(last.result)]
        return f"{last.name} reached: {', '.join(parts)}."
    found = changes(runs[0].result, last.result)
    if not found:
        return f"{runs[0].name} and {last.name} have no measure in common."
    gained = _largest_first(c for c in found if c.word in ("better", "higher"))
    lost = _largest_first(c for c in found if c.word in ("worse", "lower"))
    rest = [c for c in found if c not in gained and c not in lost]
    up, down = ("better", "worse") if found[0].low is not None else ("higher", "lower")  # without intervals, no verdict
    said = []
    if gained:
        most = _told(gained[0])
        several = f"{len(gained)} of {len(found)} kinds of search, most of all {most}"
        said.append(f"{up} at {several if len(gained) > 1 else most}")
    if lost:
        said.append(f"{down} at {_joined([_told(change) for change in lost])}")
    if rest:
        said.append(f"not clearly different at {_joined([change.endpoint.spoken for change in rest])}")
    return f"Compared with {runs[0].name}, {last.name} is {', and '.join(said)}."


def _largest_first(some: Iterable[Change]) -> list[Change]:
    return sorted(some, key=lambda change: -abs(change.difference) / change.points)


def training_line(run: RunReport) -> str:
    """What this run did, in one line."""
    if not run.metrics:
        return "no training steps on record"
    last = run.metrics[-1]
    steps, seen = int(last["step"]), number(last.get("samples"))
    seconds = sum(number(line.get("seconds")) for line in run.metrics)
    first_loss, last_loss = (number(line["loss"]) for line in (run.metrics[0], last))
    parts = [f"{steps:,} steps"]
    if seen == seen:
        parts.append(f"{seen:,.0f} pairs seen")
    if seconds == seconds:
        parts.append(duration(seconds))
    parts.append(f"loss {first_loss:.2f} to {last_loss:.2f}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _told(change: Change) -> str:
    return f"{change.endpoint.spoken} ({change.before.value:.1f} to {change.after.value:.1f})"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
