"""A run as long as so many passes over its data: the same run as with that many steps, wherever steps are seen."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.train.launcher import launch
from vlscale.cli import main
from vlscale.config import load_plan, parse_overrides, validate
from vlscale.sections import TrainConfig
from vlscale.train.doctor_config import examine_config
from vlscale.train.epochs import steps_of
from vlscale.train.metrics_file import read_metrics

EPOCHS = ["train.max_steps=null", "train.epochs=1.5"]  # of 256 samples by 32: 12 steps
WARM = ["optim.warmup_steps=8", "optim.unlock_after={text: 7}"]
QUIET = "log.progress=false"


def command(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def refused(capsys, *words: str | Path) -> str:
    assert command(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("epochs") / "run"
    assert command("train", tiny_config, "--out", out, QUIET, *EPOCHS, *WARM) == 0
    return out


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "losses", "steps"),
    [(1, 256, 32, 1, 8), (1, 257, 32, 1, 9), (3, 100, 32, 1, 10), (0.1, 10, 1000, 1, 1), (0.7, 100, 10, 1, 7),
     (1.1, 100, 11, 1, 10), (2, 256, 32, 2, 8), (2, 256, 48, 2, 6)],
)  # fmt: skip
def test_steps_are_passes_rounded_up_to_a_whole_step(epochs, samples, batch, losses, steps):
    train = TrainConfig(epochs=epochs, global_batch_size=batch, accumulate_losses=losses)
    assert steps_of(train, samples) == steps


def test_the_run_is_that_of_so_many_steps(run, tiny_config, tmp_path):
    assert command("train", tiny_config, "--out", tmp_path / "steps", QUIET, "train.max_steps=12", *WARM) == 0
    lines, expected = (read_metrics(each / "metrics.jsonl") for each in (run, tmp_path / "steps"))
    assert [line["lr"] for line in lines] == [line["lr"] for line in expected] and len(lines) == 12
    assert lines[-1]["samples"] == 384 and weights(run) == weights(tmp_path / "steps")


def test_the_folder_keeps_what_was_asked_and_what_it_came_to(run):
    kept = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert (kept["epochs"], kept["max_steps"]) == (1.5, None)
    assert json.loads((run / "data.json").read_text())["steps"] == 12


def test_the_log_and_the_plan_say_it_first(tiny_config, tmp_path, caplog, capsys):
    said = "1.5 epochs of 256 samples, 12 steps of 32 pairs"
    assert command("train", tiny_config, "--out", tmp_path / "run", QUIET, *EPOCHS) == 0
    assert caplog.messages[0] == f"run: {said}"
    assert command("train", tiny_config, "--plan", *EPOCHS) == 0
    plan = capsys.readouterr().out
    assert f"note: {said}" in plan and ["steps", "12"] in [line.split() for line in plan.splitlines()]
    assert command("train", tiny_config, "--plan", *EPOCHS, "data.train=nowhere/*.tar") == 0
    assert "how many steps train.epochs=1.5 are is not known here: data.train: no shard" in capsys.readouterr().out
    assert command("train", tiny_config, "--plan", "train.max_steps=2000") == 0
    assert ["steps", "2,000"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_schedule_that_needs_more_steps_is_refused_before_a_model(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlscale.train.loop.build_parts", lambda *given: pytest.fail("a model was built"))
    line = refused(capsys, "train", tiny_config, "--out", tmp_path / "run", *EPOCHS, "optim.warmup_steps=12")
    assert "optim.warmup_steps=12 must be below the 12 steps of train.epochs=1.5" in line
    assert "must be below the 12" in refused(capsys, "train", tiny_config, "--plan", *EPOCHS, "optim.warmup_steps=12")
    line = refused(capsys, "train", tiny_config, "--out", tmp_path / "run", *EPOCHS, "optim.unlock_after={text: 12}")
    assert "optim.unlock_after.text=12 must be below the 12 steps of train.epochs=1.5" in line


def test_neither_is_refused_and_told_by_plan_and_doctor(tiny_config, tmp_path, capsys):
    line = refused(capsys, "train", tiny_config, "--out", tmp_path / "run", "train.max_steps=null")
    assert "train.max_steps is not set" in line and "train.epochs=3" in line
    assert command("train", tiny_config, "--plan", "train.max_steps=null") == 0
    assert "neither train.max_steps nor train.epochs is set" in capsys.readouterr().out
    for given, level, said in (
        (["train.max_steps=null"], "fail", "train.max_steps is not set"),
        (EPOCHS, "ok", "1.5 epochs of data.train"),
        ([], "ok", "6 steps"),
    ):
        (found,) = [each for each in examine_config(load_plan(tiny_config, given), 1) if each.name == "length"]
        assert found.level == level and said in found.value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.captions=all", "data.caption_key=json:captions"], "not known before all of it is read; give train.max"),
        (["data.max_repeats=3"], "train.epochs=3 needs more passes than data.max_repeats=3 allows"),
    ],
)
def test_passes_that_cannot_be_counted_or_made_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        validate(parse_overrides([*given, "train.epochs=3"]), "test")
    validate(parse_overrides([*given, "train.max_steps=3"]), "test")


def test_captions_of_their_own_members_are_one_a_sample_and_can_all_be_counted():
    validate(parse_overrides(["data.captions=all", "data.caption_key=txt", "train.epochs=3"]), "test")


def test_two_ranks_make_as_many_steps_of_the_same_samples(run, tiny_config, tmp_path):
    done = launch(Path(tiny_config), tmp_path / "two", QUIET, *EPOCHS, *WARM)
    assert done.returncode == 0, done.stderr[-4000:]
    found, expected = (read_metrics(each / "metrics.jsonl") for each in (tmp_path / "two", run))
    assert [line["keys"] for line in found] == [line["keys"] for line in expected]
    assert (done.stderr + done.stdout).count("1.5 epochs of 256 samples") == 1


def unfinished(run: Path, out: Path) -> Path:
    """As it was after step 10."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-12")
    return out


def test_a_resumed_run_ends_with_the_same_bytes(run, tiny_config, tmp_path):
    out = unfinished(run, tmp_path / "run")
    assert command("train", tiny_config, "--out", out, "--resume", QUIET, *EPOCHS, *WARM) == 0
    assert weights(out) == weights(run) and len(read_metrics(out / "metrics.jsonl")) == 12


def test_other_data_that_would_be_other_steps_are_refused_on_resume(run, tiny_config, corpus, tmp_path, capsys):
    out, fewer = unfinished(run, tmp_path / "run"), f"data.train={corpus}/train-00000[012].tar"
    resume = ["train", tiny_config, "--out", out, "--resume", QUIET, fewer, *WARM]
    assert "the shards (their manifest) changed" in refused(capsys, *resume, "train.max_steps=null", "train.epochs=2")
    resume += ["data.changed_shards=next_epoch"]
    line = refused(capsys, *resume, *EPOCHS)
    assert "train.epochs=1.5 were 12 steps of 256 samples, and are 9 of the 192 that there are now" in line
    assert "train.max_steps=12 (or another number) and train.epochs=null" in line and not (out / "final").exists()
    assert command(*resume, "train.max_steps=12", "train.epochs=null") == 0
    assert len(read_metrics(out / "metrics.jsonl")) == 12


def test_other_data_of_as_many_steps_go_on(run, tiny_config, corpus, tmp_path):
    out, more = unfinished(run, tmp_path / "run"), f"data.train=[{corpus}/train-*.tar, {tmp_path}/one.tar]"
    shutil.copy(corpus / "val-000000.tar", tmp_path / "one.tar")
    begun = json.loads((out / "data.json").read_text())
    (out / "data.json").write_text(json.dumps(begun | {"samples": 319}))
    given = [QUIET, *WARM, more, "train.max_steps=null", "train.epochs=1.2", "data.changed_shards=next_epoch"]
    assert command("train", tiny_config, "--out", out, "--resume", *given) == 0
    assert len(read_metrics(out / "metrics.jsonl")) == 12


def test_what_reads_a_run_knows_its_length(run, tiny_config, tmp_path, capsys, caplog):
    assert "--step 13: the run has steps 1 to 12" in refused(capsys, "replay", run, "--step", "13")
    assert command("export", run, tmp_path / "model") == 0
    assert "| epochs | 1.5 |" in (tmp_path / "model" / "README.md").read_text()
    caplog.clear()
    longer = ["train.max_steps=null", "train.epochs=3", *WARM]
    assert command("train", tiny_config, "--out", run, "--resume", QUIET, *longer) == 0
    assert "it ended after 12 steps, and train.epochs=3.0 (it has 1.5) takes another run" in caplog.text
