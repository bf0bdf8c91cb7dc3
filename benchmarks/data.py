"""The stream's speed on one core, beside open_clip's own pipeline and plain webdataset, on the same pictures.

    python benchmarks/data.py [--pictures 400] [--rounds 3] [--json FILE]

open_clip is measured where `open_clip_torch` can be imported (with its training extras: pandas), else left out.
"""

import argparse
import importlib.util
import json
import os
import pickle
import platform
import re
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset

from vlscale.data.images import ImageSpec, normalise
from vlscale.data.keyed import permute
from vlscale.data.manifest import member_keys
from vlscale.data.reader import SampleReader
from vlscale.data.samples import open_corpus
from vlscale.data.storage import LocalShard
from vlscale.data.stream import TrainStream
from vlscale.data.tar import index_shard
from vlscale.data.tokens import train_tokenizer
from vlscale.data.writer import write_shard
from vlscale.sections import AugmentConfig, DataConfig

SIZES = {"512 x 384": (384, 512), "1024 x 768": (768, 1024)}
SPEC = ImageSpec(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), resample=3)
BATCH = 32
CAPTION = "a photograph of something on a table beside a window in the afternoon"


def photograph(dice: np.random.Generator, height: int, width: int) -> bytes:
    """Noise of all scales, so that its JPEG has a photograph's size."""
    picture = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64, 256):
        noise = dice.normal(0, 45 / scale**0.35, (scale * 3 // 4, scale, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(np.clip(picture + 128, 0, 255).astype(np.uint8), quality=90)


def make_shards(folder: Path, pictures: int, size: tuple[int, int]) -> None:
    dice = np.random.default_rng(0)
    for number in range(4):
        keys = range(number, pictures, 4)
        write_shard(
            folder / f"p-{number:06d}.tar",
            ({"__key__": f"{key:06d}", "jpg": photograph(dice, *size), "txt": CAPTION} for key in keys),
        )


def vlscale_pictures(folder: Path, tokenizer, workers: int = 0) -> Iterator[int]:
    """Pairs of each batch, normalised to float as the others give them."""
    data = DataConfig(train=[str(folder / "p-*.tar")], augment=AugmentConfig(crop_scale=0.9), workers=workers)
    for batch in TrainStream(data, SPEC, tokenizer, global_batch_size=BATCH, seed=0):
        yield len(normalise(batch.images, SPEC))


def webdataset_pictures(folder: Path) -> Iterator[int]:
    """webdataset as its documentation has it: Pillow, a resize, float; no tokens."""

    def preprocess(picture):
        return torch.from_numpy(np.asarray(picture.resize((224, 224), 3), dtype=np.float32) / 255)

    shards = sorted(str(path) for path in folder.glob("p-*.tar"))
    stream = webdataset.WebDataset(shards, shardshuffle=False).shuffle(100).decode("pil").to_tuple("jpg", "txt")
    for pictures, _ in stream.map_tuple(preprocess).batched(BATCH).repeat():
        yield len(pictures)


def open_clip_pictures(folder: Path, pictures: int) -> Iterator[int]:
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform
    from open_clip_train import data as theirs

    expand = theirs.tar_file_expander
    if expand.__module__.startswith(
        "webdataset"
    ):  # whose newer releases mark a shard's end, which open_clip cannot read
        theirs.tar_file_expander = lambda *args, **kw: (entry for entry in expand(*args, **kw) if "fname" in entry)
    options = Namespace(
        train_data=str(folder / "p-{000000..000003}.tar"), dataset_resampled=False, train_num_samples=pictures, seed=0,
        train_data_upsampling_factors=None, batch_size=BATCH, workers=0, world_size=1,
    )  # fmt: skip
    data = theirs.get_wds_dataset(
        options, image_transform(224, is_train=True), True, tokenizer=get_tokenizer("ViT-B-32")
    )
    while True:
        for batch, _ in data.dataloader:
            yield len(batch)


def stub_torchvision() -> bool:
    """Lets open_clip import on a CPU-only torch: its torchvision names operators that only its own build has."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not all(map(importlib.util.find_spec, ("open_clip", "open_clip_train", "pandas"))):
        return False
    source = (Path(spec.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    names = set(re.findall(r"(?:register_meta\(\"|torchvision::)([a-z_0-9]+)", source))
    stub_torchvision.library = torch.library.Library("torchvision", "DEF")
    for name in names:
        stub_torchvision.library.define(f"{name}(Tensor x) -> Tensor")
    return True


def rate(source: Iterator[int], pairs: int) -> float:
    """Pairs a second, after one batch of warm-up."""
    next(source)
    seen, start = 0, time.perf_counter()
    while seen < pairs:
        seen += next(source)
    seconds = time.perf_counter() - start
    source.close()
    return seen / seconds


def decode_speed(folder: Path, pictures: int, rounds: int, with_open_clip: bool, tokenizer) -> dict:
    """Median images a second a core of each pipeline, in alternation."""
    sources: dict[str, Callable[[], Iterator[int]]] = {
        "vlscale": lambda: vlscale_pictures(folder, tokenizer),
        "webdataset": lambda: webdataset_pictures(folder),
    }
    if with_open_clip:
        sources["open_clip"] = lambda: open_clip_pictures(folder, pictures)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name, source in sources.items():
            rates[name].append(rate(source(), pictures))
    found = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return found | {f"against {name}": round(found["vlscale"] / found[name], 2) for name in found if name != "vlscale"}


def reading_speed(folder: Path) -> dict:
    """Microseconds a sample without decoding: webdataset's iterator, ours, and making our index."""
    write_shard(
        folder / "r-0.tar", ({"__key__": f"{i:07d}", "jpg": b"x" * 2000, "txt": CAPTION} for i in range(30_000))
    )
    path, data = str(folder / "r-0.tar"), DataConfig()

    def microseconds(work: Callable[[], int]) -> float:
        start = time.perf_counter()
        count = work()
        return round((time.perf_counter() - start) / count * 1e6, 2)

    manifest = open_corpus(path, data)
    reader = SampleReader(manifest, data)

    def read_all() -> int:
        for row in range(manifest.num_samples):
            reader.read(0, row, with_json=False)
        return manifest.num_samples

    return {
        "index_us": microseconds(lambda: len(index_shard(LocalShard(path, path), path, member_keys(data)))),
        "webdataset_us": microseconds(lambda: sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False))),
        "vlscale_us": microseconds(read_all),
    }


def waiting_times(folder: Path, tokenizer) -> dict:
    """Seconds to the first batch with a manifest, to the first one after a resume; microseconds of keeping a state."""
    data = DataConfig(train=[str(folder / "p-*.tar")])

    def first(state=None):
        start = time.perf_counter()
        iterator = iter(TrainStream(data, SPEC, tokenizer, global_batch_size=BATCH, seed=0, state=state))
        batch = next(iterator)
        seconds = time.perf_counter() - start
        iterator.close()
        return round(seconds, 3), batch.state

    first()
    fresh, state = first()
    start = time.perf_counter()
    for _ in range(100):
        pickle.dumps(state)
    kept = (time.perf_counter() - start) / 100
    start = time.perf_counter()
    permute(np.arange(2_000_000), 2_000_000, key=1)
    order = round(time.perf_counter() - start, 3)
    return {
        "first_batch_s": fresh, "resume_s": first(state)[0], "state_us": round(kept * 1e6, 1),
        "order_of_2e9_samples_s": order,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([CAPTION], 200, 32)
    with_open_clip = stub_torchvision()
    found: dict = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"one core of {os.cpu_count()}, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "webdataset": webdataset.__version__,
        },
        "images_a_second_a_core": {},
    }
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make_shards(folder, arguments.pictures, size)
            found["images_a_second_a_core"][name] = {
                "jpeg_bytes": round(sum(p.stat().st_size for p in folder.glob("p-*.tar")) / arguments.pictures),
                **decode_speed(folder, arguments.pictures, arguments.rounds, with_open_clip, tokenizer),
            }
            if name == "512 x 384":
                found["reading"] = reading_speed(folder)
                found["waiting"] = waiting_times(folder, tokenizer)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
