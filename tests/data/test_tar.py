"""The shard index: equal to what tarfile and webdataset find, and an error for every tar that is not whole."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vlscale.data.faults import BadShard
from vlscale.data.shard_index import ShardIndex, load_summary
from vlscale.data.storage import LocalShard
from vlscale.data.tar import MemberKeys, index_shard, split_name

KEYS = MemberKeys(("jpg", "png"), "txt")
LONG = "d" * 90 + "/" + "n" * 120


def write(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def index_of(path):
    shard = LocalShard(str(path), str(path))
    try:
        return index_shard(shard, str(path), KEYS)
    finally:
        shard.close()


def pair(key, picture=b"p" * 700, text=b"a caption"):
    return [(f"{key}.jpg", picture), (f"{key}.txt", text)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_rows_point_at_the_members(tmp_path, format):
    names = ["a", "b/c", LONG if format != tarfile.USTAR_FORMAT else "d" * 90 + "/" + "n" * 60]
    path = write(tmp_path / "s.tar", [m for i, n in enumerate(names) for m in pair(n, bytes([i]) * (600 + i))], format)
    index = index_of(path)
    data = Path(path).read_bytes()
    assert [index.key(i) for i in range(len(index))] == names
    for i, row in enumerate(index.rows):
        assert data[row["image"] : row["image"] + row["image_size"]] == bytes([i]) * (600 + i)
        assert data[row["text"] : row["text"] + row["text_size"]] == b"a caption"


def test_index_of_a_corpus_has_what_webdataset_reads(corpus):
    import webdataset

    path = str(corpus / "train-000000.tar")
    index = index_of(path)
    keys = [sample["__key__"] for sample in webdataset.WebDataset(path, shardshuffle=False)]
    assert [index.key(i) for i in range(len(index))] == keys


def test_members_that_belong_to_no_sample_are_named_and_notes_are_not(tmp_path):
    index = index_of(write(tmp_path / "s.tar", [("README", b"x"), ("__meta__.json", b"x"), *pair("a")]))
    assert index.named == ["README: not named key.extension"] and len(index) == 1


def test_members_that_are_absurdly_large_are_left_out(tmp_path):
    path = tmp_path / "s.tar"
    with path.open("wb") as file:
        for name, size in [
            ("a.jpg", 10),
            ("a.txt", 20_000_000),
            ("b.jpg", 600_000_000),
            ("b.txt", 5),
            ("c.jpg", 5),
            ("c.txt", 5),
        ]:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, 1)  # a hole, not bytes
        file.write(b"\0" * 1024)
    index = index_of(path)
    assert [index.key(i) for i in range(len(index))] == ["c"]
    assert index.skipped == {"caption too large": 1, "picture too large": 1}


def test_incomplete_samples_are_counted_and_named(tmp_path):
    members = [
        *pair("whole"),
        ("blind.txt", b"x"),
        ("mute.jpg", b"p"),
        *pair("twice"),
        ("twice.jpg", b"q"),
        *pair("end"),
    ]
    index = index_of(write(tmp_path / "s.tar", members))
    assert [index.key(i) for i in range(len(index))] == ["whole", "end"]
    assert index.skipped == {"no picture": 1, "no caption": 1, "two members .jpg": 1}
    assert [line.split(":")[0] for line in index.named] == ["blind", "mute", "twice"]


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pth", "mask.pkl"])
def test_a_sample_with_a_pickle_is_left_out(tmp_path, extension):
    index = index_of(write(tmp_path / "s.tar", [*pair("a"), (f"a.{extension}", b"x"), *pair("b")]))
    assert [index.key(i) for i in range(len(index))] == ["b"]
    assert index.skipped == {"holds a pickle": 1}


def test_the_first_named_picture_extension_wins(tmp_path):
    index = index_of(write(tmp_path / "s.tar", [("a.png", b"1" * 10), *pair("a", b"2" * 20)]))
    assert index.rows["image_size"].tolist() == [20]


def test_cut_anywhere_is_an_error(tmp_path):
    data = Path(write(tmp_path / "s.tar", [m for i in range(4) for m in pair(f"k{i}")])).read_bytes()
    end = len(data.rstrip(b"\0")) + 512  # within the padding of the last member all content is there, the end mark not
    for size in [1, 300, 512, 700, 1024, 1536, 2048, 3000, 4096, end]:
        cut = tmp_path / "cut.tar"
        cut.write_bytes(data[: size - size % 512 if size == end else size])
        with pytest.raises(BadShard, match=r"cut short|is no tar"):
            index_of(cut)


def test_a_damaged_header_is_an_error(tmp_path):
    path = write(tmp_path / "s.tar", [m for i in range(4) for m in pair(f"k{i}")])
    data = bytearray(Path(path).read_bytes())
    data[1536 + 20] ^= 1
    Path(path).write_bytes(data)
    with pytest.raises(BadShard, match="damaged header at byte 1536"):
        index_of(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + b"z" * 5000, b"<html>" * 500])
def test_what_is_no_tar_is_an_error(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(BadShard, match=r"is no tar|is empty"):
        index_of(path)


def test_a_saved_index_is_the_same_and_a_damaged_one_is_not_used(tmp_path):
    index = index_of(write(tmp_path / "s.tar", pair("a") + pair("é")))
    path = tmp_path / "s.idx"
    index.save(path)
    loaded = ShardIndex.load(path)
    assert loaded.digest == index.digest and loaded.key(1) == "é" and np.array_equal(loaded.rows, index.rows)
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []
    assert load_summary(path) == index.summary()
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:-70],
        whole[:20],
        whole[:30] + b"x" + whole[31:],
        whole[:-9] + b"x" + whole[-8:],
        b"",
    ):
        path.write_bytes(damaged)
        assert ShardIndex.load(path) is None
    assert ShardIndex.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    "name, parts",
    [
        ("a.jpg", ("a", "jpg")),
        ("x/y.seg.PNG", ("x/y", "seg.png")),
        ("x.y/z.txt", ("x.y/z", "txt")),
        ("noextension", None),
        (".hidden", None),
        ("__index__.json", None),
        ("a.", None),
    ],
)
def test_names_are_split_as_webdataset_does(name, parts):
    assert split_name(name) == parts
