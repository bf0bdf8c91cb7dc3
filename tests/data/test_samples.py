"""Manifests, urls and reading in order: every sample once, faults counted and named, bad input one clear line."""

import io
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from vlscale.data.faults import BadShard
from vlscale.data.manifest import INDEX_FOLDER, build_manifest
from vlscale.data.samples import check_caption_field, open_corpus, read_manifest, read_samples
from vlscale.data.urls import expand
from vlscale.data.writer import write_shard


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_sample_once_and_in_order(corpus, make_config):
    import webdataset

    shards = sorted(str(path) for path in corpus.glob("train-*.tar"))
    expected = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    samples = list(read_samples(str(corpus / "train-*.tar"), make_config(corpus)))
    assert [sample.key for sample in samples] == expected and len(expected) == 2000
    assert all(len(sample.captions) == 5 and sample.meta["scene"] for sample in samples)


def test_parts_are_runs_that_make_the_whole(corpus, make_config):
    urls, data = str(corpus / "train-*.tar"), make_config(corpus)
    whole = [sample.key for sample in read_samples(urls, data)]
    parts = [[sample.key for sample in read_samples(urls, data, shard=(i, 7))] for i in range(7)]
    assert [key for part in parts for key in part] == whole and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_text_captions_and_json_captions(corpus, make_config):
    urls = str(corpus / "val-*.tar")
    as_text = next(read_samples(urls, make_config(corpus, caption_key="txt")))
    as_json = next(read_samples(urls, make_config(corpus)))
    assert as_text.captions == as_json.captions[:1] and as_text.meta == as_json.meta


def test_emoji_shards_are_read_whole(emoji_folder, make_config, tmp_path):
    data = make_config(emoji_folder, manifest_dir=str(tmp_path))
    counts = {
        split: sum(1 for _ in read_samples(str(emoji_folder / f"emoji-{split}-*.tar"), data))
        for split in ("train", "val")
    }
    assert counts == {"train": 2017, "val": 505}


def test_faulty_samples_are_left_out_and_named(tmp_path, make_config, caplog):
    good = json.dumps({"captions": ["x"]}).encode()
    members = [
        ("a.jpg", b"p"), ("a.json", good),
        ("blind.json", good),
        ("b.jpg", b"p"), ("b.json", b"{broken"),
        ("c.jpg", b"p"), ("c.json", json.dumps({"captions": []}).encode()),
        ("d.jpg", b"p"), ("d.json", json.dumps({"captions": ["  ", 3]}).encode()),
        ("e.jpg", b"p"), ("e.json", b"[" * 100_000),
        ("f.jpg", b"p"), ("f.json", b'{"captions": ["\\ud800"]}'),
        ("g.jpg", b"p"), ("g.json", good),
    ]  # fmt: skip
    write(tmp_path / "train-0.tar", members)
    with caplog.at_level(logging.WARNING, logger="vlscale"):
        logging.getLogger("vlscale").propagate = True
        samples = list(read_samples(str(tmp_path / "train-0.tar"), make_config(tmp_path)))
    assert [sample.key for sample in samples] == ["a", "g"]
    for line in (
        "blind: no picture",
        "b of",
        "c of",
        "d of",
        "e of",
        "f of",
        "left out when indexing: 1 no picture",
    ):
        assert any(line in message for message in caplog.messages), line


def test_an_index_is_made_once_and_again_when_the_shard_changes(own_corpus, make_config, monkeypatch):
    import vlscale.data.manifest as module

    indexed = []
    walk = module.index_shard
    monkeypatch.setattr(
        module, "index_shard", lambda shard, url, *rest: indexed.append(Path(url).name) or walk(shard, url, *rest)
    )
    shutil.rmtree(own_corpus / INDEX_FOLDER, ignore_errors=True)
    urls, data = str(own_corpus / "train-*.tar"), make_config(own_corpus)
    first = open_corpus(urls, data)
    assert len(indexed) == 8
    assert open_corpus(urls, data).hash == first.hash and len(indexed) == 8
    shutil.copy(own_corpus / "train-000001.tar", own_corpus / "train-000000.tar")
    changed = open_corpus(urls, data)
    assert indexed[8:] == ["train-000000.tar"] and changed.hash != first.hash


def test_a_manifest_is_one_read_once_it_is_made(own_corpus, make_config, monkeypatch):
    import vlscale.data.manifest as module

    shutil.rmtree(own_corpus / INDEX_FOLDER, ignore_errors=True)
    urls, data = str(own_corpus / "train-*.tar"), make_config(own_corpus)
    first = open_corpus(urls, data)
    monkeypatch.setattr(module, "load_summary", lambda path: pytest.fail("read an index"))
    assert open_corpus(urls, data).hash == first.hash
    (manifest,) = (own_corpus / INDEX_FOLDER).glob("manifest-*.json")
    monkeypatch.undo()
    manifest.write_text("{broken")
    assert open_corpus(urls, data).hash == first.hash


def test_an_index_that_is_gone_is_told(own_corpus, make_config):
    urls, data = str(own_corpus / "train-*.tar"), make_config(own_corpus)
    samples = read_manifest(open_corpus(urls, data), data)
    for index in (own_corpus / INDEX_FOLDER).glob("*.idx"):
        index.unlink()
    with pytest.raises(BadShard, match="is gone or changed; start again"):
        list(samples)
    assert len(list(read_samples(urls, data))) == 2000


def test_a_large_member_between_is_not_read(tmp_path, make_config, monkeypatch):
    from vlscale.data.storage import LocalShard

    write(tmp_path / "x.tar", [("a.jpg", b"p" * 100), ("a.mp4", b"m" * 10_000_000), ("a.txt", b"words")])
    sizes, read = [], LocalShard.read
    monkeypatch.setattr(LocalShard, "read", lambda self, start, size: sizes.append(size) or read(self, start, size))
    data = make_config(tmp_path, caption_key="txt")
    open_corpus(str(tmp_path / "x.tar"), data)
    sizes.clear()
    (sample,) = read_samples(str(tmp_path / "x.tar"), data)
    assert (sample.image, sample.captions, sizes) == (b"p" * 100, ["words"], [100, 5])


def test_a_half_made_manifest_is_gone_on_with(own_corpus, make_config):
    shutil.rmtree(own_corpus / INDEX_FOLDER, ignore_errors=True)
    shards, done = expand(str(own_corpus / "train-*.tar")), []

    def stop_after_three(samples):
        done.append(samples)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_manifest(shards, make_config(own_corpus), on_shard=stop_after_three)
    assert len(list((own_corpus / INDEX_FOLDER).glob("train-*.idx"))) == 3
    assert build_manifest(shards, make_config(own_corpus)).num_samples == 2000


def test_the_hash_is_of_content_and_order_and_not_of_the_place(corpus, own_corpus, make_config):
    urls = [str(folder / "train-*.tar") for folder in (corpus, own_corpus)]
    first, moved = (open_corpus(url, make_config(corpus)) for url in urls)
    turned = build_manifest(first.urls[::-1], make_config(corpus))
    assert first.hash == moved.hash != turned.hash


def test_a_folder_that_cannot_be_written_uses_the_cache(own_corpus, make_config, monkeypatch, tmp_path):
    shutil.rmtree(own_corpus / INDEX_FOLDER, ignore_errors=True)
    (own_corpus / INDEX_FOLDER).write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = open_corpus(str(own_corpus / "train-*.tar"), make_config(own_corpus))
    assert manifest.num_samples == 2000 and all((tmp_path / "cache") in path.parents for path in manifest.index_paths)


def test_manifest_dir_is_used_alone(own_corpus, make_config, tmp_path):
    shutil.rmtree(own_corpus / INDEX_FOLDER, ignore_errors=True)
    open_corpus(str(own_corpus / "train-*.tar"), make_config(own_corpus, manifest_dir=str(tmp_path / "m")))
    assert not (own_corpus / INDEX_FOLDER).exists() and len(list((tmp_path / "m").glob("*.idx"))) == 8


def test_patterns_expand_in_order(corpus):
    names = [Path(path).name for path in expand(str(corpus / "train-{000002,000001}.tar"))]
    assert names == ["train-000002.tar", "train-000001.tar"]
    assert len(expand(str(corpus / "train-{000000..000007}.tar"))) == 8
    assert len(expand([f"file:{corpus}/val-*.tar", str(corpus / "train-*.tar")])) == 9
    assert len(expand(str(corpus))) == 9


@pytest.mark.parametrize(
    "urls, message",
    [
        (None, "data.train is not given"),
        ([], "data.train is not given"),
        ("nowhere/train-*.tar", "no shard matches 'nowhere/train-.*check the path"),
        ("nowhere/train-{0..3}.tar", "no shard matches"),
        (
            "a.tar,b.tar",
            "no shard matches 'a.tar,b.tar'; .* several are a list: data.train='\\[\"a.tar\", \"b.tar\"\\]'",
        ),
        ("a-{0..1}.tar::b.tar", "'::' joins nothing here, .* data.train='\\[\"a-\\{0..1\\}.tar\", \"b.tar\"\\]'"),
        ("a.tar::b.tar", 'several are a list: data.train=\'\\["a.tar", "b.tar"\\]\''),
        ("pipe:cat x.tar", "scheme 'pipe' of pipe:cat x.tar is not allowed"),
        ("ftp://host/x.tar", "scheme 'ftp'"),
    ],
)
def test_urls_that_name_nothing_are_one_clear_line(urls, message):
    with pytest.raises(ValueError, match=message) as caught:
        expand(urls)
    assert "\n" not in str(caught.value)


def test_of_a_brace_list_the_shard_that_is_not_there_is_named(corpus):
    with pytest.raises(ValueError, match=r"no shard matches '[^{]*train-000008\.tar', of '.*\{000000\.\.000008\}"):
        expand(str(corpus / "train-{000000..000008}.tar"))


def test_a_shard_named_twice_is_refused(corpus):
    with pytest.raises(ValueError, match="named twice"):
        expand([str(corpus / "train-*.tar"), str(corpus / "train-000001.tar")])


def test_a_shard_that_is_no_tar(tmp_path, make_config):
    (tmp_path / "train-0.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(BadShard, match="is no tar"):
        open_corpus(str(tmp_path / "train-0.tar"), make_config(tmp_path))


def test_damaged_shards_are_left_out_when_asked(own_corpus, run_stream, keys_of, make_config, caplog):
    os.truncate(own_corpus / "train-000002.tar", 50_000)
    with pytest.raises(BadShard, match=r"train-000002.tar.*cut short"):
        run_stream(1, folder=own_corpus)
    data = make_config(own_corpus, damaged_shards="skip")
    with caplog.at_level(logging.WARNING, logger="vlscale"):
        logging.getLogger("vlscale").propagate = True
        rows, state = run_stream(4, data=data)
    assert any("train-000002.tar" in message and "cut short" in message for message in caplog.messages)
    assert "left out when indexing: 1 damaged shard" in caplog.text
    more, _ = run_stream(30, 2, state=state, data=data)
    seen = {int(key.split("-")[1]) // 270 for keys in keys_of(rows + more) for key in keys}
    assert seen == {0, 1, 3, 4, 5, 6, 7}


def test_a_caption_key_that_no_sample_has(corpus, make_config):
    with pytest.raises(ValueError, match=r"no sample with a picture .* and a caption \(caption\).*data.caption_key"):
        open_corpus(str(corpus / "val-*.tar"), make_config(corpus, caption_key="caption"))


def test_a_shard_that_changes_while_it_is_read(own_corpus, make_config):
    samples = read_samples(str(own_corpus / "train-*.tar"), make_config(own_corpus))
    next(samples)
    os.truncate(own_corpus / "train-000001.tar", 100_000)
    with pytest.raises(BadShard, match="it changed while it is read"):
        list(samples)


def test_a_shard_cut_short_while_it_is_open(own_corpus, make_config):
    samples = read_samples(str(own_corpus / "train-*.tar"), make_config(own_corpus))
    next(samples)
    os.truncate(own_corpus / "train-000000.tar", 10_000)
    with pytest.raises(BadShard, match="cut short while it is read"):
        list(samples)


def test_a_caption_field_that_no_sample_has_is_told_with_those_there_are(corpus, make_config, tmp_path):
    def check(path, key):
        data = make_config(corpus, caption_key=key)
        check_caption_field(open_corpus(str(path), data), data)

    with pytest.raises(ValueError, match=r"caption_key=json:text: none of 100 samples has .*one of captions,") as error:
        check(corpus / "train-*.tar", "json:text")
    assert len(str(error.value)) < 400
    few = [{"__key__": str(i), "jpg": b"x", "json": {"late": "yes"} if i == 40 else {"x": 1}} for i in range(50)]
    write_shard(tmp_path / "few.tar", few)
    write_shard(tmp_path / "broken.tar", [{"__key__": "a", "jpg": b"x", "json": b"{"}])
    for name in ("few", "broken"):
        check(tmp_path / f"{name}.tar", "json:late")
    check(corpus / "train-*.tar", "txt")


def test_a_caption_that_no_sample_has_is_met_before_all_of_a_large_corpus_is_indexed(tmp_path, make_config, caplog):
    for number in range(130):
        write_shard(tmp_path / f"{number:03d}.tar", [{"__key__": f"{number}-{i}", "jpg": b"x"} for i in range(3)])
    with pytest.raises(ValueError, match=r"the first 100 of 130 shards hold no sample .* \(left out: .*300\}\)"):
        open_corpus(str(tmp_path), make_config(tmp_path, caption_key="txt"))
    assert caplog.text == "" and len(list((tmp_path / INDEX_FOLDER).glob("*.idx"))) == 100
    write_shard(tmp_path / "050.tar", [{"__key__": "whole", "jpg": b"x", "txt": "a caption"}])
    assert open_corpus(str(tmp_path), make_config(tmp_path, caption_key="txt")).num_samples == 1
    assert caplog.text.count(f"({tmp_path}") == 100
    assert "left out when indexing: 387 no caption; `vlscale data check` names more than 100" in caplog.text
