"""The table in the terminal and in Markdown."""

from io import StringIO

import pytest
from rich.console import Console

from tests.evaluate.corpora import make_corpus
from vlscale.evaluate import EvalResult, Measure, evaluate_corpus
from vlscale.evaluate.table import best_rows, markdown, render

NAMES = ("contrastive only", "contrastive + relations")


@pytest.fixture(scope="module")
def results(scene_meta):
    corpora = [make_corpus(60, 2, noise=noise, meta=scene_meta) for noise in (1.2, 0.3)]
    return {name: evaluate_corpus(c, bootstrap=0) for name, c in zip(NAMES, corpora, strict=True)}


def terminal(results, width=100) -> list[str]:
    out = StringIO()
    Console(file=out, width=width).print(render(results))
    return out.getvalue().splitlines()


def test_a_terminal_of_100_columns_shows_every_number(results):
    lines = terminal(results)
    assert all(len(line.rstrip()) <= 100 for line in lines)
    assert "\u2026" not in "".join(lines)
    main = next(line for line in lines if line.startswith(f" {NAMES[1]}"))
    wanted = ["rsum"] + [f"{t}/r@{k}" for t in ("i2t", "t2i") for k in (1, 5, 10)]
    wanted += [f"{t}/ndcg@10_norm" for t in ("i2i", "t2t", "i2it", "t2it")]
    shown = main.replace(NAMES[1], "").replace("*", "").split()
    assert [float(cell) for cell in shown] == pytest.approx([results[NAMES[1]][n].value for n in wanted], abs=0.051)


def test_a_table_of_hundreds_still_fits(scene_meta):
    perfect = evaluate_corpus(make_corpus(60, 2, noise=0.0, meta=scene_meta), bootstrap=0)
    assert perfect["rsum"].value == pytest.approx(600)
    lines = terminal({NAMES[0]: perfect, NAMES[1]: perfect})
    assert "\u2026" not in "".join(lines) and all(len(line.rstrip()) <= 100 for line in lines)


def test_markdown_marks_the_best_and_says_what_chance_is(results):
    text = markdown(results)
    assert f"**{results[NAMES[1]]['rsum'].value:.1f}**" in text
    assert f"**{results[NAMES[0]]['rsum'].value:.1f}**" not in text
    assert "| a random order |" in text and "t2it paper" in text
    assert "60 images, 120 captions, protocol synthetic" in text


def test_labels_have_their_own_sheet():
    corpus = make_corpus(24, 2, meta=[{"kind": i % 4} for i in range(24)])
    lines = terminal({"one": evaluate_corpus(corpus, "labels", ["kind"], bootstrap=0)})
    assert any("Same kind found" in line for line in lines)


def test_best_rows():
    assert best_rows([1.0, 3.0, 2.0]) == {1}
    assert best_rows([3.01, 3.04, 2.0]) == {0, 1}  # alike as shown
    assert best_rows([1.0, None]) == set() and best_rows([2.0, 2.0]) == set()


def test_benchmarks_have_their_own_sheet():
    judged = {"rsum": Measure(300.0), "cxc:i2i/r@1": Measure(12.5), "cxc:sis/spearman": Measure(61.2)}
    text = markdown({"one": EvalResult("cxc", 10, 50, judged)})
    assert "Crisscrossed Captions" in text and "SIS Spearman" in text and "61.2" in text
    assert "ECCV" not in text and "STS" not in text
