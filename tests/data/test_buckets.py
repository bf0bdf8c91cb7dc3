"""Length buckets: less padding, each sample still once a pass, the same order at any number of ranks and workers."""

from collections import Counter

import pytest

from vlscale.data.keyed import hash64
from vlscale.data.writer import write_shard
from vlscale.sections import DataConfig

SAMPLES = 2_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captions of 1 to 30 words under small pictures."""
    import cv2
    import numpy as np

    picture = cv2.imencode(".jpg", np.full((16, 16, 3), 99, np.uint8))[1].tobytes()
    place = tmp_path_factory.mktemp("lengths")
    for shard in range(8):
        keys = range(shard * SAMPLES // 8, (shard + 1) * SAMPLES // 8)
        samples = ({"__key__": f"{k:05d}", "jpg": picture, "txt": "red " * (1 + hash64("l", k) % 30)} for k in keys)
        write_shard(place / f"train-{shard}.tar", samples)
    return place


@pytest.fixture
def bucketed(folder):
    def make(**changes) -> DataConfig:
        return DataConfig(**{"train": [str(folder / "train-*.tar")], "length_buckets": 6, "lanes": 8, **changes})

    return make


def test_batches_are_of_alike_length_and_not_always_of_the_same(run_stream, bucketed):
    def padding(data) -> tuple[float, set[int]]:
        masks = [batch.attention_mask for (batch,) in run_stream(30, data=data)[0]]
        lengths = {mask.shape[1] for mask in masks}
        return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks), lengths

    (plain, _), (less, lengths) = padding(bucketed(length_buckets=1)), padding(bucketed())
    assert plain > 0.4 and less < 0.65 * plain
    assert min(lengths) < 12 and max(lengths) > 28


def test_each_sample_still_comes_once_a_pass(run_stream, keys_of, bucketed):
    seen = Counter(key for batch in keys_of(run_stream(2 * SAMPLES // 64, data=bucketed())[0]) for key in batch)
    assert len(seen) == SAMPLES and set(seen.values()) <= {1, 2, 3}


@pytest.mark.parametrize(("world_size", "workers", "prefetch"), [(2, 0, 4), (4, 1, 1), (1, 2, 2)])
def test_the_order_is_that_of_any_ranks_and_workers(run_stream, keys_of, bucketed, world_size, workers, prefetch):
    expected = keys_of(run_stream(8, data=bucketed())[0])
    data = bucketed(workers=workers, prefetch=prefetch)
    first, state = run_stream(5, world_size, data=data)
    rest, _ = run_stream(3, 1, data=bucketed(), state=state)
    assert keys_of(first) + keys_of(rest) == expected


def test_buckets_may_not_change_on_resume(run_stream, bucketed):
    _, state = run_stream(1, data=bucketed())
    with pytest.raises(ValueError, match=r"data\.length_buckets changed, the checkpoint has 6, this run has 1"):
        run_stream(1, data=bucketed(length_buckets=1), state=state)


def test_captions_inside_json_have_no_length_in_the_index(bucketed):
    with pytest.raises(ValueError, match=r"data\.length_buckets=6 needs captions in members of their own"):
        bucketed(caption_key="json:captions")
