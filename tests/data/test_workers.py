"""Workers and crashes: the key stream is one whatever loads it, and nothing is left behind by what is killed."""

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from vlscale.data.loader import LoaderJob, Views
from vlscale.data.stream import TrainStream
from vlscale.data.worker import WorkerPool

STEPS = 4
TRAINER = """
import pickle, sys
from vlscale.data.stream import TrainStream
stream_arguments, log = pickle.load(open(sys.argv[1], "rb")), open(sys.argv[2], "ab")
for batch in TrainStream(**stream_arguments):
    pickle.dump((batch.keys, batch.state), log)
    log.flush()
"""


def digest(batches):
    return hashlib.sha256(repr(batches).encode()).hexdigest()


@pytest.mark.parametrize("world_size, workers, prefetch", [
    (1, 0, 1), (1, 0, 4), (1, 1, 4), (1, 3, 1), (2, 0, 4), (2, 1, 1), (2, 3, 4), (4, 0, 1), (4, 1, 4), (4, 3, 1),
])  # fmt: skip
def test_one_key_stream_for_all(run_stream, keys_of, corpus, make_config, world_size, workers, prefetch):
    rows, state = run_stream(STEPS, world_size, data=make_config(corpus, workers=workers, prefetch=prefetch))
    expected, after = run_stream(STEPS)
    assert digest(keys_of(rows)) == digest(keys_of(expected))
    assert state.rows.tolist() == after.rows.tolist()


def test_workers_give_the_same_pictures_and_texts_and_count_the_same_faults(run_stream, corpus, make_config):
    options = {"second_view": True, "second_caption": True}
    (alone,), (helped,) = (
        run_stream(2, data=make_config(corpus, workers=workers), **options)[0][1] for workers in (0, 2)
    )
    for name in ("images", "second_images", "pair_id", "input_ids", "second_input_ids", "positions"):
        assert torch.equal(getattr(alone, name), getattr(helped, name)), name
    assert alone.skipped == helped.skipped and alone.epoch == helped.epoch


def test_more_workers_than_lanes(run_stream, keys_of, corpus, make_config):
    rows, _ = run_stream(2, data=make_config(corpus, workers=3, lanes=2))
    assert keys_of(rows) == keys_of(run_stream(2, data=make_config(corpus, lanes=2))[0])


def test_an_error_in_a_worker_is_the_trainers(run_stream, own_corpus, make_config):
    with pytest.raises(ValueError, match="1000 samples in a row"):
        run_stream(1, data=make_config(own_corpus, workers=1, max_pixels=10))


def test_a_worker_that_is_killed_is_told(corpus, tokenizer, spec, make_config):
    before = set(psutil.Process().children())
    iterator = iter(
        TrainStream(make_config(corpus, workers=1, prefetch=1), spec, tokenizer, global_batch_size=64, seed=0)
    )
    next(iterator)
    (worker,) = set(psutil.Process().children()) - before
    worker.kill()
    with pytest.raises(RuntimeError, match=r"data worker ended unexpectedly \(exit code -9\)"):
        for _ in range(20):
            next(iterator)
    iterator.close()


def test_signals_for_the_trainer_do_not_end_its_workers(corpus, tokenizer, spec, make_config):
    before = set(psutil.Process().children())
    stream = TrainStream(make_config(corpus, workers=1, prefetch=1), spec, tokenizer, global_batch_size=64, seed=0)
    next(iterator := iter(stream))
    (worker,) = set(psutil.Process().children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        worker.send_signal(number)
    assert all(next(iterator).keys for _ in range(8)) and worker.is_running()
    iterator.close()


def test_a_stream_that_is_left_ends_its_workers(corpus, tokenizer, spec, make_config):
    before = set(psutil.Process().children())
    stream = TrainStream(make_config(corpus, workers=2), spec, tokenizer, global_batch_size=64, seed=0)
    next(iterator := iter(stream))
    assert len(set(psutil.Process().children()) - before) == 2
    iterator.close()
    assert set(psutil.Process().children()) == before


def test_kill_and_resume(tmp_path, corpus, tokenizer, spec, make_config, run_stream, keys_of):
    """Killed twice without warning; what was consumed is the stream's beginning, nothing twice, nothing missing."""
    log, job = tmp_path / "log", tmp_path / "job"
    (tmp_path / "trainer.py").write_text(TRAINER)
    arguments = {
        "data": make_config(corpus, workers=2, prefetch=3), "spec": spec, "tokenizer": tokenizer,
        "global_batch_size": 64, "seed": 5, "state": None,
    }  # fmt: skip
    shared_memory = set(os.listdir("/dev/shm"))
    for _ in range(2):
        job.write_bytes(pickle.dumps(arguments))
        size = log.stat().st_size if log.exists() else 0
        trainer = subprocess.Popen(
            [sys.executable, tmp_path / "trainer.py", job, log],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        wait_until(lambda: log.exists() and log.stat().st_size > size + 20_000)  # noqa: B023
        workers = psutil.Process(trainer.pid).children()
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        consumed = read_log(log)
        arguments["state"] = consumed[-1][1]
        assert len(workers) == 2
        wait_until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))  # noqa: B023
    keys = [keys for keys, _ in consumed]
    assert len(keys) > 10
    assert keys == keys_of(run_stream(len(keys))[0])
    assert not left_behind(set(os.listdir("/dev/shm")) - shared_memory)


def left_behind(names: set[str]) -> set[str]:
    """Shared memory that no living process has mapped: the others belong to whoever else works on this machine."""
    mapped = ""
    for process in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += process.read_text()
    return {name for name in names if name not in mapped and (Path("/dev/shm") / name).exists()}


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def read_log(path):
    """All whole entries; a last one that was cut by the kill is dropped from the file, as a trainer's checkpoint is."""
    entries, end = [], 0
    with path.open("rb") as file:
        try:
            while True:
                entries.append(pickle.load(file))
                end = file.tell()
        except (EOFError, pickle.UnpicklingError):
            pass
    os.truncate(path, end)
    return entries


def test_a_slow_shard_changes_nothing(run_stream, keys_of, own_corpus, monkeypatch):
    expected = keys_of(run_stream(4, 2, folder=own_corpus)[0])
    read, slow = os.pread, os.stat(own_corpus / "train-000003.tar").st_ino

    def pread(file, size, start):
        if os.fstat(file).st_ino == slow:
            time.sleep(0.01)
        return read(file, size, start)

    monkeypatch.setattr(os, "pread", pread)
    assert keys_of(run_stream(4, 2, folder=own_corpus)[0]) == expected


def test_errors_of_reading_are_tried_again_and_then_end_the_run(run_stream, keys_of, own_corpus, monkeypatch):
    import vlscale.data.retry as module

    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    expected = keys_of(run_stream(2, folder=own_corpus)[0])
    read, failures = os.pread, iter([True, True, True, False, True, True])

    def sometimes(file, size, start):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return read(file, size, start)

    monkeypatch.setattr(os, "pread", sometimes)
    assert keys_of(run_stream(2, folder=own_corpus)[0]) == expected
    assert next(failures, None) is None  # all of them were met

    def always(file, size, start):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", always)
    with pytest.raises(ValueError, match=r"shard .*train.*Input/output error \(tried 4 times\)"):
        run_stream(1, folder=own_corpus)


def test_jobs_split_into_runs_of_lanes(spec, make_config, tmp_path):
    job = LoaderJob(None, make_config(tmp_path), spec, Views(), 64, 0, 16, list(range(8)), (1.0,), 2)
    parts = job.split(3)
    assert [state for part in parts for state in part.states] == list(range(8))
    assert [part.first for part in parts] == [16, 18, 21] and len(job.split(20)) == 8


def test_a_pool_that_cannot_start_leaves_nothing(monkeypatch, spec, make_config, tmp_path):
    import vlscale.data.worker as module

    started, start = [], module._start

    def second_fails(job):
        if started:
            raise OSError("no more processes")
        started.append(start(job))
        return started[0]

    monkeypatch.setattr(module, "_start", second_fails)
    job = LoaderJob(None, make_config(tmp_path), spec, Views(), 64, 0, 0, list(range(8)), (1.0,), 2)
    with pytest.raises(OSError, match="no more processes"):
        WorkerPool(job, 2)
    assert started[0][0].poll() is not None
