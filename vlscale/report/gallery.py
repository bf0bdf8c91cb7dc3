"""Queries and what each run finds for them, chosen so that failures come first.

Letters: Q queries examined, G gallery items. A query's score is, across the modalities, 1 / rank of the first right
answer, and elsewhere NDCG of the results shown. A result is right when it is relevant and no less so than the last of
the ideal list as long as the one shown; across the modalities, when caption and picture belong together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.evaluate import relevance as relevances
from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.metrics import best_positive, ndcg
from vlscale.evaluate.protocols import relevance_of
from vlscale.evaluate.relevance import Relevance
from vlscale.evaluate.tasks import Block, Own, blocks, relevance_rows
from vlscale.report.pictures import data_uri
from vlscale.report.runs import RunReport

SHOWN = 5  # results of a query
EXAMINED = 500  # queries of a task, evenly spread over the corpus
CHOSEN = 8  # queries of a task that are shown
APART = 0.05  # scores closer than this count as equal

TITLES = {
    "i2t": ("Picture to captions", "Which captions belong to this picture?"),
    "t2i": ("Caption to pictures", "Which picture does this caption belong to?"),
    "i2i": ("Picture to pictures", "Which pictures show much the same?"),
    "t2t": ("Caption to captions", "Which captions of other pictures tell much the same?"),
    "i2it": ("Picture to both", "One gallery of pictures and captions, asked by a picture."),
    "t2it": ("Caption to both", "One gallery of pictures and captions, asked by a caption."),
}


@dataclass(frozen=True)
class Item:
    """A picture with one of its captions, or a caption with the picture it belongs to; `is_picture` says which."""

    caption: str
    picture: str | None  # data URI; None where it cannot be shown
    is_picture: bool


@dataclass(frozen=True)
class Found:
    item: Item
    right: bool
    relevance: float | None  # graded, 0 to 1
    similarity: float


@dataclass(frozen=True)
class Answer:
    """What one run finds; `score` 0 to 1."""

    run: int
    name: str
    score: float
    results: list[Found]


@dataclass(frozen=True)
class Question:
    verdict: str
    query: Item
    answers: list[Answer]


@dataclass(frozen=True)
class Gallery:
    task: str
    title: str
    asks: str
    rule: str  # what right and wrong mean here
    as_tiles: bool  # only pictures are found
    summary: str
    questions: list[Question]


@dataclass(frozen=True)
class Judge:
    """How a task's results are judged: by `relevance`, where `belongs` says that only the own sample is right; `shade`
    is the graded relevance that is shown beside each result, where there is one; `rule` says it in words."""

    rule: str
    relevance: Relevance
    belongs: bool
    shade: Relevance | None
    own: Own


def galleries(runs: list[RunReport], before: str | None = None) -> list[Gallery]:
    """Of the last two runs, or the only one: every task that the protocol has a truth for.

    `before` names an earlier run whose answers stand in front of theirs; it has no part in choosing the queries.
    """
    corpus, result = runs[0].corpus, runs[0].result
    inside = relevance_of(corpus, result, runs[0].cache)
    belonging = relevances.pairs(len(corpus.keys), corpus.text_image)
    others = Own.OTHERS if result.protocol == "labels" else Own.KEPT
    shade = None if result.protocol == "labels" else inside
    source = "true relevance" if result.protocol == "synthetic" else "relevance by ROUGE-L"
    meter = "" if shade is None else f" The meter is {source}."
    rule = f"✓ belongs to the query, ✗ does not.{meter}"
    judges = {task: Judge(rule, belonging, True, shade, Own.KEPT) for task in ("i2t", "t2i")}
    if inside is not None:
        rule = f"✓ is as relevant as the fifth best there is, ✗ is less.{meter}"
        if result.labels:
            rule = f"✓ has the {result.labels[0]} of the query, ✗ another."
        judges |= {task: Judge(rule, inside, False, shade, others) for task in ("i2i", "i2it", "t2it")}
        judges["t2t"] = Judge(rule, inside, False, shade, Own.OTHERS)
    shown: dict[str, str | None] = {}
    compared = {place: run for place, run in enumerate(runs) if place >= len(runs) - 2 or run.name == before}
    return [_gallery(task, judges[task], compared, shown) for task in TITLES if task in judges]


def _gallery(task: str, judge: Judge, compared: dict[int, RunReport], shown: dict[str, str | None]) -> Gallery:
    """`compared`: runs by their place in the report, of which the last two choose the queries."""
    runs = list(compared.values())
    corpus = runs[0].corpus
    total = len(corpus.keys) if task.startswith("i") else len(corpus.captions)
    rows = torch.linspace(0, total - 1, min(total, EXAMINED)).round().long()
    scores = torch.stack([_scores(run.corpus, task, judge, rows) for run in runs])  # (runs, Q)
    rows, scores = rows[~scores[0].isnan()], scores[:, ~scores[0].isnan()]
    chosen = choose(*scores[-2:][[0, -1]])
    picked = rows[torch.tensor([place for _, place in chosen], dtype=torch.long)]
    answers = [_answers(run, task, judge, picked, shown) for run in runs]
    questions = [
        Question(
            verdict,
            _item(runs[0], int(row) + (0 if task.startswith("i") else len(corpus.keys)), shown),
            [
                Answer(number, run.name, float(scores[n, place]), answers[n][at])
                for n, (number, run) in enumerate(compared.items())
            ],
        )
        for at, ((verdict, place), row) in enumerate(zip(chosen, picked, strict=True))
    ]
    title, asks = TITLES[task]
    return Gallery(task, title, asks, judge.rule, task in ("t2i", "i2i"), _summary(scores, runs), questions)


def choose(before: Tensor, after: Tensor, count: int = CHOSEN) -> list[tuple[str, int]]:
    """Places of queries to show, each once, with a word on why: lost, bad in both, gained, good in both."""
    change = after - before
    single = bool((change == 0).all())
    groups = [
        ("Poor in every run" if not single else "Among the worst", after + before, change.abs() <= APART),
        ("Better than before", -change, change > APART),
        ("Good in every run" if not single else "Among the best", -torch.minimum(before, after), change.abs() <= APART),
    ]
    if not single:
        groups.insert(0, ("Worse than before", change, change < -APART))
    share = -(-count // sum(bool(fits.any()) for _, _, fits in groups)) if len(before) else 0
    chosen: dict[int, str] = {}
    for word, order, fits in groups:
        places = [p for p in order.argsort(stable=True).tolist() if fits[p] and p not in chosen][:share]
        chosen |= dict.fromkeys(places, word)
    return [(word, place) for place, word in chosen.items()][:count]


def _summary(scores: Tensor, runs: list[RunReport]) -> str:
    asked = f"{scores.shape[1]:,} queries examined"
    if len(runs) == 1:
        return f"{asked}; the worst come first, then the best."
    change = scores[-1] - scores[-2]
    better, worse = int((change > APART).sum()), int((change < -APART).sum())
    same = scores.shape[1] - better - worse
    return (
        f"{asked}: {better:,} better with {runs[-1].name} than with {runs[-2].name}, {worse:,} worse, {same:,} alike. "
        "Below are extremes of each kind, losses first."
    )


def _scores(corpus: EmbeddedCorpus, task: str, judge: Judge, rows: Tensor) -> Tensor:
    """(Q,) float64, NaN where there is nothing to find."""
    parts = []
    for block in blocks(corpus, task, judge.relevance, judge.own, rows):
        if judge.belongs:
            parts.append(1 / best_positive(block.scores, block.relevance > 0, block.exclude).expected())
        else:
            parts.append(ndcg(block.scores, block.relevance, (SHOWN,), block.exclude).value[:, 0])
    return torch.cat(parts)


def _answers(run: RunReport, task: str, judge: Judge, rows: Tensor, shown: dict[str, str | None]) -> list[list[Found]]:
    """Results of each of `rows`."""
    found: list[list[Found]] = []
    for block in blocks(run.corpus, task, judge.relevance, judge.own, rows):
        shades = None if judge.shade is None else relevance_rows(judge.shade, task, block.rows)
        for place in range(len(block.rows)):
            found.append(_results(run, task, block, place, None if shades is None else shades[place], shown))
    return found


def _results(
    run: RunReport, task: str, block: Block, place: int, shades: Tensor | None, shown: dict[str, str | None]
) -> list[Found]:
    """The first SHOWN items of query `place`; `shades` (G,) is graded relevance."""
    scores, table = block.scores[place].clone(), block.relevance[place].clone()
    gone = block.exclude[place][block.exclude[place] >= 0]
    scores[gone], table[gone] = -torch.inf, 0
    enough = float(table.topk(SHOWN).values[-1])
    top = scores.topk(SHOWN)
    offset = len(run.corpus.keys) if task.endswith("2t") else 0
    return [
        Found(
            _item(run, item + offset, shown),
            right=float(table[item]) > 0 and float(table[item]) >= enough,
            relevance=None if shades is None else float(shades[item]),
            similarity=similarity,
        )
        for similarity, item in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _item(run: RunReport, item: int, shown: dict[str, str | None]) -> Item:
    """Gallery order: pictures first, then captions. `shown` keeps the pictures that were made already."""
    corpus = run.corpus
    is_picture = item < len(corpus.keys)
    image = item if is_picture else int(corpus.text_image[item - len(corpus.keys)])
    key = corpus.keys[image]
    if key not in shown:
        shown[key] = data_uri(run.picture(key))
    if not is_picture:
        return Item(corpus.captions[item - len(corpus.keys)], shown[key], is_picture=False)
    own = (corpus.text_image == item).nonzero()
    return Item(corpus.captions[int(own[0])] if len(own) else "", shown[key], is_picture=True)
