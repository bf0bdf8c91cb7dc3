"""The study's section: numbers that are the cells', winners that are winners, a page that is read without scripts."""

import json

import numpy as np
import pytest

from tests.report.test_report import Page
from vlscale.cli import main
from vlscale.evaluate.paired import seed_interval
from vlscale.report import read_study, study_of, write_report, write_study_page
from vlscale.report.study import ENDPOINTS, compared

NASTY = "<script>alert(1)</script>"


def cells(seeds: int = 5) -> dict:
    """On level `plain`, joint gains 1 to 2 everywhere but in rsum, where it loses; heads is joint give or take."""
    found = {}
    for level, count in (("plain", seeds), (NASTY, 2)):
        for seed in range(count):
            base = dict.fromkeys(ENDPOINTS, 10.0 * (seed + 1))
            joint = {name: value + 1 + seed / 4 for name, value in base.items()} | {"rsum": base["rsum"] - 3 - seed}
            heads = {name: value + (0.5 if seed % 2 else -0.5) for name, value in joint.items()}
            measured = {"teachers": base, "contrastive": base, "joint": joint, "heads": heads}
            found[f"{level}-{seed}"] = {"level_name": level, "seed": seed, "split": "test", "measured": measured}
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
    assert ("heads", "joint") in compared(study.methods)
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
    assert "joint +1.5, better" in panel.summary


def test_the_page_is_whole_safe_and_usable_with_a_keyboard(path, tmp_path):
    html = write_study_page(tmp_path / "study.html", study_of(read_study(path)), NASTY).read_text()
    page = Page(html)
    assert not page.of("script") and NASTY not in html and "http" not in html
    words = " ".join(page.text)
    assert "+1.5" in words and "+1.2 to +1.8" in words and "too few to conclude anything" in words
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
    del found["plain-0"]["measured"]["heads"]
    return found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "expected the cells that `vlscale bench method --write` keeps, got JSONDecodeError"),
        (json.dumps({"a": {"split": "test"}}), "KeyError"),
        (json.dumps({"a": {"split": "val"}}), "holds no cell that was measured on test"),
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
