"""Shards in real object stores on this machine: a server that speaks S3, and one that speaks Google Cloud Storage.

Each part is skipped without its packages: s3fs and moto[server], gcsfs and gcp-storage-emulator.
"""

import socket

import pytest

from vlscale.data import retry
from vlscale.data.faults import BadShard
from vlscale.data.samples import open_corpus, read_samples


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs", reason="no s3fs")
    servers = pytest.importorskip("moto.server", reason="no moto[server]")
    server = servers.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, corpus, monkeypatch):
    """All shards of the corpus in `s3://pairs`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    if not store.exists("pairs"):
        store.mkdir("pairs")
        for path in sorted(corpus.glob("*.tar")):
            store.put_file(str(path), f"pairs/{path.name}")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def remote(make_config, corpus, tmp_path):
    def make(url, **changes):
        return make_config(corpus, train=[url], manifest_dir=str(tmp_path / "indexes"), **changes)

    return make


def test_a_corpus_in_a_bucket_is_the_local_one(bucket, remote, corpus, make_config):
    url = "s3://pairs/val-000000.tar"
    assert open_corpus(url, remote(url)).hash == open_corpus(str(corpus / "val-*.tar"), make_config(corpus)).hash
    theirs, ours = (list(read_samples(place, remote(url))) for place in (url, str(corpus / "val-*.tar")))
    assert theirs == ours and len(ours) == 60


def test_the_stream_from_a_bucket_is_the_local_one(bucket, remote, run_stream, keys_of, tmp_path):
    data = remote("s3://pairs/train-{000000..000007}.tar", cache_dir=str(tmp_path / "cache"), workers=1)
    assert keys_of(run_stream(3, 2, data=data)[0]) == keys_of(run_stream(3, 2)[0])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 8


def test_what_is_not_there_is_one_clear_line(bucket, remote):
    for url in ("s3://pairs/none.tar", "s3://no-bucket/x.tar"):
        with pytest.raises(BadShard, match=rf"shard {url} cannot be read: the store has no such object"):
            open_corpus(url, remote(url))


def test_a_server_that_is_gone_is_tried_again_and_then_one_clear_line(bucket, remote, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    bucket.clear_instance_cache()
    url = "s3://pairs/val-000000.tar"
    with pytest.raises(BadShard, match=r"s3://pairs/val-000000.tar cannot be read: .*Endpoint.*\(tried 4 times\)"):
        open_corpus(url, remote(url))


def test_a_corpus_in_googles_store_is_the_local_one(corpus, remote, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="no gcsfs")
    servers = pytest.importorskip("gcp_storage_emulator.server", reason="no gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "*")
    server = servers.create_server("127.0.0.1", port, in_memory=True, default_bucket="pairs")
    server.start()
    try:
        gcsfs.GCSFileSystem(token="anon").put_file(str(corpus / "val-000000.tar"), "pairs/val-000000.tar")
        url = "gs://pairs/val-000000.tar"
        theirs, ours = (list(read_samples(place, remote(url))) for place in (url, str(corpus / "val-*.tar")))
        assert theirs == ours and len(ours) == 60
        with pytest.raises(BadShard, match=r"shard gs://pairs/none\.tar cannot be read: the store has no such object"):
            open_corpus("gs://pairs/none.tar", remote(url))
    finally:
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()
