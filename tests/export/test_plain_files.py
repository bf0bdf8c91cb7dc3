"""`vlscale embed --images --texts`: plain files become the index that their shards would, and `vlscale search` works on
it."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlscale.cli import main
from vlscale.data.plain_files import PICTURE_NAMES, plain_files, read_pictures
from vlscale.data.samples import read_samples
from vlscale.export import embed
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.index_file import Header, read_index
from vlscale.sections import DataConfig

PART = 20


@pytest.fixture(scope="module")
def scenes(val):
    return list(read_samples([val], DataConfig(caption_key="json:captions")))


@pytest.fixture
def pictures(tmp_path, scenes) -> Path:
    """The held-out pictures below folders, in the order of their shards; beside them what is no picture."""
    root = tmp_path / "pictures"
    for place, sample in enumerate(scenes):
        path = root / f"{place // 30:02d}" / "deeper" / f"{place:03d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)
    (root / "notes.txt").write_text("not a picture")
    (root / "00" / "._000.jpg").write_bytes(b"of a file system")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "000.jpg").write_bytes(scenes[0].image)
    return root


def request(run: Path, out: Path, **changes) -> EmbedRequest:
    return EmbedRequest(str(run), [], out, "float32", batch_size=8, part=PART, **changes)


def vlscale(*words) -> int:
    """Its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def fails(capsys, *words) -> str:
    assert vlscale(*words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def test_pictures_of_a_folder_have_the_bits_that_they_have_in_shards(run, val, pictures, scenes, tmp_path):
    open_job(EmbedRequest(str(run), [val], tmp_path / "shards.npz", "float32", batch_size=8, part=PART)).run()
    job = open_job(request(run, tmp_path / "folder.npz", images=pictures))
    heard = []
    job.run(heard.append)
    shards, folder = read_index(tmp_path / "shards.npz"), read_index(tmp_path / "folder.npz")
    assert sum(heard) == job.total == len(scenes) and job.parts == 4
    assert np.array_equal(folder.image_emb, shards.image_emb)
    assert folder.keys.tolist() == [f"{n // 30:02d}/deeper/{n:03d}.JPG" for n in range(len(scenes))]
    assert folder.captions.tolist() == [] and folder.text_emb.shape == (0, 16)
    assert folder.header.data == [str(pictures)] and folder.header.pictures == str(pictures)


def test_the_same_command_goes_on_and_a_changed_folder_is_another(run, pictures, scenes, tmp_path):
    out = tmp_path / "folder.npz"
    first = open_job(request(run, out, images=pictures, rank=1, ranks=2))
    first.run()
    again = open_job(request(run, out, images=pictures))
    assert 0 < again.done == first.total < again.total
    again.run()
    assert open_job(request(run, out, images=pictures)).complete
    changed = pictures / "00" / "deeper" / "000.JPG"
    os.utime(changed, ns=(1, 1))  # of the same size
    with pytest.raises(ValueError, match="exists and is of another model or data"):
        open_job(request(run, out, images=pictures))


def test_broken_pictures_are_told_and_left_out(run, pictures, scenes, tmp_path, caplog):
    (pictures / "00" / "deeper" / "003.JPG").write_bytes(scenes[3].image[:200])
    (pictures / "00" / "empty.png").touch()
    (pictures / "01" / "gone.webp").symlink_to("nowhere")
    open_job(request(run, tmp_path / "i.npz", images=pictures)).run()
    index = read_index(tmp_path / "i.npz")
    said = caplog.text
    assert len(index.keys) == len(index.image_emb) == len(scenes) - 1 and "00/deeper/003.JPG" not in index.keys
    assert "00/deeper/003.JPG: broken picture" in said and "00/empty.png: broken picture" in said
    assert f"skipped picture 01/gone.webp of {pictures}: No such file" in said
    assert f"left out 3 of {len(scenes) + 2} samples" in said


def test_every_usual_extension_and_linked_folders_once(tmp_path):
    for number, suffix in enumerate(PICTURE_NAMES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}{suffix.upper()}")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.png").write_bytes((tmp_path / "1.JPEG").read_bytes())
    (tmp_path / "far" / "around").symlink_to(tmp_path)  # a circle
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "far")
    found = plain_files(root, None).pictures
    assert found[0] == "linked/a.png" and len(found) == len(set(found)) == 1 + len(PICTURE_NAMES)


def test_texts_stand_alone_or_beside_pictures(run, pictures, tmp_path, caplog):
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\ufeffa red disc\r\n\r\n  two blue stars \nune étoile\u2028bleue\n".encode())
    open_job(request(run, tmp_path / "texts.npz", texts=lines)).run()
    texts = read_index(tmp_path / "texts.npz")
    assert texts.captions.tolist() == ["a red disc", "two blue stars", "une étoile\u2028bleue"]
    assert texts.keys.tolist() == [] and texts.text_image.tolist() == [-1, -1, -1]
    job = open_job(request(run, tmp_path / "both.npz", texts=lines, images=pictures))
    job.run()
    both = read_index(tmp_path / "both.npz")
    assert both.captions.tolist() == texts.captions.tolist() and len(both.keys) == job.total - 3
    assert both.text_image.tolist() == [-1, -1, -1] and both.header.data == [str(pictures), str(lines)]
    np.testing.assert_allclose(both.text_emb, texts.text_emb, atol=1e-6)
    own = job.model.embed_text("two blue stars")[0]
    np.testing.assert_allclose(texts.text_emb[1], own, atol=1e-6)
    assert "skipped" not in caplog.text and "left out" not in caplog.text


def test_search_finds_pictures_and_texts_and_shows_them(run, pictures, tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    lines.write_text("a red disc\ntwo blue stars\n")
    out, page = tmp_path / "i.npz", tmp_path / "hits.html"
    assert vlscale("embed", run, "--images", pictures, "--texts", lines, "--out", out) == 0
    asked = pictures / "00" / "deeper" / "007.JPG"
    assert vlscale("search", run, asked, "--index", out, "--k", 3, "--html", page) == 0
    said = capsys.readouterr().out
    first = next(line for line in said.splitlines() if line.startswith("│ 1 "))
    assert "00/deeper/007.JPG" in first and page.read_text().count("data:image/jpeg") == 4
    assert vlscale("search", run, "two blue stars", "--index", out, "--k", 2, "--of", "texts", "--html", page) == 0
    assert "two blue stars" in capsys.readouterr().out and "no picture" not in page.read_text()
    assert "· caption</small>" in page.read_text()
    moved = pictures.rename(tmp_path / "elsewhere")
    search = ["search", run, "a disc", "--index", out, "--k", 3, "--html", page]
    assert "is not there; name the one where it is now with --data" in fails(capsys, *search)
    assert vlscale(*search, "--data", moved) == 0
    assert page.read_text().count("data:image/jpeg") == 3


def test_a_gallery_without_what_was_asked_for_is_told(run, pictures, tmp_path, capsys):
    assert vlscale("embed", run, "--images", pictures, "--out", tmp_path / "i.npz") == 0
    said = fails(capsys, "search", run, "a disc", "--index", tmp_path / "i.npz", "--of", "texts")
    assert said == "--of texts: the index holds none; expected images"


def test_keys_of_an_index_reach_no_file_outside_its_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"a")
    keys = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "", "gone.jpg"]
    assert read_pictures(root, keys) == {"a.jpg": b"a"}


def test_indexes_of_before_are_of_shards():
    header = Header("m", "h", ["x.tar"], "d", "txt", ["jpg"], "float16", 16)
    old = header.to_json().replace(', "pictures": null', "")
    assert "pictures" not in old and Header.from_json(old) == header


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out {}/x.npz", "expected shards (--data), or plain files (--images, --texts), got neither"),
        ("--out {}/x.npz --images {} --data x.tar", "--texts), got both"),
        ("--out {}/x.npz --images {}/gone", "gone is not there; name a folder of pictures"),
        ("--out {}/x.npz --images {}/file", "file is no folder; name a folder of pictures"),
        ("--out {}/x.npz --images {}/empty", "empty holds no picture (.jpg, .jpeg,"),
        ("--out {}/x.npz --images {}/tars", "but 1 other files; shards go to --data"),
        ("--out {}/x.npz --texts {}/gone", "gone cannot be read: No such file or directory; name a file"),
        ("--out {}/x.npz --texts {}/file", "file holds no text; expected one a line"),
        ("--out {}/x.npz --texts {}/latin1", "latin1 is not UTF-8 (byte 3); save it as UTF-8"),
        ("--out {}/x.parquet --texts {}/some", "--texts: a row of"),
        ("--out {}/x.npz --texts {}/some --caption-key txt", "--caption-key txt goes with --data"),
        ("--out {}/file/below/x.npz --images {}", "--out {}/file/below/x.npz: its folder cannot be made"),
        ("--out {}/empty --images {}", "--out {}/empty is a folder; name a file in it"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(embed, "load_model", lambda *given: pytest.fail("the model was loaded"))
    monkeypatch.setattr("vlscale.export.index_file.importlib.util.find_spec", lambda name: True)  # as if pyarrow was
    for name in ("empty", "tars"):
        (tmp_path / name).mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    (tmp_path / "file").write_text(" \n")
    (tmp_path / "some").write_text("a disc")
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    error = fails(capsys, "embed", "no-model", *words.replace("{}", str(tmp_path)).split())
    assert said.replace("{}", str(tmp_path)) in error
