"""What a run says at its start, and what it finds wrong there: once, in one line, before anything heavy."""

import io
import re
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.train.launcher import launch
from vlscale.cli import main
from vlscale.config import dump, load_plan
from vlscale.data.writer import write_shard
from vlscale.train.plan import train_plan

EVERY_READER = [  # of the corpus at the start: the tokenizer, the teachers' reliability, the probe, the stream
    "objective={name: covlr, relation_reliability: true}", "teacher.source=frozen_copy", "log.diagnostics_every=1",
    "data.weights=[1]", "train.max_steps=1", "log.progress=false",
]  # fmt: skip


@pytest.fixture
def faulty(corpus, tmp_path) -> str:
    """A copy of the corpus's shards, the first without one picture."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    for shard in corpus.glob("train-*.tar"):
        shutil.copy(shard, folder)
    first = folder / "train-000000.tar"
    with tarfile.open(corpus / first.name) as whole, tarfile.open(first, "w") as lacking:
        for member in whole.getmembers()[1:]:
            lacking.addfile(member, whole.extractfile(member))
    return f"data.train={folder}/train-*.tar"


@pytest.fixture
def evaluated(corpus, tmp_path) -> list[str]:
    """After each of two steps, a shard without two pictures, and with half a picture and half a json."""
    shard = tmp_path / "val-000000.tar"
    with tarfile.open(corpus / shard.name) as whole, tarfile.open(shard, "w") as lacking:
        pictures = [member.name for member in whole.getmembers() if member.name.endswith(".jpg")]
        for member in whole.getmembers():
            if member.name not in pictures[:2]:
                content = whole.extractfile(member).read()
                halved = pictures[2], pictures[3].replace(".jpg", ".json")
                content = content[: len(content) // 2] if member.name in halved else content
                member.size = len(content)
                lacking.addfile(member, io.BytesIO(content))
    return [f"data.val={shard}", "eval.every=1", "train.max_steps=2"]


def left_out(text: str) -> Counter:
    said = ("left out", "skipped sample")
    return Counter(line[line.index(what) :] for line in text.splitlines() for what in said if what in line)


def test_what_was_left_out_is_told_once_whoever_reads_the_corpus(tiny_config, faulty, evaluated, tmp_path, caplog):
    train_plan(load_plan(tiny_config, [faulty, *EVERY_READER, *evaluated]), tmp_path / "run", resume=False)
    told = left_out(caplog.text)
    assert len(told) == 7 and set(told.values()) == {1}, told


def test_what_was_left_out_is_told_once_by_two_ranks(tiny_config, faulty, evaluated, tmp_path):
    done = launch(Path(tiny_config), tmp_path / "run", faulty, *EVERY_READER, *evaluated)
    assert done.returncode == 0, done.stderr[-4000:]
    told = left_out(done.stderr + done.stdout)
    assert len(told) == 7 and set(told.values()) == {1}, told
    assert sum("engine.comm=auto: gather: " in line for line in done.stderr.splitlines()) == 1


UNWRITABLE = "/proc/vlscale/run"  # which no user can make, whatever permissions say


def test_an_out_that_no_permission_tells_of_is_found_before_a_model_is_built(
    tiny_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("vlscale.train.loop.open_run", lambda *given, **named: pytest.fail("a run was opened"))
    for out in (UNWRITABLE, str(tmp_path / ("x" * 300))):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(tiny_config), "--out", out])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and line.endswith("; choose another --out") and f"output folder {out}" in line
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_later_run_is_tried_before_the_first_one_trains(tiny_config, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(f"base: {tiny_config}\nvariants: {{one: {{}}, two: {{}}}}\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "two").touch()
    with pytest.raises(ValueError, match=r"output folder .*/out/two cannot be written: .*; choose another --out"):
        train_plan(load_plan(recipe, []), out, resume=False)
    assert [path.name for path in out.iterdir()] == ["two"], "what was tried left nothing behind"


def test_two_ranks_end_together_where_out_cannot_be_written(tiny_config):
    started = time.monotonic()
    done = launch(Path(tiny_config), Path(UNWRITABLE))
    lines = [line for line in (done.stderr + done.stdout).splitlines() if "error: " in line]
    assert done.returncode != 0 and f"output folder {UNWRITABLE} cannot be written" in lines[0]
    assert "Traceback" not in done.stderr and time.monotonic() - started < 120


def finished(tiny_config: Path, run: Path, *overrides: str) -> None:
    """A run that says of itself that it was made with these."""
    (run / "final").mkdir(parents=True)
    (config,) = load_plan(tiny_config, list(overrides))
    (run / "config.yaml").write_text(dump(config.config))


def resumed(tiny_config: Path, run: Path, caplog, *overrides: str) -> str:
    caplog.clear()
    train_plan(load_plan(tiny_config, list(overrides)), run, resume=True)
    (line,) = [message for message in caplog.messages if message.startswith("run: complete")]
    return line.removeprefix("run: complete, nothing to do")


def test_what_a_finished_run_is_asked_to_do_otherwise_is_told(tiny_config, tmp_path, caplog):
    run = tmp_path / "run"
    finished(tiny_config, run, "optim.lr=0.001")
    assert resumed(tiny_config, run, caplog) == ""
    assert resumed(tiny_config, run, caplog, "optim.lr=0.01") == (
        ": it ended after 6 steps, and optim.lr=0.01 (it has 0.001) takes another run, with --out elsewhere and "
        f"model.init_from={run}"
    )
    line = resumed(tiny_config, run, caplog, "train.max_steps=3", "model.fusion={source: text}", "optim.lr=2")
    assert "model.fusion={config: null, layers: null, source: text} (it has null), optim.lr=2.0 (it has" in line
    assert "train.max_steps=3 take another run" in line
    many = [f"data.{key}=16" for key in ("lanes", "workers", "prefetch", "window", "max_repeats", "cache_gb")]
    assert ", 2 more take another run" in resumed(tiny_config, run, caplog, *many)


def test_other_spellings_and_older_files_are_no_difference(tiny_config, tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    finished(tiny_config, run, "data.train=shards/train-*.tar", "data.manifest_dir=index")
    monkeypatch.chdir(tmp_path)
    given = [f"data.train={tmp_path}/shards/train-*.tar", "data.manifest_dir=./index"]
    assert resumed(tiny_config, run, caplog, *given) == ""
    (run / "config.yaml").write_text("optim: {name: sgd}")
    assert ": it has ended, and optim.name=adamw (it has sgd) takes" in resumed(tiny_config, run, caplog, "optim.lr=3")


@pytest.fixture(scope="module")
def stopped(tiny_config, tmp_path_factory) -> Path:
    """A run after step 2 of 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train_plan(load_plan(tiny_config, ["log.progress=false", "train.max_steps=2"]), run, resume=False)
    shutil.rmtree(run / "final")
    return run


def test_a_run_that_goes_on_tells_what_is_set_otherwise(stopped, tiny_config, tmp_path, caplog):
    run = shutil.copytree(stopped, tmp_path / "run")
    train_plan(load_plan(tiny_config, ["log.progress=false", "optim.lr=0.002"]), run, resume=True)
    assert "run: other settings from here on: optim.lr=0.002 (was 0.001), train.max_steps=6 (was 2)" in caplog.messages
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 0.002
    shutil.rmtree(run / "final")
    caplog.clear()
    train_plan(load_plan(tiny_config, ["log.progress=false", "optim.lr=0.002"]), run, resume=True)
    assert not [message for message in caplog.messages if "other settings" in message]


@pytest.mark.parametrize(
    "given", ["optim.unlock_after={text: 4}", "model.embed_dim=8", "model.locked=[vision]", "optim.layer_decay=0.5"]
)
def test_settings_that_the_checkpoint_does_not_fit_are_named(stopped, tiny_config, tmp_path, capsys, given):
    run = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny_config), "--out", str(run), "--resume", "log.progress=false", given])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    key, _, _ = given.partition("=")
    assert ended.value.code == 2 and f"cannot resume: the newest checkpoint does not fit {key}=" in line
    assert not (run / "final").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.val=nowhere.tar"], "data.val: no shard matches 'nowhere.tar'"),
        (["data.val={val}", "data.caption_key=json:title"], "data.caption_key=json:title: none of"),
        (["data.val={val}", "train.keep_best=recall"], "train.keep_best=recall is no measure .* such as rsum, i2t/r@1"),
        (["data.val={val}", "eval.rerank=5"], "eval.rerank=5 needs a fusion encoder, and the model has none"),
        (
            ["model.vision.config={model_type: vitt}"],
            "vitt could not be built: transformers knows no such model_type; did you mean",
        ),
        (["model.init_from={val}"], "is a file; expected the folder of a model, .*by `vlscale import open-clip`"),
        (["--train.max_steps", "5"], "--train.max_steps: a setting is given without dashes .* train.max_steps=VALUE"),
        (["--resum"], "no such option: --resum; did you mean --resume"),
        (["stage={}"], "unknown key 'stage'; did you mean 'stages'"),
    ],
)
def test_what_newcomers_type_is_one_line_and_leaves_no_run(tiny_config, corpus, tmp_path, capsys, given, said):
    given = [each.replace("{val}", f"{corpus}/val-000000.tar") for each in given]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny_config), "--out", str(tmp_path / "run"), *given])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and re.search(said, line), line
    assert not (tmp_path / "run").exists()


def test_validation_shards_without_captions_are_found_before_a_model(tiny_config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("vlscale.train.loop.open_run", lambda *given, **named: pytest.fail("a run was opened"))
    other = tmp_path / "other.tar"
    write_shard(other, [{"__key__": "a", "jpg": b"", "json": {"title": "x"}}])
    with pytest.raises(
        ValueError, match=r"none of 1 samples has the field 'captions' in its json; expected one of tit"
    ):
        train_plan(load_plan(tiny_config, [f"data.val={other}"]), tmp_path / "run", resume=False)
