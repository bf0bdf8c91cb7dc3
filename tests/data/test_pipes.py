"""`pipe:` shards: only when allowed, copied whole, and never short without an error."""

import os
import shlex
import time

import pytest

from vlscale.data import pipes, retry
from vlscale.data.faults import BadShard, DamagedShard
from vlscale.data.samples import open_corpus, read_samples
from vlscale.data.storage import LocalShard
from vlscale.sections import DataConfig


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)


@pytest.fixture
def piped(corpus, tmp_path):
    """A config that reads the held-out shard by the command given, where {} is the shard."""

    def make(command: str, **changes) -> DataConfig:
        given = {
            "train": [f"pipe:{command.format(shlex.quote(str(corpus / 'val-000000.tar')))}"],
            "caption_key": "json:captions", "allow_pipe": True,
            "cache_dir": str(tmp_path / "cache"), "manifest_dir": str(tmp_path / "index"),
        }  # fmt: skip
        return DataConfig(**{**given, **changes})

    return make


def open_(data: DataConfig):
    return open_corpus(data.train, data, "data.train")


@pytest.mark.parametrize(
    "command", ["cat {}", "cat {} | cat", "dd if={} bs=100000 status=none", "sh -c 'cat {}; echo done >&2'"]
)
def test_what_a_command_writes_is_a_shard(corpus, piped, command, run_stream):
    data, plain = piped(command), DataConfig(train=[str(corpus / "val-*.tar")], caption_key="json:captions")
    expected, found = (list(read_samples(each.train, each)) for each in (plain, data))
    assert [(s.key, s.image, s.captions) for s in found] == [(s.key, s.image, s.captions) for s in expected]
    assert open_(data).hash == open_(plain).hash
    (batch,) = run_stream(1, data=data, batch_size=16)[0][0]
    assert set(batch.keys) <= {s.key for s in expected}


def test_commands_are_refused_unless_allowed_and_need_a_place(corpus, piped, tmp_path):
    refused = piped("touch " + str(tmp_path / "ran"), allow_pipe=False)
    with pytest.raises(
        ValueError, match=r"scheme 'pipe' .* is not allowed; .*data\.allow_pipe=true with data\.cache_dir"
    ):
        open_(refused)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true needs data\.cache_dir"):
        piped("cat {}", cache_dir=None)


def test_the_command_runs_once_until_its_copy_goes(corpus, piped, tmp_path):
    log = tmp_path / "runs"
    data = piped(f"echo run >> {log}; cat {{}}")
    for _ in range(2):
        assert sum(1 for _ in read_samples(data.train, data)) == 60
    assert log.read_text() == "run\n"
    for copy in (tmp_path / "cache").iterdir():
        copy.unlink()
    assert sum(1 for _ in read_samples(data.train, data)) == 60
    assert log.read_text() == "run\nrun\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("head -c 5000 {}; exit 3", r"ended with exit code 3 \(tried 4 times\)"),
        ("cat {} | (head -c 4096 && echo out of luck >&2 && false) | cat", r"exit code 1: out of luck"),
        ("cat {}.gone", r"exit code 1: .*No such file"),
        ("true", r"the command wrote nothing"),
        ("no-such-command-here x", r"there is no command 'no-such-command-here'"),
        ("kill -9 $$", r"ended with exit code -9"),
    ],
)
def test_a_command_that_fails_is_no_short_shard(piped, tmp_path, command, said):
    with pytest.raises(BadShard, match=said) as error:
        open_(piped(command))
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())


def test_output_that_is_cut_short_is_no_end_and_is_not_kept(piped, tmp_path):
    with pytest.raises(DamagedShard, match="cut short"):
        open_(piped("head -c 5000 {}"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_failure_that_passes_is_tried_again(piped, tmp_path):
    count = tmp_path / "count"
    data = piped(f"echo x >> {count}; test $(wc -l < {count}) -gt 2 && cat {{}}")
    assert sum(1 for _ in read_samples(data.train, data)) == 60


def test_a_command_that_says_nothing_is_ended(piped, monkeypatch, tmp_path):
    monkeypatch.setattr(pipes, "_TIMEOUT", 0.1)
    monkeypatch.setattr(retry, "TRIES", 1)
    alive = tmp_path / "pid"
    with pytest.raises(BadShard, match=r"wrote nothing for 0\.1 seconds"):
        open_(piped(f"echo $$ > {alive}; sleep 60"))
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{alive.read_text().strip()}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{alive.read_text().strip()}")


def test_a_shard_larger_than_the_cache_is_told(piped):
    with pytest.raises(BadShard, match=r"larger than data\.cache_gb=1e-08"):
        open_(piped("cat {}", cache_gb=1e-8))


@pytest.mark.parametrize("url", ["pipe:", "pipe:cat 'open"])
def test_commands_that_cannot_be_read_are_told(piped, url):
    with pytest.raises(ValueError, match=r"names no command|the command cannot be read"):
        open_(piped("", train=[url]))


def test_a_copy_that_goes_before_it_is_opened_is_made_again(piped, monkeypatch):
    data, opened = piped("cat {}"), []

    class Unlucky(LocalShard):
        def __init__(self, path, url):
            opened.append(path)
            if len(opened) == 1:
                os.unlink(path)
            super().__init__(path, url)

    monkeypatch.setattr(pipes, "LocalShard", Unlucky)
    shard = pipes.open_pipe(data.train[0], data)
    assert len(opened) == 2 and shard.read(0, 3)
    shard.close()
