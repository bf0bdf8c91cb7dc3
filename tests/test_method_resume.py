"""A study that is stopped, continued and changed: the documented small one from end to end, and what was made with
other settings is refused."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vlscale.resources import benchmarks_folder

METHOD = benchmarks_folder() / "method"
DOC = Path(__file__).resolve().parents[1] / "docs" / "method.md"


def documented() -> tuple[str, list[str]]:
    """The small study's file and its command."""
    (block,) = re.findall(r"```bash tried\n(.*?)```", DOC.read_text(), flags=re.S)
    (small,) = re.findall(r"<<'EOF'\n(.*?)EOF\n", block, flags=re.S)
    (command,) = [line.split() for line in block.splitlines() if line.startswith("vlscale bench")]
    return small, [sys.executable, "-m", *command]


def bench(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(documented()[1], cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with the documented study's file, and what its command made of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.yaml").write_text(documented()[0])
    done = bench(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def cells_of(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("[!.]*.json")}


def test_the_documented_small_study(copied):
    out = copied / "small-study"
    chosen = json.loads((out / "chosen.json").read_text())["clean"]
    assert chosen["heads"]["objective"]["relation_weight"] in (0.1, 0.3) and chosen["heads"]["meta"]["mode"] == "heads"
    assert "heads - contrastive" in (out / "study.md").read_text() and (out / "study.png").stat().st_size > 1000
    assert cells_of(out).keys() == {"tuning-clean", "clean-seed-0", "clean-seed-1"}
    assert all(cell["commit"] and cell["pairs"] == 128 for cell in cells_of(out).values())
    assert list((out / "work").iterdir()) == []  # a finished cell leaves no models behind
    (out / "cells" / "clean-seed-1.json").unlink()
    again = bench(copied)  # goes on: one cell is made anew
    assert again.returncode == 0 and re.findall(r"^\S+: \d+ s", again.stdout, flags=re.M)[0].startswith("clean-seed-1")


def test_a_changed_study_does_not_take_the_cells_of_another(copied):
    study = yaml.safe_load((copied / "small.yaml").read_text())
    study["levels"]["clean"]["preset"] = "image-weak"
    study["recipes"]["scenes"]["train"]["max_steps"] = 5
    (copied / "small.yaml").write_text(yaml.safe_dump(study))
    before = cells_of(copied / "small-study")
    page = (copied / "small-study" / "study.md").read_text()
    done = bench(copied)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert line.endswith(
        'tuning-clean.json: level.preset: expected "image-weak" as small.yaml has it, got "clean"; '
        "choose another --out, or delete this cell"
    )
    assert cells_of(copied / "small-study") == before and (copied / "small-study" / "study.md").read_text() == page


def test_a_study_that_was_killed_within_a_cell_ends_with_the_same_numbers(undisturbed, tmp_path):
    (tmp_path / "small.yaml").write_text(documented()[0].replace("seeds: [0, 1]", "seeds: [0]"))
    cells, work = tmp_path / "small-study" / "cells", tmp_path / "small-study" / "work" / "clean-seed-0"
    cells.mkdir(parents=True)
    shutil.copy(undisturbed / "small-study" / "cells" / "tuning-clean.json", cells)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(documented()[1], cwd=tmp_path, **quiet) as running:
        deadline = time.monotonic() + 600
        while not (work / "runs" / "contrastive" / "final").is_dir():  # and the other method is to come
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
    assert work.is_dir() and not (cells / "clean-seed-0.json").exists()
    trained = (work / "runs" / "contrastive" / "metrics.jsonl").stat().st_mtime_ns
    done = bench(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained < (tmp_path / "small-study" / "clean-seed-0.log").stat().st_mtime_ns and not work.exists()
    expected = cells_of(undisturbed / "small-study")["clean-seed-0"]
    found = cells_of(tmp_path / "small-study")["clean-seed-0"]
    assert found["measured"] == expected["measured"] and found["runs"] == expected["runs"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(METHOD.parent))
    monkeypatch.syspath_prepend(str(METHOD))
    return runpy.run_path(str(METHOD / "__main__.py"))


def asked_jobs(script, monkeypatch, study: dict, out: Path, *words: str) -> list[dict]:
    """The jobs that the study would run, all as if they had failed."""
    (out.parent / "study.yaml").write_text(yaml.safe_dump(study))
    asked = []
    monkeypatch.setitem(script["main"].__globals__, "_finished", lambda job, path: asked.append(job))
    monkeypatch.setitem(script["main"].__globals__, "write_study", lambda *given, keep: None)
    script["main"](["--study", str(out.parent / "study.yaml"), "--out", str(out), *words])
    return asked


def untuned_study() -> dict:
    study = yaml.safe_load(documented()[0]) | {"seeds": [0]}
    for own in study["methods"].values():
        del own["grid"]
    return study


def pretrained_study() -> dict:
    study = untuned_study()
    study["recipes"]["scenes"]["pretrained"] = {
        "corpus": {"preset": "clean", "pairs": 64},
        "train": {"max_steps": 2},
        "objective": {"name": "contrastive", "caption_weight": 1},
    }
    del study["recipes"]["scenes"]["teachers"]
    return study


CHANGES = {
    "recipe.train.max_steps: expected 9": lambda study: study["recipes"]["scenes"]["train"].update(max_steps=9),
    "recipe.optim: expected": lambda study: study["recipes"]["scenes"].update(optim={"lr": 0.1}),
    "level.knobs: expected": lambda study: study["levels"]["clean"].update(knobs={"blur": 1.0}),
    "pairs: expected 64": lambda study: study.update(pairs=64),
    "runs.heads.meta.inner_lr: expected 0.5": lambda study: study["methods"]["heads"]["is"]["meta"].update(
        inner_lr=0.5
    ),
    "runs.joint: expected": lambda study: study["methods"].update(joint={"is": {"objective": {"name": "covlr"}}}),
    "outside.heads: expected": lambda study: study["methods"]["heads"].update(outside="gap"),
    "theta_prime: expected": lambda study: study["methods"]["heads"].update(theta_prime=True),
}


def refused(script, monkeypatch, capsys, study: dict, out: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        asked_jobs(script, monkeypatch, study, out, *words)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "; choose another --out, or delete " in said
    return said


@pytest.mark.parametrize("left", ["cell", "cell, for its report", "half a cell"])
@pytest.mark.parametrize("problem", CHANGES)
def test_what_other_settings_made_is_refused(problem, left, script, monkeypatch, capsys, tmp_path):
    study, out = untuned_study(), tmp_path / "out"
    (job,) = asked_jobs(script, monkeypatch, study, out)
    if left == "half a cell":
        script["job_file"](job).write_text(json.dumps(job))
        Path(job["folder"]).mkdir(parents=True)
    else:
        Path(job["result"]).write_text(json.dumps(__import__("kept").settings(job) | {"measured": {}}))
    (same,) = asked_jobs(script, monkeypatch, study | {"selection": {"rsum": 1}, "endpoints": ["rsum"]}, out)
    assert same == job  # what changes no cell
    CHANGES[problem](study)
    words = ["--only-report"] if left == "cell, for its report" else []
    assert problem in refused(script, monkeypatch, capsys, study, out, *words)


def test_cells_that_hold_less_are_taken_where_that_agrees(script, monkeypatch, capsys, tmp_path):
    """As results were kept before cells told all their settings."""
    study, out = untuned_study(), tmp_path / "out"
    (job,) = asked_jobs(script, monkeypatch, study, out)
    older = {key: job[key] for key in ("name", "level_name", "seed", "split", "runs")} | {"measured": {}}
    Path(job["result"]).write_text(json.dumps(older))
    CHANGES["recipe.train.max_steps: expected 9"](study)
    assert asked_jobs(script, monkeypatch, study, out)
    CHANGES["runs.heads.meta.inner_lr: expected 0.5"](study)
    said = refused(script, monkeypatch, capsys, study, out)
    assert "runs.heads.meta.inner_lr: expected 0.5 as" in said and "got nothing" in said
    Path(job["result"]).write_text("{")
    with pytest.raises(SystemExit):
        asked_jobs(script, monkeypatch, study, out)
    assert "clean-seed-0.json: expected what a cell measured, got no JSON" in capsys.readouterr().err


def test_cells_of_another_study_are_not_taken_over(script, monkeypatch, capsys, tmp_path):
    study, out = untuned_study(), tmp_path / "out"
    (job,) = asked_jobs(script, monkeypatch, study, out)
    (tmp_path / "cells.json").write_text(json.dumps({job["name"]: job | {"measured": {}, "seed": 7}, "study": {}}))
    with pytest.raises(SystemExit):
        asked_jobs(script, monkeypatch, study, out, "--cells", str(tmp_path / "cells.json"))
    assert "cell clean-seed-0 of --cells: seed: expected 0 as" in capsys.readouterr().err
    assert not Path(job["result"]).exists()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"train": {"max_steps": 3}}, "plan.yaml: train.max_steps: expected 3"),
        ({"corpus": {"preset": "clean", "pairs": 128}}, "corpus.json: pairs: expected 128"),
    ],
)
def test_towers_of_another_pretraining_are_refused(change, problem, script, monkeypatch, capsys, tmp_path):
    study, out = pretrained_study(), tmp_path / "out"
    (job,) = asked_jobs(script, monkeypatch, study, out)
    plan, corpus = script["pretraining_of"](job | {"pretrained": "/elsewhere"})  # a folder that was copied
    folder = Path(job["pretrained"])
    folder.mkdir()
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    (folder / "corpus.json").write_text(json.dumps(corpus))
    assert asked_jobs(script, monkeypatch, study, out) == [job]
    study["recipes"]["scenes"]["pretrained"] |= change
    assert problem in refused(script, monkeypatch, capsys, study, out)


def test_a_level_that_is_only_tuned_on_is_not_measured(script, monkeypatch, tmp_path):
    study = yaml.safe_load(documented()[0])
    study["levels"]["clean"]["tuned_on"] = "text-noisy"  # of study.yaml
    monkeypatch.setitem(script["run_study"].__globals__, "choose", lambda study, trial: {"heads": {}})
    asked = asked_jobs(script, monkeypatch, study, tmp_path / "out")
    assert [job["name"] for job in asked] == ["tuning-text-noisy", "clean-seed-0", "clean-seed-1"]


def test_a_result_outlives_a_removal_that_was_cut_off(script, tmp_path):
    """Work that is half away is not continued: it goes to another name first."""
    work = tmp_path / "clean-seed-0"
    for folder in (work, tmp_path / "clean-seed-0.removed"):
        (folder / "data").mkdir(parents=True)
    script["clear"](work)
    assert not list(tmp_path.iterdir())
    script["clear"](work)  # nothing there
