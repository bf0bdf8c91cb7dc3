"""The method study: its intervals and tables on hand-made cells, what it refuses, and terms from outside."""

import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from vlscale.distributed import Ranks
from vlscale.evaluate.paired import bootstrap_interval, seed_interval
from vlscale.kernels import relation_kl_loss
from vlscale.objectives import total
from vlscale.resources import benchmarks_folder
from vlscale.sections import ObjectiveConfig
from vlscale.train import plan
from vlscale.train.metrics_file import read_metrics

METHOD = benchmarks_folder() / "method"


@pytest.fixture(scope="module")
def analyse():
    sys.path[:0] = [str(METHOD), str(METHOD.parent)]
    try:
        import analyse

        yield analyse
    finally:
        del sys.path[:2]


def test_every_difference_in_the_docs_is_one_of_a_result():
    """Rows of five endpoints, each a mean and its interval, stand in a differences.csv of benchmarks/results/."""
    kept: dict[tuple, dict[str, list[float]]] = {}
    for path in (benchmarks_folder() / "results").glob("*-differences.csv"):
        for row in csv.DictReader(path.open()):
            own = kept.setdefault((path.name, row["level"], row["first"], row["second"]), {})
            own[row["endpoint"]] = [float(row[key]) for key in ("mean", "t_low", "t_high")]
    results = np.array([[own[name] for name in ("rsum", "i2i", "t2t", "i2it", "t2it")] for own in kept.values()])
    told = 0
    for line in (Path(__file__).resolve().parents[1] / "docs" / "method.md").read_text().splitlines():
        shown = [re.findall(r"[-+]?[\d.]+", cell) for cell in line.split("|")[2:-1]]
        if [len(cell) for cell in shown] == [3] * 5 and "[" in line:
            told += 1
            assert (abs(results - np.array(shown, dtype=float)) < 0.0501).all((1, 2)).any(), line
    assert told > 50


def test_an_interval_of_equal_differences_is_a_point():
    assert seed_interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0)


def test_an_interval_is_students():
    stats = pytest.importorskip("scipy.stats")
    for seeds in (2, 3, 5, 16, 17, 40):
        given = np.random.default_rng(seeds).normal(1, 2, seeds)
        expected = stats.t.interval(0.95, seeds - 1, given.mean(), stats.sem(given))
        assert seed_interval(given) == pytest.approx(expected, abs=2e-3 * given.std())
    assert np.isnan(seed_interval(np.array([1.0]))).all()


def test_a_bootstrap_of_seeds_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for seeds in (4, 5, 40):
        given = np.random.default_rng(seeds).normal(1, 2, seeds)
        options = {"n_resamples": 20_000, "method": "percentile", "random_state": 1}
        expected = stats.bootstrap((given,), np.mean, **options).confidence_interval
        assert bootstrap_interval(given) == pytest.approx(tuple(expected), abs=0.03 * given.std())


def test_an_interval_of_five_seeds_covers_the_mean_95_times_of_100():
    bounds = [seed_interval(given) for given in np.random.default_rng(0).normal(size=(4000, 5))]
    assert np.mean([low <= 0 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.01)


def test_a_percentile_bootstrap_of_five_seeds_covers_it_84_times_of_100():
    """Why the intervals are not that."""
    bounds = [bootstrap_interval(given) for given in np.random.default_rng(0).normal(size=(2000, 5))]
    assert np.mean([low <= 0 <= high for low, high in bounds]) == pytest.approx(0.84, abs=0.015)


def cells(folder: Path, analyse) -> None:
    for seed, gain in enumerate((2.0, 2.5, 3.0)):
        plain = dict.fromkeys(analyse.NAMES, 10.0 * (seed + 1))
        better = {name: value + gain for name, value in plain.items()} | {"rsum": plain["rsum"]}
        measured = {"teachers": plain, "contrastive": plain, "joint": better}
        (folder / f"clean-seed-{seed}.json").write_text(json.dumps({"measured": measured}))


def test_differences_are_paired_by_seed(analyse, tmp_path, monkeypatch):
    """Seeds differ by 10 and the methods by 2 to 3: only paired does the difference leave out zero."""
    cells(tmp_path, analyse)
    study = {
        "levels": {"clean": {}},
        "seeds": [0, 1, 2],
        "methods": {"contrastive": {}, "joint": {}},
        "comparisons": [["joint", "contrastive"]],
    }
    table = analyse.read_cells(study, tmp_path)
    assert analyse.paired(table["clean"], "joint", "contrastive", "i2i").tolist() == [2.0, 2.5, 3.0]
    assert "| joint - contrastive | +0.0 | +2.5 |" in analyse.markdown(study, table, {})  # too few for an interval
    monkeypatch.setattr(analyse, "ENOUGH", 3)
    page = analyse.markdown(study, table, {})
    assert "| contrastive | 20.0 |" in page and "| joint | 20.0 | 22.5 |" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| joint - contrastive |")]
    assert "+0.0 [+0.0, +0.0]" in row and "**+2.5 [+1.3, +3.7]**" in row
    assert "mixture" not in page
    for seed, cell in table["clean"].items():
        cell["joint"]["mixture_text"] = 0.5 + seed / 100
    told = "Weight of the text in the mixture of `joint` at its last step, by seed: 0.500, 0.510, 0.520.\n"
    assert told in analyse.markdown(study, table, {})
    lines = analyse.as_csv(study, table).splitlines()
    assert len(lines) == 1 + 3 * 3 and lines[1].startswith("clean,0,teachers,10.0000")
    rows = {row["endpoint"]: row for row in csv.DictReader(analyse.differences_csv(study, table).splitlines())}
    assert list(rows) == list(analyse.names_of(study)) and rows["rsum"]["mean"] == "0.0000"
    shown = [float(rows["i2i"][name]) for name in ("mean", "t_low", "t_high", "boot_low", "boot_high")]
    assert shown == pytest.approx([2.5, 1.2579, 3.7421, 2.0, 3.0], abs=1e-3)


def test_a_page_says_which_commits_trained_its_cells_where_it_has_another(analyse, tmp_path, monkeypatch):
    cells(tmp_path, analyse)
    study = {"levels": {"clean": {}}, "seeds": [0, 1, 2], "methods": {"contrastive": {}}, "comparisons": []}
    for seed, commit in ((0, "a1"), (1, "b2-dirty")):
        path = tmp_path / f"clean-seed-{seed}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": commit}))
    found, table = analyse.trained_at(study, tmp_path), analyse.read_cells(study, tmp_path)
    monkeypatch.setattr(analyse, "commit", lambda: "a1")
    said = "Cells were trained earlier: 1 at commit a1, 1 at commit b2-dirty, 1 at a commit that was not kept."
    assert said in analyse.markdown(study, table, {}, found)
    alone = analyse.trained_at(study | {"seeds": [0]}, tmp_path)
    assert "trained earlier" not in analyse.markdown(study, table, {}, alone)


@pytest.mark.parametrize("name", ["study", "trained", "pretrained", "pretrained-tuned"])
def test_every_run_of_a_tuned_study_gets_as_many_trials(name):
    study = yaml.safe_load((METHOD / f"{name}.yaml").read_text())
    assert {name for pair in study["comparisons"] for name in pair} <= {"teachers", *study["methods"]}
    assert len({len(own["grid"]) for own in study["methods"].values()}) == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in METHOD.glob("*.yaml")))
def test_every_study_that_is_kept_can_begin(name, tmp_path, monkeypatch):
    """Every plan that its cells would train is accepted: nothing is run."""
    script = runpy.run_path(str(METHOD / "__main__.py"))
    asked = []
    monkeypatch.setitem(script["main"].__globals__, "_finished", lambda job, path: asked.append(job))
    given = ["--study", str(METHOD / f"{name}.yaml"), "--out", str(tmp_path), "--emoji", str(tmp_path)]
    if script["untuned"](script["read_study"](METHOD / f"{name}.yaml")) is None:
        with pytest.raises(SystemExit, match="a tuning cell failed"):
            script["main"](given)
    else:
        assert script["main"](given) == 1  # every cell is asked for and none is made
    assert asked and all(job["runs"] for job in asked)


def refused(given: list[str], capsys) -> str:
    """What the command says, which ends with 2."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(METHOD / "__main__.py"))["main"](given)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "method, problem",
    [
        ({"joint-0.3": {"is": {}}}, "names in `variants` are of letters, digits, - and _, got 'joint-0.3'"),
        ({"joint": {"is": {"objective": {"name": "kovlr"}}}}, "(joint): objective.name"),
        ({"joint": {"is": {}, "outside": "gapp"}}, "bad.yaml: outside: unknown term 'gapp'; there are: confident, gap"),
    ],
)
def test_a_study_with_a_run_that_cannot_be_trained_is_refused_at_once(method, problem, tmp_path, capsys):
    own = {"base": str(METHOD / "pretrained.yaml"), "methods": method, "comparisons": []}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(own))
    said = refused(["--study", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")], capsys)
    place = "" if "outside" in problem else "config "
    assert f"{place}{tmp_path}/bad.yaml" in said and problem in said
    assert not list((tmp_path / "out" / "cells").iterdir())


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.syspath_prepend(str(METHOD))
    import outside

    return outside


def test_a_confident_teacher_weighs_its_rows(outside):
    """Of a teacher who is as sure of every row it is the package's row KL; else sure rows count for more."""
    objective = ObjectiveConfig(name="covlr", student_temperature=0.2, teacher_temperature=0.3)
    torch.manual_seed(0)
    student = F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)

    def confident(teacher: torch.Tensor) -> torch.Tensor:
        return outside.confident_relation(student, teacher, objective, Ranks(), comm="auto", name="relation")[0]

    turns = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    even = torch.stack([turns.cos(), turns.sin()], dim=1)
    given = {"student_temperature": 0.2, "teacher_temperature": 0.3, "scope": "row", "impl": "reference"}
    torch.testing.assert_close(confident(even), relation_kl_loss(student, even, **given))
    uneven = F.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1)
    weights, distances = [], []
    for row in range(8):
        others = [at for at in range(8) if at != row]
        teacher = (uneven[row] @ uneven[others].T / 0.3).softmax(0)
        own = (student[row] @ student[others].T / 0.2).softmax(0)
        weights.append(1 - float(-(teacher * teacher.log()).sum()) / np.log(7))
        distances.append(float((teacher * (teacher / own).log()).sum()))
    assert float(confident(uneven)) == pytest.approx(np.average(distances, weights=weights))


def test_a_term_from_outside_goes_to_its_own_run_alone(outside, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        plan, "train_run", lambda job, resume: seen.update({job.folder.name: (total.relation, total.consistency_loss)})
    )
    package = total.relation, total.consistency_loss
    with outside.outside({"sure": "confident", "near": "gap"}):
        for name in ("plain", "sure", "near"):
            plan.train_run(SimpleNamespace(folder=Path(name)), resume=True)
    assert seen["plain"] == package == (total.relation, total.consistency_loss)
    assert seen["sure"] == (outside.confident_relation, package[1])
    assert seen["near"] == (package[0], outside.consistency_without_gap)


def test_a_gap_between_the_means_is_added(outside):
    image, text = F.normalize(torch.randn(2, 6, 4), dim=2)
    rows = total.Embedded(image, text, torch.tensor(5.0), None, torch.arange(6))
    objective = ObjectiveConfig(name="contrastive")
    plain, _ = total.consistency_loss(rows, objective, Ranks())
    with_gap, metrics = outside.consistency_without_gap(rows, objective, Ranks())
    gap = float((image.mean(0) - text.mean(0)).square().sum())
    assert float(with_gap - plain) == pytest.approx(gap, rel=1e-4) and float(metrics["gap"]) == pytest.approx(gap)


def test_one_pretraining_a_seed_serves_all_levels(tmp_path):
    """Towers and teachers of pretrained.yaml: the run is there once, and both levels measure it as their teachers."""
    study = yaml.safe_load((METHOD / "pretrained.yaml").read_text())
    scenes = study["recipes"]["scenes"]
    scenes["optim"]["warmup_steps"], scenes["train"] = 1, {"global_batch_size": 32, "max_steps": 2}
    scenes["pretrained"] |= {"corpus": {"preset": "clean", "pairs": 128}, "train": {"max_steps": 2}}
    study |= {"base": str(METHOD / "trained.yaml"), "name": "small", "pairs": 64, "held_out": 64, "seeds": [3]}
    del study["levels"]["text-generic"]
    study["methods"] = {name: {"is": study["methods"][name]["is"]} for name in ("contrastive", "rvlr")}
    study["comparisons"] = [["rvlr", "contrastive"]]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study))
    given = ["--study", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--processes", "2"]
    done = subprocess.run([sys.executable, str(METHOD), *given], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("[!.]*.json")}
    assert cells.keys() == {"image-weak-seed-3", "text-noisy-seed-3"}
    assert all(own["measured"].keys() == {"teachers", "contrastive", "rvlr"} for own in cells.values())
    learned = {own["measured"]["rvlr"]["mixture_text"] for own in cells.values()}
    assert len(learned) == 2 and all(0.4 < w < 0.6 for w in learned)
    assert all("mixture_text" not in own["measured"]["contrastive"] for own in cells.values())
    runs = tmp_path / "out" / "pretrained-seed-3" / "runs"
    assert (runs / "final").is_dir() and not (runs.parent / "data").exists()
    assert [line["step"] for line in read_metrics(runs / "metrics.jsonl")] == [1, 2]


def test_a_study_of_nothing_is_refused(tmp_path, capsys):
    assert "emoji needs --emoji FOLDER" in refused(["--out", str(tmp_path / "s"), "--levels", "emoji"], capsys)
