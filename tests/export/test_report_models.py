"""`vlscale report` of runs beside models as they come: all are read and measured alike."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.export.towers import save_clip
from vlscale.cli import main
from vlscale.data.samples import read_samples
from vlscale.data.tokens import train_tokenizer
from vlscale.evaluate import rouge
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.report import collect
from vlscale.report.collect import check_models, collect_run, shared_settings, short_names
from vlscale.sections import DataConfig

SCENES = DataConfig(caption_key="json:captions")


@pytest.fixture(scope="module")
def clip(val, tmp_path_factory) -> Path:
    """A CLIP as it is downloaded, which nobody trained here."""
    captions = [caption for sample in read_samples([val], SCENES) for caption in sample.captions]
    folder = tmp_path_factory.mktemp("models") / "clip-vit-base-patch32"
    save_clip(folder, train_tokenizer(captions, vocab_size=200, max_length=77))
    return folder


def vlscale(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def write_run(folder: Path, **sections) -> str:
    """A folder that says of itself what a run's config says."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return str(folder)


def test_a_model_is_measured_on_the_captions_and_by_the_protocol_of_the_run(run, clip, held_out, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr("vlscale.report.write.galleries", lambda runs, before: reports.extend(runs) or [])
    assert vlscale("report", clip, run / "final", "--out", tmp_path / "r.html") == 0
    model, trained = reports
    assert (model.name, trained.name) == ("clip-vit-base-patch32", "tiny-run")
    assert model.result.protocol == trained.result.protocol == "synthetic"
    assert model.result.images == trained.result.images == held_out and model.result.captions == 5 * held_out
    assert model.corpus.keys == trained.corpus.keys and model.images is trained.images
    assert len(trained.metrics) == 2 and model.metrics == []
    page = (tmp_path / "r.html").read_text()
    assert "Compared with clip-vit-base-patch32, tiny-run is" in page and "no training steps on record" in page


def test_the_last_is_compared_with_the_one_that_is_named(run, clip, clip_towers, tmp_path, capsys):
    page = tmp_path / "r.html"
    words = ["report", clip, run, clip_towers, "--out", page]
    assert vlscale(*words, "--against", "elsewhere") == 2
    assert f"--against elsewhere: expected one of the runs before the last: {clip}, {run}" in capsys.readouterr().err
    assert vlscale(*words, "--against", clip) == 0
    assert "Compared with clip-vit-base-patch32, final is" in page.read_text()
    assert "<h1>Retrieval report</h1>" in page.read_text()
    legend = page.read_text().split('class="legend"')[1].split("</ul>")[0]
    assert legend.count("<li>") == 1 and run.name in legend  # of those with curves


def test_what_is_chosen_holds_for_all_and_relevance_is_made_once(run, clip, val, tmp_path, monkeypatch):
    made, table = [], rouge._table
    monkeypatch.setattr(rouge, "_table", lambda *given: made.append(1) or table(*given))
    words = ["--data", val, "--protocol", "flickr30k", "--caption-key", "json:captions", "--cache", tmp_path / "rouge"]
    assert vlscale("report", clip, run, "--out", tmp_path / "r.html", *words) == 0
    page = (tmp_path / "r.html").read_text()
    assert len(made) == 1 and len(list((tmp_path / "rouge").iterdir())) == 1
    assert "relevance by ROUGE-L" in page and "true relevance" not in page


def test_two_models_without_a_run_ask_for_shards(clip, clip_towers, val, tmp_path, capsys):
    assert vlscale("report", clip, clip_towers, "--out", tmp_path / "r.html") == 2
    assert "; give the shards to evaluate on with --data" in capsys.readouterr().err
    words = ["--data", val, "--caption-key", "json:captions", "--out", tmp_path / "r.html"]
    assert vlscale("report", clip, clip_towers, *words) == 0
    assert "Compared with clip-vit-base-patch32, final is" in (tmp_path / "r.html").read_text()


def test_the_first_run_decides_and_others_that_say_otherwise_are_named(tmp_path, caplog):
    data = {"caption_key": "json:captions", "image_keys": ["tif"], "val": ["a.tar"]}
    one = write_run(tmp_path / "one", data=data, eval={"protocol": "flickr30k", "cache": "rouge"})
    two = write_run(tmp_path / "two", eval={"labels": ["kind"]})
    like = shared_settings(["a-model", one, two])
    assert (like.data.caption_key, like.data.image_keys, like.data.val) == ("json:captions", ["tif"], ["a.tar"])
    assert (like.eval.protocol, like.eval.labels, like.eval.cache) == ("flickr30k", [], "rouge")
    assert f"{two} has data.caption_key=txt; here all are measured by json:captions" in caplog.text
    assert f"{two} has eval.labels=['kind']; here all are measured by []" in caplog.text and one not in caplog.text
    caplog.clear()
    chosen = shared_settings([one, two], protocol="labels", labels=["colour"], caption_key="txt", cache=None)
    assert (chosen.eval.protocol, chosen.eval.labels, chosen.data.caption_key) == ("labels", ["colour"], "txt")
    assert chosen.eval.cache == "rouge" and chosen.data.image_keys == ["tif"] and not caplog.text
    with pytest.raises(ValueError, match=r"config report: eval.protocol: Input should be .*, got 'nope'$"):
        shared_settings([one], protocol="nope")
    assert shared_settings([]).eval.protocol == "auto"


def test_a_runs_own_labels_are_its_own_until_others_are_given(run, val, tmp_path):
    labelled = shutil.copytree(run, tmp_path / "labelled")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (labelled / "config.yaml").write_text(yaml.safe_dump(config | {"eval": config["eval"] | {"labels": ["kind"]}}))
    for given, expected in ((None, ["kind"]), ([], []), (["colour"], ["colour"])):
        _, result = evaluate_model(EvalRequest(str(labelled), [val], labels=given))
        assert result.labels == expected
    beside = collect_run("a", labelled, [val], like=shared_settings([str(run), str(labelled)]))
    assert beside.result.labels == []


def test_names_are_as_short_as_tells_them_apart(run, tmp_path):
    assert short_names(["openai/clip-vit-base-patch32", str(run / "final"), f"{tmp_path}/"]) == [
        "clip-vit-base-patch32",
        run.name,
        tmp_path.name,
    ]
    assert short_names(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "c/y"]
    with pytest.raises(ValueError, match=r"final is named twice; name each run or model once"):
        short_names([str(run), str(run / "final")][::-1])


def test_what_is_no_model_is_found_before_any_is_embedded(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "evaluate_model", lambda *given: pytest.fail("a model was embedded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unfinished = write_run(tmp_path / "unfinished")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, said in {
        "gone": "gone is no folder; expected runs, or models in Hugging Face's form",
        "empty/gone": "empty/gone is no folder",
        str(tmp_path / "gone"): "gone is no folder",
        unfinished: "has no final/ folder: it has not finished",
        "empty": "holds no weights: expected model.safetensors, got nothing",
        "nobody/nothing-at-all": "expected a folder or the name of a model on the hub; no folder of that name is here",
    }.items():
        with pytest.raises(ValueError, match="(?s)" + said.replace("(", "\\(")):
            check_models([str(run), name])
        assert vlscale("report", run, name, "--out", tmp_path / "r.html") == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
