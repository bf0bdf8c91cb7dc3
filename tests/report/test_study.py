"""The study's section: numbers that are the cells', winners that are winners, a page that is read without scripts."""

import json
import runpy

import numpy as np
import pytest
import yaml

from tests.report.test_report import Page
from vlscale.cli import main
from vlscale.evaluate.paired import seed_interval
from vlscale.report import read_study, study_of, write_report, write_study_page
from vlscale.report.study import ENDPOINTS, USUAL, compared
from vlscale.resources import benchmarks_folder

NASTY = "<script>alert(1)</script>"
OWN = {"comparisons": [["heads", "joint"], ["joint", "contrastive"], ["heads'", "heads"], ["joint", "teachers"]]}
OWN |= {"name": "own", "endpoints": ["reranked", "rsum", "t2t"]}


def cells(seeds: int = 5) -> dict:
    """On level `plain`, joint gains 1 to 2 everywhere but in rsum, where it loses; heads is joint give or take."""
    found = {}
    for level, count in (("plain", seeds), (NASTY, 2)):
        for seed in range(count):
            base = dict.fromkeys(ENDPOINTS, 10.0 * (seed + 1))
            joint = {name: value + 1 + seed / 4 for name, value in base.items()} | {"rsum": base["rsum"] - 3 - seed}
            heads = {name: value + (0.5 if seed % 2 else -0.5) for name, value in joint.items()}
            measured = {"teachers": base, "contrastive": base, "joint": joint, "heads": heads}
            found[f"{level}-seed-{seed}"] = {"level_name": level, "seed": seed, "split": "test", "measured": measured}
    found["tuning"] = {"level_name": "plain", "seed": 100, "split": "val", "measured": {}}
    return found


@pytest.fixture
def path(tmp_path):
    (tmp_path / "cells.json").write_text(json.dumps(cells()))
    return tmp_path / "cells.json"


def test_differences_are_the_cells_and_winners_are_ahead(path):
    study = study_of(read_study(path))
    plain, few = study.levels
    assert (plain.name, plain.seeds, plain.enough, few.enough) == ("plain", 5, True, False)
    assert [(c.first, c.second) for c in plain.comparisons] == compared(study.methods)
    assert ("heads", "joint") in compared(study.methods) and len(study.titles) == len(USUAL) == 6
    by_title = dict(zip(study.titles, plain.comparisons[0].differences, strict=True))
    i2i = by_title["picture to picture"]
    assert i2i.mean == pytest.approx(1.5) and i2i.word == "better"
    assert (i2i.low, i2i.high) == pytest.approx(seed_interval(np.array([1, 1.25, 1.5, 1.75, 2])))
    assert by_title["rsum, of 600"].word == "worse"
    assert {d.word for c in few.comparisons for d in c.differences} == {"too few seeds"}
    marks = {method: [mean.mark for mean in means] for method, means in plain.means}
    assert marks["contrastive"][0] == "best" and marks["teachers"][0] == ""  # rsum: ahead of both others, beyond chance
    assert "highest" in marks["joint"] + marks["heads"] and "best" not in marks["joint"] + marks["heads"]


def test_tallies_count_levels(path):
    study = study_of(read_study(path))
    tally = next(t for t in study.tallies if (t.first, t.second) == ("joint", "contrastive"))
    assert tally.counts[0] == {"better": 0, "worse": 1, "no clear change": 0, "too few seeds": 1}
    assert "joint better 5, worse 1" in study.lead


def test_dots_lie_where_their_values_do(path):
    panel = study_of(read_study(path)).levels[0].panels[1]
    joint = panel.dots[0]
    assert panel.zero < joint.low < joint.at < joint.high and len(joint.seeds) == 5
    assert joint.seeds == sorted(joint.seeds) and joint.seeds[0] > panel.zero
    assert "against contrastive: joint +1.5, better; heads" in panel.summary
    assert [dot.method for dot in panel.dots] == ["joint", "heads", "heads"]
    ((first, base), (second, other)) = panel.heads
    assert (base, other) == ("contrastive", "joint") and first < joint.y < panel.dots[1].y < second < panel.dots[2].y


def test_a_study_s_own_comparisons_and_endpoints_are_those_shown(path, tmp_path):
    given = cells()
    for cell in given.values():
        if measured := cell["measured"]:
            measured["heads'"] = {name: value + 3 + cell["seed"] / 4 for name, value in measured["heads"].items()}
    path.write_text(json.dumps(given | {"study": OWN}))
    study = study_of(read_study(path))
    assert study.titles == ["rsum, re-ranked", "rsum, of 600", "caption to caption"]
    pairs = [tuple(pair) for pair in OWN["comparisons"]]
    assert [(t.first, t.second) for t in study.tallies] == pairs
    for level in study.levels:
        assert [(c.first, c.second) for c in level.comparisons] == pairs
        assert all(len(means) == 3 for _, means in level.means)
        own = [[second for _, second in panel.heads] for panel in level.panels]
        assert own == [["joint", "contrastive", "heads"]] * 2 + [["joint", "contrastive", "heads", "teachers"]]
    moved = study.levels[0].comparisons[2].differences
    assert [d.mean for d in moved] == pytest.approx([3.5] * 3) and {d.word for d in moved} == {"better"}
    assert "against joint: heads -0.1, no clear change; against contrastive: joint" in study.levels[0].panels[2].summary
    assert "joint better 2, worse 1" in study.lead and "heads" not in study.lead
    words = " ".join(Page(write_study_page(tmp_path / "s.html", study).read_text()).text)
    assert "heads' against heads" in words and "heads' \u2212 heads" in words and "picture to both" not in words


def test_cells_are_kept_with_what_the_study_compares_and_given_again(path, tmp_path, monkeypatch):
    """What `--write` keeps is shown, and `--cells` takes it back: the entry of the study is no cell."""
    script = runpy.run_path(str(benchmarks_folder() / "method" / "__main__.py"))
    monkeypatch.setitem(script["write_study"].__globals__, "RESULTS", tmp_path)
    before = {name: cell for name, cell in cells().items() if cell["level_name"] == "plain"}
    path.write_text(json.dumps(before))  # without an entry of the study, as files were kept once
    own = OWN | {"levels": {"plain": {}}, "seeds": [0, 1, 2, 3, 4], "comparisons": [["heads", "joint"]]}
    own |= {"methods": {name: {"is": {}} for name in ("contrastive", "joint", "heads")}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(own))
    for out in (tmp_path / "first", tmp_path / "second"):
        words = ["--study", str(tmp_path / "study.yaml"), "--out", str(out), "--cells", str(path)]
        assert script["main"]([*words, "--only-report", "--write"]) == 0
        assert {file.stem for file in (out / "cells").iterdir()} == before.keys()
        (path,) = tmp_path.glob("*-method-own-cells.json")
        kept = json.loads(path.read_text())
        assert kept.pop("study") == {key: own[key] for key in OWN} and kept == before
        study = study_of(read_study(path))
        assert [(t.first, t.second) for t in study.tallies] == [("heads", "joint")] and len(study.titles) == 3


RESULTS = sorted((benchmarks_folder() / "results").glob("*-cells.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_that_were_kept_can_be_shown(file, tmp_path):
    study = study_of(read_study(file))
    assert study.lead in Page(write_study_page(tmp_path / "s.html", study).read_text()).text


def test_the_page_is_whole_safe_and_usable_with_a_keyboard(path, tmp_path):
    html = write_study_page(tmp_path / "study.html", study_of(read_study(path)), NASTY).read_text()
    page = Page(html)
    assert not page.of("script") and NASTY not in html and "http" not in html
    words = " ".join(page.text)
    low, high = seed_interval(np.array([1, 1.25, 1.5, 1.75, 2]))
    assert "+1.5" in words and f"{low:+.1f} to {high:+.1f}" in words and "too few to conclude anything" in words
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert all(attrs["href"].removeprefix("#") in ids for attrs in page.of("a"))
    assert all(attrs.get("aria-label") for attrs in page.of("svg"))
    assert all(attrs.get("tabindex") == "0" for _, attrs in page.tags if attrs.get("role") == "region")


def test_a_report_of_runs_has_it_as_a_section(path, runs, tmp_path):
    methods = study_of(read_study(path))
    page = Page(write_report(tmp_path / "r.html", runs, methods=methods).read_text())
    assert "study" in {attrs.get("id") for attrs in page.of("section")}
    assert "Methods compared" in page.text and methods.lead in page.text


def test_the_command_writes_it_alone(path, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "--study", str(path), "--out", str(tmp_path / "s.html")])
    assert not ended.value.code and "s.html" in capsys.readouterr().out and (tmp_path / "s.html").is_file()
    with pytest.raises(SystemExit) as ended:
        main(["report", "--out", str(tmp_path / "t.html")])
    assert ended.value.code == 2 and "got neither runs nor --study" in capsys.readouterr().err


def uneven() -> dict:
    found = cells()
    del found["plain-seed-0"]["measured"]["heads"]
    return found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "expected the cells that `vlscale bench method --write` keeps, got JSONDecodeError"),
        (json.dumps({"a": {"split": "test"}}), "KeyError"),
        (json.dumps({"a": {"split": "val"}}), "holds no cell that was measured on test"),
        (json.dumps(cells() | {"study": {"endpoints": ["r1"]}}), "KeyError"),
        (json.dumps(cells() | {"study": {"comparisons": [["joint"]]}}), "ValueError"),
        (json.dumps(uneven()), "every seed of level plain needs the same methods, contrastive among them"),
    ],
)
def test_files_that_are_no_study_are_one_clear_line(tmp_path, content, said):
    (tmp_path / "cells.json").write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_study(tmp_path / "cells.json")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not exist"):
        read_study(tmp_path / "none.json")
