"""`data.captions=all`: every caption is a pair of its own, in one order at any number of ranks, through any stop."""

from itertools import groupby

import pytest
import torch

from vlscale.data.samples import read_samples
from vlscale.data.stream import TrainStream


@pytest.fixture
def held_out(corpus, make_config):
    """60 samples of five captions each."""

    def make(**changes):
        given = {"train": [str(corpus / "val-*.tar")], "captions": "all", "lanes": 4}
        return make_config(corpus, **{**given, **changes})

    return make


def pairs_of(rows):
    """(key, caption) of each global batch, ranks put together."""
    return [[pair for b in row for pair in zip(b.keys, b.captions, strict=True)] for row in rows]


def test_each_caption_is_a_pair_and_a_positive_of_its_sample(run_stream, held_out):
    rows, state = run_stream(8, data=held_out(), batch_size=32)
    captions = {sample.key: sample.captions for sample in read_samples(held_out().train, held_out())}
    by_lane = [[] for _ in range(4)]
    for batch in pairs_of(rows):
        for lane, pairs in enumerate(by_lane):
            pairs += batch[8 * lane : 8 * lane + 8]
    for pairs in by_lane:
        runs = [(key, [caption for _, caption in run]) for key, run in groupby(pairs, key=lambda pair: pair[0])]
        assert all(said == captions[key] for key, said in runs[:-1]) and len(runs) > 10
        assert runs[-1][1] == captions[runs[-1][0]][: len(runs[-1][1])]
    (batch,) = rows[3]
    ids = {key: {int(i) for k, i in zip(batch.keys, batch.pair_id, strict=True) if k == key} for key in batch.keys}
    assert all(len(found) == 1 for found in ids.values()) and len(set.union(*ids.values())) == len(ids) < 16
    for key in ids:  # one view of the picture
        views = [image for k, image in zip(batch.keys, batch.images, strict=True) if k == key]
        assert all(torch.equal(view, views[0]) for view in views)
    assert 0 < int(state.rows["caption"].max()) < 5  # some lane has stopped within a sample
    assert int(state.rows["taken"].sum()) == 8 * 32


@pytest.mark.parametrize(("world_size", "workers", "prefetch"), [(2, 0, 1), (4, 1, 3), (1, 2, 4)])
def test_one_order_for_all_ranks_and_workers(run_stream, held_out, world_size, workers, prefetch):
    expected, after = run_stream(5, data=held_out(), batch_size=12)
    rows, state = run_stream(5, world_size, data=held_out(workers=workers, prefetch=prefetch), batch_size=12)
    assert pairs_of(rows) == pairs_of(expected) and state.rows.tolist() == after.rows.tolist()
    for row, (whole,) in zip(rows, expected, strict=True):
        assert torch.equal(torch.cat([batch.images for batch in row]), whole.images)


@pytest.mark.parametrize("weights", [None, [1, 2]])
def test_a_stop_within_a_sample_is_exact_at_other_ranks(run_stream, held_out, corpus, weights):
    changes = {}
    if weights:
        changes = {"train": [str(corpus / "val-*.tar"), str(corpus / "train-000007.tar")], "weights": weights}
    data = held_out(**changes)
    expected, _ = run_stream(18, data=data, batch_size=12)
    seen, state = [], None
    for world_size, steps in ((4, 5), (2, 1), (1, 7), (4, 5)):
        rows, state = run_stream(steps, world_size, state=state, data=data, batch_size=12)
        seen += rows
    assert pairs_of(seen) == pairs_of(expected)


def test_a_sample_that_fails_is_left_out_with_all_its_captions(run_stream, held_out, monkeypatch):
    from vlscale.data import loader
    from vlscale.data.faults import BadSample

    expected = pairs_of(run_stream(4, data=held_out(), batch_size=16)[0])
    lost, decode = expected[0][5][0], loader.PartLoader._read

    def read(self, shard, row):
        sample = decode(self, shard, row)
        if sample.key == lost:
            raise BadSample("broken picture", "made up")
        return sample

    monkeypatch.setattr(loader.PartLoader, "_read", read)
    rows, state = run_stream(4, data=held_out(), batch_size=16)
    assert lost not in {key for batch in pairs_of(rows) for key, _ in batch}
    assert int(state.rows["skipped"].sum()) == 1 and pairs_of(rows)[0][:4] == expected[0][:4]


def test_a_shard_that_is_lost_within_a_sample_takes_the_rest_of_it(corpus, tokenizer, spec, held_out):
    data = held_out(train=[str(corpus / "train-000000.tar"), str(corpus / "train-000007.tar")])
    stream = TrainStream(data, spec, tokenizer, global_batch_size=12, seed=1)
    next(batches := iter(stream))
    batches.close()
    assert int(stream.state.rows["caption"].max()) > 0
    stream.quarantine({0}, stream.state)
    batch = next(batches := iter(stream))
    batches.close()
    assert all(int(key.split("-")[1]) >= 7 * 270 for key in batch.keys)


def test_an_epoch_is_a_pass_over_the_samples(run_stream, held_out):
    rows, _ = run_stream(30, data=held_out(), batch_size=20)  # 600 pairs: two passes over 300
    assert rows[14][0].epoch == pytest.approx(1, abs=0.05) and rows[-1][0].epoch == pytest.approx(2, abs=0.05)
    two, _ = run_stream(30, 2, data=held_out(), batch_size=20)
    assert sum(batch.epoch for batch in two[7]) / 2 == pytest.approx(rows[7][0].epoch)


def test_the_second_caption_is_another_one(run_stream, held_out, tokenizer):
    (batch,) = run_stream(1, data=held_out(), batch_size=16, second_caption=True)[0][0]
    same = [a[m.bool()].tolist() == b[n.bool()].tolist() for a, m, b, n in zip(
        batch.input_ids, batch.attention_mask, batch.second_input_ids, batch.second_attention_mask, strict=True
    )]  # fmt: skip
    assert sum(same) < 3


def test_a_state_of_another_form_is_told(run_stream, held_out):
    from dataclasses import replace

    state = run_stream(1, data=held_out(), batch_size=12)[1]
    names = [name for name in state.rows.dtype.names if name != "caption"]
    with pytest.raises(ValueError, match="cannot resume: the form of the stream's state changed"):
        run_stream(1, data=held_out(), batch_size=12, state=replace(state, rows=state.rows[names]))
