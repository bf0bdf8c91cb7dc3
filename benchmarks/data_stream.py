"""One key stream for all: every (ranks, workers, prefetch), and resumed at other ranks, on 50,000 pairs.

    vlscale bench stream [--out FOLDER] [--pairs 50000] [--steps 60] [--shards FOLDER] [--write]

Then the order of a simulated web-scale manifest (100,000 shards, a billion samples) as training goes through it: time
and memory of it alone. Writes stream.csv and stream.md into FOLDER, and with `--write` dated into benchmarks/results/.
`--shards` takes another corpus, such as emoji shards.
"""

import argparse
import hashlib
import itertools
import logging
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from common import end_with, provenance
from data_table import Row, write

from vlscale.data.images import ImageSpec
from vlscale.data.lanes import DEFAULT_LANES, LANE_STATE, BlockTable, SourceLane, StreamState, merge_states
from vlscale.data.stream import TrainStream
from vlscale.data.synth import make_corpus, synth_config
from vlscale.data.tokens import train_tokenizer
from vlscale.sections import DataConfig

GRID = list(itertools.product((1, 2, 4), (0, 1, 3), (1, 4)))  # ranks, workers, prefetch
SPEC = ImageSpec(32, (0.5,) * 3, (0.5,) * 3)
BATCH = 256


def run(
    data: DataConfig, tokenizer, steps: int, ranks: int, state: StreamState | None = None
) -> tuple[list[str], StreamState]:
    """A hash of each global batch's keys and pictures, and the state after the last."""
    streams = [
        TrainStream(data, SPEC, tokenizer, global_batch_size=BATCH, seed=0, rank=rank, world_size=ranks, state=state)
        for rank in range(ranks)
    ]
    iterators, seen = [iter(stream) for stream in streams], []
    for _ in range(steps):
        batches = [next(iterator) for iterator in iterators]
        digest = hashlib.sha256()
        for batch in batches:
            digest.update("\n".join([*batch.keys, ""]).encode())
        for batch in batches:
            digest.update(batch.images.numpy().tobytes())
        seen.append(digest.hexdigest())
    for iterator in iterators:
        iterator.close()
    return seen, merge_states([stream.state for stream in streams])


def compare(data: DataConfig, tokenizer, steps: int) -> tuple[list[Row], bool]:
    """A row for each (ranks, workers, prefetch) and for a run that changes its ranks; whether all gave one stream."""
    expected, after = run(data, tokenizer, steps, 1)
    rows, what = [], f"pairs a second with start, {steps} batches of {BATCH}"

    def add(pipeline: str, pairs: int, seconds: float, same: bool, **setting) -> None:
        status = "ok" if same else "ANOTHER STREAM"
        rows.append(Row(what, pipeline, [pairs / seconds], status=status, **setting))

    for ranks, workers, prefetch in GRID:
        own = data.model_copy(update={"workers": workers, "prefetch": prefetch})
        start = time.perf_counter()
        seen, state = run(own, tokenizer, steps, ranks)
        same = seen == expected and state.rows.tolist() == after.rows.tolist()
        name = f"ranks {ranks}, prefetch {prefetch}"
        add(name, steps * BATCH, time.perf_counter() - start, same, workers=workers)
    state, resumed, start = None, [], time.perf_counter()
    for ranks in (4, 2, 4):
        seen, state = run(data, tokenizer, steps // 3, ranks, state)
        resumed += seen
    seconds = time.perf_counter() - start
    add("ranks 4, then 2, then 4", len(resumed) * BATCH, seconds, resumed == expected[: len(resumed)], workers=0)
    return rows, all(row.status == "ok" for row in rows)


def web_scale(batches: int, shards: int = 100_000, each: int = 10_000) -> list[Row]:
    """The places of `batches` global batches, of all lanes: first their time, then their memory. No shard is opened."""

    def order() -> None:
        table = BlockTable(np.full(shards, each), DEFAULT_LANES)
        fresh = np.zeros((), LANE_STATE)
        lanes = [
            SourceLane(table, 0, n, lanes=DEFAULT_LANES, window=8, seed=0, state=fresh) for n in range(DEFAULT_LANES)
        ]
        for _ in range(batches):
            for lane in lanes:
                for _ in range(BATCH // DEFAULT_LANES):
                    lane.next()

    start = time.perf_counter()
    order()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    order()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    what = f"order of {shards * each} samples in {shards} shards, {batches} batches of {BATCH}"
    return [
        Row(f"megabytes: {what}", "vlscale", [most / 1e6]),
        Row(f"milliseconds a batch: {what}", "vlscale", [seconds / batches * 1e3]),
    ]


def main(argv: list[str] | None = None) -> int:
    """0, or 1 when two of them gave different streams."""
    given = arguments_of(argv)
    logging.getLogger("vlscale").setLevel(logging.ERROR)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        folder = given.shards
        if folder is None:
            folder, start = Path(place) / "corpus", time.perf_counter()
            make_corpus(folder, synth_config(pairs=given.pairs, val_pairs=0), progress=False)
            seconds = time.perf_counter() - start
            rows.append(Row("synthetic pairs made a second", "vlscale", [given.pairs / seconds]))
        data = DataConfig(train=[str(folder)], caption_key=given.caption_key, manifest_dir=str(Path(place) / "indexes"))
        found, same = compare(data, train_tokenizer(["a red circle"], 300, 64), given.steps)
        rows += web_scale(batches=given.web_batches)
    command = f"vlscale bench stream --pairs {given.pairs} --steps {given.steps}" + " --write" * given.write
    about = provenance(command + (f" --shards {given.shards.name}" if given.shards else ""))
    verdict = "One stream of keys and pictures in every row." if same else "The rows do NOT give one stream."
    page = f"{about}\n\n{verdict}"
    print(write(given.out, "stream", "One stream for all", page, rows + found, keep=given.write))
    return 0 if same else 1


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vlscale bench stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-stream"), help="folder of the results")
    parser.add_argument("--pairs", type=int, default=50_000, help="of the synthetic corpus")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shards", type=Path, help="a folder of shards in place of the synthetic corpus")
    parser.add_argument("--caption-key", default="json:captions")
    parser.add_argument("--web-batches", type=int, default=4_000, help="of the simulated manifest")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    given = parser.parse_args(argv)
    if given.steps < 3 or given.pairs < BATCH:
        raise ValueError(f"expected --steps of at least 3 and --pairs of at least {BATCH}")
    return given


if __name__ == "__main__":
    end_with(main)
