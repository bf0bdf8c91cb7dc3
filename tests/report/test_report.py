"""The page as a reader gets it: complete by itself, safe against its input, true to the numbers."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from tests.report.conftest import HOSTILE, teacher
from vlscale.evaluate import Measure, evaluate_corpus
from vlscale.report import RunReport, load_metrics, write_report
from vlscale.report.gallery import choose, galleries
from vlscale.report.pictures import data_uri

VOID = {"meta", "img", "br", "path", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory) -> str:
    return write_report(
        tmp_path_factory.mktemp("page") / "report.html", runs, "A title & more", teacher(runs)
    ).read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_nothing_is_loaded_from_elsewhere(html, page):
    words = re.sub(r"base64,[^\"]*", "", html).lower()
    assert not [trace for trace in ("http", "//", "@import", "url(") if trace in words]
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:image/jpeg;base64,", "data:image/png;base64,")), attrs


def test_no_scripts_and_no_event_handlers(page):
    assert not page.of("script")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_captions_keys_and_names_are_escaped(html, page):
    assert HOSTILE not in html
    assert "<b>not bold</b>" not in html and "&lt;b&gt;not bold&lt;/b&gt;" in html  # config.yaml
    assert "A title &amp; more" in html


def test_hostile_names_and_captions_everywhere_stay_text(runs, tmp_path):
    nasty = "<img src=x onerror=alert(1)>\"'"
    captions = [f"{nasty} {place}" for place in range(len(runs[0].corpus.captions))]
    hostile = [
        dataclasses.replace(run, name=f"{nasty}{place}", corpus=dataclasses.replace(run.corpus, captions=captions))
        for place, run in enumerate(runs)
    ]
    page = Page(write_report(tmp_path / "r.html", hostile, nasty).read_text())
    assert all(attrs["src"].startswith("data:image/") for attrs in page.of("img"))
    assert any(nasty in text for text in page.text)


def test_the_first_screen_says_what_got_better_and_what_got_worse(page):
    lead = next(text for text in page.text if text.startswith("Compared with"))
    assert "contrastive + relations is better at" in lead and "worse at picture-to-picture search (" in lead
    words = " ".join(page.text)
    assert "200 steps, 51,200 pairs seen" in words
    assert "▲ better" in words and "▼ worse" in words  # in words, not colour alone


def test_every_measure_of_the_main_table_is_shown_with_its_interval(runs, page):
    words = " ".join(page.text)
    for run in runs:
        for name in ("rsum", "i2t/r@1", "t2i/r@10", "i2i/ndcg@10_norm", "t2t/ndcg@10", "t2it/ndcg@10_paper"):
            measure = run.result[name]
            assert f"{measure.value:.1f}" in words and f"{measure.low:.1f} to {measure.high:.1f}" in words, name


def test_every_search_has_a_gallery_with_marks_in_words(page):
    sections = {attrs.get("id") for attrs in page.of("section")}
    assert {"i2t", "t2i", "i2i", "t2t", "i2it", "t2it"} <= sections
    marks = [text for text in page.text if text in ("right", "wrong")]
    assert marks.count("right") > 50 and marks.count("wrong") > 50
    assert "Worse than before" in page.text and "Better than before" in page.text


def test_it_can_be_used_with_a_keyboard_and_read_aloud(page):
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"] for attrs in page.of("a")]
    assert links and all(link.removeprefix("#") in ids for link in links)
    assert all(attrs.get("alt") for attrs in page.of("img"))
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for attrs in page.of("svg"))
    assert page.of("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1


def test_marks_are_right(runs, tmp_path):
    """In the caption-to-pictures gallery each ✓ is the caption's own picture: relevance 1."""
    found = {gallery.task: gallery for gallery in galleries(runs)}
    results = [r for q in found["t2i"].questions for answer in q.answers for r in answer.results]
    assert all((r.relevance == 1) for r in results if r.right) and any(r.right for r in results)
    for question in found["t2i"].questions:
        for answer in question.answers:
            right_at = [place for place, r in enumerate(answer.results, 1) if r.right]
            assert right_at == ([round(1 / answer.score)] if 1 / answer.score <= 5 else [])
    for task in ("i2i", "t2t", "i2it", "t2it"):
        for question in found[task].questions:
            for answer in question.answers:
                similarity = [r.similarity for r in answer.results]
                assert similarity == sorted(similarity, reverse=True)
                wrong = [r.relevance for r in answer.results if not r.right]
                right = [r.relevance for r in answer.results if r.right]
                assert not wrong or not right or max(wrong) < min(right)
        results = [r for q in found[task].questions for answer in q.answers for r in answer.results]
        assert any(r.right for r in results) and any(not r.right and r.relevance > 0.05 for r in results)


def test_a_query_never_finds_itself(runs):
    by_task = {gallery.task: gallery for gallery in galleries(runs)}
    for question in by_task["i2i"].questions + by_task["t2t"].questions:
        for answer in question.answers:
            assert question.query.picture not in [r.item.picture for r in answer.results]


def test_choose_puts_losses_first():
    before, after = torch.tensor([1.0, 0.1, 0.2, 1.0, 0.9]), torch.tensor([0.2, 0.1, 1.0, 1.0, 0.3])
    assert choose(before, after, 5) == [
        ("Worse than before", 0),
        ("Worse than before", 4),
        ("Poor in every run", 1),
        ("Poor in every run", 3),
        ("Better than before", 2),
    ]
    assert [place for _, place in choose(before, before, 2)] == [1, 0]
    assert choose(torch.zeros(0), torch.zeros(0)) == []


def test_one_run_alone(runs, tmp_path):
    page = Page(write_report(tmp_path / "one.html", runs[:1]).read_text())
    assert "What was reached" in page.text and "Among the worst" in page.text
    assert any(text.startswith("contrastive only reached: cross-modal search") for text in page.text)


def test_of_several_runs_the_last_two_are_compared(runs, tmp_path):
    earlier = dataclasses.replace(runs[1], name="an earlier run")
    page = Page(write_report(tmp_path / "three.html", [earlier, *runs]).read_text())
    assert any(text.startswith("Compared with contrastive only, contrastive + relations is") for text in page.text)
    heads = [attrs.get("class") for attrs in page.of("div") if attrs.get("class", "").startswith("answer run")]
    assert set(heads) == {"answer run1", "answer run2"}  # each in the colour it has in the curves
    assert page.text.count("an earlier run") > 3  # in the list, the legend and the tables


def test_a_run_before_them_stands_in_front_and_chooses_no_queries(runs):
    first = dataclasses.replace(runs[0], name="start")
    with_start = galleries([first, *runs], before="start")
    for plain, gallery in zip(galleries(runs), with_start, strict=True):
        assert gallery.summary == plain.summary
        for question, asked in zip(gallery.questions, plain.questions, strict=True):
            assert [answer.name for answer in question.answers] == ["start", *(a.name for a in asked.answers)]
            assert question.query == asked.query and question.answers[0].results == question.answers[1].results


def test_a_pairs_result_shows_the_cross_modal_galleries_only(runs, tmp_path):
    plain = [dataclasses.replace(run, result=evaluate_corpus(run.corpus, "pairs", bootstrap=20)) for run in runs]
    page = Page(write_report(tmp_path / "pairs.html", plain).read_text())
    assert {attrs.get("id") for attrs in page.of("section")} == {
        "changed",
        "curves",
        "tables",
        "i2t",
        "t2i",
        "settings",
    }


def test_relevance_by_rouge_is_called_so(runs, tmp_path):
    by_words = [dataclasses.replace(run, result=evaluate_corpus(run.corpus, "vizwiz", bootstrap=0)) for run in runs]
    words = " ".join(Page(write_report(tmp_path / "rouge.html", by_words).read_text()).text)
    assert "The meter is relevance by ROUGE-L." in words and "true relevance" not in words
    assert "is higher at" in words and "is better at" not in words  # no resamples, so there is no verdict
    assert "vizwiz: 120 images and 600 captions are not the benchmark's" in words


def test_labels_and_pictures_that_cannot_be_read(runs, tmp_path):
    run = runs[0]
    meta = [{"kind": place % 7} for place in range(len(run.corpus.keys))]
    corpus = dataclasses.replace(run.corpus, meta=meta)
    result = evaluate_corpus(corpus, "labels", ["kind"], bootstrap=20)
    broken = dict.fromkeys(corpus.keys, b"<svg onload=alert(1)>")
    page = Page(
        write_report(
            tmp_path / "l.html", [dataclasses.replace(run, corpus=corpus, result=result, images=broken)]
        ).read_text()
    )
    assert not page.of("img") and "picture cannot be shown" in page.text
    words = " ".join(page.text)
    assert "Same kind" in words and "✓ has the kind of the query, ✗ another." in words


def test_runs_of_other_samples_or_equal_names_are_refused(runs, tmp_path):
    other = dataclasses.replace(runs[1].corpus, keys=[key + "x" for key in runs[1].corpus.keys])
    with pytest.raises(ValueError, match="evaluated on different samples"):
        write_report(tmp_path / "r.html", [runs[0], dataclasses.replace(runs[1], corpus=other)])
    with pytest.raises(ValueError, match="different names"):
        write_report(tmp_path / "r.html", [runs[0], runs[0]])
    with pytest.raises(ValueError, match="at least one run"):
        write_report(tmp_path / "r.html", [])
    with pytest.raises(ValueError, match="and the teacher were evaluated on different samples"):
        write_report(tmp_path / "r.html", runs, teacher=other)
    assert not list(tmp_path.iterdir())


def test_pictures_are_encoded_anew_and_small(runs):
    key = runs[0].corpus.keys[0]
    uri = data_uri(runs[0].picture(key))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 12_000
    assert data_uri(b"no picture") is None and data_uri(None) is None


def test_load_metrics_takes_training_steps_once_and_drops_a_cut_line(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 2, "rsum": 4}, {"step": 2, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    assert load_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert load_metrics(tmp_path / "nowhere") == []


def test_a_run_without_steps_has_no_curves(runs, tmp_path):
    bare = [RunReport(run.name, tmp_path, [], run.result, run.corpus, run.images) for run in runs]
    page = Page(write_report(tmp_path / "bare.html", bare).read_text())
    assert "curves" not in [attrs["id"] for attrs in page.of("section")]
    assert "no training steps on record" in page.text


def test_what_people_judged_has_its_own_table(runs, tmp_path):
    judged = runs[0].result.metrics | {"cxc:sis/spearman": Measure(61.2, 60.1, 62.3, None, 900)}
    run = dataclasses.replace(runs[0], result=dataclasses.replace(runs[0].result, metrics=judged))
    words = " ".join(Page(write_report(tmp_path / "cxc.html", [run]).read_text()).text)
    assert "Crisscrossed Captions" in words and "60.1 to 62.3" in words
