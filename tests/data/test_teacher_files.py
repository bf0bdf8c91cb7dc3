"""A teacher cache below an url: the rows of the local one, copies within their bound, and what can go wrong."""

import errno
import logging

import fsspec
import numpy as np
import pytest

from vlscale.data import retry, storage
from vlscale.data.keyed import hash64, uniforms
from vlscale.data.samples import open_corpus, read_manifest
from vlscale.data.teacher_cache import (
    BadTeacherCache,
    CacheHeader,
    TeacherFacts,
    TeacherRows,
    read_header,
    shard_name,
    write_shard_file,
)
from vlscale.data.teacher_files import cache_place
from vlscale.data.teacher_join import Lacking, find_lacking

WIDTH = 6
URL = "memory://bucket/teachers"


def row(name: str) -> np.ndarray:
    values = uniforms(hash64(name), WIDTH).astype(np.float32) - 0.5
    return values / np.linalg.norm(values)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """A cache of the whole corpus on a disk."""
    from vlscale.sections import DataConfig

    folder = tmp_path_factory.mktemp("teachers")
    data = DataConfig(train=[str(corpus / "train-*.tar")], caption_key="json:captions")
    manifest = open_corpus(data.train, data)
    facts = TeacherFacts("teachers/t", "weights", "preprocessing", WIDTH)
    header = CacheHeader(facts, facts, "fp16", "fp32", "all", data.caption_key, list(data.image_keys), manifest.hash)
    header.save(folder)
    samples = list(read_manifest(manifest, data))
    for shard, count in enumerate(manifest.counts.tolist()):
        own, samples = samples[:count], samples[count:]
        text = np.array([row(caption) for sample in own for caption in sample.captions])
        rows = TeacherRows(
            [s.key for s in own], [s.captions for s in own], np.array([row(s.key) for s in own]), text, []
        )
        write_shard_file(folder, header, manifest.digests[shard], manifest.urls[shard], rows)
    return folder


@pytest.fixture
def store(folder, monkeypatch):
    """The cache in a store; what was fetched of it is noted in `asked`."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe(f"/bucket/teachers/{path.name}", path.read_bytes())
    files.asked = []
    read, download = storage._Fsspec.read, storage._Fsspec.download
    monkeypatch.setattr(storage._Fsspec, "read", lambda s, at, size: (files.asked.append(size), read(s, at, size))[1])
    monkeypatch.setattr(storage._Fsspec, "download", lambda s, to: (files.asked.append(s.url), download(s, to))[1])
    yield files
    files.rm("/bucket/teachers", recursive=True)


@pytest.fixture
def remote(make_config, corpus, tmp_path):
    return lambda **changes: make_config(corpus, **{"cache_dir": str(tmp_path / "copies"), **changes})


def test_batches_are_those_of_the_local_cache(run_stream, store, remote, folder, tmp_path):
    theirs, ours = (run_stream(3, 2, data=remote(), teacher_cache=place)[0] for place in (URL, str(folder)))
    for row_of_ranks, local in zip(theirs, ours, strict=True):
        for batch, expected in zip(row_of_ranks, local, strict=True):
            assert batch.keys == expected.keys
            assert batch.teacher_image.equal(expected.teacher_image) and batch.teacher_text.equal(expected.teacher_text)
    assert sum(isinstance(asked, str) for asked in store.asked) == len(list((tmp_path / "copies").iterdir())) == 8


def test_with_all_captions_each_pair_has_the_row_of_its_own(run_stream, folder, remote):
    ((batch,),) = run_stream(1, data=remote(captions="all", lanes=4), teacher_cache=str(folder))[0]
    assert len(set(batch.keys)) < len(set(batch.captions))
    for texts, rows in ((batch.captions, batch.teacher_text), (batch.keys, batch.teacher_image)):
        np.testing.assert_allclose(rows, np.array([row(text) for text in texts]), atol=3e-4)


def test_a_whole_cache_is_checked_by_its_heads(store, remote, corpus):
    data = remote()
    manifest = open_corpus(data.train, data)
    store.asked.clear()
    assert find_lacking(cache_place(URL, data), manifest) == Lacking()
    assert all(isinstance(asked, int) for asked in store.asked) and sum(store.asked) < 20_000


def test_files_that_lack_or_are_damaged_are_named(store, remote):
    data = remote()
    manifest = open_corpus(data.train, data)
    lost, cut = (f"/bucket/teachers/{shard_name(manifest.digests[shard])}" for shard in (2, 5))
    store.rm(lost)
    store.pipe(cut, store.cat(cut)[:-1])
    found = find_lacking(cache_place(URL, data), manifest)
    assert found.shards == [manifest.urls[2]] and len(found.damaged) == 1
    assert f"{URL}/{shard_name(manifest.digests[5])} is damaged (ValueError: cut short" in found.damaged[0]


def test_a_bound_too_small_and_a_full_disk_read_into_memory(run_stream, store, remote, monkeypatch, caplog):
    expected = run_stream(2, data=remote(), teacher_cache=URL)[0]

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    logging.getLogger("vlscale").propagate = True
    for how, said in (("bound", "larger than data.cache_gb"), ("disk", "No space left on device")):
        if how == "disk":
            monkeypatch.setattr(storage._Fsspec, "download", full)
        data = remote(cache_dir=remote().cache_dir + how, cache_gb=1e-6 if how == "bound" else 1)
        with caplog.at_level(logging.WARNING, logger="vlscale"):
            rows = run_stream(2, data=data, teacher_cache=URL)[0]
        assert rows[1][0].teacher_text.equal(expected[1][0].teacher_text) and said in caplog.text


def test_what_cannot_be_read_is_one_clear_line(store, remote, monkeypatch):
    with pytest.raises(ValueError, match=r"teacher\.cache=memory://x is remote and needs data\.cache_dir"):
        cache_place("memory://x", remote(cache_dir=None))
    with pytest.raises(ValueError, match=r"teacher\.cache: scheme 'ftp' of ftp://h/x is not allowed"):
        cache_place("ftp://h/x", remote())
    with pytest.raises(BadTeacherCache, match="memory://bucket/none holds no teacher cache"):
        read_header(cache_place("memory://bucket/none", remote()))

    def broken(*given):
        raise TimeoutError("the store does not answer")

    monkeypatch.setattr(storage._Fsspec, "stamp", broken)
    with pytest.raises(BadTeacherCache, match=r"header.json cannot be read: .*does not answer \(tried 4 times\)"):
        read_header(cache_place(URL, remote()))
