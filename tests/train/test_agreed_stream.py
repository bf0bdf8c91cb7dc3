"""A shard that one rank cannot read any more: all ranks leave it out from the same batch on, also after a resume."""

import threading
from contextlib import closing
from itertools import chain
from pathlib import Path

import pytest

from vlscale.data import reader as reading
from vlscale.data.faults import BadShard
from vlscale.data.images import ImageSpec
from vlscale.data.stream import TrainStream, merge_states
from vlscale.data.tokens import train_tokenizer
from vlscale.distributed import Ranks
from vlscale.sections import DataConfig
from vlscale.train.agreed_stream import AgreedStream

SPEC = ImageSpec(16, (0.5,) * 3, (0.5,) * 3)
BATCH, LOST = 32, "train-000002.tar"


class Together:
    """What two threads, each a rank, tell each other."""

    def __init__(self, size: int):
        self.said: list = [None] * size
        self.met = threading.Barrier(size, timeout=30)

    def exchange(self, rank: int, value) -> list:
        self.said[rank] = value
        self.met.wait()
        found = list(self.said)
        self.met.wait()
        return found


class ThreadRanks(Ranks):
    def sum(self, values):
        return sum(self.group.exchange(self.rank, values))

    def gather_objects(self, value):
        return self.group.exchange(self.rank, value)


@pytest.fixture(scope="module")
def data(corpus):
    return DataConfig(
        train=[f"{corpus}/train-*.tar"], caption_key="json:captions", prefetch=3, unreadable_shards="quarantine"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red disc"], vocab_size=60, max_length=8)


def streams(data, tokenizer, world_size: int, state=None) -> list[TrainStream]:
    return [
        TrainStream(data, SPEC, tokenizer, global_batch_size=BATCH, seed=1, rank=r, world_size=world_size, state=state)
        for r in range(world_size)
    ]


def keys(own: list[TrainStream], steps: int) -> list[list[str]]:
    """Keys of `steps` global batches, of ranks that are threads."""
    group, found, errors = Together(len(own)), {}, []

    def run(rank: int) -> None:
        try:
            with closing(iter(AgreedStream(own[rank], ThreadRanks(rank, len(own), group=group)))) as batches:
                found[rank] = [next(batches).keys for _ in range(steps)]
        except BaseException as error:
            errors.append(error)
            group.met.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(own))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [list(chain(*parts)) for parts in zip(*(found[rank] for rank in range(len(own))), strict=True)]


@pytest.fixture
def shard_falls_out(monkeypatch):
    """From the `after`th read of the lost shard on, reading it fails; other shards are as they were."""

    def break_it(after: int) -> None:
        read, count = reading.SampleReader.read, iter(range(10**9))

        def read_or_fail(self, shard, row, *, with_json):
            if self.manifest.urls[shard].endswith(LOST) and next(count) >= after:
                raise BadShard(f"shard {self.manifest.urls[shard]} cannot be read: Input/output error")
            return read(self, shard, row, with_json=with_json)

        monkeypatch.setattr(reading.SampleReader, "read", read_or_fail)

    yield break_it


@pytest.fixture(scope="module")
def members(corpus, data) -> set[str]:
    """Keys of the shard that is lost."""
    from vlscale.data.samples import read_samples

    return {sample.key for sample in read_samples([str(Path(corpus) / LOST)], data)}


def test_nothing_changes_while_all_can_be_read(data, tokenizer):
    with closing(iter(streams(data, tokenizer, 1)[0])) as batches:
        expected = [next(batches).keys for _ in range(6)]
    assert keys(streams(data, tokenizer, 2), 6) == expected


def test_all_ranks_leave_the_shard_out_from_one_batch_on(data, tokenizer, members, shard_falls_out, caplog):
    whole = keys(streams(data, tokenizer, 1), 12)
    shard_falls_out(after=20)
    own = streams(data, tokenizer, 2)
    found = keys(own, 12)
    first = next(step for step, (ours, theirs) in enumerate(zip(found, whole, strict=True)) if ours != theirs)
    assert 0 < first < 12 and members & set(whole[first])
    assert not members & {key for step in found[first:] for key in step}
    assert "left out from here on: shard" in caplog.text and LOST in caplog.text
    state = merge_states([stream.state for stream in own])
    assert state.quarantined == (2,)
    resumed = keys(streams(data, tokenizer, 4, state), 5)
    again = keys(streams(data, tokenizer, 1, state), 5)
    assert resumed == again and not members & {key for step in resumed for key in step}


def test_a_corpus_that_is_all_unreadable_ends_the_run(data, tokenizer, corpus, shard_falls_out):
    alone = data.model_copy(update={"train": [str(Path(corpus) / LOST)]})
    shard_falls_out(after=0)
    with pytest.raises(ValueError, match="1 of 1 shards cannot be read, and a source has no other; the last is "):
        keys(streams(alone, tokenizer, 1), 1)


def test_other_shards_start_with_none_left_out(data, tokenizer):
    (stream,) = streams(data, tokenizer, 1)
    stream.quarantine({1}, stream.state)
    stream.quarantine({3}, stream.state)
    assert stream.state.quarantined == (1, 3) and stream.state.next_epoch("another").quarantined == ()
