"""The stream: one order for every number of ranks, exact resume at any of them, deterministic failures."""

import logging
import os
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from vlscale.data.batch import PackedPictures
from vlscale.data.keyed import hash64
from vlscale.data.lanes import LANE_STATE, BlockTable, SourceLane, choose_lanes, merge_states
from vlscale.data.samples import read_samples
from vlscale.data.stream import TrainStream
from vlscale.data.tokens import tokenise_and_count
from vlscale.sections import AugmentConfig


def test_batches_have_their_shapes(run_stream):
    (batch,), _ = run_stream(1)[0][0], None
    assert batch.images.shape == (64, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.input_ids.shape == batch.attention_mask.shape and batch.input_ids.dtype == torch.int64
    assert batch.positions.tolist() == list(range(64))
    assert batch.pair_id.tolist() == [hash64(key) >> 1 for key in batch.keys]
    assert (batch.second_images, batch.second_input_ids, batch.second_attention_mask) == (None, None, None)
    assert batch.epoch == 64 / 2000 and batch.skipped == 0


def test_ranks_share_the_global_batch_and_agree_on_everything(run_stream):
    whole = [row[0] for row in run_stream(3)[0]]
    for world_size in (2, 4):
        for row, reference in zip(run_stream(3, world_size)[0], whole, strict=True):
            assert [key for batch in row for key in batch.keys] == reference.keys
            assert torch.equal(torch.cat([batch.positions for batch in row]), reference.positions)
            assert torch.equal(torch.cat([batch.images for batch in row]), reference.images)
            assert torch.equal(torch.cat([batch.pair_id for batch in row]), reference.pair_id)
            tokens = [
                ids[mask.bool()].tolist()
                for batch in row
                for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
            ]
            assert tokens == [
                ids[mask.bool()].tolist()
                for ids, mask in zip(reference.input_ids, reference.attention_mask, strict=True)
            ]


def test_prefetch_does_not_matter(run_stream, keys_of, corpus, make_config):
    first, second = (run_stream(6, data=make_config(corpus, prefetch=prefetch))[0] for prefetch in (1, 5))
    assert keys_of(first) == keys_of(second)
    assert all(torch.equal(a[0].images, b[0].images) for a, b in zip(first, second, strict=True))


def test_an_epoch_of_a_lane_has_each_of_its_samples_once(run_stream, keys_of):
    keys = [key for batch in keys_of(run_stream(100)[0]) for key in batch]
    counts = np.unique(np.unique(keys, return_counts=True)[1])
    assert len(set(keys)) == 2000 and counts.min() >= 2 and counts.max() <= 5
    assert len(set(keys[:1280])) == 1280  # while no lane has ended, nothing comes twice


def test_orders_differ_by_seed_and_by_epoch(run_stream, keys_of):
    first, other = (keys_of(run_stream(2, seed=seed)[0]) for seed in (1, 2))
    assert first != other
    keys = [key for batch in keys_of(run_stream(62)[0]) for key in batch]
    first, second = ({key: place for place, key in enumerate(half)} for half in (keys[:1984], keys[1984:]))
    both = sorted(first.keys() & second.keys())
    assert len(both) > 1600
    assert abs(np.corrcoef([first[key] for key in both], [second[key] for key in both])[0, 1]) < 0.15


@pytest.mark.parametrize("worlds", [(1, 1, 1), (4, 2, 4), (1, 8, 2)])
def test_resume_is_exact_at_any_number_of_ranks(run_stream, keys_of, worlds):
    expected = run_stream(36)[0]
    state, seen = None, []
    for world_size in worlds:
        rows, state = run_stream(12, world_size, state=state)
        state = pickle.loads(pickle.dumps(state))
        seen += rows
    assert keys_of(seen) == keys_of(expected)
    for row, (reference,) in zip(seen, expected, strict=True):
        assert torch.equal(torch.cat([batch.images for batch in row]), reference.images)
        assert row[0].epoch == reference.epoch


def test_what_was_made_ahead_is_not_lost(corpus, tokenizer, spec, make_config):
    """The state of a batch is that batch's, however far the thread has got."""
    options = {"global_batch_size": 64, "seed": 3}
    stream = TrainStream(make_config(corpus, prefetch=6), spec, tokenizer, **options)
    iterator = iter(stream)
    for _ in range(4):
        batch = next(iterator)
    expected = next(iterator).keys
    iterator.close()
    resumed = iter(TrainStream(make_config(corpus), spec, tokenizer, **options, state=batch.state))
    assert next(resumed).keys == expected
    resumed.close()


def test_an_iterator_that_was_left_goes_on(corpus, tokenizer, spec, make_config, run_stream, keys_of):
    stream = TrainStream(make_config(corpus), spec, tokenizer, global_batch_size=64, seed=5)
    seen = []
    for _ in range(3):
        for batch, _ in zip(stream, range(2), strict=False):
            seen.append(batch.keys)
    assert seen[:2] == keys_of(run_stream(2)[0])


def test_the_batch_size_may_change_on_resume(run_stream, keys_of, corpus, make_config):
    data = make_config(corpus, lanes=32)
    rows, state = run_stream(4, data=data, batch_size=64)
    more, _ = run_stream(2, state=state, data=data, batch_size=128)
    expected = [key for batch in keys_of(run_stream(8, data=data, batch_size=64)[0]) for key in batch]
    assert sorted(key for batch in keys_of(rows + more) for key in batch) == sorted(expected)
    assert more[-1][0].epoch == 512 / 2000


def test_state_is_small(run_stream):
    state = run_stream(2)[1]
    assert state.rows.nbytes == 64 * LANE_STATE.itemsize and LANE_STATE.itemsize == 32
    assert len(pickle.dumps(state)) < 3000


def test_states_that_do_not_belong_together_are_refused(run_stream):
    rows, _ = run_stream(2, 4)
    states = [batch.state for batch in rows[1]]
    assert merge_states(states[::-1]).rows.tolist() == merge_states(states).rows.tolist()
    for wrong in (states[:3], states[1:], [*states[:3], rows[0][3].state], [*states, states[0]]):
        with pytest.raises(ValueError, match="stream states"):
            merge_states(wrong)


def test_a_state_without_my_lanes_is_refused(run_stream, corpus, tokenizer, spec, make_config):
    own = run_stream(1, 4)[0][0][1].state
    with pytest.raises(ValueError, match=r"holds lanes 16 to 32, lanes 32 to 64 were asked for"):
        TrainStream(make_config(corpus), spec, tokenizer, global_batch_size=64, seed=5, rank=1, world_size=2, state=own)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 6}, "train.seed changed"),
        ({"batch_size": 32}, "data.lanes changed"),
        ({"window": 4}, "data.window changed"),
    ],
)
def test_a_changed_run_is_not_resumed(run_stream, corpus, make_config, change, message):
    state = run_stream(1)[1]
    data = make_config(corpus, window=change.pop("window", 8))
    with pytest.raises(ValueError, match=message):
        run_stream(1, state=state, data=data, **change)


def test_changed_shards_are_not_resumed(own_corpus, run_stream):
    state = run_stream(1, folder=own_corpus)[1]
    shutil.copy(own_corpus / "train-000001.tar", own_corpus / "train-000000.tar")
    with pytest.raises(ValueError, match=r"cannot resume: the shards .* changed"):
        run_stream(1, folder=own_corpus, state=state)


def test_changed_shards_go_on_with_the_next_epoch_when_asked(own_corpus, run_stream, keys_of, make_config):
    state = run_stream(5, folder=own_corpus)[1]
    os.remove(own_corpus / "train-000007.tar")
    data = make_config(own_corpus, changed_shards="next_epoch")
    rows, after = run_stream(4, state=state, data=data)
    again, _ = run_stream(4, 4, state=state, data=data)
    assert keys_of(rows) == keys_of(again) and (after.rows["epoch"] >= 1).all()
    assert rows[-1][0].epoch == 9 * 64 / 1890
    more, _ = run_stream(2, state=after, data=make_config(own_corpus))
    assert len(keys_of(more)[0]) == 64


def damage_picture(path, key):
    """Overwrites the picture of one sample."""
    data = bytearray(path.read_bytes())
    at = data.index(f"{key}.jpg".encode()) + 512
    data[at : at + 200] = b"\0" * 200
    stat = os.stat(path)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_picture_is_replaced_the_same_way_everywhere(own_corpus, run_stream, keys_of, caplog):
    expected = keys_of(run_stream(40, folder=own_corpus)[0])
    bad = [expected[0][3], expected[2][40]]
    for key in bad:
        number = int(key.split("-")[1]) // 270
        damage_picture(own_corpus / f"train-{number:06d}.tar", key)
    with caplog.at_level(logging.WARNING, logger="vlscale"):
        logging.getLogger("vlscale").propagate = True
        rows, state = run_stream(40, folder=own_corpus)
    seen = keys_of(rows)
    assert not {key for batch in seen for key in batch} & set(bad)
    for key in bad:
        assert any(key in message and "broken picture" in message for message in caplog.messages)
    assert seen[0][:3] == expected[0][:3] and seen[0][3] == expected[1][3] and seen[0][4:] == expected[0][4:]
    assert rows[0][0].skipped == 1 and rows[2][0].skipped == 2
    assert int(state.rows["skipped"].sum()) == rows[-1][0].skipped
    again, middle = run_stream(11, 4, folder=own_corpus)
    rest, _ = run_stream(29, 2, folder=own_corpus, state=middle)
    assert keys_of(again) + keys_of(rest) == seen
    assert sum(batch.skipped for batch in rest[-1]) == rows[-1][0].skipped


def test_the_log_names_each_skipped_sample_once_and_no_more_than_a_hundred(
    corpus, tokenizer, spec, make_config, caplog
):
    stream = TrainStream(make_config(corpus), spec, tokenizer, global_batch_size=64, seed=3)
    for _ in range(2):
        stream._tell(["a is broken", "b is broken"])
    assert caplog.messages == ["skipped sample a is broken", "skipped sample b is broken"]
    stream._tell([f"{number} is broken" for number in range(200)])
    assert len(caplog.messages) == 101 and "metrics.jsonl counts them" in caplog.messages[-1]


def test_a_corpus_in_which_nothing_decodes_ends(own_corpus, run_stream, make_config):
    with pytest.raises(ValueError, match=r"1000 samples in a row cannot be used, the last is .*too many pixels"):
        run_stream(1, data=make_config(own_corpus, max_pixels=10))


def test_second_views_and_captions(run_stream):
    batch = run_stream(1, second_view=True, second_caption=True)[0][0][0]
    assert batch.second_images.shape == batch.images.shape and not torch.equal(batch.second_images, batch.images)
    same = [first[m.bool()].tolist() == second[n.bool()].tolist() for first, m, second, n in zip(
        batch.input_ids, batch.attention_mask, batch.second_input_ids, batch.second_attention_mask, strict=True
    )]  # fmt: skip
    assert np.mean(same) < 0.2
    alone = run_stream(1)[0][0][0]
    assert torch.equal(alone.images, batch.images) and torch.equal(alone.input_ids, batch.input_ids)


def test_a_single_caption_is_its_own_second(run_stream, corpus, make_config):
    batch = run_stream(1, data=make_config(corpus, caption_key="txt"), second_caption=True)[0][0][0]
    assert torch.equal(batch.input_ids, batch.second_input_ids)


def test_captions_first_and_random(run_stream, corpus, make_config):
    texts = {}
    for how in ("first", "random"):
        batch = run_stream(1, data=make_config(corpus, captions=how))[0][0][0]
        texts[how] = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
    only = run_stream(1, data=make_config(corpus, caption_key="txt"))[0][0][0]
    assert texts["first"] == [
        ids[m.bool()].tolist() for ids, m in zip(only.input_ids, only.attention_mask, strict=True)
    ]
    assert 0.05 < np.mean([a == b for a, b in zip(texts["first"], texts["random"], strict=True)]) < 0.5


def test_augmentation_changes_with_the_epoch_alone(run_stream, corpus, make_config):
    data = make_config(corpus, augment=AugmentConfig(noise=0.2))
    views = {}
    for (batch,) in run_stream(70, data=data)[0]:
        for key, image in zip(batch.keys, batch.images, strict=True):
            views.setdefault(key, []).append(image)
    assert all(not torch.equal(seen[0], seen[1]) for seen in views.values())


def test_captions_that_are_cut_are_counted(run_stream):
    short, whole = (run_stream(1, max_length=length)[0][0][0] for length in (12, 100))
    lengths = whole.attention_mask.sum(dim=1)
    assert short.truncated == int((lengths > 12).sum()) > 10 and whole.truncated == 0
    assert short.input_ids.shape[1] == 12


def test_pair_id_from_json(emoji_folder, tokenizer, spec, make_config, tmp_path):
    data = make_config(
        emoji_folder,
        train=[str(emoji_folder / "emoji-train-*.tar")],
        pair_id="json:concept",
        manifest_dir=str(tmp_path),
    )
    iterator = iter(TrainStream(data, spec, tokenizer, global_batch_size=256, seed=0))
    batch = next(iterator)
    iterator.close()
    assert 100 < len(batch.pair_id.unique()) < 250 and batch.pair_id.min() >= 0
    concepts = {
        key: "_".join(p for p in key.split("_") if p not in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
        for key in batch.keys
    }
    assert batch.pair_id.tolist() == [hash64(f'"{concepts[key]}"') >> 1 for key in batch.keys]


def test_a_pair_id_that_no_sample_has(run_stream, corpus, make_config):
    with pytest.raises(ValueError, match="no field 'concept'"):
        run_stream(1, data=make_config(corpus, pair_id="json:concept"))
    with pytest.raises(ValueError, match="expected json:FIELD"):
        run_stream(1, data=make_config(corpus, pair_id="concept"))


def test_fewer_shards_than_ranks(run_stream, keys_of, corpus, make_config):
    data = make_config(corpus, train=[str(corpus / "train-000000.tar")])
    assert keys_of(run_stream(5, 8, data=data)[0]) == keys_of(run_stream(5, 1, data=data)[0])


def test_a_batch_larger_than_the_corpus(run_stream):
    with pytest.raises(ValueError, match=r"train.global_batch_size=2048 is larger than the corpus of 2000 samples"):
        run_stream(1, batch_size=2048)


def test_a_batch_as_large_as_the_corpus_works(run_stream, keys_of, corpus, make_config):
    data = make_config(corpus, train=[str(corpus / "train-000007.tar")])
    assert len(keys_of(run_stream(3, batch_size=110, data=data)[0])[2]) == 110


@pytest.mark.parametrize(
    "batch, world, lanes, message",
    [
        (64, 3, None, "cannot be divided by the world size 3; nearest that can: 63, 66"),
        (2, 4, None, "cannot be divided by the world size 4; nearest that can: 4"),
        (
            96,
            3,
            None,
            r"data.lanes=32 \(the default\) .* multiple of the world size 3; nearest that fit: 6, 12, 24, 48",
        ),
        (64, 4, 6, "data.lanes=6 has to divide .* nearest that fit: 4, 8"),
        (64, 4, 128, "data.lanes=128 has to divide"),
    ],
)
def test_lanes_that_do_not_fit_list_those_that_do(batch, world, lanes, message):
    with pytest.raises(ValueError, match=message):
        choose_lanes(batch, world, lanes)


@pytest.mark.parametrize(
    "batch, lanes",
    [(256, 64), (96, 32), (7, 1), (512, 64), (24, 8), (2048, 64), (4096, 128), (12_288, 256), (1 << 20, 4096)],
)
def test_default_lanes(batch, lanes):
    assert choose_lanes(batch, 1, None) == lanes


@pytest.mark.parametrize("batch, world", [(4096, 128), (32_768, 512), (1 << 20, 4096)])
def test_default_lanes_serve_a_rank_for_32_pairs(batch, world):
    assert choose_lanes(batch, world, None) % world == 0


@pytest.mark.parametrize(
    "counts, lanes", [([5], 1), ([1, 1, 1], 2), ([250] * 8, 64), ([100_000, 3, 0, 7], 16), ([7] * 30, 8)]
)
def test_blocks_cover_every_sample_once(counts, lanes):
    table = BlockTable(np.array(counts), lanes)
    shards, places = table.samples(np.arange(table.num_blocks))
    assert list(zip(shards.tolist(), places.tolist(), strict=True)) == [
        (s, i) for s, n in enumerate(counts) for i in range(n)
    ]
    assert table.num_blocks >= lanes
    some = np.array([table.num_blocks - 1, 0])
    assert table.samples(some)[0][0] == len(counts) - 1 and table.samples(some)[1][-1] < table.block_size


def test_the_order_of_a_billion_samples_needs_little_memory():
    counts = np.full(100_000, 10_000)
    tracemalloc.start()
    table = BlockTable(counts, 64)
    lanes = [
        SourceLane(table, 0, lane, lanes=64, window=8, seed=0, state=np.zeros((), LANE_STATE)) for lane in range(64)
    ]
    seen = {lane.next() for lane in lanes for _ in range(2_000)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.num_samples == 10**9 and table.block_size == 1000
    assert len(seen) == 128_000 and len({shard for _, shard, _, _ in seen}) > 60 * 8 * 0.9
    assert peak < 150e6


def test_captions_train_in_turn_each_once_in_as_many_passes(run_stream, corpus, make_config):
    data = make_config(corpus, train=[str(corpus / "val-*.tar")], captions="in_turn")
    rows, _ = run_stream(60 * 6 // 4, data=data, batch_size=4)
    said: dict[str, list[str]] = {}
    for (batch,) in rows:
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            said.setdefault(key, []).append(caption)
    captions = {sample.key: sample.captions for sample in read_samples(data.train, data)}
    assert len(said) == 60 and all(len(texts) >= 5 for texts in said.values())
    for key, texts in said.items():
        assert sorted(texts[: len(captions[key])]) == sorted(captions[key])
    assert len({captions[key].index(texts[0]) for key, texts in said.items()}) > 1


def test_batches_hold_the_tokens_of_their_captions(run_stream, tokenizer):
    ((batch,),) = run_stream(1, second_caption=True, max_length=14)[0]
    ids, mask, cut = tokenise_and_count(tokenizer, batch.captions, 14)
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask, mask)
    assert batch.truncated == cut > 0 and batch.second_input_ids.shape[0] == 64


@pytest.mark.parametrize("decode", ["fast", "device"])
def test_batches_for_a_gpu_are_made_in_page_locked_memory(run_stream, corpus, make_config, monkeypatch, decode):
    """What is page-locked is noted, where there is no GPU to lock it for; one is asked whether it is."""
    data, locked, chosen = make_config(corpus, decode=decode, augment=AugmentConfig()), [], []
    expected = run_stream(2, data=data, second_view=True)[0]
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self.clone()) or locked[-1])
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = torch.device("cuda", 0)
    made = run_stream(2, data=data, second_view=True, device=device)[0]
    for (batch,), (plain,) in zip(made, expected, strict=True):
        for ours, theirs in zip(tensors_of(batch), tensors_of(plain), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_pinned() if torch.cuda.is_available() else any(ours is tensor for tensor in locked)
    assert torch.cuda.is_available() or chosen == [device]


def tensors_of(holder) -> list[torch.Tensor]:
    found = []
    for value in vars(holder).values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, PackedPictures):
            found += tensors_of(value)
    return found
