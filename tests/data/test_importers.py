"""Imports of Karpathy's splits and of lists of {image, caption}: what is in the file is in the shards."""

import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from vlscale.data.importers import karpathy_items, list_items, write_items
from vlscale.data.samples import read_samples


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    (root / "val2014").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(root / f"{number}.jpg")
    Image.new("RGB", (20, 20)).save(root / "val2014" / "7.png")
    return root


def save(tmp_path, entries):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    return path


def read(tmp_path, make_config, pattern="*.tar"):
    return list(read_samples(str(tmp_path / "out" / pattern), make_config(tmp_path)))


def karpathy_entry(name, split, captions, **more):
    return {"filename": name, "split": split, "sentences": [{"raw": c, "tokens": c.split()} for c in captions], **more}


def test_karpathy_splits(tmp_path, pictures, make_config):
    entries = [
        karpathy_entry("0.jpg", "train", ["a dog ", "one dog"], imgid=0, sentids=[0, 1]),
        karpathy_entry("1.jpg", "restval", ["a cat"], cocoid=11),
        karpathy_entry("2.jpg", "test", ["a bird"]),
        karpathy_entry("7.png", "val", ["a fish"], filepath="val2014"),
    ]
    path = save(tmp_path, {"dataset": "x", "images": entries})
    count = write_items(karpathy_items(path), pictures, tmp_path / "out", progress=False)
    assert count.samples == {"train": 2, "test": 1, "val": 1} and not count.missing
    train = read(tmp_path, make_config, "train-*.tar")
    assert [sample.captions for sample in train] == [["a dog", "one dog"], ["a cat"]]
    assert train[0].meta == {"captions": ["a dog", "one dog"], "image": "0.jpg", "imgid": 0, "sentids": [0, 1]}
    assert train[0].image == (pictures / "0.jpg").read_bytes() and train[1].meta["cocoid"] == 11
    assert read(tmp_path, make_config, "val-*.tar")[0].image == (pictures / "val2014" / "7.png").read_bytes()
    assert {split: len(items) for split, items in karpathy_items(path, restval=False).items()} == {
        "train": 1,
        "test": 1,
        "val": 1,
    }


def test_lists_join_the_captions_of_a_picture(tmp_path, pictures, make_config):
    entries = [
        {"image": "0.jpg", "caption": "a dog", "image_id": "coco_0"},
        {"image": "1.jpg", "caption": ["a cat", "one cat"]},
        {"image": "0.jpg", "caption": "one dog"},
    ]
    write_items({"train": list_items(save(tmp_path, entries))}, pictures, tmp_path / "out", progress=False)
    samples = read(tmp_path, make_config)
    assert [sample.captions for sample in samples] == [["a dog", "one dog"], ["a cat", "one cat"]]
    assert samples[0].meta["image_id"] == "coco_0"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", 'image,caption,size\n0.jpg,"a dog, asleep",3\n1.jpg,a cat,4\n0.jpg,one dog,3\n'),
        ("list.tsv", "filepath\ttitle\n0.jpg\ta dog, asleep\n1.jpg\ta cat\n0.jpg\tone dog\n"),
    ],
)
def test_a_table_is_a_list(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # a spreadsheet's mark of UTF-8
    items = list_items(tmp_path / name)
    assert [(item.image, item.captions) for item in items] == [
        ("0.jpg", ["a dog, asleep", "one dog"]),
        ("1.jpg", ["a cat"]),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("picture,caption\n0.jpg,a dog\n", "column image or filepath or path, got picture, caption; .* commas"),
        ("image\tcaption\n0.jpg\ta dog\n", "column image or filepath or path, got image\tcaption"),
        ("", "got nothing"),
        ("image,caption\n0.jpg,a dog, asleep\n", "line 2 has not as many fields as the header, 2"),
        ("image,caption\n0.jpg,a dog\n1.jpg\n", "line 3 has not as many"),
        ('image,caption\n0.jpg,"a dog\n', "are no table: unexpected end of data"),
        (b"image,caption\n0.jpg,\xff\n", "are no table: 'utf-8'"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, said):
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said):
        list_items(tmp_path / "list.csv")


def test_vizwiz_tables(tmp_path, pictures):
    tables = {
        "images": [{"id": 5, "file_name": "3.jpg"}],
        "annotations": [
            {"image_id": 5, "caption": "a box", "is_rejected": False},
            {"image_id": 5, "caption": "Quality issues", "is_rejected": True},
        ],
    }
    (item,) = list_items(save(tmp_path, tables))
    assert (item.image, item.captions) == ("3.jpg", ["a box"])


def test_missing_pictures_are_named_each_and_counted(tmp_path, pictures, make_config, caplog):
    entries = [
        {"image": name, "caption": text}
        for name, text in [("0.jpg", "x"), ("gone.jpg", "y"), ("lost.jpg", "z"), ("1.jpg", " ")]
    ]
    with caplog.at_level(logging.WARNING, logger="vlscale"):
        count = write_items({"val": list_items(save(tmp_path, entries))}, pictures, tmp_path / "out", progress=False)
    assert count.missing == ["gone.jpg", "lost.jpg"] and count.captionless == 1 and count.samples == {"val": 1}
    assert [message.split(":")[0] for message in caplog.messages] == [
        "skipped gone.jpg",
        "skipped lost.jpg",
        "skipped 1.jpg",
    ]


def test_no_more_than_a_hundred_missing_pictures_are_named(tmp_path, pictures, caplog):
    entries = save(tmp_path, [{"image": f"gone-{n}.jpg", "caption": "x"} for n in range(300)])
    with pytest.raises(ValueError, match="none of the 300 pictures"):
        write_items({"train": list_items(entries)}, pictures, tmp_path / "out", progress=False)
    assert len(caplog.messages) == 101 and caplog.messages[-1].startswith("more are skipped")


def test_shards_have_their_size(tmp_path, pictures, make_config):
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(5)]
    write_items(
        {"train": list_items(save(tmp_path, entries))}, pictures, tmp_path / "out", shard_size=2, progress=False
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"train-{n:06d}.tar" for n in range(3)]
    assert len(read(tmp_path, make_config)) == 5


@pytest.mark.parametrize(
    "entries, importer, message",
    [
        ({"image": 1}, list_items, "expected a list of"),
        ([{"image": "a.jpg"}], list_items, "entry 0 is no"),
        ([{"image": "a.jpg", "caption": [1]}], list_items, "entry 0 is no"),
        ({"images": [1], "annotations": []}, list_items, "expected images with id and file_name"),
        ([1], karpathy_items, "expected Karpathy's format"),
        ({"images": [{"filename": "a"}]}, karpathy_items, r"images\[0\] lacks"),
    ],
)
def test_files_of_another_format_are_one_clear_line(tmp_path, entries, importer, message):
    with pytest.raises(ValueError, match=message):
        importer(save(tmp_path, entries))


def test_nothing_importable_leaves_nothing(tmp_path, pictures):
    entries = save(tmp_path, [{"image": "gone.jpg", "caption": "x"}])
    with pytest.raises(ValueError, match=r"none of the 1 pictures .* the first missing one is .*gone.jpg"):
        write_items({"train": list_items(entries)}, pictures, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="does not exist"):
        write_items({"train": list_items(entries)}, tmp_path / "no", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "annotations.json").write_text("{broken")
    with pytest.raises(ValueError, match="not valid JSON"):
        list_items(tmp_path / "annotations.json")
    with pytest.raises(ValueError, match="cannot be read"):
        list_items(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["flickr30k_val.json", "coco_val.json"])
def test_the_papers_own_lists_are_read(name):
    root = os.environ.get("VLSCALE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(root) / "captions" / name
    if not path.is_file():
        pytest.skip("no caption lists")
    items = list_items(path)
    assert len(items) in (1014, 5000) and min(len(item.captions) for item in items) >= 5
