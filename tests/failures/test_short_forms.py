"""`vlscale bench failures` in its short form: each fault once, nothing is lost."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import failures
import failures_faults as faults
import failures_job as jobs

from vlscale.config import load_plan
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan


@dataclass(frozen=True)
class Here(jobs.Place):
    """With the suite's corpus. Every training is a process of its own: what it computes to the last bit must not depend
    on what other tests have left in this one."""

    scenes: Path

    @property
    def corpus(self) -> Path:
        return self.scenes


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Here:
    return Here(tmp_path_factory.mktemp("failures"), corpus)


@pytest.mark.parametrize("name", ["damaged", "full-disk", "read-only", "lost-shard", "nan"])
def test_one_rank(place, name):
    outcome = faults.FAULTS[name].run(place, 1 if name == "damaged" else 0, random.Random(name), 1)
    assert outcome.lost == [] and outcome.moment != "complete"


def test_kill_nine_and_a_rank_that_never_answers_again(place, monkeypatch):
    """Both on one training: killed in a save, continued, a rank stopped for good, continued to the end."""
    monkeypatch.setattr(faults, "chain_steps", lambda trials: faults.STEPS)
    killed = faults.kill_nine(place, 1, random.Random(1), 1)
    assert killed == faults.Outcome(killed.moment, []) and killed.moment in faults.MOMENTS
    run, _ = faults._chain(place, "kill", 1)
    run.rename(place.root / "asleep-for-ever-0")
    monkeypatch.setattr(faults, "GIVE_UP", 20)
    stopped = faults.asleep_for_ever(place, 0, random.Random(0), 1)
    assert stopped.lost == [], stopped


def test_sigterm_to_a_job_of_two_ranks(place, monkeypatch):
    monkeypatch.setattr(faults, "chain_steps", lambda trials: 200)
    monkeypatch.setattr(place.__class__, "undisturbed", lambda self, ranks, steps: self.root / "not-looked-at")
    monkeypatch.setattr(faults, "start_of", lambda run, undisturbed: [])
    outcome = faults.sigterm(place, 0, random.Random(0), 1)
    assert outcome.lost == [] and outcome.moment in faults.MOMENTS
    stopped = place.root / "sigterm" / "training-1"
    steps = [line["step"] for line in read_metrics(stopped / "metrics.jsonl")]
    assert (stopped / "checkpoints" / f"step-{steps[-1]}" / "manifest.json").is_file() and steps[-1] < 200


def test_the_clock_jumps(place, monkeypatch):
    monkeypatch.setattr(faults, "CLOCK_RANKS", 1)
    outcome = faults.clock_jumps(place, 0, random.Random(0), 1)
    assert outcome.lost == []


def test_what_is_lost_is_seen(place, tmp_path):
    """The comparison itself: samples, steps, weights, files, and a process that stays."""
    undisturbed = place.undisturbed(1, faults.STEPS)
    assert jobs.difference(undisturbed, undisturbed) == []
    other = tmp_path / "other"
    train_plan(load_plan(place.recipe(faults.STEPS), ["train.seed=1"]), other, resume=False)
    (other / "checkpoints" / ".step-9.partial").mkdir()
    lost = jobs.difference(other, undisturbed)
    assert lost == ["other samples", "other weights", "checkpoints/.step-9.partial is left"]
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert "steps are missing or doubled" in jobs.difference(other, undisturbed)
    assert jobs.start_of(other, undisturbed) == ["other samples"] and jobs.start_of(undisturbed, undisturbed) == []


def test_a_process_that_stays_is_seen_and_ended(place, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LEFT", 0.2)
    script = tmp_path / "parent.py"
    script.write_text("import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n")
    with jobs.Job(place.recipe(1), tmp_path / "run", script=script) as job:
        assert job.wait(60) == 0
        (child,) = job.alive()
        assert job.leftovers() == [f"process {child.pid} is left"]
    child.wait(10)
    assert job.alive() == []


def test_trials_are_kept_and_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    asked = []

    def fault(place, trial, dice, trials):
        asked.append(trial)
        return faults.Outcome("step", ["a bit"] if trial == 1 else [])

    monkeypatch.setitem(failures.FAULTS, "nan", faults.Fault("a fault", fault))
    command = ["--trials", "60", "--faults", "nan", "--out", str(tmp_path)]
    assert failures.main([*command, "--minutes", "0"]) == 0 and asked == []
    assert failures.main(command) == 1 and asked == [0, 1, 2]
    assert failures.main(command) == 1 and asked == [0, 1, 2]
    assert "| a fault | 3 | step 3 | 1 |" in capsys.readouterr().out
    assert [row["lost"] for row in map(json.loads, (tmp_path / "trials.jsonl").open())] == [[], ["a bit"], []]
    with pytest.raises(SystemExit, match="choose another --out"):
        failures.main([*command[2:], "--trials", "61"])
