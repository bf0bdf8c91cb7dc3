"""One key stream for all: every (ranks, workers, prefetch), killed and resumed at other ranks, on 50,000 pairs.

    python benchmarks/data_stream.py [--pairs 50000] [--steps 60] [--shards FOLDER] [--json FILE]

`--shards` takes another corpus, such as emoji shards, in place of the synthetic one.
"""

import argparse
import hashlib
import itertools
import json
import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from vlscale.data.images import ImageSpec
from vlscale.data.lanes import StreamState, merge_states
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


def compare(data: DataConfig, tokenizer, steps: int) -> dict:
    expected, after = run(data, tokenizer, steps, 1)
    rates = {}
    for ranks, workers, prefetch in GRID:
        own = data.model_copy(update={"workers": workers, "prefetch": prefetch})
        start = time.perf_counter()
        seen, state = run(own, tokenizer, steps, ranks)
        rates[f"ranks {ranks}, workers {workers}, prefetch {prefetch}"] = round(
            steps * BATCH / (time.perf_counter() - start)
        )
        if seen != expected or state.rows.tolist() != after.rows.tolist():
            raise AssertionError(f"another stream at ranks {ranks}, workers {workers}, prefetch {prefetch}")
    state, resumed = None, []
    for ranks in (4, 2, 4):
        seen, state = run(data, tokenizer, steps // 3, ranks, state)
        resumed += seen
    if resumed != expected[: len(resumed)]:
        raise AssertionError("another stream after 4 -> 2 -> 4 ranks")
    return {"stream": hashlib.sha256("".join(expected).encode()).hexdigest()[:16], "pairs_a_second_with_start": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("vlscale").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as place:
        folder, made = arguments.shards, None
        if folder is None:
            folder, start = Path(place) / "corpus", time.perf_counter()
            make_corpus(folder, synth_config(pairs=arguments.pairs, val_pairs=0), progress=False)
            made = round(arguments.pairs / (time.perf_counter() - start))
        data = DataConfig(train=[str(folder)], caption_key="json:captions", manifest_dir=str(Path(place) / "indexes"))
        found = {
            "command": " ".join(["python", *sys.argv]),
            "corpus": f"{arguments.pairs} synthetic pairs" if made else folder.name,
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
            "synthetic_pairs_made_a_second": made,
            **compare(data, train_tokenizer(["a red circle"], 300, 64), arguments.steps),
        }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
