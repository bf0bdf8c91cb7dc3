"""Search put in order by a fusion encoder, and the folder that carries it along."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.fused import SCENES, save_fused
from vlscale.cli import app
from vlscale.data.samples import read_samples
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.folder import export_model
from vlscale.export.gallery import find_pictures
from vlscale.export.index_file import read_index
from vlscale.export.loaded import load_model
from vlscale.export.rerank import reranked_search
from vlscale.export.search import Of, Query, search


@pytest.fixture(scope="module")
def folder(val, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "final"
    save_fused(folder, [val])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def index_path(folder, val, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "val.npz"
    open_job(EmbedRequest(str(folder), [val], out, "float32", "json:captions")).run()
    return out


@pytest.fixture(scope="module")
def index(index_path):
    return read_index(index_path)


@pytest.fixture(scope="module")
def sample(val):
    return next(read_samples([val], SCENES))


@pytest.fixture(scope="module")
def pictures(val):
    return lambda keys: find_pictures([val], SCENES, keys)


def test_a_text_reorders_the_nearest_pictures_and_nothing_else(model, index, pictures):
    query = Query("a red disc")
    plain = search(model, index, query, k=20, of=Of.IMAGES)
    found = reranked_search(model, index, query, pictures, rerank=8, k=20, of=Of.IMAGES)
    assert {hit.place for hit in found[:8]} == {hit.place for hit in plain[:8]} and found[8:] == plain[8:]
    odds = [hit.match for hit in found[:8]]
    assert odds == sorted(odds, reverse=True) and len(set(odds)) == 8
    assert [hit.place for hit in found[:8]] != [hit.place for hit in plain[:8]]
    short = reranked_search(model, index, query, pictures, rerank=8, k=3, of=Of.IMAGES)
    assert short == found[:3]


def test_one_pair_is_scored_alike_from_both_sides(model, index, pictures, sample):
    """A picture's log-odds with a caption are the caption's with the picture."""
    text = sample.captions[0]
    by_text = reranked_search(model, index, Query(text), pictures, rerank=63, k=63, of=Of.IMAGES)
    asked = Query("a.jpg", sample.image)
    everything = len(index.captions)
    by_picture = reranked_search(model, index, asked, pictures, rerank=everything, k=everything, of=Of.TEXTS)
    one = next(hit.match for hit in by_text if hit.key == sample.key)
    other = next(hit.match for hit in by_picture if hit.caption == text)
    assert one == pytest.approx(other, abs=2e-5)


def test_in_both_the_rest_keeps_its_place(model, index, pictures, sample):
    asked = Query("a.jpg", sample.image)
    plain = search(model, index, asked, k=100, of=Of.BOTH)
    found = reranked_search(model, index, asked, pictures, rerank=20, k=100, of=Of.BOTH)
    for before, after in zip(plain, found, strict=True):
        assert before.is_picture == after.is_picture
        assert before == after or (after.match is not None and not after.is_picture)
    assert any(before != after for before, after in zip(plain, found, strict=True))


def test_pictures_that_cannot_be_read_stand_behind_the_scored_ones(model, index, pictures, caplog):
    query = Query("a red disc")
    best = search(model, index, query, k=1, of=Of.IMAGES)[0].key

    def without_best(keys):
        return {key: picture for key, picture in pictures(keys).items() if key != best}

    found = reranked_search(model, index, query, without_best, rerank=5, k=6, of=Of.IMAGES)
    assert found[4].key == best and found[4].match is None and found[3].match is not None
    assert f"1 of 5 candidates stand behind the others, unscored: their pictures could not be read ({best})" in (
        caplog.text
    )


def test_what_cannot_be_matched_is_refused(model, index, pictures, run):
    with pytest.raises(ValueError, match=r"a text can re-rank pictures: expected --of images or both, got texts"):
        reranked_search(model, index, Query("a disc"), pictures, rerank=5, k=5, of=Of.TEXTS)
    with pytest.raises(ValueError, match="--rerank 64: expected 1 to 63, the images of the index"):
        reranked_search(model, index, Query("a disc"), pictures, rerank=64, k=5, of=Of.IMAGES)
    alone = load_model(str(run), torch.device("cpu"))
    with pytest.raises(ValueError, match="--rerank 5 needs a model with a fusion encoder"):
        reranked_search(alone, index, Query("a disc"), pictures, rerank=5, k=5, of=Of.IMAGES)


def test_the_command_shows_log_odds(folder, index_path):
    words = ["search", str(folder), "a disc", "--index", str(index_path), "--k", "4", "--rerank", "6"]
    shown = CliRunner().invoke(app, words).output
    assert "match" in shown and shown.count("│ picture │") == 4


def test_an_export_carries_it_along_and_the_index_stays_good(folder, model, tmp_path):
    out = export_model(str(folder), tmp_path / "out")
    ours, theirs = (load_file(path / "fusion" / "model.safetensors") for path in (folder, out))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    card = (out / "README.md").read_text()
    assert "## Re-ranking" in card and "| fusion encoder | 2 layers, " in card
    again = load_model(str(out))
    assert again.hash == model.hash
    shutil.rmtree(out / "fusion")
    assert load_model(str(out)).hash == model.hash  # it embeds alike without one
    assert load_model(str(out)).encoder.fusion is None
