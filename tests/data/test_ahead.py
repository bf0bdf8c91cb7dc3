"""The queue between the thread that makes batches and the one that takes them: bounds in items and in bytes."""

import threading
import time

import pytest

from vlscale.data.ahead import Ahead
from vlscale.data.stream import TrainStream


def filled(ahead: Ahead, sizes: list[int], seconds: float = 0.2) -> int:
    """How many items of these sizes go in before a putter has to wait."""
    done: list[bool] = []
    thread = threading.Thread(target=lambda: [done.append(ahead.put(size, size)) for size in sizes], daemon=True)
    thread.start()
    thread.join(seconds)
    count = len(done)
    ahead.close()
    thread.join(5)
    assert not thread.is_alive() and done == [True] * count + [False] * (len(sizes) - count)
    return count


@pytest.mark.parametrize(
    ("most", "most_bytes", "sizes", "expected"),
    [(3, 100, [1] * 5, 3), (9, 100, [40] * 5, 2), (9, 100, [50] * 5, 2), (9, 10, [500] * 3, 1), (1, 100, [1, 1], 1)],
)
def test_a_putter_waits_at_either_bound_but_one_item_always_fits(most, most_bytes, sizes, expected):
    assert filled(Ahead(most, most_bytes), sizes) == expected


def test_items_come_in_order_and_make_room():
    ahead = Ahead(2, 100)
    thread = threading.Thread(target=lambda: [ahead.put(number, 60) for number in range(50)], daemon=True)
    thread.start()
    assert [ahead.get() for _ in range(50)] == list(range(50))
    thread.join(5)
    assert not thread.is_alive()


def test_a_taker_waits_for_an_item():
    ahead = Ahead(1, 1)
    threading.Timer(0.05, lambda: ahead.put("late", 1)).start()
    start = time.monotonic()
    assert ahead.get() == "late" and time.monotonic() - start > 0.04


@pytest.mark.parametrize(("megabytes", "waiting"), [(0.25, 2), (2048, 6), (0.001, 1)])
def test_batches_made_ahead_stay_within_the_megabytes(
    corpus, tokenizer, spec, make_config, monkeypatch, megabytes, waiting
):
    """Pictures and tokens of 64 pairs are about 0.1 MB; six batches might wait."""
    made: list[Ahead] = []

    class Watched(Ahead):
        def __init__(self, *bounds):
            super().__init__(*bounds)
            made.append(self)

    monkeypatch.setattr("vlscale.data.stream.Ahead", Watched)
    data = make_config(corpus, prefetch=6, read_ahead_mb=megabytes)
    batches = iter(TrainStream(data, spec, tokenizer, global_batch_size=64, seed=0))
    next(batches)
    end = time.monotonic() + 20
    while len(made[0]._waiting) < waiting and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made[0]._waiting) == waiting
    batches.close()
