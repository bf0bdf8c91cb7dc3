"""Shards that are not local files: http with ranges, object stores through fsspec, the cache on disk."""

import errno
import http.server
import importlib.util
import logging
import os
import re
import threading
import time
from pathlib import Path

import fsspec
import pytest

from vlscale.data import retry, storage
from vlscale.data.faults import BadShard
from vlscale.data.samples import open_corpus, read_samples
from vlscale.data.storage import ReadAhead, RemoteShard, cached_copy
from vlscale.data.urls import expand


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder` with ranges; `server.faults` are statuses to answer with first."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = self.server.folder / self.path.lstrip("/")
        if self.command == "GET" and self.server.faults:
            fault = self.server.faults.pop(0)
            if isinstance(fault, int):
                return self.send_error(fault)
            return self.answer(206 if "Range" in self.headers else 200, path.read_bytes(), cut=True)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            return self.answer(206, content[int(wanted[1]) : int(wanted[2]) + 1])
        return self.answer(200, content)

    def answer(self, status, content, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", "one")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(corpus, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder, server.asked, server.faults, server.ranges = corpus, [], [], True
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def remote_config(make_config, corpus, tmp_path):
    def make(url, **changes):
        return make_config(corpus, train=[url], manifest_dir=str(tmp_path / "indexes"), **changes)

    return make


def keys(urls, data):
    return [sample.key for sample in read_samples(urls, data)]


@pytest.mark.parametrize("cached", [False, True])
def test_a_corpus_over_http_is_the_local_one(server, remote_config, corpus, make_config, tmp_path, cached):
    url = f"{server.url}/train-{{000000..000002}}.tar"
    data = remote_config(url, cache_dir=str(tmp_path / "cache") if cached else None)
    remote, local = open_corpus(url, data), open_corpus(str(corpus / "train-{000000..000002}.tar"), make_config(corpus))
    assert remote.hash == local.hash
    assert keys(url, data)[:300] == keys(str(corpus / "train-*.tar"), make_config(corpus))[:300]
    gets = sum(command == "GET" for command, _ in server.asked)
    assert gets == 3 if cached else gets > 800


def test_the_stream_over_http_is_the_local_one(server, run_stream, keys_of, remote_config, tmp_path):
    data = remote_config(f"{server.url}/train-{{000000..000007}}.tar", cache_dir=str(tmp_path / "cache"), workers=1)
    assert keys_of(run_stream(3, 2, data=data)[0]) == keys_of(run_stream(3, 2)[0])
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 8


def test_errors_of_a_server_are_tried_again(server, remote_config, tmp_path, caplog):
    url = f"{server.url}/val-000000.tar"
    server.faults = [503, "cut", 500]
    assert len(keys(url, remote_config(url, cache_dir=str(tmp_path / "cache")))) == 60
    assert server.faults == [] and [path.suffix for path in (tmp_path / "cache").iterdir()] == [".tar"]
    server.faults = [503, "cut"]
    assert len(keys(url, remote_config(url))) == 60


def test_a_server_that_never_answers_right_is_one_clear_line(server, remote_config, tmp_path):
    url = f"{server.url}/val-000000.tar"
    server.faults = [500] * 50
    with pytest.raises(BadShard, match=r"shard http.*val-000000.tar cannot be read: .*500.*\(tried 4 times\)"):
        keys(url, remote_config(url))
    with pytest.raises(BadShard, match="404"):
        keys(f"{server.url}/none.tar", remote_config(url))


def test_a_server_without_ranges_needs_the_cache(server, remote_config, tmp_path):
    server.ranges = False
    url = f"{server.url}/val-000000.tar"
    with pytest.raises(BadShard, match=r"does not serve ranges; set data.cache_dir"):
        keys(url, remote_config(url))
    assert len(keys(url, remote_config(url, cache_dir=str(tmp_path / "cache")))) == 60


@pytest.mark.parametrize("cached", [False, True])
def test_object_stores_through_fsspec(corpus, remote_config, tmp_path, cached):
    content = (corpus / "val-000000.tar").read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/val-000000.tar", content)
    url = "memory://bucket/val-000000.tar"
    assert len(keys(url, remote_config(url, cache_dir=str(tmp_path / "cache") if cached else None))) == 60
    shard = RemoteShard(url)
    assert shard.size == len(content) and shard.read(1000, 500) == content[1000:1500]


def test_a_store_whose_package_is_missing_is_one_clear_line(remote_config):
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    url = "s3://bucket/x.tar"
    with pytest.raises(ValueError, match=r"s3://bucket/x.tar: Install s3fs"):
        keys(url, remote_config(url))


def test_the_cache_keeps_its_bound_and_drops_what_was_used_longest_ago(server, corpus, tmp_path):
    sizes = [(corpus / f"train-{n:06d}.tar").stat().st_size for n in range(3)]
    bound = sum(sizes) - 1
    copies = []
    for number in (0, 1, 0, 2):
        copies.append(cached_copy(f"{server.url}/train-{number:06d}.tar", tmp_path, bound))
        now = time.time_ns() + len(copies) * 10**9
        os.utime(copies[-1], ns=(now, now))
    assert copies[0] == copies[2] and not copies[1].exists() and copies[0].exists() and copies[3].exists()
    assert cached_copy(f"{server.url}/train-000003.tar", tmp_path, 10) is None


def test_partial_copies_that_nobody_finishes_are_removed(server, tmp_path):
    for name, age in [("old.partial", 10_000), ("new.partial", 10)]:
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cached_copy(f"{server.url}/val-000000.tar", tmp_path, 10**9)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["new.partial"]


def test_a_full_disk_is_told_and_reading_goes_on(server, remote_config, tmp_path, monkeypatch, caplog):
    def full(source, target, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.shutil, "copyfileobj", full)
    url = f"{server.url}/val-000000.tar"
    with caplog.at_level(logging.WARNING, logger="vlscale"):
        logging.getLogger("vlscale").propagate = True
        assert len(keys(url, remote_config(url, cache_dir=str(tmp_path / "cache")))) == 60
    assert any(
        "cannot be cached (No space left on device); it is read without" in message for message in caplog.messages
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_readers_share_a_cache(server, remote_config, tmp_path):
    url, found = f"{server.url}/val-000000.tar", []
    data = remote_config(url, cache_dir=str(tmp_path / "cache"))
    threads = [threading.Thread(target=lambda: found.append(len(keys(url, data)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [60] * 6 and len(list((tmp_path / "cache").iterdir())) == 1


def test_read_ahead_gives_the_same_bytes_in_few_reads():
    class Counting:
        size, reads = 5000, 0

        def read(self, start, size):
            self.reads += 1
            return bytes((start + i) % 251 for i in range(size))

    shard = Counting()
    ahead = ReadAhead(shard, span=1000)
    for start, size in [(0, 10), (500, 400), (990, 20), (4990, 100), (0, 5), (3000, 1500), (5000, 1)]:
        assert ahead.read(start, size) == bytes((start + i) % 251 for i in range(min(size, 5000 - start)))
    assert shard.reads <= 6


@pytest.mark.parametrize(
    "url, message",
    [
        ("https://host/x-*.tar", "wildcard, which only paths may have"),
        ("pipe:curl x", "scheme 'pipe' .* is not allowed; expected"),
    ],
)
def test_urls_that_cannot_be_read(url, message):
    with pytest.raises(ValueError, match=message):
        expand(url)


def test_file_urls_are_paths(corpus):
    assert (
        expand(f"file://{corpus}/val-000000.tar")
        == expand(f"FILE:{corpus}/val-000000.tar")
        == [str(Path(corpus) / "val-000000.tar")]
    )
