"""`vlscale bench data` and `vlscale bench stream` at their smallest: complete tables, peers that are missing named."""

import csv
import os
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The names of a benchmark's file, which finds its neighbours."""
    sys.path.insert(0, str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))
    sys.path.remove(str(FOLDER))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_speeds_is_complete(benchmark, tmp_path, capsys):
    cores = os.sched_getaffinity(0)
    arguments = ["--pictures", "128", "--rounds", "1", "--sizes", "64x48", "--workers", "0", "--read", "200"]
    arguments += ["--indexed", "400"]
    assert benchmark("data")["main"]([*arguments, "--out", str(tmp_path)]) == 0
    assert os.sched_getaffinity(0) == cores
    rows = table(tmp_path / "data.csv")
    speeds = [row for row in rows if row["measured"] == "images a second"]
    names = [(row["pipeline"], row["state"]) for row in speeds]
    device = "vlscale, decode=device"
    assert names[:4] == [("vlscale", "not kept"), ("vlscale", "kept"), (device, "not kept"), ("webdataset", "none")]
    assert {name for name, _ in names} == {"vlscale", device, "webdataset", "open_clip", "mosaicml-streaming"}
    for row in rows:
        assert (row["status"] == "ok" and float(row["median"]) > 0) or row["status"].startswith("missing: install ")
    assert len({row["measured"] for row in rows}) == 10
    assert any(row["measured"].startswith("seconds for a manifest of 400 samples in 2 shards") for row in rows)
    page = (tmp_path / "data.md").read_text()
    assert page in capsys.readouterr().out and "| vlscale | 64x48 | 0 | kept |" in page


def test_the_streams_of_all_settings_are_compared(benchmark, tmp_path, monkeypatch):
    names = benchmark("data_stream")
    names["main"].__globals__["GRID"] = [(2, 0, 1), (1, 1, 4)]
    arguments = ["--pairs", "600", "--steps", "3", "--web-batches", "50", "--out", str(tmp_path)]
    assert names["main"](arguments) == 0
    rows = table(tmp_path / "stream.csv")
    assert [row["pipeline"] for row in rows[3:]] == [
        "ranks 2, prefetch 1", "ranks 1, prefetch 4", "ranks 4, then 2, then 4",
    ]  # fmt: skip
    assert "One stream of keys and pictures in every row." in (tmp_path / "stream.md").read_text()
    run = names["run"]

    def other_at_two_ranks(data, tokenizer, steps, ranks, state=None):
        seen, after = run(data, tokenizer, steps, ranks, state)
        return ([*seen[:-1], "another"] if ranks == 2 else seen), after

    names["main"].__globals__["run"] = other_at_two_ranks
    assert names["main"](arguments) == 1
    statuses = [row["status"] for row in table(tmp_path / "stream.csv")]
    assert statuses == ["ok"] * 3 + ["ANOTHER STREAM", "ok", "ANOTHER STREAM"]
    bounded = next(row for row in rows if row["measured"].startswith("megabytes: order of 1000000000 samples"))
    assert 0 < float(bounded["median"]) < 100


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("data", ["--sizes", "512"], "--sizes 512: expected WIDTHxHEIGHT"),
        ("data", ["--pictures", "5"], "expected --pictures of at least 128"),
        ("data_stream", ["--steps", "1"], "expected --steps of at least 3"),
    ],
)
def test_wrong_arguments_are_one_line(benchmark, name, arguments, said):
    with pytest.raises(ValueError, match=said):
        benchmark(name)["main"](arguments)
