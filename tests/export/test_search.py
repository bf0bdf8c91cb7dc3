"""Search over an index: by text, by picture, and what is refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vlscale.cli import app, main
from vlscale.data.samples import read_samples
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.gallery import data_uri, find_pictures
from vlscale.export.index_file import Index, read_index
from vlscale.export.loaded import LoadedModel, load_model
from vlscale.export.search import Of, Query, check_model, read_query, search
from vlscale.sections import DataConfig

HOSTILE = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture(scope="module")
def index_path(run, val, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("search") / "val.npz"
    open_job(EmbedRequest(str(run), [val], out, dtype="float32")).run()
    return out


@pytest.fixture(scope="module")
def model(run) -> LoadedModel:
    return load_model(str(run))


@pytest.fixture(scope="module")
def index(index_path) -> Index:
    return read_index(index_path)


@pytest.fixture(scope="module")
def sample(val):
    return next(read_samples([val], DataConfig(caption_key="json:captions")))


def test_a_picture_finds_itself_and_the_order_is_that_of_all_scores(model, index, sample):
    hits = search(model, index, Query("a.jpg", sample.image), k=len(index.keys), of=Of.IMAGES)
    scores = index.image_emb @ model.embed_picture(sample.image)[0].numpy()
    assert hits[0].key == sample.key and hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].caption == sample.captions[0] and hits[0].is_picture
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1].tolist(), abs=1e-5)


@pytest.mark.parametrize("of", list(Of))
def test_with_and_without_faiss_the_hits_are_the_same(model, index, sample, of, monkeypatch):
    """Twice the same picture in the index, too: equal scores stand in the index's order."""
    pytest.importorskip("faiss")
    image_emb = np.concatenate([index.image_emb[:1], index.image_emb[:1], index.image_emb[2:]])
    doubled = dataclasses.replace(index, image_emb=image_emb)
    asked = Query("a.jpg", sample.image)
    by_faiss = search(model, doubled, asked, k=20, of=of)
    monkeypatch.setattr("vlscale.export.search.importlib.util.find_spec", lambda name: None)
    by_kernel = search(model, doubled, asked, k=20, of=of)
    assert [hit.key for hit in by_faiss] == [hit.key for hit in by_kernel]
    assert [hit.score for hit in by_faiss] == pytest.approx([hit.score for hit in by_kernel], abs=1e-6)


def test_a_caption_finds_itself_among_texts_and_among_both(model, index, sample):
    for of in (Of.TEXTS, Of.BOTH):
        hits = search(model, index, Query(sample.captions[1]), k=len(index.captions), of=of)
        own = next(hit for hit in hits if not hit.is_picture and hit.caption == sample.captions[1])
        assert own.score == pytest.approx(1, abs=1e-5) and hits[0].score <= own.score + 1e-5
    everything = len(index.keys) + len(index.captions)
    hits = search(model, index, Query("a disc"), k=everything, of=Of.BOTH)
    assert {hit.key for hit in hits if hit.is_picture} == set(index.keys.tolist())
    assert sorted(hit.caption for hit in hits if not hit.is_picture) == sorted(index.captions.tolist())


def test_an_export_searches_the_index_of_its_run_and_another_model_does_not(
    run, clip_towers, index, index_path, tmp_path
):
    shutil.copytree(run / "final", tmp_path / "copy")
    check_model(load_model(str(tmp_path / "copy")), index, index_path)
    with pytest.raises(ValueError, match=r"was made by model .*tiny-run \(hash \w{32}\), got .*final"):
        check_model(load_model(str(clip_towers)), index, index_path)


def test_the_command_prints_a_table_and_writes_a_gallery(run, index_path, sample, tmp_path):
    asked = tmp_path / "asked.jpg"
    asked.write_bytes(sample.image)
    page = tmp_path / "new" / "found.html"
    words = ["search", str(run), str(asked), "--index", str(index_path), "--k", "3", "--html", str(page)]
    shown = CliRunner().invoke(app, words).output
    assert "1.0000" in shown and sample.key in shown and shown.count("│ picture │") == 3
    html = page.read_text()
    assert html.count("<li>") == 3 and html.count("data:image/jpeg;base64,") == 4
    assert "http" not in html and "<script" not in html


def test_texts_are_escaped_in_page_and_terminal(run, index_path, index, tmp_path):
    arrays = dict(np.load(index_path))
    arrays["captions"] = np.array([HOSTILE] * len(index.captions))
    np.savez(tmp_path / "hostile.npz", **arrays)
    page = tmp_path / "found.html"
    words = ["search", str(run), "<b>disc", "--index", str(tmp_path / "hostile.npz"), "--of", "texts"]
    shown = CliRunner().invoke(app, [*words, "--html", str(page)]).output
    assert "alert(1)" in shown and "\x1b" not in shown
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;b&gt;disc" in html


def test_pictures_that_are_gone_or_broken_are_left_out(val, sample):
    data = DataConfig(caption_key="json:captions")
    assert find_pictures([val], data, {sample.key, "no such key"}) == {sample.key: sample.image}
    assert data_uri(b"no picture") is None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("  ", "the query is empty"),
        ("./gone.jpg", "picture ./gone.jpg does not exist"),
        ("{broken}", r"broken.png cannot be read: broken picture"),
    ],
)
def test_queries_that_cannot_be_asked(run, index_path, tmp_path, capsys, query, said):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(SystemExit) as ended:
        main(["search", str(run), query.format(broken=tmp_path / "broken.png"), "--index", str(index_path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_long_text_is_a_text():
    text = "a disc " * 2000
    assert read_query(text) == Query(text)


@pytest.mark.parametrize("of", list(Of))
def test_k_beyond_the_gallery_is_refused(model, index, of):
    images, texts = len(index.keys), len(index.captions)
    size = {Of.IMAGES: images, Of.TEXTS: texts, Of.BOTH: images + texts}[of]
    for k in (0, size + 1):
        with pytest.raises(ValueError, match=f"--k {k}: expected 1 to {size}, the size of the gallery of {of}"):
            search(model, index, Query("a disc"), k=k, of=of)


def test_an_index_that_cannot_be_written_to_is_searched_in_silence(model, index, recwarn):
    """As parquet's arrays are."""
    frozen = index.image_emb.copy()
    frozen.flags.writeable = False
    asked = Query("a disc")
    hits = search(model, dataclasses.replace(index, image_emb=frozen), asked, k=3, of=Of.IMAGES)
    assert hits == search(model, index, asked, k=3, of=Of.IMAGES)
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]


def test_files_that_are_no_index_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; make it with `vlscale embed`"):
        read_index(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", header=np.array({"a": 1}, dtype=object))
    for name in ("text", "other", "pickled"):
        with pytest.raises(ValueError, match=r"is none that `vlscale embed` wrote, or is damaged"):
            read_index(tmp_path / f"{name}.npz")
