"""A hundred damaged shards (benchmarks/data_fuzz.py runs thousands)."""

import logging

from benchmarks.data_fuzz import DAMAGES, run


def test_damaged_shards_are_read_alike_or_refused(tmp_path):
    logging.getLogger("vlscale").setLevel(logging.ERROR)
    found = run(99, tmp_path, seed=1)
    kinds = {outcome.split(":")[0] for outcome in found["outcomes"]}
    assert kinds == {damage.__name__ for damage in DAMAGES}
    assert {"cut_end: refused", "pickles: lost", "bombs: lost", "broken_json: lost"} <= found["outcomes"].keys()
    assert found["slowest_seconds"] < 10 and found["memory_growth_mb"] < 100
