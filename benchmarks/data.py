"""The stream's speed beside open_clip's own pipeline, webdataset and mosaicml-streaming, on the same pictures.

    vlscale bench data [--pictures 320] [--rounds 3] [--sizes 512x384 1024x768] [--workers 0 1 2] [--write]

Images a second by picture size, workers, and with or without keeping the stream's state at each batch; the pipelines
alternate, round by round. With no workers everything is on one core. Then microseconds a sample of reading without
decoding, the index of a million samples, and seconds until a batch comes. `--write` keeps data.csv and data.md, dated,
in benchmarks/results/. A peer that is not installed is a row that says so; into a folder PEERS of their own:

    pip install --target PEERS open_clip_torch mosaicml-streaming pandas
    pip install --target PEERS --no-deps --upgrade torchvision==0.28.0
    PYTHONPATH=PEERS vlscale bench data
"""

import argparse
import contextlib
import os
import pickle
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from common import end_with, provenance
from data_peers import BATCH, SHARDS, SPEC, Job, Pipeline, pipelines
from data_table import Row, write

from vlscale.data.keyed import permute
from vlscale.data.manifest import member_keys
from vlscale.data.reader import SampleReader
from vlscale.data.samples import open_corpus
from vlscale.data.storage import LocalShard
from vlscale.data.stream import TrainStream
from vlscale.data.tar import index_shard
from vlscale.data.tokens import train_tokenizer
from vlscale.data.writer import write_shard
from vlscale.sections import DataConfig

CAPTION = "a photograph of something on a table beside a window in the afternoon"


def main(argv: list[str] | None = None) -> int:
    given = arguments_of(argv)
    cores = os.sched_getaffinity(0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    tokenizer = train_tokenizer([CAPTION], 200, 32)
    try:
        for size in given.sizes:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                make_shards(folder, given.pictures, tuple(map(int, size.split("x"))))
                for workers in given.workers:
                    os.sched_setaffinity(0, cores if workers else {min(cores)})
                    rows += decode_speed(Job(folder, given.pictures, workers, tokenizer), size, given.rounds)
                os.sched_setaffinity(0, {min(cores)})
                if size == given.sizes[0]:
                    rows += reading_speed(folder, given.read) + manifest_speed(folder, given.read, given.indexed)
                    rows += waiting_times(folder, tokenizer)
    finally:
        os.sched_setaffinity(0, cores)
    command = f"vlscale bench data --pictures {given.pictures} --rounds {given.rounds}"
    about = provenance(command + " --write" * given.write) + f" Pipelines: {', '.join(pipeline_versions())}."
    print(write(given.out, "data", "The stream beside other pipelines", about, rows, keep=given.write))
    return 0


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vlscale bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-data"), help="folder of the results")
    parser.add_argument("--pictures", type=int, default=320, help="of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["512x384", "1024x768"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--read", type=int, default=30_000, help="samples that are read without decoding")
    parser.add_argument("--indexed", type=int, default=1_000_000, help="samples of the corpus that is indexed")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    given = parser.parse_args(argv)
    wrong = next((s for s in given.sizes if len(s.split("x")) != 2 or not s.replace("x", "").isdigit()), None)
    if wrong:
        raise ValueError(f"--sizes {wrong}: expected WIDTHxHEIGHT, for example 512x384")
    if given.pictures < SHARDS * BATCH or given.rounds < 1 or min(given.workers) < 0:
        raise ValueError(f"expected --pictures of at least {SHARDS * BATCH}, --rounds above 0 and --workers from 0")
    return given


def pipeline_versions() -> list[str]:
    packages = ("webdataset", "open_clip_torch", "mosaicml-streaming", "simplejpeg", "opencv-python-headless", "Pillow")
    found = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def make_shards(folder: Path, pictures: int, size: tuple[int, int]) -> None:
    dice = np.random.default_rng(0)
    for number in range(SHARDS):
        keys = range(number, pictures, SHARDS)
        samples = ({"__key__": f"{key:06d}", "jpg": photograph(dice, *size), "txt": CAPTION} for key in keys)
        write_shard(folder / f"p-{number:06d}.tar", samples)


def photograph(dice: np.random.Generator, width: int, height: int) -> bytes:
    """Noise of all scales, so that its JPEG has a photograph's size."""
    picture = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64, 256):
        noise = dice.normal(0, 45 / scale**0.35, (scale * 3 // 4, scale, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(np.clip(picture + 128, 0, 255).astype(np.uint8), quality=90)


def decode_speed(job: Job, size: str, rounds: int) -> list[Row]:
    """Images a second of each pipeline that is there, in alternation."""
    known = pipelines()
    rates: dict[Pipeline, list[float]] = {each: [] for each in known if each.batches}
    for _ in range(rounds):
        for pipeline, found in rates.items():
            found.append(rate(pipeline.batches(job), job))
    base = statistics.median(rates[known[0]])
    rows = []
    for each in known:
        setting = {"pictures": size, "workers": job.workers, "state": each.state}
        if each not in rates:
            rows.append(Row("images a second", each.name, **setting, status=f"missing: install {each.package}"))
            continue
        found = rates[each]
        times = "" if each.name == "vlscale" else f"{base / statistics.median(found):.2f}"
        rows.append(Row("images a second", each.name, found, **setting, times=times))
    return rows


def rate(batches: Iterator[int], job: Job) -> float:
    """Pairs a second, after what was made ahead before the clock started is used up."""
    for _ in range(1 + 3 * job.workers):
        next(batches)
    seen, start = 0, time.perf_counter()
    while seen < job.pictures:
        seen += next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seen / seconds


def reading_speed(folder: Path, count: int) -> list[Row]:
    """Microseconds a sample without decoding: webdataset's iterator, ours, and making our index."""
    path, data = str(folder / "r-0.tar"), DataConfig()
    write_shard(Path(path), ({"__key__": f"{i:07d}", "jpg": b"x" * 2000, "txt": CAPTION} for i in range(count)))

    def microseconds(work: Callable[[], int]) -> list[float]:
        start = time.perf_counter()
        count = work()
        return [(time.perf_counter() - start) / count * 1e6]

    def read_all() -> int:
        manifest = open_corpus(path, data)
        reader = SampleReader(manifest, data)
        for row in range(manifest.num_samples):
            reader.read(0, row, with_json=False)
        reader.close()
        return manifest.num_samples

    index = microseconds(lambda: len(index_shard(LocalShard(path, path), path, member_keys(data))))
    theirs = microseconds(lambda: sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False)))
    open_corpus(path, data)
    ours = microseconds(read_all)
    what = "microseconds a sample, read without decoding"
    return [
        Row(what, "vlscale", ours),
        Row(what, "webdataset", theirs, times=f"{theirs[0] / ours[0]:.2f}"),
        Row("microseconds a sample, indexing", "vlscale", index),
    ]


def manifest_speed(folder: Path, held: int, count: int) -> list[Row]:
    """Seconds to index a corpus from nothing, and to find it indexed; its shards are links to the one of `held`
    samples, each of which is indexed by itself."""
    links = folder / "links"
    links.mkdir()
    for number in range(-(-count // held)):
        os.link(folder / "r-0.tar", links / f"{number:05d}.tar")
    data, seconds = DataConfig(manifest_dir=str(folder / "made")), []
    for _ in range(2):
        start = time.perf_counter()
        manifest = open_corpus(str(links), data)
        seconds.append(time.perf_counter() - start)
    what = f"for a manifest of {manifest.num_samples} samples in {len(manifest.urls)} shards"
    return [
        Row(f"seconds {what}, from nothing", "vlscale", seconds[:1]),
        Row(f"seconds {what}, indexed", "vlscale", seconds[1:]),
    ]


def waiting_times(folder: Path, tokenizer) -> list[Row]:
    """Until the first batch with a manifest, and after a resume; keeping a state; ordering two billion samples."""
    data = DataConfig(train=[str(folder / "p-*.tar")])

    def first(state=None):
        start = time.perf_counter()
        batches = iter(TrainStream(data, SPEC, tokenizer, global_batch_size=BATCH, seed=0, state=state))
        batch = next(batches)
        seconds = time.perf_counter() - start
        batches.close()
        return seconds, batch.state

    first()
    fresh, state = first()
    start = time.perf_counter()
    for _ in range(100):
        pickle.dumps(state)
    kept = (time.perf_counter() - start) / 100
    blocks = np.arange(2_000_000)  # of a thousand samples each
    start = time.perf_counter()
    permute(blocks, len(blocks), key=1)
    order = time.perf_counter() - start
    tracemalloc.start()
    permute(blocks, len(blocks), key=1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [
        Row("seconds to the first batch, with a manifest", "vlscale", [fresh]),
        Row("seconds to the first batch, resumed", "vlscale", [first(state)[0]]),
        Row("microseconds to keep a state", "vlscale", [kept * 1e6]),
        Row("seconds to order 2e9 samples", "vlscale", [order]),
        Row("megabytes to order 2e9 samples", "vlscale", [most / 1e6]),
    ]


if __name__ == "__main__":
    end_with(main)
